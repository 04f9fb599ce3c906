"""From SIGTERM to the exit: how much of a scheduler's grace time (30 s on many) a run of one or two processes takes.

    python -m benchmarks.sigterm [--times=3] [--csv=benchmarks/results/sigterm.csv]

`experiments/first_run.py` with attention only, which compiles quickly. When a run has done 20 steps, its last process gets the
signal; what is counted ends when all processes have ended, with the step in flight done and saved. Every start continues the run.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import table
from deltajax import children
from deltajax.training import metrics

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "first_run.py"
STEPS = 20

_TIMES = flags.DEFINE_integer("times", 3, "signals for each number of processes", 1)


def start(workdir: Path, count: int) -> list[subprocess.Popen]:
    """That many processes of the run."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "deltajax.train", f"--config={EXPERIMENT}", f"--workdir={workdir}"]
    keys = {
        "model.pattern": "swa",
        "optimizer.name": "adamw",
        "steps": 100_000,
        "log_every": 1,
        "evaluation.every": 1000,
    }
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    return [
        subprocess.Popen(
            **children.tied(
                [*command, f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
            ),
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def last_step(workdir: Path) -> int:
    """The last training step in the log; 0 before the first."""
    return max((row["step"] for row in metrics.read_rows(workdir) if "loss" in row), default=0)


def stored_bytes(workdir: Path) -> int:
    """Of the last checkpoint."""
    last = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())


def stop(workdir: Path, count: int) -> float:
    """Seconds from the signal to the end of the last process."""
    before = last_step(workdir)
    processes = start(workdir, count)
    while last_step(workdir) < before + STEPS:
        time.sleep(0.2)
        assert all(process.poll() is None for process in processes), processes[0].communicate()
    sent = time.monotonic()
    processes[-1].send_signal(signal.SIGTERM)
    said = [process.communicate()[1].splitlines()[-1] for process in processes]
    seconds = time.monotonic() - sent
    assert all("stopped by SIGTERM; last good checkpoint: step" in line for line in said), said
    return seconds


def main(_: list[str]) -> None:
    """Stop, print and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in [1] * _TIMES.value + [2] * _TIMES.value:
            workdir = Path(folder) / str(count)
            seconds, size = stop(workdir, count), stored_bytes(workdir) / 1e6
            rows.append({"processes": count, "seconds": f"{seconds:.2f}", "checkpoint_MB": f"{size:.1f}"})
            print(rows[-1], flush=True)
            table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
