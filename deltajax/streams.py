"""Make printing harmless: what can't be written is dropped, what can't be encoded is escaped."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any


class _Lossy(io.FileIO):
    """A file that takes everything; after its first failure it drops the rest."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, whatever happens."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.failure is None:
                written = super().write(rest)
                if written is None:  # another process has made the pipe non-blocking, and it is full
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self.failure = error
        return size


_replaced: dict[str, _Lossy] = {}


def protect() -> None:
    """Let the standard streams of this process never fail; those that are closed lead nowhere.

    Call it before anything opens a file, which would get the number of a closed stream, and all that is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody has replaced it
        raw = _replaced[name] = _Lossy(descriptor)
        unbuffered = getattr(stream, "write_through", False)
        protected = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=getattr(stream, "line_buffering", True),
            write_through=unbuffered,
        )
        setattr(sys, name, protected)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Within it, characters that a stream's encoding lacks are escaped."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def output_failure() -> OSError | None:
    """Why some of stdout was not written; None if it was, or if its reader left before the end."""
    sys.stdout.flush()
    failure = _replaced["stdout"].failure if "stdout" in _replaced else None
    return None if failure is None or failure.errno == errno.EPIPE else failure
