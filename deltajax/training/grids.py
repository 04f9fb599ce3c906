"""Grids of settings, as flags and experiment files give them."""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any


def check(tables: Any, path: str) -> Sequence[Mapping[str, Iterable[Any]]]:
    """Return what `get_grid` returned as a list of tables.

    Raises:
      ValueError: it is neither a mapping from names to lists of values nor several of them.
    """
    listed = [tables] if isinstance(tables, Mapping) else tables
    if isinstance(tables, Iterator):
        listed = list(tables)
    values = [pair for table in listed for pair in table.items()] if _are(listed, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and _are(of_name, object) for name, of_name in values):
        raise ValueError(
            f"--config={path}: get_grid() must return mappings from names to lists of values, got {str(tables)[:80]}"
        )
    return listed


def _are(values: Any, kind: type) -> bool:
    """Whether it is a collection, neither text nor a mapping, of these."""
    return (
        isinstance(values, Collection)
        and not isinstance(values, str | bytes | Mapping)
        and all(isinstance(value, kind) for value in values)
    )


def parse(text: str) -> tuple[str, list[str]]:
    """The name and the values of "name=value,value"."""
    name, equals, listed = text.partition("=")
    values = [v.strip() for v in re.split(r",(?![^(]*\))", listed)]
    if not equals or not name or not all(values):
        raise ValueError(f"--grid={text}: must be name=value,value,...")
    return name.strip(), values


def products(tables: Iterable[Mapping[str, Iterable[Any]]]) -> Iterator[dict[str, str]]:
    """The settings of every member: one value of every name, of one table after the other."""
    for table in tables:
        for values in itertools.product(*table.values()):
            yield {k: str(v) for k, v in zip(table, values, strict=True)}
