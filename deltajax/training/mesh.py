"""The device mesh, and the one table that says how arrays are laid out over it."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltajax.layers.param import ParamSpec, is_spec
from deltajax.training import config as config_lib

# Logical axis (as parameters and batches name them) -> mesh axes.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    None: (),
}


def make_mesh(config: config_lib.Mesh) -> jax.sharding.Mesh:
    """A mesh over all devices with axes (data, fsdp, tensor).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    resolved = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(resolved.values()) != devices:
        raise ValueError(f"mesh must multiply to the {devices} device(s) of this machine, got {_show(sizes)}")
    return jax.make_mesh(tuple(resolved.values()), tuple(resolved), axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_batch(batch_size: int, grad_accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError unless every device gets equally many rows of every microbatch."""
    shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % (shards * grad_accumulation):
        raise ValueError(
            f"data.batch_size must be a multiple of data * fsdp * grad_accumulation = "
            f"{shards * grad_accumulation}, got {batch_size}"
        )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """The NamedSharding of every parameter, by `RULES` from its logical axes.

    Raises:
      ValueError: an axis without a rule, or a dimension that its mesh axis does not divide.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: NamedSharding(mesh, _partition(jax.tree_util.keystr(path), spec, mesh)),
        specs,
        is_leaf=is_spec,
    )


def _partition(name: str, spec: ParamSpec, mesh: jax.sharding.Mesh) -> PartitionSpec:
    entries: list[tuple[str, ...]] = []
    used: set[str] = set()
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        if axis not in RULES:
            raise ValueError(
                f"parameter {name}: logical axis {axis!r} has no rule; known: {', '.join(filter(None, RULES))}"
            )
        mesh_axes = tuple(a for a in RULES[axis] if a not in used)  # a mesh axis can lay out one dimension only
        shards = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % shards:
            raise ValueError(
                f"parameter {name}: axis {axis!r} = {size} must be a multiple of mesh {_show(mesh.shape, mesh_axes)}"
            )
        used.update(mesh_axes)
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def _show(sizes: Any, axes: Any = None) -> str:
    return ", ".join(f"{axis}={sizes[axis]}" for axis in axes or sizes)
