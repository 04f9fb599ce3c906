"""Sweeps: which members there are, what of them ends in the table, what is done again."""

import asyncio
import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from training_runs import HERE, ROOT

from deltajax import data, sweep
from deltajax.models import lm
from deltajax.training import metrics, pretrained, sweep_workers, sweeps
from deltajax.training.config import default_workdir, load_config
from deltajax.training.lock import lock

FILE = str(HERE / "tiny_sweep.py")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, _environment):
    """(exit code, workdir) of the whole sweep, in which one member fails."""
    workdir = tmp_path_factory.mktemp("sweep")
    return sweep.main(["sweep", f"--config={FILE}", f"--workdir={workdir}", "--jobs=2", "--bins=3"]), workdir


def test_table_of_a_sweep_whose_second_member_fails(swept):
    code, workdir = swept
    assert code == 1
    rows = read(workdir / "results.csv")
    assert list(rows[0]) == ["group", "learning_rate", "seed", *sweeps.COLUMNS]
    members = {(row["group"], row["learning_rate"], row["seed"]): row["status"] for row in rows}
    assert list(members) == [("S3", "0.01", ""), ("S3", "1e+30", ""), ("(0 1), (0 1 2 3)", "", "1")]
    good, bad, other = members.values()
    assert good == other == "complete"
    assert bad.startswith("failed: non-finite loss or gradient at step ")
    assert [row["value"] for row in rows if row["status"] == bad] == [""]

    mine = [row for row in rows if row["learning_rate"] == "0.01"]
    overall = {(row["set"], row["metric"]): float(row["value"]) for row in mine if not row["position"]}
    assert overall["", "chance"] == pytest.approx(1 / 6, rel=1e-5)
    assert overall["", "parameters"] == lm.num_params(load_config(FILE).model)
    assert [row["step"] for row in mine if row["set"] == "validation" and row["metric"] == "loss"] == ["2", "4"]
    for name in ("loss", "accuracy"):
        curve = {row["position"]: float(row["value"]) for row in mine if row["metric"] == name and row["position"]}
        assert list(curve) == ["4", "8", "12"]
        # Positions 2-4, 5-8 and 9-11: the first one asks for nothing.
        mean = np.average(list(curve.values()), weights=[3, 4, 3])
        assert mean == pytest.approx(overall["length_11", name], rel=1e-4)


def test_scores_by_position_are_those_of_the_model(swept):
    workdir = swept[1] / "group=S3,learning_rate=0.01"
    config = load_config(FILE)
    found = pretrained.load(workdir)
    assert found.step == 4
    source = data.load(config.data).evaluations["length_11"]
    tokens, targets = (np.stack([source[i][key] for i in range(10)]) for key in ("tokens", "targets"))
    logits, _ = lm.apply(found.params, config.model, tokens)
    right = np.mean(np.argmax(logits, -1) == targets, axis=0)
    rows = read(workdir / metrics.POSITIONS)
    assert [(row["set"], int(row["position"]), float(row["weight"])) for row in rows] == [
        ("length_11", i, 10) for i in range(2, 12)
    ]
    np.testing.assert_allclose([float(row["accuracy"]) for row in rows], right[1:], atol=1e-6)


def test_only_what_is_not_complete_is_done_again(swept, monkeypatch, capfd):
    _, workdir = swept
    before = (workdir / "results.csv").read_text()
    trained = []

    async def train(worker, member):
        trained.append(member.name)
        return "again"

    monkeypatch.setattr(sweeps.Worker, "train", train)
    found = sweeps.members(FILE)
    with pytest.raises(Exception, match=r"1 of 3 members failed; the first is group=S3,learning_rate=1e\+30: again"):
        sweeps.run(found, workdir, workdir / "again.csv", bins=3)
    assert trained == ["group=S3,learning_rate=1e+30"]
    complete = [line for line in before.splitlines() if "failed" not in line]
    assert [line for line in (workdir / "again.csv").read_text().splitlines() if "failed" not in line] == complete


def test_more_members_go_into_the_table_that_is_there(swept, tmp_path, capfd):
    """A member again, its number written in another way, replaces its rows; a table of something else is not touched."""
    table = tmp_path / "table.csv"
    shutil.copy(swept[1] / "results.csv", table)
    before = read(table)
    command = ["sweep", f"--config={FILE}", f"--workdir={tmp_path}", f"--csv={table}", "--bins=3", "--grid=group=S3"]
    for rate in ("0.01", "1e-2"):
        assert sweep.main([*command, f"--grid=learning_rate={rate}", "--grid=config.seed=7"]) == 0
        after = read(table)
        assert after[: len(before)] == before
        assert {(row["learning_rate"], row["seed"]) for row in after[len(before) :]} == {(rate, "7")}
    assert sweep.main([*command, "--grid=config.steps=4"]) == 2
    assert (
        "a table of runs that differ in group, learning_rate, seed, not in group, steps; name another"
        in capfd.readouterr().err
    )
    assert read(table) == after


