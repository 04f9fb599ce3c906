"""When one of several processes fails: all others end within seconds, and say who is gone.

What a process that is gone does to the others depends: Gloo's collectives fail at once on those that were connected with it and
hang on those that wait for one of these; JAX's own heartbeat ends everybody 100 s later, in words of its own. So the first that
sees a collective fail calls the roll, in the key-value store of JAX's runtime. A thread of every process answers, and speaks and
ends the process if its main thread hangs. Nothing here notices a failure by itself: where none sees one, the heartbeat remains.

JAX aborts all others when the first process ends, so that one goes last: when all who answered have said what they had to say.
Time is counted in rests, not by the clock: a process that is starved or stopped for a while would otherwise find everybody late.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as runtime  # its barriers with a time-out and its store have no public name

from deltajax.training import distributed

CALLED, VERDICT = "deltajax_roll/called", "deltajax_roll/verdict"
PRESENT, SAID = "deltajax_roll/present/", "deltajax_roll/said/"  # followed by a process's index
STATUS = (
    "UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION|DATA_LOSS"  # of XLA's errors
)
POLL_SECONDS = 1.0
REST_SECONDS = 0.1
ANSWER_SECONDS = 5.0  # that others have to answer
LEAVING_SECONDS = 5.0  # that a process whose run failed waits for the others to say the same
LAST_SECONDS = 60.0  # that the first process waits, at most, for the others to have spoken


class Attendance:
    """A context in which a process of several answers when the roll is called; does nothing for a single process."""

    def __init__(self, kept: Callable[[], str]):
        """`kept` says what is safe on disk."""
        self._kept = kept
        self._over = threading.Event()
        self._speaker = threading.Lock()  # held by the thread that has the last word
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Attendance":
        if jax.process_count() > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if jax.process_count() > 1:
            self._thread.join()

    def last_word(self, error: Exception) -> str:
        """What to say of an error of JAX: who is gone, or if nobody is, the error itself; and what is kept.

        Returns after `ANSWER_SECONDS` at most.
        """
        self._speaker.acquire()  # never released: if the thread was faster it is about to end this process
        client = _client()
        client.key_value_set(CALLED, "", allow_overwrite=True)
        self._answer()
        return self._describe(_close_the_roll(client), error)

    def _watch(self) -> None:
        client = _client()
        while not self._over.wait(POLL_SECONDS):
            if _read(client, CALLED) is None:
                continue
            self._answer()
            gone = _close_the_roll(client)
            if self._speaker.acquire(blocking=False):
                print(f"error: {self._describe(gone, None)}", file=sys.stderr, flush=True)
                _leave_others(1)
            return

    def _answer(self) -> None:
        _client().key_value_set(f"{PRESENT}{jax.process_index()}", "", allow_overwrite=True)

    def _describe(self, gone: list[int], error: Exception | None) -> str:
        me, count = jax.process_index(), jax.process_count()
        if me in gone:
            names = f"process {me} of {count} did not answer for {ANSWER_SECONDS:.0f} s; the others have given it up"
        elif gone:
            one = len(gone) == 1
            names = f"process{'' if one else 'es'} {', '.join(map(str, gone))} of {count} {'is' if one else 'are'} gone"
        else:
            reason = str(error).splitlines()[0] if error else "another process failed"
            names = f"process {me} of {count}: {reason}"
        return f"{names}; {self._kept()}; to continue start all of them again"


def is_of_runtime(error: BaseException | None) -> bool:
    """Whether JAX's runtime failed, such as a collective; some ways of reading an array make a ValueError of that.

    So it is if that was the cause: the collectives in which Orbax starts a save fail as "could not be written".
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match(f"({STATUS}): ", str(error)):
            return True
        error = error.__cause__
    return False


def leave(code: int) -> None:
    """End this process after a failure, in JAX's way if all have failed.

    Else JAX would wait for the others, and they may wait for this one; threads of Orbax may wait for a process that is gone.
    """
    client = _client()
    verdict = _read(client, VERDICT)
    if verdict is None or not json.loads(verdict):
        try:
            client.wait_at_barrier("deltajax_failed", int(LEAVING_SECONDS * 1000))
            jax.distributed.shutdown()
            _end(code)
        except jax.errors.JaxRuntimeError:
            _publish(client, [jax.process_index()])
            client.key_value_set(CALLED, "", allow_overwrite=True)
    _leave_others(code)


def _leave_others(code: int) -> None:
    """End this process, which has said what it had to say; the first one waits for the others."""
    client = _client()
    client.key_value_set(f"{SAID}{jax.process_index()}", "", allow_overwrite=True)
    if distributed.is_first():
        there = set(range(jax.process_count())) - set(json.loads(_read(client, VERDICT) or "[]"))
        for _ in _rests(LAST_SECONDS):
            if _who(client, SAID) >= there:
                break
        time.sleep(POLL_SECONDS)  # from a last word to the end of its process
    _end(code)


def _end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def _close_the_roll(client: Any) -> list[int]:
    """Processes that did not answer in time, the same list for everybody who asks."""
    everybody, present = set(range(jax.process_count())), set[int]()
    for _ in _rests(ANSWER_SECONDS):
        present = _who(client, PRESENT)
        if present == everybody or _read(client, VERDICT) is not None:
            break
    _publish(client, sorted(everybody - present))
    verdict = _read(client, VERDICT)
    assert verdict is not None  # ours or that of a faster one
    return json.loads(verdict)


def _rests(seconds: float) -> Iterator[None]:
    for _ in range(round(seconds / REST_SECONDS)):
        yield
        time.sleep(REST_SECONDS)


def _who(client: Any, key: str) -> set[int]:
    """Processes that have set their key."""
    return {int(name.removeprefix(key)) for name, _ in client.key_value_dir_get(key)}


def _publish(client: Any, gone: list[int]) -> None:
    """Make it the verdict, unless another process was faster."""
    try:
        client.key_value_set(VERDICT, json.dumps(gone))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def _read(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _client() -> Any:
    client = runtime.global_state.client
    assert client is not None
    return client
