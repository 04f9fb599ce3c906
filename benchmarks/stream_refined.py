"""What the streaming runner computes of the networks that a sweep has refined, on the validation clips of its data.

    python -m benchmarks.stream_refined --config=experiments/delta_motion.py --workdir=runs/delta_motion \\
        --table=docs/results/delta_motion_stream.csv

Each member's network is folded and goes through the clips a frame at a time, each clip from a reset. Rows are as those of the
sweep's table: "saved_operations", the share of multiply-accumulates in the pixels that the runner left out (the first
frame of a clip left out, as in the sparsities), "streamed_accuracy" by the mean of the frames' logits, and "times_dense",
the runner's speed over that of its own kernel when it computes everything, in the same process, each a sum over frames of the
smallest of --rounds times.
"""

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import operations
from deltajax import data
from deltajax.delta_activations import fold, stream
from deltajax.training import pretrained, sweeps

_CONFIG = flags.DEFINE_string("config", "experiments/delta_motion.py", "experiment file of the sweep")
_WORKDIR = flags.DEFINE_string("workdir", "runs/delta_motion", "of the sweep")
_TABLE = flags.DEFINE_string("table", None, "write the table to this file")
_CLIPS = flags.DEFINE_integer("clips", 240, "of the validation set, the first ones", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "times that each frame is timed", lower_bound=1)


def clips(config: object) -> Iterator[tuple[np.ndarray, int]]:
    """(frames [T, H, W, C], class) of validation clips."""
    for batch in data.load(config).validation_batches():
        for frames, target, weight in zip(batch["frames"], batch["targets"], batch["weights"], strict=True):
            if weight:
                yield np.asarray(frames, np.float32), int(target)


def measure(found: pretrained.Pretrained) -> dict[str, float]:
    """Metrics of one network."""
    graph, params = fold.fold(found.params, found.stats, found.config.model)
    runner = stream.Stream(graph, params, found.config.model.frame_shape)
    seconds, done, right, count = np.zeros(2), [], 0, 0
    _, state, _ = runner.step(runner.init_state(), np.zeros(runner.frame_shape))  # compiled here, not in what is timed
    for frames, target in clips(found.config.data):
        best = np.full((2, len(frames)), np.inf)
        for n in range(_ROUNDS.value):
            for i in (0, 1):  # the runner; its kernel with everything anew
                state = runner.reset(state)
                logits = []
                for t, frame in enumerate(frames):
                    state = runner.reset(state) if i else state
                    start = time.perf_counter()
                    of_frame, state, counts = jax.block_until_ready(runner.step(state, frame))
                    best[i, t] = min(best[i, t], time.perf_counter() - start)
                    logits.append(np.asarray(of_frame))
                    if t and not i and not n:
                        done.append(operations.computed(runner, counts))
                if not i and not n:
                    right += int(np.argmax(np.mean(logits, axis=0)) == target)
        seconds += best[:, 1:].sum(axis=1)
        count += 1
        if count == _CLIPS.value:
            break
    return {
        "saved_operations": 1 - float(np.mean(done)),
        "streamed_accuracy": right / count,
        "times_dense": float(seconds[1] / seconds[0]),
    }


def main(_):
    """Measure every member that is there, print, and write the table."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file that it opens
    rows: list[dict[str, object]] = []
    for member in sweeps.members(_CONFIG.value):
        folder = Path(_WORKDIR.value) / member.name
        if not folder.is_dir():
            print(f"{folder} is not there: left out")
            continue
        found = pretrained.load(folder)
        metrics = measure(found)
        print(f"{member.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
        about = {**member.by_column, "status": "complete", "step": found.step, "set": "stream", "position": ""}
        rows += [{**about, "metric": name, "value": f"{value:.6g}"} for name, value in metrics.items()]
    if not rows:
        raise app.UsageError(f"--workdir={_WORKDIR.value}: no run of {_CONFIG.value} is in it")
    if _TABLE.value:
        path = Path(_TABLE.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    app.run(main)
