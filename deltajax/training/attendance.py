"""Which of several processes are there: a roll call before JAX's runtime starts, a watch from then on.

JAX's runtime takes 100 s to notice that a process is gone, and then aborts all others; it aborts them at
once when the first process is gone. Gloo's collectives fail or hang. So the connections of the roll
call stay open, one from each process to the first, and a thread of each process watches them. A
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

ROLL = "deltajax roll call: "  # before what process 0 answers
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


def call_the_roll(port: int, count: int, timeout: int) -> "Attendance":
    """Process 0: wait until every other one has come, and tell them all whether to go on.

    Raises:
      RunError: not all came, or they do not fit together; the message names them.
    """
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise RunError(f"--coordinator: port {port} cannot be used on this host ({error.strerror})") from None
    came: dict[int, _Peer] = {}
    verdict = ""
    with server, contextlib.ExitStack() as connections:
        greeted = []
        server.settimeout(TICK_SECONDS)
        tick, ticks = time.monotonic() + TICK_SECONDS, timeout / TICK_SECONDS
        while len(came) < count - 1 or any(peer.closed for peer in came.values()):
            if time.monotonic() >= tick:
                tick, ticks = time.monotonic() + TICK_SECONDS, ticks - 1
                for peer in came.values():
                    peer.send("")
                    peer.closed = peer.closed or _is_closed(peer.connection)
                    peer.silent += peer.closed
                if ticks <= 0 or any(peer.silent > SILENT_TICKS for peer in came.values()):
                    break
            try:
                connection, (host, *_) = server.accept()
            except TimeoutError:
                continue
            connections.enter_context(connection)
            connection.settimeout(5)
            try:
                index, theirs = map(int, connection.makefile().readline().split())
            except (OSError, ValueError):  # someone else knocked
                continue
            peer = _Peer(connection, host)
            greeted.append(peer)
            if theirs != count:
                verdict = f"--num_processes is {count} on process 0 and {theirs} on process {index} ({host})"
            elif index in came and not _is_closed(came[index].connection):
                verdict = f"--process_id={index} was given to two processes ({came[index].host} and {host})"
            came[index] = peer
            if verdict:
                break
        gone = sorted(index for index, peer in came.items() if peer.closed)
        missing = sorted(set(range(1, count)) - set(came))
        if gone and not verdict:
            verdict = f"{_are_gone(gone, count)}; to continue start all of them again"
        elif missing and not verdict:
            there = ", ".join(f"{index} on {peer.host}" for index, peer in sorted(came.items())) or "none"
            absent = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))} of {count}"
            verdict = f"{absent} did not come within {timeout} s (came, besides 0: {there})"
        for peer in greeted:
            peer.send(f"{ROLL}{verdict}")
        if verdict:
            raise RunError(verdict)
        connections.pop_all()
    return Attendance(0, count, came)


def answer_the_roll(host: str, port: int, index: int, count: int, timeout: int) -> "Attendance":
    """Any other process: come to the roll call, and learn whether to go on.

    Raises:
      RunError: process 0 did not come, something else answers, or not all came.
    """
    deadline = time.monotonic() + timeout
    lost = None  # when process 0 first closed a connection; it may be started again
    while True:
        left = deadline - time.monotonic()
        if lost is not None and time.monotonic() - lost > SILENT_TICKS * TICK_SECONDS:
            raise RunError(f"{_are_gone([0], count)}; to continue start all of them again")
        if left <= 0:
            raise RunError(f"process 0 of --coordinator={host}:{port} did not come within {timeout} s")
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except socket.gaierror as error:
            raise RunError(f"--coordinator={host}:{port}: no such host ({error.strerror})") from None
        except OSError:
            time.sleep(min(0.2, max(left, 0)))  # process 0 is not there yet
            continue
        with contextlib.ExitStack() as closing:
            closing.enter_context(connection)
            peer = _Peer(connection, host)
            peer.send(f"{index} {count}")
            connection.settimeout(SILENT_TICKS * TICK_SECONDS)
            verdict = _first_line(connection)
            if verdict is None:
                lost = time.monotonic() if lost is None else lost
                time.sleep(0.2)
                continue
            if not verdict.startswith(ROLL):
                raise RunError(f"--coordinator={host}:{port}: what answers there is not process 0 of this run")
            if verdict.removeprefix(ROLL).strip():
                raise RunError(verdict.removeprefix(ROLL))
            closing.pop_all()
        return Attendance(index, count, {0: peer})


def _first_line(connection: socket.socket) -> str | None:
    """The first line that is not a sign of life; None if the other side has gone or is silent."""
    line = b""
    try:
        while byte := connection.recv(1):  # not more: what follows is for the watch
            if byte != b"\n":
                line += byte
            elif line:
                break
    except OSError:
        return None if not line else line.decode(errors="replace")
    return line.decode(errors="replace") if line else None


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has gone, perhaps to be started again."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


@dataclasses.dataclass
class _Peer:
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

    def __init__(self, index: int, count: int, peers: dict[int, _Peer]):
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

        Whoever has not failed `FAILED_TICKS` after the first that has learns that that one is gone.
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
            peer: _Peer = key.data
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
            names = _are_gone(gone, self.count)
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


def _are_gone(gone: list[int], count: int) -> str:
    one = len(gone) == 1
    return f"process{'' if one else 'es'} {', '.join(map(str, gone))} of {count} {'is' if one else 'are'} gone"


def end(code: int) -> None:
    """End this process at once, whatever its other threads do."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
