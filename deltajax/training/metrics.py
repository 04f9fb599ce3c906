"""Numbers of a run: rows in `metrics.jsonl` and TensorBoard, a progress bar, the final plot."""

import csv
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from deltajax.csv_table import read_table
from deltajax.errors import RunError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = "metrics.jsonl"
POSITIONS = "positions.csv"
SUMMARY = "summary.json"


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """All rows; a last line that a kill left unfinished is ignored.

    Raises:
      RunError: a line is not a row, which is a step and numbers by name; the message has its number.
    """
    path = workdir / FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not _is_numeric(row):
            raise RunError(f"{path}: line {number} is damaged; remove it and start again")
        rows.append(row)
    return rows


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """What a run wrote last; None if it is not complete, or if the file is damaged: then it is written anew."""
    try:
        result = json.loads((workdir / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(result, dict) and {"steps", "validation_loss"} <= result.keys() and _is_numeric(result)
    return result if whole else None


def read_positions(workdir: Path) -> list[dict[str, str]]:
    """The rows of `positions.csv`; none if there is no such file.

    Raises:
      RunError: a row is damaged; the message has the number of its line.
    """
    path = workdir / POSITIONS
    rows: list[dict[str, str]] = []
    if not path.exists():
        return rows
    try:
        _, numbered = read_table(path, ("set", "position"))
        for line, row in numbered:
            _, position, *numbers = row.values()
            try:
                int(position), [float(number) for number in numbers if number != ""]
            except ValueError:
                raise ValueError(f"{path}: line {line}: {','.join(row.values())} is not made of numbers") from None
            rows.append(row)
    except ValueError as error:
        raise RunError(f"{error}; remove the file and start again") from None
    return rows


def _is_numeric(tree: Any) -> bool:
    """Whether it is a number, or made of such by name."""
    if isinstance(tree, dict):
        return all(map(_is_numeric, tree.values()))
    return isinstance(tree, int | float)


class Writer:
    """Appends rows; a resumed run first drops those of steps that it will do again, so that no step appears twice."""

    def __init__(self, workdir: Path, step: int):
        """Continue after `step`."""
        rows = [row for row in read_rows(workdir) if row["step"] <= step]
        path, whole = workdir / FILE, workdir / f"{FILE}.tmp"
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(whole, path)
        self._file = open(path, "a", buffering=1)  # by line: a row survives a kill  # noqa: SIM115
        # The plain event writer: SummaryWriter's thread dies on a full disk, and closing it then waits for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = event_file_writer.EventsWriter(str(workdir / "tensorboard" / "events"))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # later steps seen so far no longer count
        self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def write(self, step: int, **values: float) -> None:
        """One row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if not math.isfinite(value):  # TensorBoard has no point for it, and tensorboardX warns
                continue
            scalar = summary.scalar(name, value)
            self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar))
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def write_positions(workdir: Path, tables: dict[str, dict[str, np.ndarray]]) -> None:
    """`positions.csv`: a row per set and position (from 1) that was asked for; its weight, and means of all else.

    Args:
      tables: set -> name -> [positions] sums, "weight" among the names.
    """
    with open(workdir / POSITIONS, "w", newline="") as file:
        rows = csv.writer(file)
        names = sorted({name for table in tables.values() for name in table} - {"weight"})
        rows.writerow(["set", "position", "weight", *names])
        for of_set, table in tables.items():
            for i in np.flatnonzero(table["weight"]):
                weight = table["weight"][i]
                means = (f"{table[name][i] / weight:.6g}" if name in table else "" for name in names)
                rows.writerow([of_set, i + 1, f"{weight:.6g}", *means])


def overall(table: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over all positions."""
    weight = max(float(table["weight"].sum()), 1e-9)
    return {name: float(x.sum()) / weight for name, x in table.items() if name != "weight"}


class Silence:
    """Stands for what writes and shows in all processes but the first."""

    def write(self, step: int, *_: Any, **values: float) -> None:
        """Nothing."""

    def update(self, step: int, loss: float, speed: str) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Progress:
    """A bar with loss, speed and time left on a terminal; elsewhere one line per tenth of the run."""

    def __init__(self, step: int, steps: int):
        self._bar = tqdm.tqdm(initial=step, total=steps, unit="step", disable=not sys.stderr.isatty())
        self._steps = steps
        self._tenths = step * 10 // steps
        self._started = step

    def update(self, step: int, loss: float, speed: str) -> None:
        """Show `step`."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and step * 10 // self._steps > self._tenths:
            self._tenths = step * 10 // self._steps
            print(f"step {step}/{self._steps}  loss {loss:.3f}  {speed}", flush=True)

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        self._bar.clear()
        print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def plot(workdir: Path, bits_per_nat: float | None, baselines: dict[str, float], path: Path) -> None:
    """Training and validation loss, in bits per byte where the data are text, with a line per baseline.

    Args:
      bits_per_nat: bits per byte for one nat per target; None: not text.
      baselines: name -> bits per byte.
    """
    rows = read_rows(workdir)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(row["step"], row[key] * (bits_per_nat or 1)) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1 if key == "loss" else 2)
    for style, (name, value) in zip(("--", ":", "-."), baselines.items(), strict=False):
        axes.axhline(value, linestyle=style, color="gray", label=f"{name}: {value:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats)" if bits_per_nat is None else "bits per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
