"""Batch normalisation (arXiv 1502.03167) with running statistics, in float32 even if the activations are bfloat16.

Training normalises by the batch and moves the running statistics; evaluation normalises by the running statistics
and returns them untouched, so nothing of a test set can enter them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.errors import check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers.param import ParamSpec, is_spec


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of all the batch norms of a network.

    Attributes:
      momentum: weight of the new batch in the running statistics, in (0, 1].
      eps: added to the variance.
    """

    momentum: float = dataclasses.field(default=0.1, metadata=CHANGEABLE)
    eps: float = 1e-5

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_number(self, "momentum", 0, 1)
        check_number(self, "eps", 0)


def param_specs(dim: int) -> dict[str, ParamSpec]:
    """scale (ones) and bias (zeros), both [dim]."""
    return {
        "scale": ParamSpec((dim,), (None,), jax.nn.initializers.ones, weight_decay=False),
        "bias": ParamSpec((dim,), (None,), jax.nn.initializers.zeros, weight_decay=False),
    }


def init_stats(specs: Any) -> Any:
    """Running statistics for all batch norms in a tree of specs: {"mean": 0, "var": 1} at the same paths, nothing else."""
    if isinstance(specs, dict) and specs.keys() == {"scale", "bias"}:
        return {"mean": jnp.zeros(specs["scale"].shape), "var": jnp.ones(specs["scale"].shape)}
    if isinstance(specs, list):
        return [init_stats(item) for item in specs]
    nested = {} if is_spec(specs) else {name: init_stats(item) for name, item in specs.items()}
    return {name: item for name, item in nested.items() if item}


def apply(
    params: dict[str, Float[Array, "C"]],
    stats: dict[str, Float[Array, "C"]],
    config: Config,
    x: Float[Array, "... C"],
    *,
    train: bool,
) -> tuple[Float[Array, "... C"], dict[str, Float[Array, "C"]]]:
    """(x - mean) / sqrt(var + eps) * scale + bias over all axes but the last, and the running statistics.

    `train`: mean and (biased) variance of this batch, over all devices; the running variance takes the unbiased one, as
    PyTorch's does. Otherwise the running statistics, returned as they are.
    """
    y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    mean, var = stats["mean"], stats["var"]
    if train:
        axes = tuple(range(y.ndim - 1))
        mean, var = jnp.mean(y, axes), jnp.var(y, axes)
        count = y.size // y.shape[-1]
        batch = {"mean": mean, "var": var * (count / max(count - 1, 1))}
        stats = {name: old + config.momentum * (batch[name].astype(old.dtype) - old) for name, old in stats.items()}
    y = (y - mean) * (jax.lax.rsqrt(var + config.eps) * params["scale"]) + params["bias"]
    return y.astype(x.dtype), stats


def fold(
    params: dict[str, Float[Array, "C"]],
    stats: dict[str, Float[Array, "C"]],
    config: Config,
    kernel: Float[Array, "... C"],
) -> tuple[Float[Array, "... C"], Float[Array, "C"]]:
    """(kernel, bias) of the linear map that equals `kernel` followed by this norm in evaluation mode."""
    factor = jax.lax.rsqrt(stats["var"] + config.eps) * params["scale"]
    return kernel * factor, params["bias"] - stats["mean"] * factor
