"""How far the TPU kernels are from the recurrence in float64, where no error decays; needs no TPU, and is no measurement on one.

    python -m benchmarks.tpu_accuracy --csv=benchmarks/results/tpu_accuracy.csv
    python -m benchmarks.tpu_accuracy --dtype=bfloat16 --length=800 --heads=4 --steps=1,4 --gates=none,scalar --seeds=2 \\
        --csv=benchmarks/results/tpu_accuracy_bfloat16.csv

beta = 2, unit keys of cosine 0.95, K = V = 64, B1; the kernels run in Pallas' TPU interpret mode on the CPU, "chunked" stands
beside them. Each row has the largest relative RMS over seeds, of output and final state ("outputs") and of the gradients
of a random projection of both, and which array it is of. The bounds are those of the tests of every implementation.

Where this differs from a TPU: products of bfloat16 are exact before they are summed in float32 on both, only the order of the
sums differs. Products of float32 at `Precision.HIGHEST` are one multiplication and one rounding a term on a CPU, six products
of bfloat16 parts on a TPU's matrix unit: "pallas_tpu, passes" puts these six in their place (parts rounded to nearest; what they
leave out, 2^-24 of each term, a TPU leaves out too). exp is the CPU's: a TPU's may err by more units of the last place.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental.pallas import tpu as pltpu

from benchmarks import table
from pallas_kernels import tpu_chunk

sys.path.append(str(Path(__file__).parents[1] / "tests" / "ops"))
from delta_rule_cases import draw, evaluate, relative_rms

BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}  # outputs, gradients
BETA, COSINE, DIM = 2.0, 0.95, 64

_LENGTH = flags.DEFINE_integer("length", 4096, "T", lower_bound=1)
_STEPS = flags.DEFINE_list("steps", ["1", "4"], "R")
_GATES = flags.DEFINE_list("gates", ["none", "scalar", "channel"], "of none, scalar, channel, strong")
_HEADS = flags.DEFINE_integer("heads", 1, "H = HV", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "draws of the inputs", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(BOUNDS), "of every input")


def float32_product(x, y, dimensions):
    """x y as a TPU's matrix unit makes it at the highest precision: six products of bfloat16 parts, summed in float32."""
    xs, ys = map(_thirds, (x, y))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dimensions, precision=jax.lax.Precision.HIGHEST)
    products = (product(xs[i], ys[j]) for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)))
    return functools.reduce(jnp.add, products)


def _thirds(x):
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts


@contextmanager
def _interpreted(passes: bool) -> Iterator[None]:
    with (
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
        mock.patch.object(tpu_chunk, "float32_product", float32_product) if passes else nullcontext(),
    ):
        yield


def measure(steps: int, gate: str) -> list[dict[str, Any]]:
    """A row for each implementation."""
    dtype = _DTYPE.value
    arms: dict[str, Callable[[], AbstractContextManager]] = {
        "chunked": nullcontext,
        "pallas_tpu": functools.partial(_interpreted, False),
    }
    if dtype == "float32":
        arms["pallas_tpu, passes"] = functools.partial(_interpreted, True)
    worst: dict[str, list[dict[str, float]]] = {arm: [{}, {}] for arm in arms}
    for seed in range(_SEEDS.value):
        arguments = draw(
            seed,
            1,
            _LENGTH.value,
            steps,
            _HEADS.value,
            _HEADS.value,
            DIM,
            DIM,
            None if gate == "none" else gate,
            BETA,
            COSINE,
            dtype,
        )
        expected = evaluate(jax.tree.map(lambda x: x.astype(jnp.float64), arguments), "reference")
        for arm, context in arms.items():
            with context():
                found = evaluate(arguments, arm.split(",")[0])
            for group, actual, exact in zip(worst[arm], found, expected, strict=True):
                for name, x in exact.items():
                    group[name] = max(group.get(name, 0.0), relative_rms(actual[name], x))
    rows = []
    for arm, groups in worst.items():
        row = {"implementation": arm, "dtype": dtype, "length": _LENGTH.value, "steps": steps, "gate": gate}
        for what, group, bound in zip(("outputs", "gradients"), groups, BOUNDS[dtype], strict=True):
            largest = max(group, key=lambda name: group[name])
            row |= {what: f"{group[largest]:.1e}", f"{what}_of": largest, f"{what}_bound": f"{bound:.0e}"}
        rows.append(row)
    return rows


def main(_: list[str]) -> None:
    """Measure, print and write the table."""
    rows: list[dict[str, Any]] = []
    for steps in map(int, _STEPS.value):
        for gate in _GATES.value:
            with jax.enable_x64(True):
                found = measure(steps, gate)
            for row in found:
                print(" | ".join(map(str, row.values())), flush=True)
            rows += found
    table.write(rows, f"{table.cpu()}, interpret mode")


if __name__ == "__main__":
    app.run(main)
