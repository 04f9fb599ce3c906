"""Gated delta rule on a CPU: ours against transformers' `torch_chunk_gated_delta_rule`, in turn on the same cores.

    python -m benchmarks.cpu_delta_rule --peer_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS

The peer runs in a process of its own, which is stopped while it is not its turn (torch's threads spin): rounds alternate ours
and theirs, and the ratio is that of the minima. Prints a table and, with --csv, writes it to a file.
"""

import atexit
import itertools
import os
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import table
from deltajax import children
from deltajax.ops import delta_rule

PEER = """
import sys, time, torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as f
B, T, H, K, threads = map(int, sys.argv[1:6])
torch.set_num_threads(threads)
torch.manual_seed(0)
q, k, v = (torch.randn(B, T, H, K, requires_grad=True) for _ in range(3))
g = (-torch.nn.functional.softplus(torch.randn(B, T, H))).requires_grad_()
beta = torch.rand(B, T, H, requires_grad=True)
call = lambda: f(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
for line in sys.stdin:
    start = time.perf_counter()
    if line.strip() == "forward":
        with torch.no_grad():
            call()
    else:
        torch.autograd.grad((call() ** 2).sum(), (q, k, v, g, beta))
    print(time.perf_counter() - start, flush=True)
"""

_PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "a Python with torch and transformers; without it only ours is timed"
)
_ROUNDS = flags.DEFINE_integer("rounds", 30, "timed rounds of each", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 5, "times that all of it is done: the ratios of one run vary", lower_bound=1)
_SHAPE = flags.DEFINE_list("shape", ["1", "2048", "8", "64"], "B,T,H,K (V = K)")


def ours(batch, length, heads, dim):
    """The two timed calls, compiled; L2 normalisation of q and k is inside, as in the peer's call."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (batch, length, heads, dim)) for key in keys[:3])
    beta = jax.random.uniform(keys[3], (batch, length, heads))
    g = -jax.nn.softplus(jax.random.normal(keys[4], (batch, length, heads)))

    def forward(q, k, v, beta, g):
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
        return delta_rule(q, k, v, beta, g)[0]

    def loss(*arguments):
        return jnp.sum(forward(*arguments) ** 2)

    arguments = (q, k, v, beta, g)
    compiled = {"forward": jax.jit(forward), "forward+backward": jax.jit(jax.grad(loss, argnums=range(5)))}

    def run(what):
        start = time.perf_counter()
        jax.block_until_ready(compiled[what](*arguments))
        return time.perf_counter() - start

    return run


def peer(python, *shape):
    """The same calls answered by a process with torch."""
    command = [python, "-c", PEER, *map(str, shape), str(os.cpu_count())]
    pipe = subprocess.PIPE
    process = subprocess.Popen(**children.tied(command), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    atexit.register(process.kill)

    def run(what):
        assert process.stdin and process.stdout
        process.send_signal(signal.SIGCONT)
        print(what, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        if not answer:
            raise RuntimeError(f"--peer_python={python} could not run transformers' torch_chunk_gated_delta_rule")
        return float(answer)

    return run


def main(_):
    """Time, print, and write the CSV file."""
    shape = tuple(map(int, _SHAPE.value))
    sides = {"deltajax": ours(*shape)}
    if _PEER_PYTHON.value:
        sides["transformers"] = peer(_PEER_PYTHON.value, *shape)
    rows: list[dict[str, object]] = []
    for run, what in itertools.product(range(_RUNS.value), ("forward", "forward+backward")):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(_ROUNDS.value + 2):
            for name, side in sides.items():
                times[name].append(side(what))
        best = {name: 1e3 * np.min(t[2:]) for name, t in times.items()}
        median = {name: 1e3 * np.median(t[2:]) for name, t in times.items()}
        ratio = best["transformers"] / best["deltajax"] if "transformers" in best else float("nan")
        for name in sides:
            figures = {"min_ms": best[name], "median_ms": median[name], "ratio_of_minima": ratio}
            about = {"run": run, "pass": what, "library": name, **dict(zip("BTHK", shape, strict=True))}
            rows.append({**about, **{field: f"{x:.2f}" for field, x in figures.items()}})
    lines: list[list[object]] = [list(rows[0]), *(list(row.values()) for row in rows)]
    for line in lines:
        print("".join(f"{x!s:>17}" for x in line))
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
