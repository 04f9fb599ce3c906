"""The delta product on a Hopper GPU: checked, then ours, our "chunked" form and fla-core timed in the same run.

    pip install -c constraints.txt "jax[cuda13]"; python3 -m venv fla && fla/bin/pip install "fla-core[cuda]==0.6.0"
    python -m benchmarks.gpu_delta_rule --peer_python=fla/bin/python --csv=benchmarks/results/gpu_delta_rule.csv

First the check: at every shape and task, with fresh random inputs and memory full of nan beforehand, outputs and gradients of
two heads against "chunked" in float64, as relative RMS; over --tolerance the run ends, exit code 1. Then the times: kernels'
time on the device (CUPTI; for the peer torch.profiler, which asks CUPTI too), summed over a call's kernels, gaps between
them not counted; the median over input sets of the median over calls, the libraries taking turns. TFLOP/s and GB/s count the
products that R steps need at blocks of 64 rows, and every argument and result once; ratio_to_bound is to the larger of the
times that these need at two ceilings measured first, of a large bfloat16 product and of a large copy. The peer runs in a process
of its own, on the same inputs; its error is reported, and ends nothing.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too; read when jax starts

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental.mosaic.gpu import profiler

from benchmarks import table
from deltajax.errors import RunError
from deltajax.ops import delta_product

SHAPES = (
    (1, 8192, 16, 128),
    (8, 2048, 16, 128),
    (4, 4096, 32, 64),
    (1, 32768, 16, 128),
    (8, 2048, 8, 256),
)  # B, T, H, K = V
TASKS = {"delta rule": (1, False), "gated delta rule": (1, True)} | {
    f"delta product {r}": (r, False) for r in (2, 3, 4)
}
PASSES = ("forward", "forward+backward")
OURS = ("pallas_gpu", "chunked")
PEER = "fla-core"

_PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "a Python with fla-core 0.6, torch and triton; else only ours run"
)
_SETS = flags.DEFINE_integer("sets", 3, "input sets", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "timed calls of each library on each input set", lower_bound=1)
_TOLERANCE = flags.DEFINE_float("tolerance", 2e-2, "relative RMS of outputs and gradients", lower_bound=0.0)
_SHAPES = flags.DEFINE_list("shapes", [f"{b}x{t}x{h}x{k}" for b, t, h, k in SHAPES], "BxTxHxK, V = K")

PROGRAM = """
import json, sys
import numpy as np, torch
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.gated_delta_product import chunk_gated_delta_product
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

def call(q, k, v, beta, g=None):
    steps = k.shape[2]
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    if steps > 1:
        return chunk_gated_delta_product(q, k, v, g, beta, num_householder=steps)[0]
    return chunk_delta_rule(q, k, v, beta)[0] if g is None else chunk_gated_delta_rule(q, k, v, g, beta)[0]

def load(x):
    x = torch.tensor(x, device="cuda")
    return x.view(torch.bfloat16) if x.dtype == torch.int16 else x

for line in sys.stdin:
    job = json.loads(line)
    with np.load(job["inputs"]) as file:
        arguments = {name: load(file[name]) for name in file.files}
    do = arguments.pop("do")
    if job["pass"] == "forward":
        def run():
            with torch.no_grad():
                return [call(**arguments)]
    else:
        for x in arguments.values():
            x.requires_grad_()
        def run():
            o = call(**arguments)
            return [o, *torch.autograd.grad(o, list(arguments.values()), do)]
    results = [run() for _ in range(3)][-1]  # compiles, tunes, warms
    torch.cuda.synchronize()
    times = []
    for _ in range(job["calls"]):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        times.append(sum(event.self_device_time_total for event in profile.key_averages()) / 1e3)
    ends = {}
    for name, x in zip(["o", *arguments], results):
        x = x[:1].detach().float()
        ends[name] = (x[..., [0, -1]] if name in ("beta", "g") else x[..., [0, -1], :]).cpu().numpy()
    np.savez(job["outputs"], **ends)
    print(json.dumps(times), flush=True)
