"""Inside shard_map: over which mesh axes the arguments and results of a kernel vary."""

from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array


def results(
    inputs: Iterable[Array], shapes_and_dtypes: Iterable[tuple[tuple[int, ...], Any]]
) -> list[jax.ShapeDtypeStruct]:
    """`out_shape` of a `pallas_call`: results vary over every manual mesh axis over which an input does.

    Under `check_vma=True`, the default of `jax.shard_map`, Pallas must be told; and JAX knows then where a gradient has to be
    summed over devices, and where not.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in shapes_and_dtypes]


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
