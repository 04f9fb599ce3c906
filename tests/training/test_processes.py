"""Several processes over loopback: the same losses as one, whoever dies; on another mesh and process count; roll call."""

import contextlib
import os
import random
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from training_runs import SMALL, Ended, assert_killed, free_port, losses, run_together

from deltajax.errors import RunError
from deltajax.layers.param import count_params
from deltajax.training import attendance, distributed, loop, overrides
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import TrainConfig


def damage(checkpoint: Path, what: str) -> None:
    """Cut every file of the parameters' arrays in half; or the file of losses; or change how the data go on."""
    if what == "arrays":
        for path in checkpoint.glob("params/ocdbt.process_0/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "losses":
        (checkpoint / "metrics").mkdir()
        (checkpoint / "metrics" / "metrics").write_text("{")
    else:
        path = checkpoint / "progress" / "metadata"
        path.write_text(re.sub(r'("iterator": \{.*?)\d', r"\g<1>9", path.read_text(), count=1))


def save_another_run(workdir: Path, config: TrainConfig) -> int:
    """A run with a checkpoint of the parameters that another seed gives; how many there are."""
    config = overrides.apply(config, dict(flag.removeprefix("--config.").split("=") for flag in SMALL))
    state = loop.make_step(config, jax.devices()[:1]).init(config.seed + 1)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(1, state, config, {}, None)
    return count_params(state.params)


def test_killed_full_torn_and_moved(tmp_path, tiny_config):
    """Four processes that begin from another run's parameters, one killed; again, in a save; two others on another mesh: the
    newest checkpoint is torn, the disk of one is full; two that are told to stop.

    All losses are those of one process.
    """
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1000)))
    print(f"KILL_SEED={seed}")  # pytest shows it if the test fails
    workdir, draw = tmp_path / "run", random.Random(seed)
    size = save_another_run(tmp_path / "another", tiny_config)
    small = (*SMALL, f"--config.init_from={tmp_path / 'another'}")

    def steps() -> list[int]:
        return Checkpoints(workdir, read_only=True).steps()

    def four(victim: int, what: str, step: int) -> tuple[list[int], str]:
        accidents = [(what, step) if index == victim else ("kill", 0) for index in range(4)]
        ended = run_together(workdir, accidents, "--config.mesh.data=2", "--config.mesh.fsdp=2", *small)
        return assert_killed(ended, victim), ended[0].out

    step = draw.choice([9, 13])
    kept, out = four(draw.randrange(4), "kill_saved", step)
    assert set(kept) <= {step - 1}
    assert f"{size:,} parameters from step 1 of {tmp_path / 'another'}\n" in out
    what = draw.choice(["kill_at_save", "kill_in_save", "kill_before_commit"])
    four(0 if what == "kill_before_commit" else draw.randrange(4), what, step + 3)
    assert steps()[-1] in (step - 1, step + 3)  # the other three may just have written everything

    def two(*accidents: tuple[str, int]) -> list[Ended]:
        ended = run_together(workdir, list(accidents), "--config.mesh.data=1", "--config.mesh.tensor=2", *small)
        assert [process.code for process in ended] == [1, 1], ended
        return ended

    newest, before = steps()[::-1][:2]
    damage(workdir / "checkpoints" / str(newest), draw.choice(["arrays", "losses", "data"]))
    full = two(("kill", 0), ("full", before + 2))
    assert f"continuing after step {before} " in full[0].out
    torn, message = full[0].messages
    assert f"checkpoint of step {newest} " in torn
    assert full[1].messages == [message]
    assert message.endswith(f"File too large (process 1); step {before} is kept")

    first, second = two(("kill", 0), ("terminate", before + 2))
    last = steps()[-1]
    assert last >= before + 2
    message = f"error: stopped by SIGTERM; last good checkpoint: step {last}, the same command continues"
    assert first.messages == second.messages == [message]
    assert [line for line in second.out.splitlines() if not line.startswith("[Gloo]")] == []

    (alone,) = run_together(tmp_path / "alone", [("terminate", 20)], *small)
    assert alone.code == 1
    ours, theirs = losses(workdir), losses(tmp_path / "alone")
    assert set(ours) == set(range(1, last + 1))
    for at in range(1, min(last, 20) + 1):
        assert ours[at][0] == pytest.approx(theirs[at][0], rel=1e-4), f"step {at}"


