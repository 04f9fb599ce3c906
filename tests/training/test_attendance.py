"""Who is gone, as the watches of several processes find it in one process; with processes that die: `test_processes.py`."""

import contextlib
import socket
import threading

import jax
import pytest
from training_runs import Ended, assert_killed

from deltajax.training import attendance, relay
from deltajax.training.attendance import Attendance, _Peer

COUNT = 4


class Processes:
    """A run of four, connected; those that watch are to be started. The others are connections that a test holds."""

    def __init__(self, watching: tuple[int, ...]):
        pairs = {index: socket.socketpair() for index in range(1, COUNT)}
        self.ends = {index: pair[1] for index, pair in pairs.items()}
        self.first = {index: pair[0] for index, pair in pairs.items()}
        hub = {index: _Peer(connection, "here") for index, connection in self.first.items()}
        peers = {0: hub} | {index: {0: _Peer(connection, "there")} for index, connection in self.ends.items()}
        self.watches = {index: Attendance(index, COUNT, peers[index]) for index in watching}
        for watch in self.watches.values():
            watch.kept = lambda: "kept"
            watch.start()

    def said(self, capfd) -> list[str]:
        """All lines, once every watch has ended."""
        for watch in self.watches.values():
            watch._thread.join(60)
            assert not watch._thread.is_alive()
        return sorted(capfd.readouterr().err.splitlines())

    def close(self) -> None:
        for connection in (*self.first.values(), *self.ends.values()):
            connection.close()


def gone(names: str) -> str:
    return f"error: {names} gone; kept; to continue start all of them again"


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """Exit codes of processes that would have ended. Time passes quickly."""
    codes: list[int] = []
    monkeypatch.setattr(attendance, "end", codes.append)
    monkeypatch.setattr(attendance, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(attendance, "LEAVING_SECONDS", 0.2)
    return codes


@pytest.fixture
def processes(ended):
    """`processes(indices of those that watch)`."""
    with contextlib.ExitStack() as stack:

        def start(*watching: int) -> Processes:
            return stack.enter_context(contextlib.closing(Processes(watching)))

        yield start


@pytest.mark.parametrize(
    "victims, names", [((2,), "process 2 of 4 is"), ((0,), "process 0 of 4 is"), ((1, 3), "processes 1, 3 of 4 are")]
)
def test_who_closes_a_connection_is_gone(victims, names, processes, ended, capfd):
    """All that are left say so, whether they wait for it or not, and end with code 1."""
    run = processes(*(index for index in range(COUNT) if index not in victims))
    for victim in victims:
        for connection in run.first.values() if victim == 0 else [run.ends[victim]]:
            connection.close()
    left = COUNT - len(victims)
    assert run.said(capfd) == [gone(names)] * left
    assert ended == [1] * left


@pytest.mark.parametrize("victim", [0, 2])
def test_who_is_silent_is_gone(victim, processes, ended, capfd):
    """It learns that when it goes on."""
    run = processes(*(index for index in range(COUNT) if index != victim))
    if victim == 0:  # there are signs of life of the others, but nobody passes on who is gone
        assert run.said(capfd) == [gone("process 0 of 4 is")] * 3
        late = Attendance(0, COUNT, {index: _Peer(connection, "") for index, connection in run.first.items()})
    else:
        assert run.said(capfd) == [gone("process 2 of 4 is")] * 3
        late = Attendance(2, COUNT, {0: _Peer(run.ends[2], "")})
    late.start()
    late._thread.join(60)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: process {victim} of 4 did not answer for ")
    assert line.endswith(" s; the others have given it up; to continue start all of them again")
    assert ended == [1] * 4


@pytest.mark.parametrize("victim", [0, 2])
def test_who_fails_alone_is_gone(victim, processes, ended, capfd):
    """It has said why, and says no more; others that wait to leave after a success learn of it, too."""
    run = processes(*range(COUNT))
    done = threading.Thread(target=run.watches[1].leave, args=(0,))
    done.start()
    run.watches[victim].leave(1)
    done.join()
    assert run.said(capfd) == [gone(f"process {victim} of 4 is")] * 3
    assert ended == [1] * 4


@pytest.mark.parametrize("code", [0, 1])
def test_who_ends_as_all_do_is_not_gone(code, processes, ended, capfd):
    run = processes(*range(COUNT))
    threads = [threading.Thread(target=watch.leave, args=(code,)) for watch in run.watches.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.said(capfd) == []
    assert ended == [1] * COUNT * code


def test_an_error_of_a_collective(processes, ended, monkeypatch, capfd):
    """The main thread says who is gone, or the error itself if nobody is."""
    error = jax.errors.JaxRuntimeError("INTERNAL: closed\nat a place")
    run = processes(0, 1, 3)
    monkeypatch.setattr(attendance, "VERDICT_SECONDS", 0.1)
    assert run.watches[0].last_word(error) == (
        "process 0 of 4: INTERNAL: closed; kept; to continue start all of them again"
    )
    monkeypatch.setattr(attendance, "VERDICT_SECONDS", 60)
    run.ends[2].close()
    said = run.watches[1].last_word(error)
    assert said == "process 2 of 4 is gone; kept; to continue start all of them again"
    assert run.said(capfd) == [gone("process 2 of 4 is")]  # the watch of the third


def test_a_relay_holds_what_the_service_has_closed():
    """JAX's client would abort its process; it hears of a service that has not started, and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        host, _, relayed = relay.start("127.0.0.1", port).rpartition(":")
        with socket.create_connection((host, int(relayed))) as client:
            connection, _ = service.accept()
            with connection:
                client.sendall(b"question")
                assert connection.recv(100) == b"question"
                connection.sendall(b"answer")
                assert client.recv(100) == b"answer"
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
    with socket.create_connection((host, int(relayed))) as client:
        assert client.recv(1) == b""


def test_causes_are_of_the_runtime():
    """Orbax wraps what a collective raises, and so do we."""
    try:
        try:
            raise ValueError("UNKNOWN: Gloo AllGather failed: closed")
        except ValueError as error:
            raise RuntimeError("could not be written") from error
    except RuntimeError as error:
        assert attendance.is_of_runtime(error)
    assert not attendance.is_of_runtime(RuntimeError("could not be written"))


def test_only_what_gloo_ends_may_be_silent():
    """The helper of the tests with processes: whom it excuses, and what it says of one that ended without a word."""
    killed = Ended(-9, "", "", 0.0)
    gloo = Ended(-6, "", "gloo::EnforceNotMet\nReceived data size doesn't match expected size.", 0.0)

    def says(names: str) -> Ended:
        line = f"error: {names} gone; last good checkpoint: step 8; to continue start all of them again\n"
        return Ended(1, "", line, 0.0)

    one, two = says("process 1 of 3 is"), says("processes 1, 2 of 3 are")
    assert assert_killed([one, killed, one], 1) == [8, 8]
    assert assert_killed([two, killed, gloo], 1) == [8]
    for other in (one, two):
        with pytest.raises(
            AssertionError, match=r"process 2: code -6, said nothing; its log ends: detected fatal errors"
        ):
            assert_killed([other, killed, Ended(-6, "", "detected fatal errors", 0.0)], 1)
    with pytest.raises(AssertionError, match="process 0 should say"):
        assert_killed([one, killed, gloo], 1)
