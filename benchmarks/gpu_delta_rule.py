"""The delta product on a Hopper GPU: checked, then ours, fla-core and our "chunked" form timed in the same run on the same card.

    pip install -c constraints.txt "jax[cuda13]"; python3 -m venv fla && fla/bin/pip install "fla-core[cuda]==0.6.0"
    python -m benchmarks.gpu_delta_rule --peer_python=fla/bin/python --csv=benchmarks/results/gpu_delta_rule.csv --budget=540

A Python that has jax, torch and fla can be its own peer: `--peer_python=python3`. `--rehearse` runs everything without a GPU, on
shapes of its own: the kernels in Mosaic GPU's interpreter, and the peer, if one is named, on what its torch can do.

For each input set (fresh random inputs, memory full of nan) the outputs and gradients of two heads are compared with
"chunked" in float64, and then the calls are timed: kernels' time on the device (CUPTI; for the peer torch.profiler, which asks
CUPTI too), summed over a call's kernels, gaps between them not counted, the median over sets of the median over calls, the
libraries taking turns; host_ms is a call of many in a row by the host's clock. tflops and gb_per_s count the products that R
steps need at blocks of 64 rows, and every argument and result once; ratio_to_bound is to the larger of the times that these
need at two ceilings measured first, of a large bfloat16 product and of a large copy.

To tune, ours with other `pallas_kernels.gpu.Blocks` (columns, stages, late_stages, places) may be among the libraries:
`--libraries=pallas_gpu,pallas_gpu:16x3x3x2,pallas_gpu:64x2x2x1 --shapes=1x8192x16x128 --tasks="gated delta rule"`.

Made for a card that is there for minutes, on a machine without a network. What tells most comes first (`cells`), and the table is
written after every row. Ours, "chunked", the peer, and what draws inputs and finds what is right (a CPU's work, one shape ahead)
are processes: what fails, dies or takes longer than --patience (the peer, which tries out its kernels' settings: three times
that) becomes a row with a note, and the next job gets a new process; who lets two jobs pass so is left out from then on. After
--budget seconds it ends. Exit code 1 if a result of ours was wrong or missing.

Nothing needs to be installed but JAX with its CUDA plugin, jaxtyping and absl-py (jax 0.11.2 does); ptxas may be the toolkit's or
triton's. The peer's fla-core is pure Python and needs torch, triton and einops: where nothing can be fetched, bring its wheel,
`pip install --no-deps --target=DIR fla_core-0.6.0-py3-none-any.whl`, and set PYTHONPATH=DIR.
"""

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import table
from benchmarks.gpu_worker import blocks_of
from benchmarks.worker import Worker, WorkerError
from deltajax.errors import RunError

SHAPES = (
    (1, 8192, 16, 128),
    (8, 2048, 16, 128),
    (8, 2048, 8, 256),
    (4, 4096, 32, 64),
    (1, 32768, 16, 128),
)  # B, T, H, K = V
TINY = ((1, 70, 1, 64),)
TASKS = {  # R, gate
    "gated delta rule": (1, "scalar"), "delta product 4": (4, "none"), "delta rule": (1, "none"), "delta product 2": (2, "none"),
    "delta product 3": (3, "none"), "kimi delta attention": (1, "channel"),
}  # fmt: skip
PASSES = ("forward", "forward+backward")
OURS, PEER, CHUNKED = "pallas_gpu", "fla-core", "chunked"
PATIENCE = {PEER: 3.0}  # of a library, in units of --patience

_PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "a Python with fla-core 0.6, torch and triton; else only ours run"
)
_SETS = flags.DEFINE_integer("sets", 2, "input sets", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "timed calls of each library on each input set", lower_bound=1)
_TOLERANCE = flags.DEFINE_float("tolerance", 2e-2, "relative RMS of outputs and gradients", lower_bound=0.0)
_SHAPES = flags.DEFINE_list("shapes", None, "BxTxHxK, V = K, of the issue's five or others")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "which of them")
_PASSES = flags.DEFINE_list("passes", list(PASSES), "which of them")
_LIBRARIES = flags.DEFINE_list("libraries", [OURS, PEER, CHUNKED], "which of them, in turn; pallas_gpu:16x2x2x1")
_BUDGET = flags.DEFINE_float("budget", 3600.0, "seconds after which it ends", lower_bound=0.0)
_PATIENCE = flags.DEFINE_float("patience", 120.0, "seconds that one answer of a process may take", lower_bound=1.0)
_REHEARSE = flags.DEFINE_bool("rehearse", False, "without a GPU: no time means anything")


def cells(shapes, tasks) -> Iterator[tuple]:
    """(shape, task), what tells most first: the first shape, then the others, in three tasks; then the other tasks."""
    main = [task for task in list(TASKS)[:3] if task in tasks]
    rest = [task for task in tasks if task not in main]
    yield from ((shapes[0], task) for task in main)
    yield from ((shape, task) for task in main for shape in shapes[1:])
    yield from ((shape, task) for task in rest for shape in shapes)


def work(what: str, shape, steps: int, gate: str) -> tuple[float, float]:
    """(TFLOP, GB) of one call: the products that blocks of 64 rows need, with nothing recomputed; arguments and results once."""
    batch, length, heads, dim = shape
    square, narrow = dim * dim, 64 * dim
    rows = steps * (2 * square + 2 * narrow)  # K S, K^T V'; K K^T, (I + A)^-1 times its right-hand side
    outputs = square + 2 * steps * narrow  # Q S; Q K^T, P V'
    arguments = 2 * (dim + steps * (2 * dim + 1)) + 4 * {"none": 0, "scalar": 1, "channel": dim}[gate]
    products, moved = rows + outputs, arguments + 2 * dim
    if what != "forward":  # two products for each; do is read, the arguments again, their cotangents written
        products, moved = 3 * products, moved + 2 * dim + 2 * arguments
    tokens = batch * length * heads
    return 2 * products * tokens / 1e12, moved * tokens / 1e9


class Clock:
    """What is left of the budget."""

    def __init__(self):
        self.start = time.monotonic()

    def left(self) -> float:
        """Seconds, less what it takes to end."""
        return _BUDGET.value - 5 - (time.monotonic() - self.start)

    def patience(self, times: float = 1.0) -> float:
        """Seconds that the next answer may take."""
        return min(times * _PATIENCE.value, self.left())


def row(shape, task, what, library, answers, note, ratio, ceilings) -> dict[str, object]:
    """One line of the table from the answers of a library to its jobs; without answers, the note alone."""
    flops, moved = work(what, shape, *TASKS[task])
    figures = dict.fromkeys(("ms", "times_as_fast_as_fla", "tflops", "gb_per_s", "ratio_to_bound"), "unmeasured")
    figures |= dict.fromkeys(("host_ms", "clock", "first_call_s", "relative_rms"), "unmeasured")
    if answers:
        ms = median(answers, "ms")
        bound = max(flops / ceilings["tflops"], moved / ceilings["gb_per_s"]) * 1e3
        figures |= {
            "ms": f"{ms:.3f}",
            "times_as_fast_as_fla": f"{ratio:.2f}" if ratio else "unmeasured",
            "tflops": f"{flops / ms * 1e3:.1f}",
            "gb_per_s": f"{moved / ms * 1e3:.0f}",
            "ratio_to_bound": f"{ms / bound:.1f}",
            "host_ms": f"{median(answers, 'host_ms'):.3f}",
            "clock": "+".join(sorted({x["timer"] for x in answers})),
            "first_call_s": f"{answers[0]['first_call_s']:.1f}",
            "relative_rms": f"{max(worst(x) for x in answers):.1e}",
        }
    sizes = dict(zip("BTHK", shape, strict=True))
    return {**sizes, "task": task, "pass": what, "library": library, **figures, "note": note}


