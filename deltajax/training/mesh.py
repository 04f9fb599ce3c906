"""The device mesh, and the one table that says how arrays are laid out over it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltajax.layers.param import ParamSpec, is_spec
from deltajax.ops.over_mesh import ACTIVATIONS
from deltajax.training import config as config_lib

# Logical axis (as parameters and batches name them) -> mesh axes.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ACTIVATIONS["batch"],
    "heads": ACTIVATIONS["heads"],
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    None: (),
}


def make_mesh(config: config_lib.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh over all devices with axes (data, fsdp, sequence, tensor).

    Neighbours on the last axes are neighbours in the machine. On several slices (TPU pods joined by a data-centre network)
    only the data axis crosses from one to the next.

    Args:
      devices: default: those of all processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    resolved = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(resolved.values()) != len(devices):
        raise ValueError(f"mesh must multiply to the {len(devices)} device(s) there are, got {_show(sizes)}")
    axis_types = (AxisType.Auto,) * len(resolved)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(tuple(resolved.values()), devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(array, tuple(resolved), axis_types=axis_types)
    if resolved["data"] % slices:
        raise ValueError(f"mesh.data must be a multiple of the {slices} slices, got {resolved['data']}")
    across = dict.fromkeys(resolved, 1) | {"data": slices}
    inside = [size // across[axis] for axis, size in resolved.items()]
    array = mesh_utils.create_hybrid_device_mesh(inside, list(across.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, tuple(resolved), axis_types=axis_types)


def within(mesh: jax.sharding.Mesh, f: Callable) -> Callable:
    """`f` traced with `mesh` as the ambient one: layers then know how activations are spread (`ops.over_mesh`)."""

    @functools.wraps(f)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*arguments)

    return traced


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


def check_sequence(seq_len: int | None, mesh: jax.sharding.Mesh) -> None:
    """Raise a ValueError unless every device gets equally many of a sequence's tokens; None: the data are no sequences."""
    devices = mesh.shape["sequence"]
    if devices > 1 and seq_len is None:
        raise ValueError(f"mesh.sequence must be 1 for data without seq_len, got {devices}")
    if devices > 1 and seq_len % devices:
        raise ValueError(f"data.seq_len must be a multiple of mesh.sequence = {devices}, got {seq_len}")


def reading_group(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal parts of every batch.

    Processes whose devices differ only on the sequence or tensor axis read the same rows. Where in the global array a part
    comes to lie depends on the mesh; the rows of the batch do not.

    Raises:
      ValueError: the mesh gives processes parts that overlap.
    """
    shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    rows: dict[int, set[int]] = {}
    device: Any
    for device, index in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).update(range(shards)[index[0]])
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != shards or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh {_show(mesh.shape)}: the {len(rows)} processes must hold equal parts of data * fsdp that do not overlap"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


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
