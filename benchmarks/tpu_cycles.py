"""Estimated cycles, VMEM and register spills of the delta product on TPUs, by libtpu's compiler; needs no TPU.

    pip install libtpu==0.0.52
    python -m benchmarks.tpu_cycles [--generations=v5e,v6e,tpu7x] [--steps=1,2,4] [--implementations=pallas_tpu,chunked,matmul]
        [--csv=benchmarks/results/tpu_cycles.csv]

B1, T8192, H16, K = V = 128, bfloat16, scalar gate; cycles in thousands. "kernels" are the Pallas calls, "xla" everything that
XLA does around them. "no estimate": the profiler gave up on a program.

- pallas_tpu: the static profile of the whole program. Of identical operations of XLA it gives one, so "xla" is a lower bound.
  vmem_kib is what each kernel reserves of VMEM, spills its stores of registers to VMEM a chunk.
- chunked: at the full length, the profile of each operation times the trip counts of the loops that it stands in. What the
  profile leaves out (of identical operations it gives one, and it may abort) counts by the estimate in the compiled text,
  scaled by how the two stand to each other where there are both.
- matmul: a projection of the same model, [T, H K] x [H K, H V], by the profile.

The bound is the larger of each array once through HBM at the datasheet's bandwidth, and of the products that R steps need at
chunks of 64 rows, padded to the array (8 of 64 x 128 x 128 forward, 28 with the backward, per chunk and head); of the matmul
that of its flops on the whole array.
"""

import collections
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks import table
from deltajax import children
from deltajax.training import hlo

TOPOLOGY = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HBM_BYTES_PER_CYCLE = {"v5e": 546, "v6e": 937, "tpu7x": 1677}
FLOPS_PER_CYCLE = {"v5e": 131072, "v6e": 524288, "tpu7x": 524288}
PRODUCT_CYCLES = 2 * 64 * 128 * 128 / 131072
LENGTH, HEADS, DIM = 8192, 16, 128
PASSES = ("forward", "forward+backward")
KERNELS = ("inverse", "forward", "backward")
FIGURES = ("kernels", "xla", "cycles_per_token_and_head", "ratio_to_bound")
FIELDS = ("generation", "implementation", "pass", "steps", "bound", *FIGURES, "vmem_kib", "spills")

_GENERATIONS = flags.DEFINE_list("generations", list(TOPOLOGY), "of v5e, v6e, tpu7x")
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4"], "R of pallas_tpu; the others have 1")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["pallas_tpu", "chunked", "matmul"], "what to measure")

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from deltajax.ops import delta_product

topology, implementation, what, length, steps, heads, dim = *sys.argv[1:4], *map(int, sys.argv[4:8])
mesh = Mesh(np.array(topologies.get_topology_desc(topology, platform="tpu").devices[:1]), ("x",))

def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def forward(*arguments):
    return delta_product(*arguments, implementation=implementation)[0]

def backward(do, *arguments):
    o, pull = jax.vjp(forward, *arguments)
    return o, pull(do)

values = array(1, length, steps, heads, dim)
beta, g = array(1, length, steps, heads, dtype="float32"), array(1, length, heads, dtype="float32")
arguments = [array(1, length, heads, dim), values, values, beta, g]
if what != "forward":
    arguments.insert(0, array(1, length, heads, dim))
f = forward if what == "forward" else backward
if implementation == "matmul":
    f, arguments = jnp.matmul, [array(length, heads * dim), array(heads * dim, heads * dim)]
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
print(compiled.as_text())
"""


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      text: of the optimised module; empty if the profiler aborted, or if XLA put more into VMEM than there is, which it mends
        only without the profiler.
      cycles: of its operations by the static profile, as far as that goes.
      spills: of its kernels: stores of registers to VMEM.
    """

    text: str
    cycles: dict[str, int]
    spills: dict[str, int]


def compile_program(generation: str, implementation: str, what: str, steps: int, profile: bool = True) -> Compiled:
    """Compile one program in a process of its own, because the profiler may abort it: what counts is what it wrote by then."""
    with tempfile.TemporaryDirectory() as folder:
        utilization = "final_hlo-static-per-bundle-utilization"
        options = [
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            f"--xla_jf_dump_llo_pass_label_regex={utilization}",
        ]
        if profile:
            options.append(f"--xla_jf_dump_static_llo_profile_to={folder}")
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from it is not profiled
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_LOG_DIR": "disabled",  # else the profiler's complaints fill the disk: gigabytes for each program
            "TPU_MIN_LOG_LEVEL": "3",
            "LIBTPU_INIT_ARGS": " ".join(options),
        }
        sizes = map(str, (LENGTH, steps, HEADS, DIM))
        command = [sys.executable, "-c", PROGRAM, TOPOLOGY[generation], implementation, what, *sizes]
        tied = children.tied(command)
        done = subprocess.run(**tied, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        cycles: dict[str, int] = {}
        for file in Path(folder).glob("*static_llo_profile*"):
            found = re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', file.read_text())
            cycles |= {name: int(count) for name, count in found}
        if "Traceback" in done.stderr and not cycles:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        tables = Path(folder).glob(f"*{utilization}*")
        spills = {kernel: _spills(file) for file in tables if (kernel := _kernel(file.name))}
    return Compiled(done.stdout, cycles, spills)


def _kernel(name: str) -> str | None:
    found = re.search(f"delta_product_({'|'.join(KERNELS)})", name)
    return found[1] if found else None


def _spills(file: Path) -> int:
    """Stores of registers to VMEM in a table of a program's use of its slots, a line a bundle."""
    _, slots, _, _, *bundles = file.read_text().splitlines()
    column = slots.split(", ").index("VSTORE:SPILL")
    return sum(int(bundle.split()[column]) for bundle in bundles if bundle.strip())


def _vmem(text: str) -> dict[str, int]:
    """Bytes of VMEM that each kernel reserves."""
    found = {}
    for line in text.splitlines():
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)
        if used and "custom-call(" in line and (kernel := _kernel(line)):
            found[kernel] = int(used[1])
    return found


