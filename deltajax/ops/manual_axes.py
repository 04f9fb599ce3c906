"""Inside shard_map: over which mesh axes an array varies, and what the neighbour on an axis holds."""

import jax
from jaxtyping import Array


def vary_alike(*arrays: Array | None) -> list[Array | None]:
    """The arrays, each as varying over every manual mesh axis over which one of them does; outside shard_map unchanged.

    A scan's carry and a custom VJP's arguments must not depend on fewer axes than what is computed from them.
    """
    varying = {id(x): jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None}
    axes = frozenset().union(*varying.values())

    def cast(x):
        missing = tuple(sorted(axes - varying[id(x)]))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return [None if x is None else cast(x) for x in arrays]


def from_neighbour(x: Array, axis: str, distance: int = 1, reverse: bool = False) -> Array:
    """The x of the device `distance` places before this one on a mesh axis (reverse: after it); zeros where there is none."""
    devices = jax.lax.axis_size(axis)
    pairs = [(i, i + distance) for i in range(devices - distance)]
    return jax.lax.ppermute(x, axis, [pair[::-1] for pair in pairs] if reverse else pairs)
