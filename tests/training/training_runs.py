"""Running the tiny experiment, and reading what it left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from deltajax.training import metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = str(HERE / "tiny.py")
# Compiles quickly, and goes on until it is told to stop.
SMALL = (
    "--config.model.pattern=swa",
    "--config.optimizer.name=adamw",
    "--config.steps=10000",
    "--config.checkpoint.every=4",
    "--config.evaluation.every=10000",
)


def start(script: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(script), *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True
    )


def losses(workdir: Path) -> dict[int, tuple[float | None, float | None]]:
    """Step -> (training loss, validation loss); a step that is written twice fails."""
    table: dict[tuple[int, str], float] = {}
    for row in metrics.read_rows(workdir):
        for key in ("loss", "validation_loss"):
            if key in row:
                assert (row["step"], key) not in table, f"step {row['step']} has two rows of {key}"
                table[row["step"], key] = row[key]
    return {step: (table.get((step, "loss")), table.get((step, "validation_loss"))) for step, _ in table}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Ended(NamedTuple):
    """How a process ended: its exit code (-9: killed), what it wrote, and when, in seconds of the monotonic clock."""

    code: int
    out: str
    err: str
    at: float

    @property
    def messages(self) -> list[str]:
        """Its errors and warnings."""
        return [line for line in self.err.splitlines() if line.startswith(("error: ", "warning: "))]


def run_together(workdir: Path, accidents: list[tuple[str, int]], *arguments: str, config: str = TINY) -> list[Ended]:
    """One process per accident (step 0: none)."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    str(HERE / "accident.py"),
                    what,
                    str(step),
                    f"--config={config}",
                    f"--workdir={workdir}",
                ),
                *(f"--coordinator=localhost:{port}", f"--num_processes={len(accidents)}", f"--process_id={index}"),
                *arguments,
            ],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},  # what one says before it is killed counts
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (what, step) in enumerate(accidents)
    ]

    def end(process: subprocess.Popen) -> Ended:
        out, err = process.communicate()
        return Ended(process.returncode, out, err, time.monotonic())

    stopped = [process for process, (what, step) in zip(processes, accidents, strict=True) if step and "stop" in what]

    def end_stopped() -> None:
        """A stopped process goes on when all others have ended."""
        for process in processes:
            if process not in stopped:
                process.wait()
        for process in stopped:
            process.send_signal(signal.SIGCONT)

    with ThreadPoolExecutor(len(processes) + 1) as threads:
        threads.submit(end_stopped)
        return list(threads.map(end, processes))


def assert_killed(ended: list[Ended], victim: int) -> list[int]:
    """One was killed, all others ended and said who is gone.

    Gloo may take a process along without a word (`_ended_by_gloo`): that one counts as gone.

    Returns:
      The last good checkpoint, as each of the others named it.
    """
    assert ended[victim].code == -signal.SIGKILL, f"process {victim} was to be killed; {_described(ended)}"
    gone = [index for index, process in enumerate(ended) if index == victim or _ended_by_gloo(process)]
    names = f"process{'es' * (len(gone) > 1)} {', '.join(map(str, gone))}"
    said = f"error: {names} of {len(ended)} {'are' if len(gone) > 1 else 'is'} gone"
    kept = []
    for index, process in enumerate(ended):
        if index in gone:
            continue
        line = rf"{said}; last good checkpoint: step (\d+); to continue start all of them again"
        found = re.fullmatch(line, "\n".join(process.messages))
        assert found and process.code == 1, f"process {index} should say {said!r}, code 1; {_described(ended)}"
        kept.append(int(found[1]))
    return kept


def _ended_by_gloo(process: Ended) -> bool:
    """Whether it met a message of another size than it waited for, which a thread of Gloo answers by ending the process.

    Seen once in some 100 kills: XLA adds up many arrays in one all-reduce, and where one fails may begin with the next.
    """
    reason = "Received data size doesn't match expected size"
    return process.code == -signal.SIGABRT and "gloo::EnforceNotMet" in process.err and reason in process.err


def _described(ended: list[Ended]) -> str:
    """Code, messages and the end of the log of every process."""
    return "".join(
        f"\nprocess {index}: code {process.code}, said {process.messages or 'nothing'}; its log ends: {process.err[-1500:]}"
        for index, process in enumerate(ended)
    )
