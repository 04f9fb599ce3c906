"""Which of several processes are gone: each watches the others, from the roll call to its end.

JAX's runtime takes 100 s to notice that a process is gone, and then aborts all others; it aborts them at
once when the first process is gone. Gloo's collectives fail or hang. So the connections of the `roll_call`
stay open, one from each process to the first, and a thread of each process watches them. A
connection that closes, or on which nothing comes for `SILENT_TICKS`, is a process that is gone. The first
process tells the others which; if it is itself gone, each of the others notices. The thread then says so
and ends its process, whatever the main thread does, with exit code 1.

Time is counted in ticks of the watch, not by the clock: a process that was starved or stopped for a while
would otherwise find everybody late.
"""

import contextlib
import dataclasses
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from deltajax.errors import RunError

OVER, GONE = "over ", "gone "  # messages: an exit code; indices of processes that are gone
STATUS = (
    "UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION|DATA_LOSS"  # of XLA's errors
)
TICK_SECONDS = 1.0  # between signs of life
SILENT_TICKS = 10  # without a sign of life, after which a process is gone
LOST_TICKS = 2  # until the first process names who is gone: others that the same cause ended, too
FAILED_TICKS = 5  # that a process whose run failed waits for the others to say the same
LEAVING_SECONDS = 2.0  # that the first process waits, at most, for the others to have read who is gone
VERDICT_SECONDS = 7.0  # that a process whose collective failed waits to learn who is gone


@dataclasses.dataclass
class Peer:
    """A process at the other end of a connection.

    Attributes:
      silent: ticks since it last sent something.
      closed: it has gone.
      code: what it wants to exit with.
    """

    connection: socket.socket
    host: str
    unread: bytes = b""
    silent: int = 0
    closed: bool = False
    code: int | None = None

    def send(self, message: str) -> None:
        """Send a line; nothing is a sign of life."""
        with contextlib.suppress(OSError):  # it has gone since, as the next look finds
            self.connection.sendall(f"{message}\n".encode())

    def receive(self) -> list[str]:
        """What has come, line by line, when something has."""
        try:
            data = self.connection.recv(2**16)
        except OSError:
            data = b""
        self.closed, self.silent = not data, 0
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines if line]