def test_a_folder_of_another_config_is_refused_and_kept(swept, capfd):
    """Its run is complete, and would otherwise stand in the table under a config that it never had."""
    _, workdir = swept
    before = (workdir / "results.csv").read_text()
    arguments = ["sweep", f"--config={FILE}", f"--workdir={workdir}", "--config.optimizer.learning_rate=1e-5"]
    assert sweep.main(arguments) == 2
    said = capfd.readouterr().err
    assert "holds a run of another config (optimizer.learning_rate: 0.01 -> 1e-05); take another --workdir" in said
    assert (workdir / "results.csv").read_text() == before


def test_a_folder_of_another_version(swept, tmp_path, capfd):
    """A field that came later has its default, with a warning for all runs; one that is not known any more is an error."""
    workdir = shutil.copytree(swept[1], tmp_path / "sweep")
    file = sorted(workdir.glob(f"*/{sweeps.CONFIG_FILE}"))[0]
    stored = json.loads(file.read_text())
    del stored["grad_accumulation"], stored["format"]
    file.write_text(json.dumps(stored))
    command = [
        "sweep",
        f"--config={FILE}:rates=1",
        f"--workdir={workdir}",
        f"--csv={tmp_path / 'table.csv'}",
    ]  # complete
    assert sweep.main(command) == 0
    assert (
        f"warning: {workdir} has runs of an older deltajax; they are read with grad_accumulation=1"
        in capfd.readouterr().err
    )
    file.write_text(json.dumps({**stored, "accumulation": 1}))
    assert sweep.main(command) == 2
    assert (
        f"error: {file}: config.accumulation: this deltajax has no such field (did it become" in capfd.readouterr().err
    )


def test_a_member_that_is_killed_leaves_the_others(tmp_path, monkeypatch):
    """A worker that dies in a member takes that one along; one that dies between two members takes none."""
    found = sweeps.members(f"{FILE}:rates=1")

    async def kill_in_the_first_and_after_the_second():
        worker = sweeps.Worker(tmp_path, None)
        try:
            first = asyncio.create_task(worker.train(found[0]))
            while worker._process is None:
                await asyncio.sleep(0.01)
            worker._process.kill()
            assert await first == "its process ended by SIGKILL"
            assert await worker.train(found[0]) is None
            worker._process.kill()
            await worker._process.wait()
            return await worker.train(found[1])
        finally:
            await worker.close()

    assert asyncio.run(kill_in_the_first_and_after_the_second()) is None


