"""The streaming runner against dense inference of the same network, frame by frame, batch 1.

    python -m benchmarks.stream --csv=benchmarks/results/stream.csv

A share of the 8 x 8 tiles of each frame is new noise, the rest is as in the frame before: either one rectangle, as an object that
moves makes it, or tiles anywhere. Weights are random and the steps tiny, so quantisation stops no change on its way: the
worst case for a given share of tiles. Compared with it are, batch norms folded: "native_dense", the runner's own kernel when
it computes everything and compares nothing; "xla_dense", XLA's program of the same quantised inference; "plain", XLA's program
of the network without delta activations. "times_dense" is against the faster of the first two. All go through the frames in
turn, --rounds times; a frame's time is the smallest, and a row has the mean over frames. "operations" is the share of the
network's multiply-accumulates in the pixels that were computed: "times_dense" could reach 1 / operations. The limits of
--implementation=xla are calibrated first, on frames of all kinds. Prints a table and, with --csv, writes it to a file.

On a machine that others use, --clock=cpu counts the processor's time of this process instead: meant for one core
(`taskset -c 0`), as threads that wait for each other count too.
"""

import dataclasses
import functools
import itertools
import os
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import operations, table
from deltajax.delta_activations import fold, graph, stream
from deltajax.layers import delta_activation
from deltajax.models import efficientnet, frames, resnet

TILE = 8
MOBILE = efficientnet.Config(  # MobileNetV2 (arXiv 1801.04381) at width 1, with relu for relu6
    stem=32,
    stages=tuple(
        efficientnet.Stage("inverted", channels, repeats, 3, stride, expand, activation="relu")
        for expand, channels, repeats, stride in (
            (1.0, 16, 1, 1),
            (6.0, 24, 2, 2),
            (6.0, 32, 3, 2),
            (6.0, 64, 4, 2),
            (6.0, 96, 3, 1),
            (6.0, 160, 3, 2),
            (6.0, 320, 1, 1),
        )
    ),
    head=1280,
    activation="relu",
)
NETWORKS: dict[str, resnet.Config | efficientnet.Config] = {
    "small": resnet.resnet_small(widths=(16, 32, 64), num_classes=101),
    "small_wide": resnet.resnet_small(widths=(32, 64, 128), num_classes=101),
    "resnet18": resnet.resnet18(num_classes=101),
    "resnet50": resnet.resnet50(num_classes=101),
    "mobilenetv2": dataclasses.replace(MOBILE, num_classes=101),
}

_NETWORKS = flags.DEFINE_list("networks", ["small", "resnet18"], f"of {', '.join(NETWORKS)}")
_PIXELS = flags.DEFINE_list("pixels", ["112", "224"], "height and width of the frames")
_UNCHANGED = flags.DEFINE_list("unchanged", ["1", "0.99", "0.95", "0.9", "0.8", "0.5", "0"], "shares of tiles")
_WHERE = flags.DEFINE_list("where", ["rectangle", "anywhere"], "where tiles change")
_FRAMES = flags.DEFINE_integer("frames", 4, "frames of each row", lower_bound=1)
_IMPLEMENTATION = flags.DEFINE_enum("implementation", "native", ["native", "xla"], "of the runner")
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "what counts as time")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "times that each is timed", lower_bound=1)


def clip(rng: np.random.Generator, pixels: int, unchanged: float, where: str, length: int) -> np.ndarray:
    """Frames [length + 1, pixels, pixels, 3]; each but the first has `1 - unchanged` of its tiles, rounded, anew."""
    side = pixels // TILE
    frame = rng.standard_normal((pixels, pixels, 3)).astype(np.float32)
    found = [frame]
    for _ in range(length):
        frame = frame.copy()
        count = round((1 - unchanged) * side * side)
        if where == "rectangle" and count:
            rows = min(side, max(1, round(count**0.5)))
            columns = min(side, round(count / rows))
            top, left = rng.integers(side - rows + 1), rng.integers(side - columns + 1)
            changed = [(i, j) for i in range(top, top + rows) for j in range(left, left + columns)]
        else:
            changed = [divmod(n, side) for n in rng.permutation(side * side)[:count]]
        for i, j in changed:
            frame[TILE * i : TILE * (i + 1), TILE * j : TILE * (j + 1)] = rng.standard_normal((TILE, TILE, 3))
        found.append(frame)
    return np.stack(found)


