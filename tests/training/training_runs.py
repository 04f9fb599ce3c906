"""Running the tiny experiment, and reading what it left."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def run_together(
    workdir: Path, accidents: list[tuple[str, int]], *arguments: str, config: str = TINY
) -> list[tuple[int, str, str]]:
    """One process per accident (step 0: none); (exit code, stdout, stderr) of each."""
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
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (what, step) in enumerate(accidents)
    ]
    ended = [process.communicate() for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, ended, strict=True)]
