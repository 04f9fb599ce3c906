"""Squeeze and excitation: channels scaled by a function of their means over the image (arXiv 1709.01507)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.layers import linear
from deltajax.layers.activation import ACTIVATIONS
from deltajax.layers.param import ParamSpec


def param_specs(dim: int, reduced: int) -> dict:
    """Two linear maps with bias: dim -> reduced -> dim."""
    zeros = jax.nn.initializers.zeros
    return {
        "reduce": linear.spec(dim, reduced, None, None, scale=2**0.5),
        "reduce_bias": ParamSpec((reduced,), (None,), zeros, weight_decay=False),
        "expand": linear.spec(reduced, dim, None, None),
        "expand_bias": ParamSpec((dim,), (None,), zeros, weight_decay=False),
    }


def apply(params: dict, x: Float[Array, "B H W C"], *, activation: str, gate: str) -> Float[Array, "B H W C"]:
    """x * gate(expand(activation(reduce(mean of x over the image)))).

    Args:
      params: of `param_specs`.
      x: images.
      activation, gate: names in `activation.ACTIVATIONS`.
    """
    p = {name: w.astype(x.dtype) for name, w in params.items()}
    y = ACTIVATIONS[activation](jnp.mean(x, (1, 2)) @ p["reduce"] + p["reduce_bias"])
    return x * ACTIVATIONS[gate](y @ p["expand"] + p["expand_bias"])[:, None, None]
