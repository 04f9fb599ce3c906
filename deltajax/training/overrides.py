"""Replacing fields of nested frozen dataclasses by typed dotted path: `{"optimizer.learning_rate": "3e-4"}`."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_CHOICE = ""  # in the tree of overrides: the text given for a group itself


def apply(config: Any, overrides: Mapping[str, str], prefix: str = "config") -> Any:
    """A copy of `config` with the fields named by dotted paths replaced.

    All overrides of one dataclass are applied together, so its checks see only the final values.

    Args:
      config: a frozen dataclass; its fields may hold dataclasses and mappings of them. A field whose annotation is a union of
        dataclasses takes the name of one of them in lower case (`HardBatches`: "hard_batches"), which puts that one's
        defaults there; keys below it are applied to these.
      overrides: path -> text; the text is read as the field's annotated type.
      prefix: what precedes every path in messages.

    Raises:
      ValueError: an unknown key (with the nearest), text of the wrong type, or what a dataclass' own check says.
    """
    tree: dict = {}
    for path, text in overrides.items():
        *groups, leaf = path.split(".")
        node = tree
        for group in groups:
            below = node.setdefault(group, {})
            node[group] = node = below if isinstance(below, dict) else {_CHOICE: below}
        node[leaf] = {**node[leaf], _CHOICE: text} if isinstance(node.get(leaf), dict) else text
    return _replace(config, tree, prefix)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that is not itself a dataclass or mapping."""
    for key, value in _children(config).items():
        path = f"{prefix}.{key}" if prefix else key
        if _is_group(value):
            yield from leaves(value, path)
        else:
            yield path, value


def _replace(node: Any, tree: Mapping[str, Any], path: str) -> Any:
    children = _children(node)
    hints = {} if isinstance(node, Mapping) else typing.get_type_hints(type(node))
    changes = {}
    for key, text in tree.items():
        where = f"{path}.{key}"
        if key not in children:
            raise ValueError(_unknown_key(where, key, node, children))
        value = children[key]
        variants = _variants(hints.get(key))
        choice = text.get(_CHOICE) if isinstance(text, dict) else text if variants else None
        if choice is not None:
            if not variants:
                raise ValueError(f"--{where}={choice}: keys below this path are also given values")
            value = _choose(variants, choice, where)
            text = {k: v for k, v in text.items() if k != _CHOICE} if isinstance(text, dict) else {}
        if isinstance(text, dict):
            if not _is_group(value):
                raise ValueError(f"--{where}.{next(iter(text))}: {where} is a value ({value!r}), it has no keys")
            changes[key] = _replace(value, text, where)
        elif _is_group(value):
            raise ValueError(
                f"--{where}={text}: {where} is a group; set one of its keys: {', '.join(_children(value))}"
            )
        else:
            changes[key] = parse(text, hints.get(key, type(value)), f"--{where}={text}")
    if isinstance(node, Mapping):
        return type(node)({**node, **changes})  # type: ignore[call-arg]
    try:
        return dataclasses.replace(node, **changes)
    except ValueError as error:
        raise ValueError(f"{' '.join(_given(tree, path)) or '--' + path}: {error}") from error


def _variants(hint: Any) -> dict[str, type]:
    """Name -> dataclass, for a union of several dataclasses; else nothing."""
    classes = [c for c in typing.get_args(hint) if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", c.__name__).lower(): c for c in classes} if len(classes) > 1 else {}


def _choose(variants: Mapping[str, type], name: str, where: str) -> Any:
    if name not in variants:
        nearest = difflib.get_close_matches(name, variants, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"--{where}={name}: must be one of {', '.join(variants)}{hint}")
    return variants[name]()


def _given(tree: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, text in tree.items():
        if isinstance(text, dict):
            yield from _given(text, f"{path}.{key}")
        else:
            yield f"--{path}.{key}={text}" if key != _CHOICE else f"--{path}={text}"


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, Mapping)


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return dict(node)
    return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}


def _unknown_key(where: str, key: str, node: Any, children: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(key, children, n=1)
    hint = f"; did you mean {where[: -len(key)]}{nearest[0]}?" if nearest else ""
    if not nearest:  # the right key in the wrong group
        below = [path for path, _ in leaves(node) if path.rsplit(".", 1)[-1] == key]
        hint = f"; did you mean {where[: -len(key)]}{below[0]}?" if below else ""
    there = ", ".join(children) or f"none, {type(node).__name__} has no settings"
    return f"--{where}: no such key{hint} (keys here: {there})"


def normal(text: str) -> Any:
    """What `text` means, where its type isn't known: values that are spelled in several ways become equal."""
    text = text.strip()
    if text.lower() in ("true", "false", "none"):
        return {"true": 1, "false": 0}.get(text.lower())
    if text.startswith("(") or "," in text:
        inside = text[1:-1] if _is_enclosed(text) else text
        return tuple(map(normal, _split(inside)))
    for number in (int, float):
        try:
            return text if text.lower().endswith("nan") else number(text)
        except ValueError:
            continue
    return text


def _is_enclosed(text: str) -> bool:
    """Whether the parenthesis that begins the text is closed at its end."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return character == ")" and i == len(text) - 1
    return False


def parse(text: str, hint: Any, given: str) -> Any:
    """`text` as a value of type `hint`.

    Args:
      given: what the user wrote, for the message.

    Raises:
      ValueError: it is none.
    """
    try:
        return _read(text, hint)
    except ValueError:
        raise ValueError(f"{given}: must be {_describe(hint)}") from None


def _read(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`; a ValueError without a useful message if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in sorted(arguments, key=lambda a: a is str):  # any text is a str, so that comes last
            try:
                return _read(text, argument)
            except ValueError:
                continue
        raise ValueError
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[text] if text in map(str, arguments) else _reject()
    if hint is type(None):
        return None if text.lower() == "none" else _reject()
    if hint is bool:
        return _BOOLS[text.lower()] if text.lower() in _BOOLS else _reject()
    if hint is int:
        number = float(text) if any(c in text for c in ".eE") else int(text)
        return int(number) if number == number // 1 else _reject()
    if hint in (float, str):
        return hint(text)
    if hint is tuple or origin is tuple:
        if arguments and typing.get_origin(arguments[0]) is tuple:
            items = _split(text[1:-1] if text.startswith(("((", "()")) else text)
        else:
            items = _split(text.strip("()"))
        if not arguments or arguments[-1] is Ellipsis:
            return tuple(_read(item, arguments[0] if arguments else str) for item in items)
        if len(items) != len(arguments):
            raise ValueError
        return tuple(_read(item, argument) for item, argument in zip(items, arguments, strict=True))
    raise ValueError


def _split(text: str) -> list[str]:
    """What stands between the commas that are in no parentheses."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _reject() -> Any:
    raise ValueError


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if hint is tuple or origin is tuple:
        inner = ", ".join("..." if a is Ellipsis else _describe(a) for a in arguments)
        if arguments and typing.get_origin(arguments[0]) is tuple:
            return f"a list (a,b),(a,b) ({inner})"
        return f"a comma-separated list ({inner})"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, f"set in the experiment file ({hint})")
