"""Causal depthwise short convolution over tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.layers.param import ParamSpec
from deltajax.ops.over_mesh import tokens_before
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
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y_t = sum_i weight_i x_(t - W + 1 + i), over tokens of the same document only.

    `state` holds the W - 1 inputs before the first token (default zeros); returns the last W - 1 inputs as the new one.
    With `sequence_axis`, inside shard_map, the tokens are spread over that mesh axis: the state comes from the neighbours.
    """
    width, dim = weight.shape
    batch, length, _ = x.shape
    if sequence_axis is not None:
        state = tokens_before(x, width - 1, sequence_axis)
    if state is None:
        state = jnp.zeros((batch, width - 1, dim), x.dtype)
    padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    if segment_ids is not None:
        if sequence_axis is None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (width - 1, 0)), mode="edge")
        else:
            segment_ids = jnp.concatenate([tokens_before(segment_ids, width - 1, sequence_axis), segment_ids], axis=1)
        segment_ids = number_segments(segment_ids)
    y = jnp.zeros_like(x)
    for i in range(width):
        term = padded[:, i : i + length] * weight[i].astype(x.dtype)
        if segment_ids is not None and i < width - 1:
            term = jnp.where((segment_ids[:, i : i + length] == segment_ids[:, width - 1 :])[..., None], term, 0)
        y = y + term
    return y, padded[:, length:].astype(state.dtype)
