"""The tidy tables that sweeps write: reading, choosing and grouping their rows, and how settings are named."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltajax.csv_table import Row as Row
from deltajax.csv_table import read_table
from deltajax.training import overrides

Where = Mapping[str, Any]  # column -> value, or several allowed ones


def read(path: Path) -> list[Row]:
    """Read the rows of a sweep's table.

    Raises:
      ValueError: the table is damaged, a number of a complete run is none, or a number comes twice; the
        message has file and line.
    """
    _, rows = read_table(path, NOT_SETTINGS)
    first: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        if row["status"] != "complete":
            continue
        try:
            float(row["value"]), int(row["step"])
        except ValueError:
            raise ValueError(
                f"{path}: line {line}: step {row['step']!r} and value {row['value']!r} must be numbers"
            ) from None
        earlier = first.setdefault(tuple(v for k, v in row.items() if k != "value"), line)
        if earlier != line:
            raise ValueError(f"{path}: line {line} repeats the number of line {earlier}; remove one of them")
    return [row for _, row in rows]


def median(values: Iterable[float]) -> float:
    """Return the median; NaN if any value is NaN, whatever the order."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def unify(rows: Iterable[Row]) -> list[Row]:
    """The rows with equal settings spelled as where they come first: 0.01 and 1e-2, True and true are one setting."""
    first: dict[tuple[str, Any], str] = {}
    return [
        {k: v if k in NOT_SETTINGS or not v else first.setdefault((k, overrides.normal(v)), v) for k, v in row.items()}
        for row in rows
    ]


def check_unique(rows: Iterable[Row], name: str) -> None:
    """Raise a ValueError if two numbers are of the same run, step, set, position and metric."""
    seen = set()
    for row in rows:
        key = tuple(v for k, v in row.items() if k not in ("value", "status"))
        if row["status"] == "complete" and key in seen:
            what = ", ".join(f"{k} {v}" for k, v in row.items() if v and k not in ("value", "status"))
            raise ValueError(f"{name}.csv, with the tables beside it, has two numbers for {what}")
        seen.add(key)


def select(rows: Iterable[Row], where: Where) -> list[Row]:
    """Complete rows whose columns have one of the allowed values, compared as numbers where both are.

    `step="last"` keeps the last step of each member; a column that `where` does not name may be anything, but rows of
    single positions are only selected by naming "position".
    """
    where = {"position": ""} | dict(where)
    chosen = []
    last = where.pop("step", None) == "last"
    for row in rows:
        if row["status"] == "complete" and all(_matches(row.get(k, ""), allowed) for k, allowed in where.items()):
            chosen.append(row)
    if last:
        final: dict[tuple, int] = {}
        for row in chosen:
            final[member(row)] = max(final.get(member(row), 0), int(row["step"]))
        chosen = [row for row in chosen if int(row["step"]) == final[member(row)]]
    return chosen


ANY = object()  # in `where`: whatever is not empty


def _matches(value: str, allowed: Any) -> bool:
    if allowed is ANY:
        return value != ""
    if isinstance(allowed, list | tuple | set):
        return any(_matches(value, one) for one in allowed)
    try:
        return float(value) == float(allowed)
    except ValueError:
        return value == str(allowed)


NOT_SETTINGS = ("status", "step", "set", "position", "metric", "value")


def member(row: Row) -> tuple[str, ...]:
    """What tells a member of a sweep from the others."""
    return tuple(v for k, v in row.items() if k not in NOT_SETTINGS)


def group(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
    """Values by the columns' values, in the order of the table."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(c, "") for c in columns), []).append(float(row["value"]))
    return groups


def name_of(columns: Sequence[str], values: Sequence[str], labels: Mapping[str, str]) -> str:
    """Such as "R = 2, beta_max = 1" for numbers and "S5, attention" for words; `labels` may say otherwise."""
    parts = []
    for column, value in zip(columns, values, strict=True):
        if value in labels:
            parts.append(labels[value])
        elif re.fullmatch(r"-?\d+(\.\d*)?(e[-+]?\d+)?", value):
            number = float(value)
            parts.append(f"{labels.get(column, column)} = {number:g}")
        else:
            parts.append(value)
    return ", ".join(parts)
