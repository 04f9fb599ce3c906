"""What goes wrong, in one line each: checks of configs (ValueError, exit code 2) and failures of a run (exit code 1)."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}


class RunError(RuntimeError):
    """A run cannot go on; the message is one line that says why and what is kept."""


def check_types(config: Any) -> None:
    """Check every field of a dataclass against its annotation; to be called first in `__post_init__`.

    Values that mean the same are converted: scalars and arrays of NumPy and JAX to Python's numbers,
    integers to floats where a float is annotated, sequences to tuples. Neither a bool nor a float is
    an integer, whatever its value.

    Raises:
      ValueError: names the field, the value, its type and what is allowed.
    """
    kind: Any = type(config)
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        converted = _convert(value, hint, f"{_title(kind)}.{name}")
        if converted is not value:
            object.__setattr__(config, name, converted)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _title(kind: type) -> str:
    """Such as "Optimizer" or "lm.Config"."""
    return kind.__module__.rpartition(".")[2] + ".Config" if kind.__qualname__ == "Config" else kind.__qualname__


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; a ValueError with one line if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    plain = _plain(value)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            try:
                return _convert(value, argument, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        for choice in arguments:
            if type(plain) is type(choice) and plain == choice:
                return choice
    elif hint is float:
        if type(plain) is float or (type(plain) is int and abs(plain) <= 2**1023):
            return float(plain)
    elif hint is str:
        if type(plain) is str and _is_unicode(plain):
            return plain
    elif hint in SCALARS:
        if type(plain) is hint:
            return plain
    elif hint is tuple or origin is tuple:
        if isinstance(plain, Iterable) and not isinstance(plain, str | bytes | bytearray | Mapping | set | frozenset):
            items = tuple(plain)
            if not arguments or arguments[-1] is Ellipsis:
                arguments = (arguments or (Any,))[:1] * len(items)
            if len(items) == len(arguments):
                made = tuple(
                    _convert(x, a, f"{where}[{i}]") for i, (x, a) in enumerate(zip(items, arguments, strict=True))
                )
                same = isinstance(value, tuple) and all(x is y for x, y in zip(made, value, strict=True))
                return value if same else made
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            entries = {
                _convert(k, arguments[0], f"a key of {where}"): _convert(v, arguments[1], f"{where}[{k!r}]")
                for k, v in value.items()
            }
            pairs = zip((*entries, *entries.values()), (*value, *value.values()), strict=False)
            return value if all(x is y for x, y in pairs) else entries
    elif dataclasses.is_dataclass(hint):
        if type(value) is hint:  # a subclass would be read back from a checkpoint as this class
            return value
    elif not isinstance(hint, type) or isinstance(value, hint):
        return value
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    raise ValueError(f"{where} must be {_describe(hint)}, got {shown} ({type(value).__name__})")


def _plain(value: Any) -> Any:
    """Convert scalars and arrays of NumPy and JAX, and subclasses of scalar types, to Python's own."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str):
        return str.__str__(value)
    for scalar in (int, float):
        if isinstance(value, scalar) and not isinstance(value, bool):
            return scalar(value)
    return value


def _is_unicode(text: str) -> bool:
    """Whether it can be written; bytes of a command line that are no UTF-8 can, as they came."""
    try:
        return bool(text.encode("utf-8", "surrogateescape")) or not text
    except UnicodeEncodeError:
        return False


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        *most, last = map(_describe, arguments)
        return f"{', '.join(most)} or {last}"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a tuple ({', '.join('...' if a is Ellipsis else _describe(a) for a in arguments)})"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from {_describe(arguments[0])} to {_describe(arguments[1])}"
    return SCALARS.get(hint) or (_title(hint) if isinstance(hint, type) else str(hint))


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