def test_the_first_is_killed_while_all_compile(tmp_path):
    """JAX would abort the other one at once, in words of its own."""
    ended = run_together(tmp_path, [("kill_in_compile", 1), ("kill", 0)], *SMALL)
    assert [process.code for process in ended] == [-signal.SIGKILL, 1], ended
    again = "to continue start all of them again"
    assert ended[1].messages == [f"error: process 0 of 2 is gone; no checkpoint was saved yet; {again}"]


def test_one_is_stopped_while_jax_starts(tmp_path):
    """Nothing closes; without a sign of life it counts as gone, and says so itself when it goes on."""
    ended = run_together(tmp_path, [("kill", 0), ("stop_in_start", 1)], *SMALL)
    assert [process.code for process in ended] == [1, 1], ended
    again = "to continue start all of them again"
    assert ended[0].messages == [f"error: process 1 of 2 is gone; {again}"]
    message = f"error: process 1 of 2 did not answer for 10 s; the others have given it up; {again}"
    assert ended[1].messages == [message]


def start_processes(*processes: tuple[int, int], timeout: int = 20) -> list[str]:
    """What `distributed.start` says to those (index, count) that come; JAX itself is not reached."""
    port = free_port()

    def come(process: tuple[int, int]) -> str:
        with pytest.raises(RunError) as raised:
            distributed.start(f"localhost:{port}", process[1], process[0], timeout)
        return str(raised.value)

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(come, processes))


def test_missing_processes_are_named():
    for message in start_processes((0, 4), (2, 4), timeout=2):
        assert message.startswith("processes 1, 3 of 4 did not come within 2 s (came, besides 0: 2 on ")
    (message,) = start_processes((1, 2), timeout=1)
    assert "process 0 of --coordinator=localhost:" in message
    assert message.endswith("did not come within 1 s")


def test_who_dies_in_the_roll_call_is_gone(monkeypatch):
    """It may come again for a while, but nobody waits for the whole time-out."""
    monkeypatch.setattr(attendance, "TICK_SECONDS", 0.05)
    port = free_port()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(attendance.call_the_roll, port, 3, 600)
        for _ in range(2):
            with socket.socket() as connection:
                while connection.connect_ex(("localhost", port)):  # it is not there yet
                    pass
                connection.sendall(b"1 3\n")
        with pytest.raises(RunError, match="process 1 of 3 is gone; to continue start all of them again"):
            first.result()
    with socket.create_server(("", port)) as server, ThreadPoolExecutor(1) as thread:
        other = thread.submit(attendance.answer_the_roll, "localhost", port, 1, 3, 600)
        while not other.done():
            server.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()
        with pytest.raises(RunError, match="process 0 of 3 is gone; to continue start all of them again"):
            other.result()


def test_processes_that_do_not_fit_together_are_named():
    for message in start_processes((0, 3), (1, 4)):
        assert message.startswith("--num_processes is 3 on process 0 and 4 on process 1 (")
    for message in start_processes((0, 3), (1, 3), (1, 3)):
        assert message.startswith("--process_id=1 was given to two processes (")


def test_somebody_else_at_the_coordinators_address():
    """A port that is taken on the first host; a service of another kind there, as another one sees it."""
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(RunError, match="cannot be used on this host"):
            distributed.start(address, 2, 0, timeout=5)
        with ThreadPoolExecutor(1) as thread:
            said = thread.submit(distributed.start, address, 2, 1, timeout=5)
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            with pytest.raises(RunError, match=f"--coordinator={address}: what answers there is not process 0"):
                said.result()


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("localhost:1", 2, None), "--process_id (or JAX_PROCESS_ID) is missing"),
        (("localhost:1", 2, 2), "--process_id must be in [0, 2), got 2"),
        (("localhost:1", 0, 0), "--num_processes must be >= 1, got 0"),
        (("localhost:99999", 2, 0), "--coordinator must be host:port, got 'localhost:99999'"),
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


def test_settings_from_a_cluster(monkeypatch):
    """As one of two tasks of a SLURM step: the coordinator is the step's first host."""
    step = {
        "JOB_ID": "7",
        "STEP_NODELIST": "localhost",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "1",
        "STEP_NUM_NODES": "1",
    }
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(RunError, match=r"process 0 of --coordinator=localhost:\d+ did not come within 1 s"):
        distributed.start(timeout=1)
