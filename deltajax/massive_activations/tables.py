"""How every table of this study is written."""

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """A CSV file, a row at a time as they come; missing cells stay empty, missing folders are made.

    What fails before its first row leaves an older file as it was.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain(first, rows):
            writer.writerow(row)
            file.flush()