"""


class Peer:
    """A process that answers jobs; started anew when one kills it."""

    def __init__(self, python: str):
        self.python = python
        self.process: subprocess.Popen | None = None

    def run(self, job: dict) -> list[float] | None:
        """Milliseconds of each call; None if the peer cannot serve the job (its last line of complaint is printed)."""
        if self.process is None:
            pipe = subprocess.PIPE
            self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
            command = [self.python, "-c", PROGRAM]
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.complaints, text=True)
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.process.wait()
        self.complaints.seek(0)
        print(f"{PEER}: no figure: {(self.complaints.read().strip().splitlines() or ['it died'])[-1]}")
        self.process = None
        return None


def draw(seed, shape, steps, gated):
    """Arguments by name, and "do": unit queries and keys, beta in (0, 1), gates of all strengths."""
    batch, length, heads, dim = shape
    keys = jax.random.split(jax.random.key(seed), 6)

    def normal(key, *axes, unit=False):
        x = jax.random.normal(keys[key], (batch, length, *axes, heads, dim))
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True) if unit else x).astype(jnp.bfloat16)

    arguments = {"q": normal(0, unit=True), "k": normal(1, steps, unit=True), "v": normal(2, steps)}
    arguments["beta"] = jax.random.uniform(keys[3], (batch, length, steps, heads)).astype(jnp.bfloat16)
    if gated:
        arguments["g"] = -jnp.exp(2 * jax.random.normal(keys[4], (batch, length, heads)) - 3)
    return arguments | {"do": normal(5)}


def function(what, implementation):
    """f(arguments with do) -> results by name."""

    def forward(arguments):
        return delta_product(**arguments, implementation=implementation)[0]

    def run(arguments):
        do = arguments["do"]
        arguments = {name: x for name, x in arguments.items() if name != "do"}
        if what == "forward":
            return {"o": forward(arguments)}
        o, pull = jax.vjp(forward, arguments)
        return {"o": o, **pull(do.astype(o.dtype))[0]}

    return jax.jit(run)


def ends(name, x):
    """The first and the last head of the first sequence; heads do not know of each other."""
    x = x[:1]
    return x[..., np.array([0, -1])] if name in ("beta", "g") else x[..., np.array([0, -1]), :]


def expected(what, arguments):
    """In float64, of two heads."""
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(ends(name, x), jnp.float64) for name, x in arguments.items()}
        return jax.tree.map(np.asarray, function(what, "chunked")(exact))


def errors(results, expected):
    """Relative RMS by name."""
    found = {}
    for name, x in expected.items():
        y = np.asarray(results[name], np.float64).reshape(x.shape)
        found[name] = float(np.sqrt(np.sum((y - x) ** 2) / np.sum(x**2)))
    return found


def poison():
    """Fill half of the free memory with nan and let go of it, so that an output never written is seen."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    blocks = [jnp.full(2**26, jnp.nan) for _ in range(free // 2 // 2**28)]
    jax.block_until_ready(blocks)


def milliseconds(f, arguments, calls):
    """Of the kernels of each call."""
    jax.block_until_ready(f(arguments))
    _, times = profiler.measure(f, iterations=calls)(arguments)
    return times if isinstance(times, list) else [times]


@functools.cache
def ceilings():
    """(TFLOP/s of a product of 8192 x 8192 bfloat16 matrices, GB/s of reading and writing 2 GiB)."""
    x = jnp.ones((8192, 8192), jnp.bfloat16)
    product = statistics.median(milliseconds(jax.jit(lambda x: x @ x), x, 20))
    y = jnp.ones(2**29)
    copy = statistics.median(milliseconds(jax.jit(lambda y: y + 1), y, 20))
    return 2 * 8192**3 / product / 1e9, 2 * y.nbytes / copy / 1e6


def work(what, shape, steps, gated):
    """(TFLOP, GB) of one call: the products that blocks of 64 rows need, with nothing recomputed; arguments and results once."""
    batch, length, heads, dim = shape
    square, narrow = dim * dim, 64 * dim
    rows = steps * (2 * square + 2 * narrow)  # K S, K^T V'; K K^T, (I + A)^-1 times its right-hand side
    outputs = square + 2 * steps * narrow  # Q S; Q K^T, P V'
    arguments = 2 * (dim + steps * (2 * dim + 1)) + 4 * gated
    products, moved = rows + outputs, arguments + 2 * dim
    if (
        what != "forward"
    ):  # two products for each of the forward's; do is read, the arguments again, their cotangents written
        products, moved = 3 * products, moved + 2 * dim + 2 * arguments
    tokens = batch * length * heads
    return 2 * products * tokens / 1e12, moved * tokens / 1e9


