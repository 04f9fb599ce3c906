"""What every benchmark does with its figures: one `--csv` flag, and one way to write a table with its date and machine."""

import csv
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

CSV = flags.DEFINE_string("csv", None, "write the table to this file")


def cpu() -> str:
    """The machine that a figure measured on the CPU belongs to."""
    return f"{os.cpu_count()} CPU cores of a shared machine, jax {jax.__version__}"


def write(rows: Sequence[Mapping[str, object]], machine: str) -> None:
    """Rows, a field a column, to the file of `--csv`; does nothing without the flag."""
    if not CSV.value:
        return
    path = Path(CSV.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": time.strftime("%Y-%m-%d"), "machine": machine}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
