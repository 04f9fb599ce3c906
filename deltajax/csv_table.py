"""Reading CSV tables strictly: what is damaged is an error with file and line."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]


def read_table(
    path: str | Path, needed: Sequence[str] = (), unfinished_last_line: bool = False
) -> tuple[list[str], list[tuple[int, Row]]]:
    """Read a table with a header.

    Args:
      needed: columns that it must have.
      unfinished_last_line: a file that is still being written: without a newline at its end, its last
        line is left out, for a number in it may be cut.

    Returns:
      The columns, and (number of the line, row) of every row. A byte-order mark is no part of a name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, a column is missing or comes twice, a row has too few or too many cells,
        or the file ends within a line.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: the file must be UTF-8 ({error.reason})") from None
    cut = bool(text) and not text.endswith(("\n", "\r"))
    if cut and unfinished_last_line:
        text = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows += ((reader.line_num, cells) for cells in reader)
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    columns = rows.pop(0)[1] if rows else []
    missing = [name for name in needed if name not in columns]
    if missing:
        there = ", ".join(columns) or "none"
        raise ValueError(f"{path}: column {missing[0]} is missing (needed: {', '.join(needed)}; there: {there})")
    twice = next((name for n, name in enumerate(columns) if name in columns[:n]), None)
    if twice is not None:
        raise ValueError(f"{path}: line 1: column {twice!r} comes twice")
    for line, cells in rows:
        if cells and len(cells) != len(columns):
            raise ValueError(f"{path}: line {line}: {len(cells)} cells, where the header has {len(columns)} columns")
    if cut and not unfinished_last_line:
        raise ValueError(f"{path}: the last line has no end, so its last cell may be cut; end it with a newline")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows if cells]


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows alone; arguments and errors as in `read_table`."""
    return [row for _, row in read_table(path)[1]]
