"""What probes saw during training: `activations.csv` in the workdir, a row per step and block."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import numpy as np

from deltajax.errors import RunError
from deltajax.ops.activation_statistics import summarise

FILE = "activations.csv"
STATISTICS = ("top1", "top2", "top3", "median", "ratio", "kurtosis", "position", "channel", "first_token_share")
COLUMNS = ("step", "layer", *STATISTICS)


class Writer:
    """Appends rows; the file appears with the first. A resumed run first drops the rows that it will write again."""

    def __init__(self, workdir: Path, step: int):
        """Continue with the parameters after `step` updates."""
        self._path = workdir / FILE
        self._file: TextIO | None = None
        if self._path.exists():
            kept = [row for row in _read(self._path) if int(row[0]) < step]
            temporary = self._path.with_suffix(".tmp")
            with open(temporary, "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *kept])
            os.replace(temporary, self._path)

    def write(self, step: int, statistics: Mapping[str, np.ndarray]) -> None:
        """One row per block.

        Args:
          step: updates that the parameters have seen.
          statistics: as `Step.train_probed` returns them.
        """
        if self._file is None:
            new = not self._path.exists()
            self._file = open(self._path, "a", newline="")  # noqa: SIM115
            if new:
                csv.writer(self._file).writerow(COLUMNS)
        values = summarise(statistics)
        rows = [
            {"step": step, "layer": layer, **{name: _text(x[layer]) for name, x in values.items()}}
            for layer in range(len(values["top1"]))
        ]
        csv.DictWriter(self._file, COLUMNS, restval="").writerows(rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _read(path: Path) -> list[list[str]]:
    """The rows; a last line that a kill left unfinished is left out: it belongs to a step that is done again.

    Raises:
      RunError: another line is damaged.
    """
    rows: list[list[str]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = line.decode().rstrip("\r").split(",")
            if number == 1 and row == list(COLUMNS):
                continue
            if number == 1 or len(row) != len(COLUMNS):
                raise ValueError
            int(row[0]), int(row[1]), [float(value) for value in row[2:] if value]
        except ValueError:
            raise RunError(f"{path}: line {number} is damaged; remove it and start again") from None
        rows.append(row)
    return rows


def _text(value: np.generic) -> str:
    if isinstance(value, np.integer):
        return str(value)
    return "" if np.isnan(value) else f"{value:.7g}"
