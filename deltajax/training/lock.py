"""The lock by which one run has a workdir to itself."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltajax.errors import RunError

IN_USE = "is in use by another run"  # what `InUse` says of a workdir, and who it is


class InUse(RunError):
    """A workdir belongs to another run that has not ended."""


@contextmanager
def lock(workdir: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold `workdir`, which is created if it is missing, for one run.

    The kernel releases the lock when the process ends, also after `kill -9`.

    Args:
      patience: seconds to wait for a run that is just ending.

    Raises:
      ValueError: the path cannot be a folder that is written to, or TensorStore would misread it.
      InUse: another process holds the lock; the message names it.
    """
    check_path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Not "w": the file says who holds the lock, also to those who are refused.
        file = open(workdir / ".lock", "a+")  # noqa: SIM115
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise ValueError(f"--workdir={workdir}: must be a folder that can be written ({error.strerror})") from None
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: cannot be used ({error.strerror})") from None
    with file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                raise InUse(f"{workdir} {IN_USE}{_owner(file)}; wait for it or choose another --workdir") from None
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv), "since": started}
        file.write(json.dumps(owner))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_path(workdir: Path) -> None:
    """Raise a ValueError for a path that TensorStore would not use as it is written.

    TensorStore reads a backslash as a separator and needs UTF-8.
    """
    whole = str(workdir.resolve())
    problem = "a backslash" if "\\" in whole else None
    try:
        whole.encode()
    except UnicodeEncodeError:
        problem = "bytes that are not UTF-8"
    if problem:
        shown = whole.encode(errors="backslashreplace").decode()
        raise ValueError(f"--workdir={shown}: must be a path without {problem}")


def _owner(file) -> str:
    """Return " (process 7 on host, ...)" as the holder of a lock wrote it, or "" if it has not done so yet."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
        if owner["host"] == socket.gethostname() and not _is_alive(owner["pid"]):
            return ""  # the one before, which was killed
        return f" (process {owner['pid']} on {owner['host']} since {owner['since']}: {owner['command'][:200]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
