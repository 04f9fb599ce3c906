"""A worker of a sweep: reads one run a line from stdin, trains it, answers with its exit code; ends when stdin does."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from deltajax import streams, train
from deltajax.training.lock import InUse, lock


def main() -> None:
    """Everything that a run prints goes to its log; only the answers go to the first stdout."""
    streams.protect()
    answers = os.fdopen(os.dup(1), "w")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # between runs; while one is in progress it has its own handler
    for line in sys.stdin:
        run = json.loads(line)
        with open(run["log"], "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            with contextlib.suppress(ValueError), lock(Path(run["folder"]), run["patience"]):
                pass
            code = train.main(["train", *run["flags"]])
        except InUse as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    main()
