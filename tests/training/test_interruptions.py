"""Whatever ends a run, the same command continues it, and the losses are those of a run that nothing ended."""

import dataclasses
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from training_runs import HERE, TINY, losses, start

from deltajax import data
from deltajax.training import loop, watch
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import Evaluation
from deltajax.training.lock import lock
from deltajax.training.loop import make_step


def crash(what: str, step: int, workdir: Path):
    """Run until the accident."""
    return start(HERE / "accident.py", what, str(step), f"--config={TINY}", f"--workdir={workdir}")


def final_state(workdir: Path):
    """Every array of the last checkpoint."""
    checkpoints = Checkpoints(workdir, read_only=True)
    config = checkpoints.progress(12)["config"]
    step, state, _ = checkpoints.restore(make_step(config).abstract, config)
    assert step == 12
    return state


def assert_same_run(workdir: Path, finished: Path):
    """Bit for bit: every loss, every array of the final state."""
    assert losses(workdir) == losses(finished)
    ours, theirs = jax.tree.leaves(final_state(workdir)), jax.tree.leaves(final_state(finished))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)


def test_killed_at_random_steps_and_in_saves(finished, tmp_path, run_train):
    """One run, killed again and again, at drawn steps and in two moments of a save."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1000)))
    print(f"KILL_SEED={seed}")  # pytest shows it if the test fails
    workdir = tmp_path / "run"
    steps = sorted(random.Random(seed).sample([1, 2, 4, 5, 7, 8, 10, 11], 3))
    for what, step in [("kill", s) for s in steps] + [("kill_in_save", 9), ("kill_before_commit", 12)]:
        done = max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0)
        if step <= done:
            continue
        assert crash(what, step, workdir).returncode == -signal.SIGKILL
    code, out, _ = run_train(workdir)
    assert code == 0
    assert "continuing after step" in out
    assert_same_run(workdir, finished)


@pytest.mark.parametrize("what, name", [("interrupt", "SIGINT"), ("terminate", "SIGTERM"), ("hangup", "SIGHUP")])
def test_signals_save_and_end_in_one_line(what, name, finished, tmp_path, run_train):
    """The step in flight is finished and saved."""
    workdir = tmp_path / "run"
    ended = crash(what, 4, workdir)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: stopped by {name}; last good checkpoint: step ")
    assert ended.stderr.count("\n") == 1
    assert Checkpoints(workdir, read_only=True).steps()[-1] in (4, 5)
    assert run_train(workdir)[0] == 0
    assert_same_run(workdir, finished)


def test_output_that_nobody_reads_and_no_code_has(tmp_path):
    """The run ends as any other: nothing of it depends on what is printed."""
    command = f"{sys.executable} -m deltajax.train --config={TINY} --workdir={tmp_path} --config.prompt=日本"
    for redirection, env in (("> /dev/full", {}), (">&- 2>&-", {}), ("> out", {"PYTHONIOENCODING": "ascii"})):
        (tmp_path / "summary.json").unlink(missing_ok=True)
        ended = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"], env=os.environ | env, cwd=tmp_path, check=False
        )
        assert ended.returncode == 0
        assert (tmp_path / "summary.json").exists()
    assert r"\u65e5\u672c" in (tmp_path / "out").read_text()
    assert (tmp_path / "sample.txt").read_text(errors="replace").startswith("日本")


def test_a_prompt_of_bytes_that_are_no_text(finished, tmp_path, run_train):
    """As a command line has them; they are found only when the run has ended."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "summary.json").unlink()
    assert run_train(workdir, "--config.prompt=\udcff")[0] == 0
    assert (workdir / "sample.txt").read_bytes().startswith(b"\xff")


def test_full_disk(finished, tmp_path, run_train):
    """One line; what was saved before stays, and the run continues once there is room."""
    workdir = tmp_path / "run"
    ended = crash("full", 7, workdir)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "File too large" in ended.stderr
    kept = re.search(r"step (\d) is kept", ended.stderr)
    code, out, _ = run_train(workdir)
    assert (code, f"continuing after step {kept[1]}" in out) == (0, True)
    assert_same_run(workdir, finished)


def test_two_runs_in_one_workdir(tmp_path, run_train):
    """The second one leaves at once."""
    with lock(tmp_path):
        code, _, err = run_train(tmp_path)
    assert code == 1
    assert "in use by another run" in err
    assert err.count("\n") == 1


class HangingSource:
    """Examples of another source; all reads but the first 40, of 48 that the run needs, hang until somebody has complained."""

    def __init__(self, source):
        self.source, self.reads, self.reported = source, itertools.count(), threading.Event()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if next(self.reads) >= 40:
            assert self.reported.wait(600)  # the loop may still compile
        return self.source[index]


def test_stalled_data_are_reported(tiny_config, tmp_path, monkeypatch, capfd):
    """Who waits, for how long and for which step; when the data come the run goes on."""
    config = dataclasses.replace(tiny_config, steps=6, evaluation=Evaluation(every=6, batches=1))
    dataset, report = data.load(config.data), watch.report_stall
    source = HangingSource(dataset.train)

    def report_and_go_on(*arguments):
        report(*arguments)
        source.reported.set()

    monkeypatch.setattr(watch, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(watch, "report_stall", report_and_go_on)
    monkeypatch.setattr(data, "load", lambda _: dataclasses.replace(dataset, train=source))
    loop.run(config, tmp_path)
    err = capfd.readouterr().err
    assert re.search(r"warning: process 0 has waited \d s for the batch of step \d; data loading is stalled\n", err)
    assert losses(tmp_path)[6][0] is not None