def worst(answer) -> float:
    """The largest relative RMS; nan is infinite."""
    return max(x if x == x else float("inf") for x in answer["errors"].values())


def verdict(answers, note: str, tolerance: float) -> str:
    """The note, and which arrays are wrong."""
    wrong = {name: error for x in answers for name, error in x["errors"].items() if not error < tolerance}
    listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
    return "; ".join(x for x in (note, listed and f"wrong: {listed}") if x)


def compare(shape, task, what, folder, libraries, ceilings, clock):
    """A row for each library: one pass of one task at one shape."""
    answers: dict[str, list[dict]] = {name: [] for name in libraries}
    notes = dict.fromkeys(libraries, "")
    for index in range(_SETS.value):
        for name, process in libraries.items():
            if notes[name]:
                continue
            if clock.left() < 1:
                notes[name] = "the budget ended"
                continue
            if process.unanswered > 1:
                notes[name] = "left out: two jobs were not answered"
                continue
            patience = clock.patience(PATIENCE.get(name, 1.0))
            job = {"do": "measure", "library": name, "what": what, "folder": folder, "index": index}
            try:
                answers[name].append(process.ask({**job, "calls": _CALLS.value}, patience))
            except WorkerError as error:
                notes[name] = f"failed: {error}"
    peer = answers.get(PEER) or []
    for name in libraries:
        clocks = {x["timer"] for x in answers[name] + peer}
        field = "ms" if len(clocks) == 1 else "host_ms"  # a host's and a device's times do not compare
        ratio = median(peer, field) / median(answers[name], field) if peer and answers[name] else None
        note = verdict(answers[name], notes[name], _TOLERANCE.value)
        yield row(shape, task, what, name, answers[name], note, ratio, ceilings)


def median(answers, field: str) -> float:
    """Of the input sets."""
    return statistics.median(x[field] for x in answers)


def main(_: list[str]) -> None:
    """Check, measure, print and write the table; one line and exit code 1 when ours is wrong or there is no GPU."""
    try:
        with contextlib.ExitStack() as cleanup:
            _main(cleanup)
    except RunError as error:
        sys.exit(f"error: {error}")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise RunError(f"--shapes: {text!r} is not four sizes, as 1x8192x16x128")
    return tuple(map(int, sizes))


def _known(flag: str, values, allowed):
    if unknown := [x for x in values if x not in allowed]:
        raise RunError(f"--{flag}: {unknown[0]!r} is not one of {', '.join(allowed)}")
    return values


def _variant(name: str) -> str:
    try:
        blocks_of(name)
    except ValueError as error:
        raise RunError(f"--libraries: {name!r}: {error}") from error
    return name


def toolkit(packages: Path, usual: Path = Path("/usr/local/cuda")) -> Path | None:
    """Where Mosaic GPU finds bin/ptxas if it is not among JAX's own packages."""
    if list(packages.glob("nvidia/cu*/bin/ptxas")):
        return None
    known = (shutil.which("ptxas"), usual / "bin/ptxas", packages / "triton/backends/nvidia/bin/ptxas")
    return next((Path(x).resolve().parents[1] for x in known if x and Path(x).exists()), None)