def kernels(generation: str, what: str, steps: int) -> dict[str, Any] | None:
    """Cycles ("kernels", "xla") of our program, "vmem" and "spills" of its kernels; None if the profiler gave none for one."""
    program = compile_program(generation, "pallas_tpu", what, steps)
    if not {_kernel(name) for name in program.cycles} >= set(what.split("+")):
        return None
    found: collections.Counter[str] = collections.Counter()
    for name, count in program.cycles.items():
        found["kernels" if _kernel(name) else "xla"] += count
    text = program.text or compile_program(generation, "pallas_tpu", what, steps, profile=False).text
    return {**found, "vmem": _vmem(text), "spills": program.spills}


def loops(generation: str, what: str, steps: int) -> float:
    """Cycles of "chunked" at the full length: those of each operation times how often it is executed."""
    program = compile_program(generation, "chunked", what, steps)
    text = program.text or compile_program(generation, "chunked", what, steps, profile=False).text
    ops = [op for op in hlo.ops(text) if op.cycles]
    profiled = [op for op in ops if op.name in program.cycles]
    factor = sum(program.cycles[op.name] for op in profiled) / sum(op.cycles or 0 for op in profiled)
    return sum(op.times * program.cycles.get(op.name, factor * (op.cycles or 0)) for op in ops)


def measure(generation: str, what: str, steps: int, implementation: str = "pallas_tpu") -> dict[str, str]:
    """One row of the table."""
    bytes_per_token = HEADS * ((2 + 2 * steps) * DIM * 2 + 2 * steps + 4)  # q, o, k, v, beta in bfloat16, the gate
    memory = LENGTH * bytes_per_token * (1 if what == "forward" else 3) / HBM_BYTES_PER_CYCLE[generation]
    products = LENGTH / 64 * HEADS * steps * (8 if what == "forward" else 28) * PRODUCT_CYCLES
    bound = max(memory, products)
    row = {"generation": generation, "implementation": implementation, "pass": what, "steps": str(steps)}
    row |= dict.fromkeys(("vmem_kib", "spills"), "")
    if implementation == "pallas_tpu":
        ours = kernels(generation, what, steps)
        if ours is None:
            return row | {"bound": f"{bound / 1e3:.0f}"} | dict.fromkeys(FIGURES, "no estimate")
        row["vmem_kib"] = _by_kernel({kernel: size // 1024 for kernel, size in ours["vmem"].items()})
        row["spills"] = _by_kernel(ours["spills"])
        found = {part: ours[part] for part in ("kernels", "xla")}
    elif implementation == "matmul":
        bound = 2 * LENGTH * (HEADS * DIM) ** 2 / FLOPS_PER_CYCLE[generation]
        found = {
            "kernels": 0,
            "xla": sum(compile_program(generation, implementation, what, steps).cycles.values()),
        }
    else:
        found = {"kernels": 0, "xla": loops(generation, what, steps)}
    total = sum(found.values())
    return row | {
        "bound": f"{bound / 1e3:.0f}",
        "kernels": f"{found['kernels'] / 1e3:.0f}",
        "xla": f"{found['xla'] / 1e3:.0f}",
        "cycles_per_token_and_head": f"{total / LENGTH / HEADS:.1f}",
        "ratio_to_bound": f"{total / bound:.2f}",
    }


def _by_kernel(found: Mapping[str, int]) -> str:
    return " ".join(f"{kernel}={found[kernel]}" for kernel in KERNELS if kernel in found)


def _libtpu() -> str:
    from importlib.metadata import version

    return version("libtpu")


def main(_: list[str]) -> None:
    """Measure, print and write the table."""
    rows = []
    print(" | ".join(FIELDS))
    for generation, implementation in itertools.product(_GENERATIONS.value, _IMPLEMENTATIONS.value):
        variants = [(1, "forward")] if implementation == "matmul" else [(1, what) for what in PASSES]
        if implementation == "pallas_tpu":
            variants = list(itertools.product(map(int, _STEPS.value), PASSES))
        for steps, what in variants:
            row = measure(generation, what, steps, implementation)
            rows.append({field: row[field] for field in FIELDS})
            print(" | ".join(rows[-1].values()), flush=True)
    table.write(rows, f"libtpu {_libtpu()}, static profile")


if __name__ == "__main__":
    app.run(main)
