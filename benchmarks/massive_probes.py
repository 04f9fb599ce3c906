"""What capturing activations costs a training step: steps that probe against steps that do not, in turn.

    taskset -c 0 python -m benchmarks.massive_probes --turns=6 --csv=benchmarks/results/massive_probes.csv

Two comparisons. A step of `Step.train_probed` against one of `Step.train`: what is paid where a row is logged; and the program of
`Step.train` against the same model without any tag: what is paid in between, told by the compiled programs' operations, which no
noise disturbs. Times are the fastest of each kind, taken in turn.
"""

import contextlib
import re
import time
from collections import Counter
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import app, flags

from benchmarks import table
from deltajax.layers import attention, delta
from deltajax.models import gpt_neox, lm, registry
from deltajax.training import mesh as mesh_lib
from deltajax.training import optimizer
from deltajax.training.config import Mesh, Optimizer, Probes, Schedule
from deltajax.training.step import Step

_VOCAB = 257
MODELS: dict[str, Any] = {
    "gpt_neox 4x64 (of the study)": gpt_neox.Config(_VOCAB, 64, 4, 4),
    "gpt_neox 6x256 (Pythia 31M on bytes)": gpt_neox.Config(_VOCAB, 256, 6, 8),
    "deltanet 4x64 (of the study)": lm.Config(_VOCAB, 64, ("d",) * 4, {"d": delta.deltanet(4, 16)}, mlp_dim=192),
}
_TURNS = flags.DEFINE_integer("turns", 10, "pairs of steps", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 256, "tokens per sequence", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "sequences per step", lower_bound=1)


_ONLY = flags.DEFINE_string("only", "", "models whose name holds this")


def make_step(model: Any, sequences: int = Probes().sequences) -> Step:
    """As the trainer makes it."""
    mesh, schedule = mesh_lib.make_mesh(Mesh()), optimizer.make_schedule(Schedule(), 1e-3, 1000)
    specs = registry.module_of(model).param_specs(model)
    return Step(model, optimizer.make_optimizer(Optimizer(), schedule, specs), schedule, mesh, 1, sequences)


def random_batch(length: int, size: int) -> dict[str, np.ndarray]:
    """Tokens drawn evenly."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, _VOCAB, (size, length + 1)).astype(np.int32)
    ones = np.ones((size, length), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "weights": ones.astype(np.float32)}


def operations(model: Any, batch: dict[str, np.ndarray]) -> Counter[str]:
    """How often the compiled program of `Step.train` has each operation."""
    step = make_step(model)
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.batch_sharding) for k, x in batch.items()}
    text = step.train.lower(step.abstract, shapes).compile().as_text()  # type: ignore[attr-defined]
    return Counter(re.findall(r" = \S+ ([a-z][\w-]*)\(", text))


def untagged() -> contextlib.ExitStack:
    """While it is entered, models are traced as if they held no tags."""
    stack = contextlib.ExitStack()
    for module in (gpt_neox, lm, attention):
        stack.enter_context(mock.patch.object(module, "tag", lambda x, name: x))
    return stack


def seconds(model: Any, batch: dict[str, np.ndarray], turns: int) -> tuple[float, float]:
    """(fastest step, fastest step that probes), taken in turn after two rounds that do not count."""
    step = make_step(model)
    state, placed = step.init(0), step.put(batch)
    best = [np.inf, np.inf]
    for turn in range(turns + 2):
        for i, run in enumerate((step.train, step.train_probed)):
            start = time.perf_counter()
            results: tuple[Any, ...] = run(state, placed)
            state = jax.block_until_ready(results)[0]
            if turn >= 2:
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]


def main(_):
    """Print and write the table."""
    batch = random_batch(_TOKENS.value, _BATCH.value)
    rows = []
    for name, model in MODELS.items():
        if _ONLY.value not in name:
            continue
        plain, probed = seconds(model, batch, _TURNS.value)
        with_tags = operations(model, batch)
        with untagged():
            without = operations(model, batch)
        figures = {"step_ms": f"{1e3 * plain:.2f}", "probed_step_ms": f"{1e3 * probed:.2f}"}
        figures |= {"cost_where_logged": f"{probed / plain - 1:+.2%}"}
        figures |= {"operations_in_between": str((with_tags - without).total() - (without - with_tags).total())}
        print(f"{name:<40}" + "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
        rows.append({"model": name, "sequences": _BATCH.value, "tokens": _TOKENS.value, **figures})
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
