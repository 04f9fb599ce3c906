"""The training command line with an accident at an exact moment: `accident.py WHAT STEP <flags of deltajax.train>`.

WHAT: `kill`, `interrupt`, `terminate` and `hang_up` (SIGKILL, SIGINT, SIGTERM, SIGHUP twice) when the row of STEP is written;
`kill_saved`, the same as
`kill` once the save of the step before it has ended; `kill_at_save`, `kill_in_save` and `kill_before_commit` (SIGKILL) when
all are to start the save of STEP together, when it is being written and when it is about to get its final name;
`full` (no file may grow past a few kB) from STEP on.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from deltajax import train
from deltajax.training import checkpoint, metrics

what, step = sys.argv[1], int(sys.argv[2])
workdir = next((Path(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("--workdir=")), Path())
del sys.argv[1:3]


def now(at: int) -> None:
    """Let the accident happen if its moment has come."""
    if at != step:
        return
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    else:
        deadline = time.monotonic() + 60
        while what == "kill_saved" and not (workdir / "checkpoints" / str(step - 1)).exists():
            assert time.monotonic() < deadline, f"the checkpoint of step {step - 1} was not saved"
            time.sleep(0.05)
        numbers = {"interrupt": [signal.SIGINT], "terminate": [signal.SIGTERM], "hang_up": [signal.SIGHUP] * 2}
        for number in numbers.get(what, [signal.SIGKILL]):
            os.kill(os.getpid(), number)


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


if what == "kill_in_save":
    checkpoint.Checkpoints.save = after_start(checkpoint.Checkpoints.save)  # type: ignore[method-assign]
elif what == "kill_at_save":
    checkpoint._Manager.save = before_start(checkpoint._Manager.save)
elif what == "kill_before_commit":
    sys.addaudithook(before_rename)
else:
    for writer in (metrics.Writer, metrics.Silence):  # of the first process, of the others
        writer.write = after_row(writer.write)  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(train.main())