def start_sweep(workdir, *arguments):
    command = [sys.executable, "-m", "deltajax.sweep", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_owner(folder) -> int:
    """The process that trains in this folder, once one does."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((folder / ".lock").read_text())["pid"]
        time.sleep(0.05)
    raise AssertionError(f"nobody trains in {folder}")


def test_a_killed_sweep_takes_its_workers_along(tmp_path):
    """What they held is free once they are gone."""
    folders = [tmp_path / member.name for member in sweeps.members(f"{FILE}:rates=1")]
    with start_sweep(tmp_path, f"--config={FILE}:rates=1", "--jobs=2", "--config.steps=1000000") as killed:
        workers = [wait_for_owner(folder) for folder in folders]
        killed.kill()
    assert killed.pid not in workers and workers[0] != workers[1]
    try:
        for folder in folders:
            with lock(folder, patience=60):
                pass
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def test_a_sweep_that_is_told_to_stop_ends_its_worker(tmp_path):
    (member,) = sweeps.members(FILE, ["group=S3"])
    with start_sweep(tmp_path, f"--config={FILE}", "--grid=group=S3", "--config.steps=1000000") as sweeping:
        wait_for_owner(tmp_path / member.name)
        sweeping.terminate()
        err = sweeping.communicate(timeout=120)[1]
    assert err == "error: interrupted; 0 of 1 members are complete, the same command continues\n"
    with lock(tmp_path / member.name):
        pass


def test_a_member_in_use_is_left_out(tmp_path, monkeypatch, capfd):
    """It is no failure of the member; the message says whose it is."""
    found = sweeps.members(f"{FILE}:rates=1")
    monkeypatch.setattr(sweep_workers, "ENDING_SECONDS", 0.0)
    with contextlib.ExitStack() as stack:
        for member in found:
            stack.enter_context(lock(tmp_path / member.name))
        assert sweep.main(["sweep", f"--config={FILE}:rates=1", f"--workdir={tmp_path}"]) == 1
    out, err = capfd.readouterr()
    assert out.count(f"in use by another run (process {os.getpid()} on ") == 2
    assert err == (
        f"error: 2 of 2 members are in use by other runs; the first is {found[0].name}; "
        "the same command trains what is missing\n"
    )
    assert read(tmp_path / "results.csv") == []


def test_a_member_waits_for_a_run_that_is_ending(tmp_path):
    """The lock is free a moment after the worker has asked for it; then it trains, here with a mistake."""
    (member,) = sweeps.members(FILE, ["group=S3"])
    member = dataclasses.replace(member, changes={"steps": "few"})
    folder = tmp_path / member.name

    async def train():
        worker = sweeps.Worker(tmp_path, None)
        try:
            with lock(folder):
                task = asyncio.create_task(worker.train(member))
                while not (folder / "log.txt").exists():
                    await asyncio.sleep(0.01)
            return await task
        finally:
            await worker.close()

    assert asyncio.run(train()).startswith("--config.steps=few: ")


def test_a_damaged_member_does_not_stop_the_table(swept, tmp_path):
    found = sweeps.members(FILE)
    for member in found:
        shutil.copytree(swept[1] / member.name, tmp_path / member.name, ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / found[0].name / "metrics.jsonl").write_text("not json\n" * 3)
    sweeps.write_table(found, tmp_path, tmp_path / "table.csv", {})
    statuses = {row["group"]: row["status"] for row in read(tmp_path / "table.csv")}
    assert statuses["S3"].startswith("failed: ") and list(statuses.values())[-1] == "complete"


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    running = []

    async def train(worker, member):
        running.append(member.name)
        if len(running) == 2:
            raise KeyboardInterrupt
        await asyncio.sleep(60)

    monkeypatch.setattr(sweeps.Worker, "train", train)
    assert sweep.main(["sweep", f"--config={FILE}", f"--workdir={tmp_path}", "--jobs=2"]) == 1
    assert "interrupted; 0 of 3 members are complete, the same command continues" in capfd.readouterr().err
    assert len(running) == 2


def test_grids_of_flags_and_files():
    names = [member.name for member in sweeps.members(f"{FILE}:rates=1")]
    assert names == ["group=S3,learning_rate=0.01", "group=_0_1_,_0_1_2_3_,seed=1-4dc5d5d8"]
    found = sweeps.members(FILE, ["group=S4", "config.seed=3,4", "config.data.lengths=(7,8),(9)"], {"steps": "7"})
    assert [m.settings["config.data.lengths"] for m in found] == ["(7,8)", "(9)"] * 2
    assert [(m.config.steps, m.config.seed, m.config.data.lengths) for m in found] == [
        (7, 3, (7, 8)),
        (7, 3, (9,)),
        (7, 4, (7, 8)),
        (7, 4, (9,)),
    ]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--grid=group"], "--grid=group: must be name=value,value,..."),
        (["--grid=group=S3,,S4"], "must be name=value"),
        (["--grid=group=S3,S3"], "--grid: the member group=S3 occurs twice"),
        (["--grid=config.sead=1"], "--config.sead: no such key; did you mean config.seed?"),
        (["--grid=grup=S3"], "get_config() takes no 'grup' (arguments: group, learning_rate)"),
        (["--grid=learning_rate=fast"], "learning_rate=fast: must be a number"),
        (["--grid=group=Q8"], "group must be"),
        (["--grid=group=S3", "--grid=group=S4"], "--grid: group is given twice"),
        (["--grid=config.seed=1", "--grid=seed=2"], "--grid: seed is given twice"),
        (["--csv=."], "--csv=.: must be a file, is a folder"),
        (["--grid=config.steps=1", "--jobs=0"], "jobs"),
    ],
)
def test_a_mistake_starts_nothing(arguments, part, tmp_path, capfd):
    code = sweep.main(["sweep", f"--config={FILE}", f"--workdir={tmp_path / 'new'}", *arguments])
    err = capfd.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert part in err
    assert not (tmp_path / "new").exists()


def test_file_without_a_grid(capfd):
    code = sweep.main(["sweep", f"--config={HERE / 'tiny.py'}"])
    assert (code, "the file defines no get_grid()" in capfd.readouterr().err) == (2, True)


def test_arguments_of_experiment_files():
    assert load_config(f"{FILE}:group=(0 1), (0 1 2 3),learning_rate=3e-4").data.group == "(0 1), (0 1 2 3)"
    assert load_config(f"{FILE}:learning_rate=3e-4").optimizer.learning_rate == 3e-4
    for arguments, part in [("group", "name=value"), ("rank=1", "takes no 'rank'"), ("group=S0", "group must be")]:
        with pytest.raises(ValueError, match=part):
            load_config(f"{FILE}:{arguments}")
    assert str(default_workdir("experiments/a.py")) == "runs/a"
    assert str(default_workdir("experiments/a.py:group=S3,b=2")) == "runs/a-group=S3-b=2"
    names = {default_workdir(f"experiments/a.py:group={group},b=2") for group in ("(0 1)", "(0_1)", "_0_1", "0 1")}
    assert len(names) == 4 and all("/a-group=_0_1" in str(name) or "/a-group=0_1" in str(name) for name in names)


def test_member_json_is_the_config(swept):
    text = (swept[1] / "group=S3,learning_rate=0.01" / "member.json").read_text()
    assert json.loads(text)["data"]["group"] == "S3"
    assert ROOT in HERE.parents
