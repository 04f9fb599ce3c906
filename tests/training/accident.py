"""The training command line with an accident at an exact moment: `accident.py WHAT STEP <flags of deltajax.train>`.

WHAT is how a process ends, perhaps followed by when, as in `kill_in_save`; with STEP = 0 nothing happens.
How: `kill`, `stop`, `interrupt`, `terminate` (SIGKILL, SIGSTOP, SIGINT, SIGTERM), `raise`, `exit` (`os._exit`);
`hangup` (SIGHUP twice, as a terminal that closes may send it);
`full` (no file may grow past a few kB) from then on.
When: the row of STEP is written; `saved`, the same once the save of the step before it has ended; `at_save`, `in_save`
and `before_commit`, all are to start the save of STEP together, it is being written, it is about to get its final name;
`in_start`, `in_compile`, `at_end`, in each of these phases.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax

from deltajax import train
from deltajax.training import attendance, checkpoint, loop, metrics

how, _, when = sys.argv[1].partition("_")
step = int(sys.argv[2])
workdir = next((Path(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("--workdir=")), Path())
del sys.argv[1:3]
SIGNALS = {
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
    "hangup": signal.SIGHUP,
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
}


def now(at: int) -> None:
    """Let the accident happen if its moment has come."""
    global step
    if at != step or not step:
        return
    deadline = time.monotonic() + 60
    while when == "saved" and not (workdir / "checkpoints" / str(step - 1)).exists():
        assert time.monotonic() < deadline, f"the checkpoint of step {step - 1} was not saved"
        time.sleep(0.05)
    step = 0  # once
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    elif how == "raise":
        raise LookupError("an accident")
    elif how == "exit":
        os._exit(3)
    else:
        for _ in range(2 if how == "hangup" else 1):
            os.kill(os.getpid(), SIGNALS[how])


def before(function):
    """The accident, whatever the step, then the function."""

    def wrapped(*arguments, **named):
        now(step)
        return function(*arguments, **named)

    return wrapped


def after_row(write):
    """`Writer.write`, then the accident."""

    def wrapped(self, at, **values):
        write(self, at, **values)
        if "loss" in values:
            now(at)

    return wrapped


def after_start(save):
    """`Checkpoints.save`, which returns while threads still write, then the accident."""

    def wrapped(self, at, *arguments):
        save(self, at, *arguments)
        now(at)

    return wrapped


def before_start(save):
    """What Orbax does to start a save, after the accident: the others are in its first barrier or soon will be."""

    def wrapped(self, at, **arguments):
        now(at)
        return save(self, at, **arguments)

    return wrapped


def before_rename(event, arguments):
    """Python announces every rename; the one that commits a checkpoint is called off."""
    if event == "os.rename" and os.fspath(arguments[1]).rstrip("/").endswith(f"checkpoints/{step}"):
        now(step)


if when == "in_save":
    checkpoint.Checkpoints.save = after_start(checkpoint.Checkpoints.save)  # type: ignore[method-assign]
elif when == "at_save":
    checkpoint._Manager.save = before_start(checkpoint._Manager.save)
elif when == "before_commit":
    sys.addaudithook(before_rename)
elif when == "in_start":
    jax.distributed.initialize = before(jax.distributed.initialize)
elif when == "in_compile":
    loop.Run.train = before(loop.Run.train)  # type: ignore[method-assign]
elif when == "at_end":
    loop.Run.finish = before(loop.Run.finish)  # type: ignore[method-assign]
elif when == "leaving":
    attendance.leave = before(attendance.leave)
else:
    for writer in (metrics.Writer, metrics.Silence):  # of the first process, of the others
        writer.write = after_row(writer.write)  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(train.main())