def compare(what, task, shape, peer):
    """Rows of the table for one pass, task and shape.

    Raises:
      RunError: ours is wrong.
    """
    steps, gated = TASKS[task]
    times: dict[str, list[float]] = {}
    worst: dict[str, float] = {}
    for seed in range(_SETS.value):
        arguments = draw(seed, shape, steps, gated)
        exact = expected(what, arguments)
        for name in OURS:
            f = function(what, name)
            if name == OURS[0]:
                poison()
            results = f(arguments)
            found = errors({key: ends(key, x) for key, x in results.items()}, exact)
            del results
            worst[name] = max(worst.get(name, 0.0), *found.values())
            if not worst[name] < _TOLERANCE.value:
                raise RunError(f"{name} is wrong, {what} of {task} at {shape}: relative RMS {found}")
            times.setdefault(name, []).append(statistics.median(milliseconds(f, arguments, _CALLS.value)))
        if peer is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = {name: str(Path(folder, f"{name}.npz")) for name in ("inputs", "outputs")}
            host: dict[str, Any] = {name: np.asarray(x) for name, x in arguments.items()}
            np.savez(
                job["inputs"], **{name: x if x.dtype == np.float32 else x.view(np.int16) for name, x in host.items()}
            )
            answer = peer.run({**job, "pass": what, "calls": _CALLS.value})
            if answer is not None:
                times.setdefault(PEER, []).append(statistics.median(answer))
                with np.load(job["outputs"]) as file:
                    worst[PEER] = max(worst.get(PEER, 0.0), *errors(file, exact).values())
    best = {name: statistics.median(sets) for name, sets in times.items()}
    flops, moved = work(what, shape, steps, gated)
    peak, bandwidth = ceilings()
    bound = max(flops / peak, moved / bandwidth) * 1e3
    return [
        {
            **dict(zip("BTHK", shape, strict=True)),
            "task": task,
            "pass": what,
            "library": name,
            "ms": f"{ms:.3f}",
            "times_as_fast_as_fla": f"{best[PEER] / ms:.2f}" if PEER in best else "unmeasured",
            "tflops": f"{flops / ms * 1e3:.1f}",
            "gb_per_s": f"{moved / ms * 1e3:.0f}",
            "ratio_to_bound": f"{ms / bound:.1f}",
            "relative_rms": f"{worst[name]:.1e}",
        }
        for name, ms in best.items()
    ]


def main(_: list[str]) -> None:
    """Check, measure, print and write the table; one line and exit code 1 when ours is wrong or there is no GPU."""
    try:
        _main()
    except RunError as error:
        sys.exit(f"error: {error}")


def _shape(text):
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise RunError(f"--shapes: {text!r} is not four sizes, as 1x8192x16x128")
    return tuple(map(int, sizes))


def _main():
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise RunError(f"this needs a Hopper GPU, and jax.devices()[0] is {device.device_kind!r}")
    peak, bandwidth = ceilings()
    print(f"{device.device_kind}: {peak:.0f} TFLOP/s, {bandwidth:.0f} GB/s")
    peer = Peer(_PEER_PYTHON.value) if _PEER_PYTHON.value else None
    machine = f"{device.device_kind}, jax {jax.__version__}, {peak:.0f} TFLOP/s, {bandwidth:.0f} GB/s"
    rows: list[dict] = []
    for shape in map(_shape, _SHAPES.value):
        for task in TASKS:
            for what in PASSES:
                for row in compare(what, task, shape, peer):
                    print(" | ".join(map(str, row.values() if rows else (*row, "\n", *row.values()))), flush=True)
                    rows.append(row)
                table.write(rows, machine)  # what there is, should the machine go away


if __name__ == "__main__":
    app.run(main)
