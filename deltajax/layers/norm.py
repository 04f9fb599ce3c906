"""Normalisations, in float32 even if the activations are bfloat16."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.layers.param import ParamSpec


def rms_norm_spec(dim: int, axis: str | None = None) -> ParamSpec:
    """The scale of `rms_norm`."""
    return ParamSpec((dim,), (axis,), lambda key, shape, dtype: jnp.ones(shape, dtype), weight_decay=False)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467)."""
    y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(y.dtype)).astype(x.dtype)


def l2_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + eps): unit length, and zero stays zero with a finite gradient."""
    y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def layer_norm_specs(dim: int, axis: str | None = None) -> dict[str, ParamSpec]:
    """Scale and bias of `layer_norm`."""
    return {
        "scale": rms_norm_spec(dim, axis),
        "bias": ParamSpec((dim,), (axis,), lambda key, shape, dtype: jnp.zeros(shape, dtype), weight_decay=False),
    }


def layer_norm(x: Float[Array, "... D"], params: dict, eps: float) -> Float[Array, "... D"]:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias (arXiv 1607.06450)."""
    y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * params["scale"].astype(y.dtype) + params["bias"].astype(y.dtype)).astype(x.dtype)