def network(name: str, pixels: int) -> tuple[graph.Graph, dict, graph.Graph, dict]:
    """(graph, parameters) with delta activations and without."""
    config = frames.Config(NETWORKS[name], (pixels, pixels), delta_activation.Config(init_step=1e-4))
    params, stats = jax.jit(lambda key: frames.init(key, config))(jax.random.key(0)), frames.init_stats(config)
    plain = dataclasses.replace(config, delta=None)
    return *fold.fold(params, stats, config), *fold.fold({"network": params["network"]}, stats, plain)


def measure(name: str, pixels: int, shares: list[float], wheres: list[str]) -> list[dict[str, object]]:
    """Rows of one network and size."""
    quantized, params, unquantized, plain_params = network(name, pixels)
    implementation: stream.Implementation = "native" if _IMPLEMENTATION.value == "native" else "xla"
    clock = time.perf_counter if _CLOCK.value == "wall" else time.process_time
    runner = stream.Stream(quantized, params, (pixels, pixels, 3), implementation=implementation)
    native = stream.Stream(quantized, params, (pixels, pixels, 3), implementation="native")
    dense = jax.jit(functools.partial(graph.apply, quantized))
    plain = jax.jit(functools.partial(graph.apply, unquantized))
    rng = np.random.default_rng(0)

    def timed(function, *arguments):
        start = clock()
        out = jax.block_until_ready(function(*arguments))
        return out, clock() - start

    sample = [clip(rng, pixels, share, where, 2) for where in wheres for share in (0.99, 0.95, 0.8, 0.5, 0)]
    stream.calibrate(runner, [frame for part in sample for frame in part])
    rows: list[dict[str, object]] = []
    for where, unchanged in itertools.product(wheres, shares):
        seen = clip(rng, pixels, unchanged, where, _FRAMES.value)
        best = np.full((4, _FRAMES.value), np.inf)
        differ, shares_done = 0.0, []
        # Each in a row of its own: after another program a program finds neither its caches nor its memory.
        for _ in range(_ROUNDS.value):
            got = []
            for i, one in enumerate((runner, native)):
                _, state, _ = jax.block_until_ready(one.step(one.init_state(), seen[0]))
                for t, frame in enumerate(seen[1:]):
                    state = one.reset(state) if i else state
                    (logits, state, counts), seconds = timed(one.step, state, frame)
                    best[i, t] = min(best[i, t], seconds)
                    if not i:
                        got.append(logits)
                        shares_done.append(operations.computed(runner, counts))
            for i, (function, of_function) in enumerate(((dense, params), (plain, plain_params)), 2):
                timed(function, of_function, seen[:1])
                for t, frame in enumerate(seen[1:]):
                    logits, seconds = timed(function, of_function, frame[None])
                    best[i, t] = min(best[i, t], seconds)
                    if i == 2:
                        differ = max(differ, float(np.abs(got[t] - logits[0]).max() / np.abs(logits).max()))
        ours, native_dense, xla_dense, without = 1e3 * best.mean(axis=1)
        cores = len(os.sched_getaffinity(0))
        about = {"cores": cores, "clock": _CLOCK.value, "implementation": implementation}
        about |= {"network": name, "pixels": pixels, "where": where}
        share = np.mean(
            [
                (a != b).any(-1).reshape(pixels // TILE, TILE, -1, TILE).any((1, 3)).mean()
                for a, b in itertools.pairwise(seen)
            ]
        )
        figures = {
            "unchanged_tiles": 1 - share,
            "operations": float(np.mean(shares_done)),
            "stream_ms": ours,
            "native_dense_ms": native_dense,
            "xla_dense_ms": xla_dense,
            "plain_ms": without,
            "frames_per_second": 1e3 / ours,
            "times_dense": min(native_dense, xla_dense) / ours,
            "times_plain": without / ours,
        }
        rows.append({**about, **{k: f"{x:.3f}" for k, x in figures.items()}, "largest_difference": f"{differ:.1e}"})
        print("".join(f"{x!s:>16}" for x in rows[-1].values()), flush=True)
    return rows


def main(_):
    """Time, print, and write the CSV file."""
    rows = []
    for name in _NETWORKS.value:
        if name not in NETWORKS:
            raise app.UsageError(f"--networks must be of {', '.join(NETWORKS)}, got {name!r}")
        for pixels in map(int, _PIXELS.value):
            rows += measure(name, pixels, [float(x) for x in _UNCHANGED.value], _WHERE.value)
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
