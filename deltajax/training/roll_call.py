"""The roll call: all processes of a run meet at the coordinator's address before JAX's runtime starts there.

It names those that do not come or do not fit together. The connections stay open, for `attendance`.
"""

import contextlib
import socket
import time

from deltajax.errors import RunError
from deltajax.training import attendance
from deltajax.training.attendance import Attendance, Peer, are_gone

ROLL = "deltajax roll call: "  # before what process 0 answers


def call(port: int, count: int, timeout: int) -> Attendance:
    """Process 0: wait until every other one has come, and tell them all whether to go on.

    Raises:
      RunError: not all came, or they do not fit together; the message names them.
    """
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise RunError(f"--coordinator: port {port} cannot be used on this host ({error.strerror})") from None
    came: dict[int, Peer] = {}
    verdict = ""
    with server, contextlib.ExitStack() as connections:
        greeted = []
        server.settimeout(attendance.TICK_SECONDS)
        tick, ticks = time.monotonic() + attendance.TICK_SECONDS, timeout / attendance.TICK_SECONDS
        while len(came) < count - 1 or any(peer.closed for peer in came.values()):
            if time.monotonic() >= tick:
                tick, ticks = time.monotonic() + attendance.TICK_SECONDS, ticks - 1
                for peer in came.values():
                    peer.send("")
                    peer.closed = peer.closed or _is_closed(peer.connection)
                    peer.silent += peer.closed
                if ticks <= 0 or any(peer.silent > attendance.SILENT_TICKS for peer in came.values()):
                    break
            try:
                connection, (host, *_) = server.accept()
            except TimeoutError:
                continue
            connections.enter_context(connection)
            connection.settimeout(2)
            try:
                index, theirs = map(int, connection.makefile().readline().split())
            except (OSError, ValueError):  # someone else knocked
                continue
            peer = Peer(connection, host)
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
            verdict = f"{are_gone(gone, count)}; to continue start all of them again"
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


def answer(host: str, port: int, index: int, count: int, timeout: int) -> Attendance:
    """Any other process: come to the roll call, and learn whether to go on.

    Raises:
      RunError: process 0 did not come, something else answers, or not all came.
    """
    deadline = time.monotonic() + timeout
    lost = None  # when process 0 first closed a connection; it may be started again
    while True:
        left = deadline - time.monotonic()
        if lost is not None and time.monotonic() - lost > attendance.SILENT_TICKS * attendance.TICK_SECONDS:
            raise RunError(f"{are_gone([0], count)}; to continue start all of them again")
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
            peer = Peer(connection, host)
            peer.send(f"{index} {count}")
            connection.settimeout(attendance.SILENT_TICKS * attendance.TICK_SECONDS)
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
