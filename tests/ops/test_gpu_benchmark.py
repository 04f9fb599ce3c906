"""The benchmark for a GPU that is there for minutes: what can go wrong with it, without one."""

import contextlib
import csv
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from absl.testing import flagsaver

from benchmarks import gpu_delta_rule, worker
from deltajax.errors import RunError

ROOT = Path(worker.__file__).parents[1]
STUB = """
import os, sys, time
from benchmarks import worker
def handle(job):
    print("chatter")
    if job["do"] == "hang": time.sleep(600)
    if job["do"] == "die": sys.stderr.write("first\\nout of registers\\n"); sys.stderr.flush(); os._exit(3)
    if job["do"] == "fail": raise MemoryError("no room\\nfor this")
    return {"pid": os.getpid()}
worker.serve(handle)
"""


def test_a_job_that_goes_wrong_costs_one_answer(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    process = worker.Worker(sys.executable, "stub", {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    first = process.ask({"do": "well"}, 60)
    assert process.ask({"do": "well"}, 60) == first
    for job, seconds, message in (
        ("fail", 60, "MemoryError: no room for this"),
        ("die", 60, r"it died \(3\): out of registers"),
        ("hang", 0.5, "no answer after 0 s"),
    ):
        with pytest.raises(worker.WorkerError, match=f"^{message}$"):
            process.ask({"do": job}, seconds)
        assert process.ask({"do": "well"}, 60) != first  # by another process
    assert process.unanswered == 1
    process.stop()
    with pytest.raises(worker.WorkerError, match="No such file"):
        worker.Worker("/no/python", "stub").send({})


def test_what_tells_most_comes_first():
    cells = list(gpu_delta_rule.cells(gpu_delta_rule.SHAPES, list(gpu_delta_rule.TASKS)))
    assert len(set(cells)) == len(cells) == 30
    assert {task for shape, task in cells[:3]} == {"delta rule", "gated delta rule", "delta product 4"}
    assert {shape for shape, task in cells[:3]} == {(1, 8192, 16, 128)}


def test_a_wrong_result_is_a_note():
    answers = [{"errors": {"o": 1e-3, "k": float("nan"), "v": 2e-3}}, {"errors": {"o": 0.5}}]
    assert gpu_delta_rule.verdict(answers, "", 1e-2) == "wrong: k nan, o 5.0e-01"
    assert gpu_delta_rule.verdict(answers[:0], "failed: x", 1e-2) == "failed: x"
    assert gpu_delta_rule.verdict([{"errors": {"o": 1e-3}}], "", 1e-2) == ""
    assert [gpu_delta_rule.worst(x) for x in answers] == [float("inf"), 0.5]


def test_what_hangs_again_and_again_is_left_out():
    gpu_delta_rule.flags.FLAGS.mark_as_parsed()
    hanging = worker.Worker("/no/python", "stub")
    hanging.unanswered = 2
    peaks = {"tflops": 800.0, "gb_per_s": 3000.0}
    arguments = ((1, 64, 1, 64), "delta rule", "forward", "", {"pallas_gpu": hanging}, peaks, gpu_delta_rule.Clock())
    (row,) = gpu_delta_rule.compare(*arguments)
    assert (row["ms"], row["note"]) == ("unmeasured", "left out: two jobs were not answered")


def test_host_times_are_compared_where_one_has_no_other():
    gpu_delta_rule.flags.FLAGS.mark_as_parsed()

    def process(ms, host_ms, timer):
        answer = {"ms": ms, "host_ms": host_ms, "timer": timer, "first_call_s": 1.0, "errors": {"o": 1e-3}}
        return types.SimpleNamespace(unanswered=0, ask=lambda *_: answer)

    libraries = {"pallas_gpu": process(1.0, 2.0, "cupti"), "fla-core": process(3.0, 3.0, "host")}
    peaks = {"tflops": 800.0, "gb_per_s": 3000.0}
    arguments = ((1, 64, 1, 64), "delta rule", "forward", "", libraries, peaks, gpu_delta_rule.Clock())
    assert [row["times_as_fast_as_fla"] for row in gpu_delta_rule.compare(*arguments)] == ["1.50", "1.00"]


def test_ptxas_is_found_beside_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for place, found in (("triton/backends/nvidia", tmp_path / "triton/backends/nvidia"), ("nvidia/cu13", None)):
        (tmp_path / place / "bin").mkdir(parents=True)
        (tmp_path / place / "bin/ptxas").touch()
        assert gpu_delta_rule.toolkit(tmp_path, usual=tmp_path / "none") == found


def test_rehearsal(tmp_path):
    """One cell in the interpreter, with our blocks and others, beside a peer without torch."""
    table = tmp_path / "table.csv"
    flags = ["--tasks=delta rule", "--passes=forward", "--shapes=1x64x1x64", "--sets=1", "--calls=1", f"--csv={table}"]
    flags.append("--libraries=pallas_gpu,fla-core,chunked,pallas_gpu:16x2x2x1")
    command = [sys.executable, "-m", "benchmarks.gpu_delta_rule", "--rehearse", f"--peer_python={sys.executable}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fla-core: no figures: it died (1): ModuleNotFoundError: No module named " in done.stdout
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["library"] for row in rows] == ["pallas_gpu", "chunked", "pallas_gpu:16x2x2x1"]
    assert all(row["note"] == "" and float(row["relative_rms"]) < 1e-2 and float(row["ms"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("pallas_gpu:16x2", "'pallas_gpu:16x2': blocks are four numbers, as 16x2x2x1"),
        ("pallas_gpu:48x2x2x1", "'pallas_gpu:48x2x2x1': columns must be one of (16, 32, 64), got 48"),
        ("fla", "'fla' is not one of pallas_gpu, fla-core, chunked"),
    ],
)
def test_libraries_that_there_are_not(library, message):
    gpu_delta_rule.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(libraries=[library]), pytest.raises(RunError, match=re.escape(message)):
        gpu_delta_rule._main(contextlib.ExitStack())
