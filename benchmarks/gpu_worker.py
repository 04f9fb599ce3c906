"""The JAX processes of `gpu_delta_rule`: one on a CPU draws inputs and finds what is right, one on the GPU checks and times.

Without a GPU the second rehearses: the kernels run in Mosaic GPU's interpreter, and the only clock is the host's.
"""

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import worker
from deltajax.ops import delta_product
from pallas_kernels import gpu

HELD: dict[str, dict[str, jax.Array]] = {}  # the inputs of one folder, by file


def on_gpu() -> bool:
    """Whether there is one."""
    return jax.devices()[0].platform == "gpu"


def hello() -> dict:
    """The device, and its two ceilings: TFLOP/s of a large bfloat16 product, GB/s of a large copy (read and written)."""
    side, length = (8192, 2**29) if on_gpu() else (64, 2**12)
    x, y = jnp.ones((side, side), jnp.bfloat16), jnp.ones(length)
    product, _, timer = milliseconds(jax.jit(lambda x: x @ x), x, 20)
    copy, _, _ = milliseconds(jax.jit(lambda y: y + 1), y, 20)
    return {
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
        "tflops": 2 * side**3 / product / 1e9,
        "gb_per_s": 2 * y.nbytes / copy / 1e6,
        "timer": timer,
    }


def draw(shape, steps: int, gate: str, sets: int, folder: str, seed: int) -> dict:
    """Arguments and "do" to inputs_<set>.npz: unit queries and keys, beta in (0, 1), gates of all strengths; of their first and
    last head in float64 outputs and gradients, to expected_<set>.npz.
    """
    batch, length, heads, dim = shape
    for index in range(sets):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), 6)

        def normal(key, *axes, unit=False, keys=keys):
            x = jax.random.normal(keys[key], (batch, length, *axes, heads, dim))
            return (x / jnp.linalg.norm(x, axis=-1, keepdims=True) if unit else x).astype(jnp.bfloat16)

        arguments = {"q": normal(0, unit=True), "k": normal(1, steps, unit=True), "v": normal(2, steps)}
        arguments["beta"] = jax.random.uniform(keys[3], (batch, length, steps, heads)).astype(jnp.bfloat16)
        if gate != "none":
            channels = (dim,) if gate == "channel" else ()
            arguments["g"] = -jnp.exp(2 * jax.random.normal(keys[4], (batch, length, heads, *channels)) - 3)
        arguments["do"] = normal(5)
        host = {name: np.asarray(x) for name, x in arguments.items()}
        bits: dict[str, Any] = {name: x if x.dtype == np.float32 else x.view(np.int16) for name, x in host.items()}
        np.savez(Path(folder, f"inputs_{index}.npz"), **bits)
        with jax.enable_x64(True):
            exact = {name: jnp.asarray(ends(name, x), jnp.float64) for name, x in arguments.items()}
            expected = function("forward+backward", "chunked")(exact)
            np.savez(Path(folder, f"expected_{index}.npz"), **jax.tree.map(np.asarray, expected))
    return {}


def measure(library: str, what: str, folder: str, index: int, calls: int) -> dict:
    """Check one implementation on one input set, with memory full of nan beforehand, then time it."""
    arguments = inputs(Path(folder, f"inputs_{index}.npz"))
    f = function(what, library)
    interpreted = library.startswith("pallas_gpu") and not on_gpu()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()) if interpreted else contextlib.nullcontext():
        poison()
        start = time.perf_counter()
        results = jax.block_until_ready(f(arguments))
        first = time.perf_counter() - start
        found = {name: np.asarray(ends(name, x), np.float64) for name, x in results.items()}
        del results
        kernels, host, timer = milliseconds(f, arguments, calls)
    with np.load(Path(folder, f"expected_{index}.npz")) as file:
        errors = {name: relative_rms(x, file[name]) for name, x in found.items()}
    return {"ms": kernels, "host_ms": host, "timer": timer, "first_call_s": first, "errors": errors}


def inputs(path: Path) -> dict[str, jax.Array]:
    """The arrays of one file, on the device; those of its folder stay there, others go."""
    for other in [name for name in HELD if Path(name).parent != path.parent]:
        del HELD[other]
    if str(path) not in HELD:
        with np.load(path) as file:
            host = {name: file[name] for name in file.files}
        typed = {name: x if x.dtype == np.float32 else x.view(ml_dtypes.bfloat16) for name, x in host.items()}
        HELD[str(path)] = jax.tree.map(jnp.asarray, typed)
    return HELD[str(path)]


def blocks_of(library: str) -> gpu.Blocks | None:
    """Those in a name as "pallas_gpu:16x2x2x1": columns, stages, late_stages, places.

    Raises:
      ValueError: not four numbers, or none that `Blocks` allows.
    """
    if ":" not in library:
        return None
    sizes = library.split(":")[1].split("x")
    if len(sizes) != 4 or not all(size.isdigit() for size in sizes):
        raise ValueError("blocks are four numbers, as 16x2x2x1")
    return gpu.Blocks(*map(int, sizes))


@functools.cache
def function(what: str, implementation: str):
    """f(arguments with do) -> results by name, compiled once for each shape."""
    name, blocks = implementation.split(":")[0], blocks_of(implementation)

    def forward(arguments):
        with mock.patch.object(gpu.Blocks, "for_shape", lambda *_: blocks) if blocks else contextlib.nullcontext():
            return delta_product(**arguments, implementation=name)[0]

    def run(arguments):
        do = arguments["do"]
        arguments = {name: x for name, x in arguments.items() if name != "do"}
        if what == "forward":
            return {"o": forward(arguments)}
        o, pull = jax.vjp(forward, arguments)
        return {"o": o, **pull(do.astype(o.dtype))[0]}

    return jax.jit(run)


def ends(name: str, x):
    """The first and the last head of the first sequence; heads do not know of each other."""
    x = x[:1]
    per_head = name == "beta" or (name == "g" and x.ndim == 3)
    return x[..., np.array([0, -1])] if per_head else x[..., np.array([0, -1]), :]


def relative_rms(actual, expected) -> float:
    """Root of the summed squares of the difference, over those of what is expected."""
    return float(np.sqrt(np.sum((actual.reshape(expected.shape) - expected) ** 2) / np.sum(expected**2)))


def poison() -> None:
    """Fill half of the free memory, at most 16 GB, with nan and let go of it, so that an output never written is seen."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    jax.block_until_ready([jnp.full(2**26, jnp.nan) for _ in range(min(free // 2, 2**34) // 2**28)])


def milliseconds(f, arguments, calls: int) -> tuple[float, float, str]:
    """Median of a call's kernels by CUPTI, and a call of many in a row by the host's clock; the latter twice without CUPTI."""
    jax.block_until_ready(f(arguments))
    start = time.perf_counter()
    for _ in range(calls):
        results = f(arguments)
    jax.block_until_ready(results)
    host = (time.perf_counter() - start) / calls * 1e3
    del results
    if not on_gpu():
        return host, host, "host"
    times: list[float] = []
    try:
        for _ in range(-(-calls // 5)):  # it holds the results of all its calls
            times += profiler.measure(f, iterations=5)(arguments)[1] or []
    except Exception as error:
        print(worker.one_line(error), file=sys.stderr)
    return (statistics.median(times), host, "cupti") if times else (host, host, "host")


if __name__ == "__main__":
    JOBS: dict[str, Callable[..., dict]] = {"hello": hello, "draw": draw, "measure": measure}
    worker.serve(lambda job: JOBS[job.pop("do")](**job))