def settings() -> dict[str, str]:
    """What JAX on the GPU needs to know: to leave memory to the peer, and where ptxas is."""
    if _REHEARSE.value:  # threads for the interpreter's warpgroups, which wait for each other
        return {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    found = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    root = None if "CUDA_ROOT" in os.environ else toolkit(Path(jax.__file__).parents[1])
    return found | ({"CUDA_ROOT": str(root)} if root else {})


def hello(process: Worker, clock: Clock) -> dict:
    """The device and its ceilings; asked again if no answer comes, as all stands or falls with it.

    Raises:
      WorkerError: no answer the second time either.
    """
    try:
        return process.ask({"do": "hello"}, clock.patience())
    except WorkerError as error:
        print(f"JAX on the GPU: {error}; once more", flush=True)
        return process.ask({"do": "hello"}, clock.patience(2.0))


def _main(cleanup: contextlib.ExitStack):
    clock = Clock()
    shapes = [_shape(x) for x in _SHAPES.value] if _SHAPES.value else list(TINY if _REHEARSE.value else SHAPES)
    tasks, passes = _known("tasks", _TASKS.value, list(TASKS)), _known("passes", _PASSES.value, PASSES)
    wanted = _known("libraries", [x for x in _LIBRARIES.value if not x.startswith(f"{OURS}:")], (OURS, PEER, CHUNKED))
    variants = [_variant(x) for x in _LIBRARIES.value if x not in wanted]
    ours, chunked = (Worker(sys.executable, "benchmarks.gpu_worker", settings()) for _ in range(2))
    others = {name: Worker(sys.executable, "benchmarks.gpu_worker", settings()) for name in variants}
    oracle = Worker(sys.executable, "benchmarks.gpu_worker", {"JAX_PLATFORMS": "cpu"})
    peer = Worker(_PEER_PYTHON.value, "benchmarks.gpu_peer") if _PEER_PYTHON.value else None
    for process in filter(None, (ours, chunked, oracle, peer, *others.values())):
        cleanup.callback(process.stop)
    scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    planned = list(cells(shapes, tasks))

    def prepare(number):
        shape, task = planned[number]
        folder = scratch / str(number)
        folder.mkdir()
        steps, gate = TASKS[task]
        job = {"do": "draw", "shape": shape, "steps": steps, "gate": gate, "sets": _SETS.value}
        oracle.send({**job, "folder": str(folder), "seed": number})
        return str(folder)

    folder = prepare(0)
    if peer:
        with contextlib.suppress(WorkerError):  # it says so when it is asked
            peer.send({"do": "hello"})
    try:
        about = hello(ours, clock)
    except WorkerError as error:
        raise RunError(f"no GPU for JAX: {error}") from error
    if about["platform"] != "gpu" and not _REHEARSE.value:
        raise RunError(f"this needs a Hopper GPU, and jax.devices()[0] is {about['device']!r}")
    versions, processes = "no peer", {OURS: ours, CHUNKED: chunked, **others}
    if peer:
        try:
            versions, processes[PEER] = peer.receive(clock.patience())["version"], peer
        except WorkerError as error:
            print(f"{PEER}: no figures: {error}", flush=True)
    libraries = {name: processes[name] for name in _LIBRARIES.value if name in processes}
    peaks = f"{about['tflops']:.0f} TFLOP/s, {about['gb_per_s']:.0f} GB/s by {about['timer']}"
    machine = f"{about['device']}, {about['version']}, {versions}, {peaks}"
    print(f"{machine}\n{len(planned)} cells in {_BUDGET.value:.0f} s", flush=True)
    rows: list[dict] = []
    for number, (shape, task) in enumerate(planned):
        if clock.left() < 1:
            print(f"the budget ended before {len(planned) - number} of {len(planned)} cells", flush=True)
            break
        try:
            oracle.receive(clock.patience())
            note = ""
        except WorkerError as error:
            note = f"no inputs: {error}"
        current = folder
        if number + 1 < len(planned):
            with contextlib.suppress(WorkerError):
                folder = prepare(number + 1)
        for what in passes:
            if note:
                found = (row(shape, task, what, name, [], note, None, about) for name in libraries)
            else:
                found = compare(shape, task, what, current, libraries, about, clock)
            for one in found:
                if not rows:
                    print(" | ".join(one))
                print(" | ".join(str(x) for x in one.values() if x != "unmeasured"), flush=True)
                rows.append(one)
                table.write(rows, machine)  # what there is, should the machine go away
        shutil.rmtree(current, ignore_errors=True)
    failed = [x for x in rows if x["library"] == OURS and x["note"] not in ("", "the budget ended")]
    if failed:
        raise RunError(f"{len(failed)} rows of ours with a note, first {failed[0]['task']}: {failed[0]['note']}")


if __name__ == "__main__":
    app.run(main)
