"""The roll that is called when a process is gone, on a store in memory; with processes that die: `test_processes.py`."""

import json
import threading

import jax
import pytest
from training_runs import Ended, assert_killed

from deltajax.training import attendance
from deltajax.training.attendance import CALLED, PRESENT, SAID, VERDICT


class Store:
    """What is used of the client of JAX's runtime."""

    def __init__(self):
        self.keys: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.keys and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.keys[key] = value

    def key_value_try_get(self, key):
        if key not in self.keys:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.keys[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.keys.items()) if key.startswith(prefix)]


@pytest.fixture
def store(monkeypatch) -> Store:
    """Of a run of four; this is its first process."""
    store = Store()
    monkeypatch.setattr(attendance, "_client", lambda: store)
    monkeypatch.setattr(attendance, "REST_SECONDS", 0.01)
    monkeypatch.setattr(attendance, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda *_: 0)
    return store


def test_the_first_goes_when_all_who_answered_have_spoken(store, monkeypatch):
    """However long one of them takes: its going aborts them."""
    ended = threading.Event()
    monkeypatch.setattr(attendance, "_end", lambda code: ended.set())
    store.keys |= {VERDICT: "[2]", f"{SAID}1": ""}
    leaving = threading.Thread(target=attendance.leave, args=(1,))
    leaving.start()
    assert not ended.wait(0.5)
    store.keys[f"{SAID}3"] = ""
    assert ended.wait(30)
    leaving.join()


def test_who_does_not_answer_is_gone(store, monkeypatch):
    store.keys |= {f"{PRESENT}1": "", f"{PRESENT}3": ""}
    monkeypatch.setattr(attendance, "ANSWER_SECONDS", 0.2)
    said = attendance.Attendance(lambda: "kept").last_word(jax.errors.JaxRuntimeError("INTERNAL: closed"))
    assert said == "process 2 of 4 is gone; kept; to continue start all of them again"
    assert CALLED in store.keys
    assert json.loads(store.keys[VERDICT]) == [2]


def test_the_first_verdict_holds(store, monkeypatch):
    """One who comes too late says so, whatever it sees itself."""
    store.keys |= {f"{PRESENT}1": "", VERDICT: "[0, 2]"}
    said = attendance.Attendance(lambda: "kept").last_word(jax.errors.JaxRuntimeError("INTERNAL: closed"))
    assert said.startswith("process 0 of 4 did not answer for 5 s; the others have given it up; kept")


def test_nobody_is_gone(store):
    store.keys |= {f"{PRESENT}{index}": "" for index in range(4)}
    said = attendance.Attendance(lambda: "kept").last_word(jax.errors.JaxRuntimeError("INTERNAL: a\nb"))
    assert said == "process 0 of 4: INTERNAL: a; kept; to continue start all of them again"


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
    assert assert_killed([gloo, killed, Ended(-6, "", "", 0.0)], 1) == []
    for other in (one, two):
        with pytest.raises(
            AssertionError, match=r"process 2: code -6, said nothing; its log ends: detected fatal errors"
        ):
            assert_killed([other, killed, Ended(-6, "", "detected fatal errors", 0.0)], 1)
    with pytest.raises(AssertionError, match="process 0 should say"):
        assert_killed([one, killed, gloo], 1)
