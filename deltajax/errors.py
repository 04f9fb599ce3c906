"""What goes wrong, in one line each: checks of configs (ValueError, exit code 2) and failures of a run (exit code 1)."""

import dataclasses
import math
from typing import Any


class RunError(RuntimeError):
    """A run cannot go on; the message is one line that says why and what is kept."""


def check_integers(config: Any, minimum: int, *names: str) -> None:
    """Check fields of a dataclass: integers of at least `minimum`, or None where that is the default.

    Raises:
      ValueError: names the field, the value and what is allowed.
    """
    for name, value, optional in _fields(config, names):
        if not (value is None and optional) and (type(value) is not int or value < minimum):
            raise ValueError(f"{name} must be an integer >= {minimum}{' or none' * optional}, got {value!r}")


def check_number(config: Any, name: str, low: float, high: float = math.inf) -> None:
    """Check a field of a dataclass: a finite number in (low, high].

    Raises:
      ValueError: names the field, the value and what is allowed.
    """
    ((_, value, _),) = _fields(config, (name,))
    allowed = f"> {low}" if high == math.inf else f"in ({low}, {high}]"
    if type(value) not in (int, float) or not math.isfinite(value) or not low < value <= high:
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def _fields(config, names):
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return [(name, getattr(config, name), defaults[name] is None) for name in names]
