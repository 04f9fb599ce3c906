"""Processes that answer jobs, so that what hangs, crashes or runs out of memory costs one answer and not the run.

A job and an answer are a line of JSON each. Needs nothing but Python: a peer's interpreter runs it too.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltajax import children


class WorkerError(RuntimeError):
    """No answer; the message is one line that says why."""


def one_line(error: BaseException) -> str:
    """The type and the beginning of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def serve(handle: Callable[[dict], dict]) -> None:
    """In the worker: answers every line of stdin by handle(job), or by its error. What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """`python -m module` in the repository's root, which serves; started with its first job, and anew after any failure."""

    def __init__(self, python: str, module: str, environment: Mapping[str, str] | None = None):
        self.command: Sequence[str] = (python, "-m", module)
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None
        self.unanswered = 0  # jobs to which no answer came in time

    def send(self, job: dict) -> None:
        """Give it a job; `receive` has the answer.

        Raises:
          WorkerError: it cannot be started.
        """
        if self.process is None:
            self.complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            try:
                self.process = subprocess.Popen(
                    **children.tied(self.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.complaints,
                    cwd=Path(__file__).parents[1],
                    env=self.environment,
                    text=True,
                )
            except OSError as error:
                self.complaints.close()
                raise WorkerError(one_line(error)) from error
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` tells
            print(json.dumps(job), file=self.process.stdin, flush=True)

    def receive(self, seconds: float) -> dict:
        """The answer to the last job.

        Raises:
          WorkerError: there is none in time, the process died, or the job failed; the process is gone then.
        """
        if self.process is None:
            raise WorkerError("it was given no job")
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], max(seconds, 0.0))[0]:
            self.stop()
            self.unanswered += 1
            raise WorkerError(f"no answer after {seconds:.0f} s")
        answer = self.process.stdout.readline()
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.complaints.seek(0)
            lines = self.complaints.read().strip().splitlines() or ["it said nothing"]
            code = self.stop()
            raise WorkerError(f"it died ({code}): {lines[-1][:300]}")
        found = json.loads(answer)
        if "error" in found:  # a device that has failed once may fail for ever: the next job gets a new process
            self.stop()
            raise WorkerError(found["error"])
        return found

    def ask(self, job: dict, seconds: float) -> dict:
        """`send` and `receive`."""
        self.send(job)
        return self.receive(seconds)

    def stop(self) -> int | None:
        """End the process, also one that hangs; its exit code."""
        if self.process is None:
            return None
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: leave it
            self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout, self.complaints):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        code, self.process = self.process.returncode, None
        return code
