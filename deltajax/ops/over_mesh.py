"""How activations lie over the ambient device mesh, and running a function on each device's part of them.

Under `jax.set_mesh` XLA lays most operations out by itself. The ones here are better told: the delta product, because a
hardware kernel cannot be split by XLA and tokens on several devices need an algorithm of their own; short convolutions
and attention where tokens are spread.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from deltajax.ops.manual_axes import from_neighbour

# Logical axis of activations -> mesh axes.
ACTIVATIONS: dict[str, tuple[str, ...]] = {"batch": ("data", "fsdp"), "sequence": ("sequence",), "heads": ("tensor",)}
_LETTERS = {"B": "batch", "T": "sequence", "H": "heads"}


def spread_over(logical: str) -> int:
    """Over how many devices of the ambient mesh a logical axis is spread; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS[logical] if axis in _free_axes(mesh))


def over_mesh(f: Callable, layouts: tuple[str, ...], out: str) -> Callable:
    """`f(*arrays, sequence_axis=...)` on each device's part of the arrays, as a function of the whole arrays.

    Args:
      f: its result has the layout `out`. `sequence_axis` is the mesh axis over which the tokens are spread, or None.
      layouts: of each array, a character per axis: B, T and H are batch, tokens and heads, others stay whole. An array may be
        None. A logical axis is spread only if its devices divide the size wherever it occurs.
      out: layout of the result.
    """

    def mapped(*arrays: Array | None) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        free = _free_axes(mesh)
        if not free:
            return f(*arrays, sequence_axis=None)
        used = _axes_used(mesh, [(x, layout) for x, layout in zip(arrays, layouts, strict=True) if x is not None])

        def spec(layout: str) -> PartitionSpec:
            return PartitionSpec(*(used.get(letter) or None for letter in layout))

        axis = used["T"][0] if used["T"] else None
        return jax.shard_map(
            functools.partial(f, sequence_axis=axis),
            mesh=mesh,
            in_specs=tuple(None if x is None else spec(layout) for x, layout in zip(arrays, layouts, strict=True)),
            out_specs=spec(out),
            axis_names=set(_auto_axes(mesh)),  # those of one device too: Mosaic kernels want all of a mesh or none
        )(*arrays)

    return mapped


def lay_out(x: Array, layout: str) -> Array:
    """The same array, spread over the ambient mesh as its layout (see `over_mesh`) says; unchanged without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _free_axes(mesh):
        return x
    used = _axes_used(mesh, [(x, layout)])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(used.get(letter) or None for letter in layout)))


def _axes_used(mesh: Any, arrays: list[tuple[Array, str]]) -> dict[str, tuple[str, ...]]:
    """Letter -> the mesh axes that its dimension is spread over: all free ones of its rule, or none if they do not divide it."""
    sizes = [pair for x, layout in arrays for pair in zip(layout, x.shape, strict=True)]
    used = {}
    for letter, logical in _LETTERS.items():
        axes = tuple(axis for axis in ACTIVATIONS[logical] if axis in _free_axes(mesh))
        devices = math.prod(mesh.shape[axis] for axis in axes)
        used[letter] = axes if all(size % devices == 0 for name, size in sizes if name == letter) else ()
    return used


def _free_axes(mesh: Any) -> tuple[str, ...]:
    """Axes of more than one device that no surrounding shard_map has taken."""
    return tuple(name for name in _auto_axes(mesh) if mesh.shape[name] > 1)


def _auto_axes(mesh: Any) -> tuple[str, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Auto)


def tokens_before(x: Array, count: int, axis: str) -> Array:
    """Inside shard_map: the last `count` tokens (axis 1 of x) of the devices before this one; zeros where there are none."""
    length = x.shape[1]
    parts: list[Array] = []
    for distance in range(1, -(-count // length) + 1):
        taken = min(length, count - (distance - 1) * length)
        parts.insert(0, from_neighbour(x[:, length - taken :], axis, distance))
    return jnp.concatenate(parts, axis=1) if parts else x[:, :0]
