"""Configs as JSON and back, and how two of them differ. Every dataclass carries its type's name.

What an older deltajax wrote is read by these rules: a field or type that is not known any more is an error that names it. A field
that came later has its default, which must be what was done before there was such a field, and `defaulted` tells of it. `FORMAT`
is raised where a stored value gets another meaning under the same name.
"""

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from deltajax.training import overrides

FORMAT = 1  # of what `to_json` writes; 0: until 2026-11, without a number
_TYPE, _FORMAT = "type", "format"


class Mismatch(ValueError):
    """A checkpoint and a config, or this deltajax, that cannot go together."""


def to_json(config: Any) -> dict[str, Any]:
    """`config` (a dataclass of dataclasses, mappings, tuples, scalars) as what `json` can write."""
    return {_FORMAT: FORMAT, **_to_json(config)}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {_TYPE: f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {
            _TYPE: f"{type(value).__module__}:{type(value).__qualname__}",
            **{k: _to_json(v) for k, v in value.items()},
        }
    if isinstance(value, tuple | list):
        return [_to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"config: {value!r} of type {type(value).__name__} cannot be stored; use dataclasses, tuples, scalars"
    )


def from_json(tree: Any) -> Any:
    """Inverse of `to_json`; lists become tuples, missing fields have their defaults.

    Raises:
      ValueError: a newer format; a field or type that this deltajax does not have (nothing outside this project is ever
        imported); a value that it does not allow. The message names the field.
    """
    written = tree.get(_FORMAT, 0) if isinstance(tree, dict) else None
    if not isinstance(written, int):
        raise ValueError("config: not one that deltajax wrote")
    if written > FORMAT:
        raise ValueError(f"config: written by a newer deltajax (format {written}, this one reads up to {FORMAT})")
    return _from_json({name: value for name, value in tree.items() if name != _FORMAT}, "config")


def defaulted(tree: dict[str, Any]) -> list[str]:
    """`key=value` of every field that the JSON of a config lacks, with the default that `from_json` gives it."""
    stored = {key for key, _ in overrides.leaves(tree)}
    now = overrides.leaves(to_json(from_json(tree)))
    return [
        f"{key}={value}" for key, value in now if key not in stored and key.rsplit(".", 1)[-1] not in (_TYPE, _FORMAT)
    ]


def _from_json(tree: Any, path: str) -> Any:
    if isinstance(tree, list):
        return tuple(_from_json(v, f"{path}[{i}]") for i, v in enumerate(tree))
    if not isinstance(tree, dict):
        return tree
    made = _find_type(tree.get(_TYPE, ""), path)
    values = {k: _from_json(v, f"{path}.{k}") for k, v in tree.items() if k != _TYPE}
    if issubclass(made, Mapping):
        return made(values)
    fields = {f.name: f for f in dataclasses.fields(made) if f.init}
    for name in values:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f" (did it become {nearest[0]}?)" if nearest else ""
            raise ValueError(f"{path}.{name}: this deltajax has no such field{hint}; another version wrote it")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}.{name} is missing; another version wrote this config")
    try:
        return made(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def differences(stored: Any, given: Any) -> list[str]:
    """`key: stored -> given` for every dotted path whose value differs or exists on one side only."""
    old, new = (dict(overrides.leaves(c)) for c in (stored, given))
    absent = "absent"
    return [
        f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def _find_type(name: Any, path: str) -> Any:
    module, _, qualname = str(name).partition(":")
    if module == "builtins" and qualname == "dict":
        return dict
    if module.split(".")[0] != "deltajax":
        raise ValueError(f"{path}: type {name!r} is not one of this project's")
    try:
        importlib.import_module(module)
        made: Any = sys.modules[module]
        for part in qualname.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError):
        made = None
    if not (dataclasses.is_dataclass(made) or (isinstance(made, type) and issubclass(made, Mapping))):
        raise ValueError(f"{path}: this deltajax has no type {name!r}; another version wrote it")
    return made
