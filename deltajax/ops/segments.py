"""Packed documents: a new one starts wherever the id differs from the previous token's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deltajax.ops.manual_axes import from_neighbour


def segment_starts(segment_ids: Int[Array, "B T"], sequence_axis: str | None = None) -> Bool[Array, "B T"]:
    """Whether a token begins a document other than the one before it; never true at the first token.

    sequence_axis: inside `shard_map`, the mesh axis over which the tokens are spread.
    """
    before = segment_ids[:, :1]
    if sequence_axis is not None:
        last = from_neighbour(segment_ids[:, -1:], sequence_axis)
        before = jnp.where(jax.lax.axis_index(sequence_axis) == 0, before, last)
    return segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)


def number_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Ids that are unique in a row, so that equal ids mean the same document even where the given ones come back."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1)
