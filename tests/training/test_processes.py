"""Several processes over loopback: the same losses as one, whoever dies; on another mesh and process count; roll call."""

import os
import random
import re
import signal
import threading
from pathlib import Path

import pytest
from training_runs import SMALL, free_port, losses, run_together

from deltajax.errors import RunError
from deltajax.training import distributed
from deltajax.training.checkpoint import Checkpoints


def damage(checkpoint: Path) -> None:
    """Cut every file of the parameters' arrays in half."""
    for path in checkpoint.glob("params/ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error: ", "warning: "))]


def test_killed_torn_and_moved(tmp_path):
    """Four processes, one killed; the newest checkpoint torn; two others on another mesh, one told to stop.

    All losses are those of one process.
    """
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1000)))
    print(f"KILL_SEED={seed}")  # pytest shows it if the test fails
    workdir, draw = tmp_path / "run", random.Random(seed)
    victim, step = draw.randrange(4), draw.choice([9, 13])
    accidents = [("kill_saved", step if index == victim else 0) for index in range(4)]
    ended = run_together(workdir, accidents, "--config.mesh.data=2", "--config.mesh.fsdp=2", *SMALL)
    assert ended[victim][0] == -signal.SIGKILL, ended
    # JAX may abort a process that is slower to see it than others, and aborts all when the first one dies.
    said = [errors(err) for code, _, err in ended if code == 1]
    assert (said or victim == 0) and all(code for code, *_ in ended), ended
    for (message,) in said:
        assert re.match(r"error: process \d of 4: .*last good checkpoint: step \d+; to continue start all", message)
    newest, before = Checkpoints(workdir, read_only=True).steps()[::-1][:2]

    damage(workdir / "checkpoints" / str(newest))
    accidents = [("kill", 0), ("terminate", 12)]
    ended = run_together(workdir, accidents, "--config.mesh.data=1", "--config.mesh.tensor=2", *SMALL)
    assert [code for code, *_ in ended] == [1, 1], ended
    assert f"continuing after step {before} " in ended[0][1]
    torn, stopped = errors(ended[0][2])
    assert f"checkpoint of step {newest} " in torn
    last = Checkpoints(workdir, read_only=True).steps()[-1]
    assert stopped == f"error: stopped by SIGTERM; last good checkpoint: step {last}, the same command continues"
    assert last >= 12
    assert [line for line in ended[1][1].splitlines() if not line.startswith("[Gloo]")] == []

    alone = run_together(tmp_path / "alone", [("terminate", 14)], *SMALL)
    assert alone[0][0] == 1
    ours, theirs = losses(workdir), losses(tmp_path / "alone")
    for at in range(1, 13):
        assert ours[at][0] == pytest.approx(theirs[at][0], rel=1e-4), f"step {at}"


def start_processes(count: int, *indices: int, timeout: int = 20) -> list[str]:
    """What `distributed.start` says to those processes of `count` that come; JAX itself is not reached."""
    port, said = free_port(), {}

    def come(index: int) -> None:
        try:
            distributed.start(f"localhost:{port}", count, index, timeout)
        except (RunError, ValueError) as error:
            said[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [said[index] for index in indices]


def test_missing_processes_are_named(monkeypatch):
    for index, message in zip((0, 2), start_processes(4, 0, 2, timeout=2), strict=True):
        assert message.startswith("processes 1, 3 of 4 did not come within 2 s (came, besides 0: 2 on "), index
    (message,) = start_processes(2, 1, timeout=1)
    assert "process 0 of --coordinator=localhost:" in message
    assert message.endswith("did not come within 1 s")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("localhost:1", 2, None), "--process_id (or JAX_PROCESS_ID) is missing"),
        (("localhost:1", 2, 2), "--process_id must be in [0, 2), got 2"),
        (("localhost", 2, 0), "--coordinator must be host:port, got 'localhost'"),
        (("nowhere.invalid:1", 2, 1), "nowhere.invalid:1: no such host"),
    ],
)
def test_wrong_settings(arguments, part):
    with pytest.raises((ValueError, RunError), match=re.escape(part)):
        distributed.start(*arguments, timeout=1)


def test_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match="--num_processes must be an integer, got 'two'"):
        distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert distributed.start() is False
