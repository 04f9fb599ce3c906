"""Causal depthwise short convolution over tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers.param import ParamSpec
from deltajax.ops.segments import number_segments


def param_spec(width: int, dim: int) -> ParamSpec:
    """Weights [width, dim]; the last row multiplies the current token. Uniform within 1 / sqrt(width)."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    return ParamSpec((width, dim), (None, "heads"), init)


def apply(
    weight: Float[Array, "W D"],
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: Float[Array, "B W-1 D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y_t = sum_i weight_i x_(t - W + 1 + i), over tokens of the same document only.

    `state` holds the W - 1 inputs before the first token (default zeros); returns the last W - 1 inputs as the new one.
    """
    width, dim = weight.shape
    batch, length, _ = x.shape
    if state is None:
        state = jnp.zeros((batch, width - 1, dim), x.dtype)
    padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    if segment_ids is not None:
        segment_ids = number_segments(segment_ids)
        before = jnp.pad(segment_ids, ((0, 0), (width - 1, 0)), mode="edge")
    y = jnp.zeros_like(x)
    for i in range(width):
        term = padded[:, i : i + length] * weight[i].astype(x.dtype)
        if segment_ids is not None and i < width - 1:
            term = jnp.where((before[:, i : i + length] == segment_ids)[..., None], term, 0)
        y = y + term
    return y, padded[:, length:].astype(state.dtype)
