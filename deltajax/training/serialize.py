"""Configs as JSON and back, and how two of them differ. Every dataclass carries its type's name."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from deltajax.training import overrides

_TYPE = "type"


class Mismatch(Exception):
    """A checkpoint and a config that cannot go together."""


def to_json(value: Any) -> Any:
    """`value` (dataclasses, mappings, tuples, scalars) as what `json` can write."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {_TYPE: f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {
            _TYPE: f"{type(value).__module__}:{type(value).__qualname__}",
            **{k: to_json(v) for k, v in value.items()},
        }
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"config: {value!r} of type {type(value).__name__} cannot be stored; use dataclasses, tuples, scalars"
    )


def from_json(tree: Any) -> Any:
    """Inverse of `to_json`; lists become tuples.

    Raises:
      ValueError: a type that is not defined in this project (nothing else is ever imported).
    """
    if isinstance(tree, list):
        return tuple(from_json(v) for v in tree)
    if not isinstance(tree, dict):
        return tree
    fields = {k: from_json(v) for k, v in tree.items() if k != _TYPE}
    made: Any = _find_type(tree.get(_TYPE, ""))
    return made(fields) if issubclass(made, Mapping) else made(**fields)


def differences(stored: Any, given: Any) -> list[str]:
    """`key: stored -> given` for every dotted path whose value differs or exists on one side only."""
    old, new = (dict(overrides.leaves(c)) for c in (stored, given))
    absent = "absent"
    return [
        f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def _find_type(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if module == "builtins" and qualname == "dict":
        return dict
    if module.split(".")[0] != "deltajax":
        raise ValueError(f"config: type {name!r} is not one of this project's")
    importlib.import_module(module)
    made: Any = sys.modules[module]
    for part in qualname.split("."):
        made = getattr(made, part)
    return made
