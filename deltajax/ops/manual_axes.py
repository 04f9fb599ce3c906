"""Inside shard_map: what the neighbour on a mesh axis holds."""

import jax
from jaxtyping import Array


def from_neighbour(x: Array, axis: str, distance: int = 1, reverse: bool = False) -> Array:
    """The x of the device `distance` places before this one on a mesh axis (reverse: after it); zeros where there is none."""
    devices = jax.lax.axis_size(axis)
    pairs = [(i, i + distance) for i in range(devices - distance)]
    return jax.lax.ppermute(x, axis, [pair[::-1] for pair in pairs] if reverse else pairs)
