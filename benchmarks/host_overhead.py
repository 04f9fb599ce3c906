"""What the training loop itself costs the host per step: everything but the compiled step.

    python -m benchmarks.host_overhead [--csv=benchmarks/results/host_overhead.csv]

The real loop with everything on (data of a language model, put on the device, metrics of every step read, a row logged every 10,
the signal and stall watches), under `jax.transfer_guard("disallow")` from end to end, so that any implicit transfer is an
error; but with a step that returns at once what it was given. So a step's whole time is overhead, and none of it overlaps.
Shown: the median and the 90th percentile of windows of 10 steps, per step, and their share of a step of 100 ms.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import table
from deltajax import data
from deltajax.layers import delta
from deltajax.models import lm
from deltajax.training import loop
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import Checkpoint, Evaluation, Schedule, TrainConfig

_STEPS = flags.DEFINE_integer("steps", 1000, "of the loop", 100)
WINDOW = 10


def measure(batch_size: int, seq_len: int, steps: int) -> np.ndarray:
    """Seconds per step of the loop, of each window of steps after the first ten windows."""
    config = TrainConfig(
        model=lm.Config(
            vocab_size=264,
            d_model=32,
            pattern=("delta",),
            mixers={"delta": delta.deltanet(2, 16)},
            mlp_dim=64,
        ),
        data=data.Config(corpus="stdlib", seq_len=seq_len, batch_size=batch_size),
        steps=steps,
        schedule=Schedule(warmup_steps=1),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=steps, batches=1),
    )
    times: list[float] = []
    step = loop.make_step(config)
    dataset = data.load(config.data)
    real = step.train
    last: dict[str, Any] = {}

    def at_once(state: Any, batch: Any) -> Any:
        times.append(time.perf_counter())
        if not last:
            state, last["metrics"] = real(state, batch)
            jax.block_until_ready(state)
        return state, last["metrics"]

    step.train = at_once
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        checkpoints = Checkpoints(Path(folder))
        run = loop.Run(config, Path(folder), checkpoints, step, dataset, None)
        with contextlib.closing(run), contextlib.closing(checkpoints), jax.transfer_guard("disallow"):
            run.train()
    marks = np.asarray(times)[::WINDOW]
    return np.diff(marks)[10:] / WINDOW


def main(_: list[str]) -> None:
    """Measure, print and write the table."""
    logging.set_verbosity(logging.ERROR)  # Orbax says much
    rows = []
    for batch_size, seq_len in ((8, 512), (8, 2048), (32, 2048)):
        seconds = measure(batch_size, seq_len, _STEPS.value)
        middle, high = np.median(seconds), np.quantile(seconds, 0.9)
        rows.append(
            {
                "batch_size": batch_size,
                "seq_len": seq_len,
                "steps": _STEPS.value,
                "median_ms": f"{middle * 1e3:.2f}",
                "p90_ms": f"{high * 1e3:.2f}",
                "share_of_100_ms": f"{middle / 0.1:.2%}",
            }
        )
        print(rows[-1], flush=True)
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
