"""Estimated cycles of the delta product's TPU kernels, by the static profile of libtpu's compiler; needs no TPU.

    pip install libtpu==0.0.52
    python -m benchmarks.tpu_cycles [--generations=v5e,v6e,tpu7x] [--steps=1,2,4] [--csv=benchmarks/results/tpu_cycles.csv]

B1, T8192, H16, K = V = 128, bfloat16, scalar gate. Every figure is a slope between two short lengths times T, because
the cycles of a Pallas call are linear in its grid. "kernels" are the Pallas calls, "xla" everything that XLA does around
them. "no estimate": the profiler gave up on a program; "out of VMEM": the compiler did. The bound is the larger of each
array once through HBM at the datasheet's bandwidth, and of the products that R steps need at chunks of 64 rows, padded to
the array (8 of 64 x 128 x 128 forward, 28 with the backward, per chunk and head).
"""

import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks import table

TOPOLOGY = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HBM_BYTES_PER_CYCLE = {"v5e": 546, "v6e": 937, "tpu7x": 1677}
PRODUCT_CYCLES = 2 * 64 * 128 * 128 / 131072
LENGTH, HEADS, DIM = 8192, 16, 128
PASSES = ("forward", "forward+backward")
FIELDS = (
    "generation",
    "pass",
    "steps",
    "kernels",
    "xla",
    "bound",
    "cycles_per_token_and_head",
    "ratio_to_bound",
)

UNKNOWN = ("kernels", "xla", "cycles_per_token_and_head", "ratio_to_bound")  # where there is no figure

_GENERATIONS = flags.DEFINE_list("generations", list(TOPOLOGY), "of v5e, v6e, tpu7x")
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4"], "R")

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from deltajax.ops import delta_product

topology, what, length, steps, heads, dim = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
mesh = Mesh(np.array(topologies.get_topology_desc(topology, platform="tpu").devices[:1]), ("x",))

def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def forward(*arguments):
    return delta_product(*arguments, implementation="pallas_tpu")[0]

def backward(do, *arguments):
    o, pull = jax.vjp(forward, *arguments)
    return o, pull(do)

values = array(1, length, steps, heads, dim)
beta, g = array(1, length, steps, heads, dtype="float32"), array(1, length, heads, dtype="float32")
arguments = [array(1, length, heads, dim), values, values, beta, g]
if what != "forward":
    arguments.insert(0, array(1, length, heads, dim))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.jit(forward if what == "forward" else backward).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
"""


def profile(generation: str, what: str, length: int, steps: int) -> dict[str, int] | None:
    """Cycles of "kernels" and "xla" of one program; None if the profiler gave none for a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_LOG_DIR": "disabled",  # else the profiler's complaints fill the disk: gigabytes for each program
            "TPU_MIN_LOG_LEVEL": "3",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}",
        }
        sizes = map(str, (length, steps, HEADS, DIM))
        command = [sys.executable, "-c", PROGRAM, TOPOLOGY[generation], what, *sizes]
        # The profiler may abort the process after it wrote what it had: what counts is what is there.
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        if "in memory space vmem" in done.stderr:
            raise MemoryError
        if "Traceback" in done.stderr:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found: collections.Counter[str] = collections.Counter()
        passes = set()
        for file in Path(folder).glob("*static_llo_profile*"):
            for name, cycles in re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', file.read_text()):
                kernel = re.search("delta_product_(inverse|forward|backward)", name)
                found["kernels" if kernel else "xla"] += int(cycles)
                passes |= {kernel[1]} if kernel else set()
    return dict(found) if passes >= set(what.split("+")) else None


def measure(generation: str, what: str, steps: int) -> dict[str, str]:
    """One row of the table; cycles in thousands at the full length."""
    short, long = 256 // steps, 512 // steps
    bytes_per_token = HEADS * ((2 + 2 * steps) * DIM * 2 + 2 * steps + 4)  # q, o, k, v, beta in bfloat16, the gate
    memory = LENGTH * bytes_per_token * (1 if what == "forward" else 3) / HBM_BYTES_PER_CYCLE[generation]
    products = LENGTH / 64 * HEADS * steps * (8 if what == "forward" else 28) * PRODUCT_CYCLES
    bound = max(memory, products)
    row = {
        "generation": generation,
        "pass": what,
        "steps": str(steps),
        "bound": f"{bound / 1e3:.0f}",
    }
    try:
        first, second = (profile(generation, what, length, steps) for length in (short, long))
    except MemoryError:
        return row | dict.fromkeys(UNKNOWN, "out of VMEM")
    if first is None or second is None:
        return row | dict.fromkeys(UNKNOWN, "no estimate")
    slope = {part: (second[part] - first[part]) / (long - short) * LENGTH for part in ("kernels", "xla")}
    total = sum(slope.values())
    return row | {
        "kernels": f"{slope['kernels'] / 1e3:.0f}",
        "xla": f"{slope['xla'] / 1e3:.0f}",
        "cycles_per_token_and_head": f"{total / LENGTH / HEADS:.1f}",
        "ratio_to_bound": f"{total / bound:.2f}",
    }


def _libtpu() -> str:
    from importlib.metadata import version

    return version("libtpu")


def main(_: list[str]) -> None:
    """Measure, print and write the table."""
    rows = []
    print(" | ".join(FIELDS))
    for generation in _GENERATIONS.value:
        for steps in map(int, _STEPS.value):
            for what in PASSES:
                rows.append(measure(generation, what, steps))
                print(" | ".join(rows[-1][field] for field in FIELDS), flush=True)
    table.write(rows, f"libtpu {_libtpu()}, static profile")


if __name__ == "__main__":
    app.run(main)
