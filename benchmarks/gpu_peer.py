"""The peer's process of `gpu_delta_rule`: fla-core on torch and triton, on the inputs that it is given. It needs no JAX."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.gated_delta_product import chunk_gated_delta_product
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.kda import chunk_kda

from benchmarks import worker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to rehearse, with another fla
HELD: dict[str, dict[str, torch.Tensor]] = {}  # the inputs of one folder, by file


def hello() -> dict:
    """Versions; that the imports worked is what counts."""
    return {"version": f"torch {torch.__version__}", "device": DEVICE}


def call(q, k, v, beta, g=None):
    """O of the function that fla has for these arguments."""
    steps = k.shape[2]
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    if steps > 1:
        return chunk_gated_delta_product(q, k, v, g, beta, num_householder=steps)[0]
    if g is None:
        return chunk_delta_rule(q, k, v, beta)[0]
    return (chunk_kda if g.ndim == q.ndim else chunk_gated_delta_rule)(q, k, v, g, beta)[0]


def inputs(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of one file, on the device; those of its folder stay there, others go."""
    for other in [name for name in HELD if Path(name).parent != path.parent]:
        del HELD[other]
    if str(path) not in HELD:
        with np.load(path) as file:
            arrays = {name: torch.tensor(file[name], device=DEVICE) for name in file.files}
        HELD[str(path)] = {name: x.view(torch.bfloat16) if x.dtype == torch.int16 else x for name, x in arrays.items()}
    return HELD[str(path)]


def measure(library: str, what: str, folder: str, index: int, calls: int) -> dict:
    """Time one pass on one input set, and compare its first and last head with what is right."""
    del library
    held = inputs(Path(folder, f"inputs_{index}.npz"))
    arguments = {name: x.detach() for name, x in held.items() if name != "do"}
    if what == "forward":

        def run():
            with torch.no_grad():
                return [call(**arguments)]

    else:
        for x in arguments.values():
            x.requires_grad_()

        def run():
            o = call(**arguments)
            return [o, *torch.autograd.grad(o, list(arguments.values()), held["do"])]

    start = time.perf_counter()
    run()
    synchronize()
    first = time.perf_counter() - start
    results = [run() for _ in range(2)][-1]  # compiled and tuned by now
    synchronize()
    errors = {}
    with np.load(Path(folder, f"expected_{index}.npz")) as file:
        for name, x in zip(["o", *arguments], results, strict=False):
            x = x[:1].detach()
            per_head = name == "beta" or (name == "g" and x.ndim == 3)
            x = (x[..., [0, -1]] if per_head else x[..., [0, -1], :]).double().cpu().numpy()
            exact = file[name]
            errors[name] = float(np.sqrt(np.sum((x.reshape(exact.shape) - exact) ** 2) / np.sum(exact**2)))
    del results
    kernels, host, timer = milliseconds(run, calls)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # the card is shared with JAX
    return {"ms": kernels, "host_ms": host, "timer": timer, "first_call_s": first, "errors": errors}


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(run, calls: int) -> tuple[float, float, str]:
    """As `gpu_worker.milliseconds`; kernels of all calls in order of their starts, cut into calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    host = (time.perf_counter() - start) / calls * 1e3
    if DEVICE != "cuda":
        return host, host, "host"
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                run()
            synchronize()
        kernels = (x for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA)
        events = [x for x in kernels if not getattr(x, "is_user_annotation", False)]
        events.sort(key=lambda x: x.time_range.start)
        times = [x.time_range.elapsed_us() / 1e3 for x in events]
        if not times:
            return host, host, "host"
        each, rest = divmod(len(times), calls)
        if rest:  # not alike: the mean
            return sum(times) / calls, host, "cupti"
        return statistics.median(sum(times[n * each : (n + 1) * each]) for n in range(calls)), host, "cupti"
    except Exception as error:
        print(worker.one_line(error), file=sys.stderr)
        return host, host, "host"


if __name__ == "__main__":
    JOBS: dict[str, Callable[..., dict]] = {"hello": hello, "measure": measure}
    worker.serve(lambda job: JOBS[job.pop("do")](**job))