class Attendance:
    """The watch of one of several processes, from the roll call to its end."""

    def __init__(self, index: int, count: int, peers: dict[int, Peer]):
        """Nothing is watched before `start`.

        Args:
          peers: those with a connection to this process: all others for the first one, the first for the others.
        """
        self.index, self.count = index, count
        self.kept: Callable[[], str] | None = None  # says what is safe on disk
        self._peers = peers
        self._code: int | None = None  # what this process wants to exit with
        self._lost_ticks = self._failed_ticks = 0
        self._gone: list[int] | None = None  # once it is decided
        self._decided = threading.Event()
        self.has_left = False
        self._speaker = threading.Lock()  # held by the thread that has the last word
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def last_word(self, error: Exception) -> str:
        """What to say of an error of JAX: who is gone, or if nobody is, the error itself; and what is kept.

        Returns after `VERDICT_SECONDS` at most.
        """
        self._speaker.acquire()  # never released: if the watch was faster it is about to end this process
        self._decided.wait(VERDICT_SECONDS)
        return self._describe(error)

    def leave(self, code: int) -> None:
        """Wait until all want to leave; after a failure, end this process.

        `FAILED_TICKS` after the first failure, the processes that have not failed are told which one is gone.
        """
        if code:
            self._speaker.acquire(blocking=False)  # this process has said why it ends
        self._code = code
        if self.index:
            self._peers[0].send(f"{OVER}{code}")
        try:
            self._thread.join()
        except KeyboardInterrupt:
            if not code:
                raise
        self.has_left = True
        if code:
            end(code)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                peer.connection.settimeout(TICK_SECONDS)
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            tick = time.monotonic() + TICK_SECONDS
            while self._gone is None:
                self._receive(selector, tick)
                if time.monotonic() >= tick:
                    self._receive(selector, 0)  # what came while this process was stopped, if it was
                    tick = time.monotonic() + TICK_SECONDS
                    self._tick()
                if self._gone is None:
                    self._gone = self._judge()
            for peer in self._peers.values():
                peer.send(f"{GONE}{','.join(map(str, self._gone))}")
                with contextlib.suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_WR)
            self._decided.set()
            speaks = bool(self._gone) and self._speaker.acquire(blocking=False)
            if speaks:
                with contextlib.suppress(AttributeError, OSError, ValueError):  # nobody reads it
                    sys.stderr.write(f"error: {self._describe(None)}\n")
                    sys.stderr.flush()
            # Closed before the others have read it, a connection may lose what was sent.
            deadline = time.monotonic() + LEAVING_SECONDS
            while self.index == 0 and selector.get_map() and time.monotonic() < deadline:
                self._receive(selector, deadline)
        if speaks:
            end(1)
        for peer in self._peers.values():
            peer.connection.close()

    def _receive(self, selector: selectors.BaseSelector, until: float) -> None:
        """Wait for messages, and read them."""
        for key, _ in selector.select(max(until - time.monotonic(), 0)):
            peer: Peer = key.data
            for message in peer.receive():
                if message.startswith(OVER):
                    peer.code = int(message.removeprefix(OVER))
                elif message.startswith(GONE):
                    self._gone = [int(index) for index in message.removeprefix(GONE).split(",") if index]
            if peer.closed:
                selector.unregister(peer.connection)

    def _tick(self) -> None:
        for peer in self._peers.values():
            peer.silent += 1
            peer.send("")
        self._lost_ticks += bool(self._lost())
        self._failed_ticks += bool(self._failed())

    def _judge(self) -> list[int] | None:
        """Who is gone, in the end; None while that is open."""
        lost, failed = self._lost(), self._failed()
        if self.index:
            return lost or None
        if lost:
            return sorted({*lost, *failed}) if self._lost_ticks >= LOST_TICKS else None
        if self._code is not None and all(peer.code is not None for peer in self._peers.values()):
            return [] if len(failed) == self.count else failed
        return failed if self._failed_ticks > FAILED_TICKS else None

    def _lost(self) -> list[int]:
        return [index for index, peer in self._peers.items() if peer.closed or peer.silent >= SILENT_TICKS]

    def _failed(self) -> list[int]:
        codes = {0: self._code} | {index: peer.code for index, peer in self._peers.items() if index}
        return sorted(index for index, code in codes.items() if code)

    def _describe(self, error: Exception | None) -> str:
        gone = self._gone or []
        if self.index in gone:
            names = (
                f"process {self.index} of {self.count} did not answer for {SILENT_TICKS * TICK_SECONDS:.0f} s; "
                "the others have given it up"
            )
        elif gone:
            names = are_gone(gone, self.count)
        else:
            reason = str(error).splitlines()[0] if error else "another process failed"
            names = f"process {self.index} of {self.count}: {reason}"
        kept = f"; {self.kept()}" if self.kept else ""
        return f"{names}{kept}; to continue start all of them again"


current: Attendance | None = None  # of this process, once it has come to the roll call of several


def keep(kept: Callable[[], str]) -> None:
    """From here on `kept` says what is safe on disk."""
    if current is not None:
        current.kept = kept


@contextmanager
def explained() -> Iterator[None]:
    """Within it an error of JAX's runtime becomes a RunError that says who is gone, if there are several processes."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, RunError) as error:
        if current is None or not is_of_runtime(error):
            raise
        raise RunError(current.last_word(error)) from error


def leave(code: int) -> None:
    """End this process after a failure; without one wait for the others, if there are any."""
    if current is not None:
        current.leave(code)


def leave_at_exit() -> None:
    """Leave when Python ends, if that has not been done."""
    if current is not None and not current.has_left:
        current.leave(int(hasattr(sys, "last_exc")))  # of an exception that nobody caught


def is_of_runtime(error: BaseException | None) -> bool:
    """Whether JAX's runtime failed, such as a collective; some ways of reading an array make a ValueError of that.

    So it is if that was the cause: the collectives in which Orbax starts a save fail as "could not be written".
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match(f"({STATUS}): ", str(error)):
            return True
        error = error.__cause__
    return False


def are_gone(gone: list[int], count: int) -> str:
    """Say which of `count` processes are gone."""
    one = len(gone) == 1
    return f"process{'' if one else 'es'} {', '.join(map(str, gone))} of {count} {'is' if one else 'are'} gone"


def end(code: int) -> None:
    """End this process at once, whatever its other threads do."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
