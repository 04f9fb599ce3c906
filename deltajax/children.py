"""Child processes that end with their parent, also after `kill -9`.

A child is started through this file, which forks a guard and then becomes the command. The parent
holds one end of a pipe. When it is gone, however it ended, the guard sees the pipe close and kills
the child's process group. It does the same with what a child leaves behind. Linux's PR_SET_PDEATHSIG
is no substitute: it follows the thread that started the child, it does not reach the child's own
children, and other systems have no such signal.

Needs nothing but Python's standard library.
"""

import contextlib
import errno
import functools
import os
import select
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any


def tied(command: Sequence[Any]) -> dict[str, Any]:
    """Arguments that make `subprocess.run` or `subprocess.Popen` start a command that ends with this process.

    The command has a process group of its own, so that Ctrl-C reaches this process alone.

    Raises:
      FileNotFoundError: there is no such program.
    """
    program, *arguments = map(os.fspath, command)
    if shutil.which(program) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    lifeline = _lifeline()
    return {
        "args": [sys.executable, "-I", "-S", __file__, str(lifeline), program, *arguments],
        "pass_fds": (lifeline,),
    }


@functools.cache
def _lifeline() -> int:
    """The end to read of a pipe whose other end closes with this process, and that no child inherits."""
    return os.pipe()[0]


def _become(lifeline: int, command: list[str]) -> None:
    """Become the command, guarded."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    running, held = os.pipe()
    child = os.getpid()
    if os.fork() == 0:
        os.close(held)
        _guard(lifeline, running, child)
    os.set_inheritable(lifeline, False)
    os.set_inheritable(held, True)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def _guard(lifeline: int, running: int, child: int) -> None:
    """Wait until the parent or the child is gone, then kill what is left of the child's group."""
    os.setsid()  # signals to the child's group do not reach the guard
    for number in (0, 1, 2):  # who reads the child's output waits until all have closed it
        os.close(number)
    ready, _, _ = select.select([lifeline, running], [], [])
    if lifeline not in ready:  # the child is ending, or has only closed the pipe
        while os.getppid() == child and not select.select([lifeline], [], [], 0.1)[0]:
            pass
    with contextlib.suppress(OSError):  # nothing is left
        os.killpg(child, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
