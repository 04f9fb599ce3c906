"""When one of several processes fails: all others end within seconds, and say who is gone.

What a process that is gone does to the others depends: Gloo's collectives fail at once on those that were connected with it and
hang on those that wait for one of these; JAX's own heartbeat ends everybody 100 s later, in words of its own. So the first that
sees a collective fail calls the roll, in the key-value store of JAX's runtime. A thread of every process answers, and speaks and
ends the process if its main thread hangs. Nothing here notices a failure by itself: where none sees one, the heartbeat remains.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed as runtime  # its barriers with a time-out and its store have no public name

from deltajax.training import distributed

CALLED, PRESENT, VERDICT = "deltajax_roll/called", "deltajax_roll/present/", "deltajax_roll/verdict"
STATUS = (
    "UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION|DATA_LOSS"  # of XLA's errors
)
POLL_SECONDS = 1.0
ANSWER_SECONDS = 5.0  # that others have to answer
LEAVING_SECONDS = 5.0  # that a process whose run failed waits for the others to say the same


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
        count = jax.process_count()
        if gone:
            one = len(gone) == 1
            names = f"process{'' if one else 'es'} {', '.join(map(str, gone))} of {count} {'is' if one else 'are'} gone"
        else:
            reason = str(error).splitlines()[0] if error else "another process failed"
            names = f"process {jax.process_index()} of {count}: {reason}"
        return f"{names}; {self._kept()}; to continue start all of them again"


def is_of_runtime(error: Exception) -> bool:
    """Whether JAX's runtime failed, such as a collective; some ways of reading an array make a ValueError of that."""
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(re.match(f"({STATUS}): ", str(error)))


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
    if distributed.is_first():
        time.sleep(LEAVING_SECONDS)  # the others are aborted when it goes, and may have a last word
    _end(code)


def _end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def _close_the_roll(client: Any) -> list[int]:
    """Processes that did not answer in time, the same list for everybody who asks."""
    deadline = time.monotonic() + ANSWER_SECONDS
    everybody = set(range(jax.process_count()))
    while True:
        verdict = _read(client, VERDICT)
        if verdict is not None:
            return json.loads(verdict)
        present = {int(key.removeprefix(PRESENT)) for key, _ in client.key_value_dir_get(PRESENT)}
        if present == everybody or time.monotonic() > deadline:
            _publish(client, sorted(everybody - present))
        time.sleep(0.1)


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
