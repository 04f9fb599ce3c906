"""Running the tiny experiment, and reading what it left."""

import os
import subprocess
import sys
from pathlib import Path

from deltajax.training import metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = str(HERE / "tiny.py")


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
