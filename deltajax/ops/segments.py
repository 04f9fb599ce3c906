"""Packed documents: a new one starts wherever the id differs from the previous token's."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a token begins a document other than the one before it; never true at the first token."""
    return jnp.zeros(segment_ids.shape, bool).at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])


def number_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Ids that are unique in a row, so that equal ids mean the same document even where the given ones come back."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1)
