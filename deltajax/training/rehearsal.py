"""A run's train step compiled for devices that are not here: does it fit, what travels, what takes the time.

XLA's TPU compiler (`pip install libtpu`) needs no TPU. What it says is an estimate of its own, not a measurement.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable, topologies
from jax.experimental.compilation_cache import compilation_cache

from deltajax import data
from deltajax.errors import RunError
from deltajax.layers.param import count_params
from deltajax.training import hlo, loop, serialize
from deltajax.training.config import TrainConfig
from deltajax.training.step import Step
from pallas_kernels import cpu

GIB = 2**30
EXAMPLES = "v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:2x2x1"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX counts as one device.

    Attributes:
      memory: bytes of HBM that a program may use, as XLA says when one needs more.
      flops: peak of bfloat16 products per second, from the datasheet.
      clock: cycles per second at which that peak is reached.
    """

    memory: float
    flops: float
    clock: float


CHIPS = {
    "TPU v5 lite": Chip(15.75 * GIB, 197e12, 1.50e9),
    "TPU v5": Chip(95.73 * GIB, 459e12, 1.75e9),
    "TPU v6 lite": Chip(31.24 * GIB, 918e12, 1.75e9),
    "TPU7x": Chip(94.74 * GIB, 1153e12, 2.20e9),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one rehearsal found. Bytes and cycles are of one device and one step.

    Attributes:
      devices, kind, mesh: how many, what JAX calls them, sizes of the axes.
      parameters: in all.
      batch, unit: targets in a global batch, and what they are ("tokens").
      state, temporary: bytes of what lives between steps; of everything else at the worst moment.
      collectives: kind -> (executions, bytes of their results).
      background: of all these bytes, the part that travels while something is computed.
      cycles: that the compiler expects, without waiting for other devices; 0: it says nothing (CPU, GPU).
      uncounted: executions of Pallas kernels, of which it says nothing either.
      costly: the most expensive operations of JAX: (share of the cycles, where in the program).
    """

    devices: int
    kind: str
    mesh: dict[str, int]
    parameters: int
    batch: int
    unit: str
    state: float
    temporary: float
    collectives: dict[str, tuple[int, float]]
    background: float
    cycles: int
    uncounted: int
    costly: list[tuple[float, str]]

    @property
    def seconds(self) -> float:
        """Of one step if no device ever waits; 0: unknown."""
        return self.cycles / CHIPS[self.kind].clock if self.kind in CHIPS else 0.0

    @property
    def per_second(self) -> float:
        """Targets per second of all devices together, at most; 0: unknown."""
        return self.batch / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float:
        """Model flops (6 per parameter and target) over the devices' peak, at most; 0: unknown."""
        peak = self.devices * CHIPS[self.kind].flops if self.kind in CHIPS else math.inf
        return 6 * self.parameters * self.per_second / peak


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU pod slice such as "v5p:8x8x8", or of several joined by a data-centre network.

    Raises:
      ValueError: there is no such topology.
      RunError: the TPU compiler is not installed.
    """
    if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)+", topology):  # libtpu dies of v5e:0x0
        raise ValueError(f"--topology={topology}: must be a generation and a shape such as {EXAMPLES}")
    # Read when libtpu is loaded: it is not to look for a TPU, nor to write logs.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    os.environ |= {
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        **quiet,
        **os.environ,
    }
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except Exception as error:  # the plug-in raises what it likes
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise RunError(f"--topology={topology} needs the TPU compiler: pip install libtpu") from None
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--topology={topology}: must be one that libtpu knows, e.g. {EXAMPLES} ({reason})") from None


def rehearse(config: TrainConfig, devices: list[Any] | None = None) -> tuple[Report, Any]:
    """(what was found, the compiled step) for these devices; None: the ones that are here.

    Raises:
      ValueError: the config does not fit the devices or the data.
      RunError: the step needs more memory than a device has; the message says what to change.
    """
    step = loop.make_step(config, devices)
    dataset = data.load(config.data)
    loop.check_fits(config, dataset)
    rows = next(dataset.train_iterator())
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=step.batch_sharding)
        for k, x in rows.items()
    }
    mesh = step.batch_sharding.mesh
    platform = mesh.devices.flat[0].platform
    train: Any = step.train
    try:
        with _no_compilation_cache():
            compiled = train.trace(step.abstract, batch).lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise RunError(f"does not fit: {reason} Change {'; or '.join(remedies(config, step))}") from None
    memory = compiled.memory_analysis()
    sequence = getattr(config.data, "seq_len", None) or 1
    ops = hlo.ops(compiled.as_text())
    collectives, costs = summarise(ops)
    cycles = sum(costs.values())
    return Report(
        devices=mesh.devices.size,
        kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=count_params(step.abstract.params),
        batch=config.data.batch_size * sequence,
        unit=dataset.unit,
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives,
        background=in_background(ops),
        cycles=cycles,
        uncounted=sum(op.times for op in ops if op.kind == hlo.KERNEL and op.cycles is None),
        costly=[(n / cycles, source) for source, n in costs.most_common(8) if cycles],
    ), compiled


@contextlib.contextmanager
def _no_compilation_cache():
    """A CPU program from JAX's cache cannot be saved again: it would load with "Function ... not found" (jaxlib 0.12.0)."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def summarise(ops: list[hlo.Op]) -> tuple[dict[str, tuple[int, float]], collections.Counter[str]]:
    """(collectives as in `Report`, operation of JAX -> cycles)."""
    collectives: dict[str, tuple[int, float]] = {}
    costs: collections.Counter[str] = collections.Counter()
    for op in ops:
        if op.kind in hlo.COLLECTIVES:
            count, size = collectives.get(op.kind, (0, 0.0))
            collectives[op.kind] = count + op.times, size + op.times * op.bytes
        if op.cycles:
            costs[op.source or f"({op.kind} of the compiler)"] += op.cycles * op.times
    return collectives, costs


def in_background(ops: list[hlo.Op]) -> float:
    """Of the bytes that travel between devices, the part that does so while something is computed."""
    travels = [(op.times * op.bytes, op.background) for op in ops if op.kind in hlo.COLLECTIVES]
    return sum(size for size, beside in travels if beside) / max(sum(size for size, _ in travels), 1)


def remedies(config: TrainConfig, step: Step) -> list[str]:
    """Keys of the config whose change makes a step need less memory, the cheapest first."""
    mesh = step.batch_sharding.mesh.shape
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"] * config.grad_accumulation)
    found = []
    if getattr(config.model, "remat", "full") != "full":
        found.append("config.model.remat to full (activations are computed again, about a third more work)")
    if rows > 1:
        found.append(f"config.grad_accumulation to {2 * config.grad_accumulation} (same update, half the activations)")
    if mesh["data"] > 1:
        found.append(f"config.mesh.fsdp to {mesh['data'] * mesh['fsdp']} (every device holds less of the state)")
    if rows == 1 and hasattr(config.data, "seq_len"):
        found.append(f"config.mesh.sequence to {2 * mesh['sequence']} (half the tokens of a sequence on each device)")
    found.append(f"config.mesh.tensor to {2 * mesh['tensor']} (half the heads and hidden units on each device)")
    return found


def save(compiled: Any, config: TrainConfig, path: Path) -> None:
    """Write the compiled step, for `load` on the same number of the same devices with the same JAX."""
    payload, inputs, outputs = serialize_executable.serialize(compiled)
    devices = jax.tree.leaves(compiled.input_shardings)[0].device_set
    contents = {
        "jax": jax.__version__,
        "devices": _name(devices),
        "config": serialize.to_json(config),
        "program": payload,
        "trees": (inputs, outputs),
        "native": "deltajax_delta_product" in compiled.as_text(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(contents))


def load(path: Path, config: TrainConfig) -> Any:
    """The compiled step that `save` wrote. The file is a pickle: load only what you wrote.

    Raises:
      ValueError: it was made for another config or other devices or by another JAX, or is no such file.
    """
    try:
        contents = dict(pickle.loads(path.read_bytes()))
        contents = {name: contents[name] for name in contents.keys() | {"devices", "jax", "config", "program", "trees"}}
    except OSError:
        raise
    except Exception:  # damaged pickles raise of all kinds
        raise ValueError(f"--executable={path}: not a file that deltajax.rehearse --save wrote") from None
    if contents["devices"] != _name(jax.devices()):
        raise ValueError(f"--executable={path}: made for {contents['devices']}, here are {_name(jax.devices())}")
    if contents["jax"] != jax.__version__:
        raise ValueError(f"--executable={path}: made by jax {contents['jax']}, this is {jax.__version__}")
    try:
        changed = serialize.differences(serialize.from_json(contents["config"]), config)
    except ValueError as error:
        raise ValueError(f"--executable={path}: {error}") from None
    if changed:
        raise ValueError(f"--executable={path}: made for another config: {'; '.join(changed)}")
    if contents.get("native"):
        try:
            cpu.register()
        except NotImplementedError as error:
            raise ValueError(f"--executable={path}: {error}") from None
    return serialize_executable.deserialize_and_load(contents["program"], *contents["trees"])


def _name(devices: Collection[Any]) -> str:
    return f"{len(devices)} x {next(iter(devices)).device_kind}"
