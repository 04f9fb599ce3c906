"""The worker processes of a sweep, as the sweep sees them; what they do is in `sweep_worker`."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deltajax import children
from deltajax.training import serialize
from deltajax.training.lock import IN_USE, InUse

if TYPE_CHECKING:
    from deltajax.training.sweeps import Member

CONFIG_FILE = "member.json"  # in a member's folder: the config that its run was started with
ENDING_SECONDS = 15.0  # that a run before this one, which was killed, may take to end


class Worker:
    """A process that trains one member after the other: it imports and compiles once what they share."""

    def __init__(self, workdir: Path, cores: set[int] | None):
        """Nothing is started before the first member."""
        self._workdir, self._cores = workdir, cores
        self._process: asyncio.subprocess.Process | None = None

    async def train(self, member: "Member") -> str | None:
        """Run `deltajax.train` to its end; None, or why it failed.

        Raises:
          InUse: the member belongs to another run.
        """
        folder = self._workdir / member.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(serialize.to_json(member.config)))
        if self._process is not None and self._process.returncode is not None:
            self._process = None  # it was killed between two members
        flags = [f"--config={member.path}", f"--workdir={folder}"]
        flags += [f"--config.{key}={value}" for key, value in member.changes.items()]
        process = self._process = self._process or await self._start()
        assert process.stdin and process.stdout
        run = {"folder": str(folder), "log": str(folder / "log.txt"), "flags": flags, "patience": ENDING_SECONDS}
        process.stdin.write(json.dumps(run).encode() + b"\n")
        answer = await process.stdout.readline()
        if answer.strip() == b"0":
            return None
        if not answer:
            self._process = None
            code = await process.wait()
            return (
                f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
            )
        lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ")
        if reason.startswith(f"{folder} {IN_USE}"):
            raise InUse(reason)
        return reason

    async def _start(self) -> asyncio.subprocess.Process:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self._workdir / ".jax_cache")}
        cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        command = children.tied([sys.executable, "-m", "deltajax.training.sweep_worker"])
        process = await asyncio.create_subprocess_exec(
            *command["args"],
            pass_fds=command["pass_fds"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=cache | dict(os.environ),
        )
        if self._cores:
            os.sched_setaffinity(process.pid, self._cores)  # before JAX, not imported yet, counts them
        return process

    async def close(self) -> None:
        """Let the run in progress save, and end the process."""
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.close()  # no run follows
            self._process.send_signal(signal.SIGTERM)
            await self._process.wait()
        self._process = None


def share(jobs: int) -> list[set[int] | None]:
    """Return the cores of each job: an equal part each, or one core for several jobs if there are too few."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // jobs
    return [set(cores[i * each : (i + 1) * each]) if each else {cores[i % len(cores)]} for i in range(jobs)]
