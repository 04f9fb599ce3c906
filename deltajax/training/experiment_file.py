"""Experiment files: running them and calling their functions; whatever fails there is one line with file and line."""

import difflib
import functools
import importlib.util
import inspect
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltajax.training import overrides


def load_experiment(path: str) -> types.ModuleType:
    """The module in an experiment file.

    Raises:
      ValueError: no such file, or an error while it runs.
    """
    if not Path(path).is_file():
        nearest = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"--config={path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        raise ValueError(_describe(error, module, path)) from error
    return module


def call(module: types.ModuleType, name: str, arguments: Mapping[str, str], path: str) -> Any:
    """`module.name(**arguments)`, each argument's text read as its annotation says.

    Raises:
      ValueError: no such function, no such argument, text of the wrong type, or whatever the function raises.
    """
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"--config={path}: ValueError: the file defines no {name}()")
    if not callable(function):
        raise ValueError(f"--config={path}: {name} must be a function, got {type(function).__name__}")
    parameters = parameters_of(module, name)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {}
    for key, text in arguments.items():
        where = f"--config={path}: {key}={text}"
        if key not in parameters and not anything:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"--config={path}: {name}() takes no {key!r} (arguments: {known})")
        hint = parameters[key].annotation if key in parameters else str
        if isinstance(hint, str):
            hint = _resolve(hint, function, where)
        given[key] = overrides.parse(text, str if hint is inspect.Parameter.empty else hint, where)
    try:
        return function(**given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(_describe(error, module, path)) from error


def _resolve(annotation: str, function: Any, where: str) -> Any:
    """What the text of one annotation means where the function was defined."""
    defined = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    try:
        return eval(annotation, getattr(defined, "__globals__", {}))
    except Exception as error:
        raise ValueError(f"{where}: its annotation {annotation!r} can't be resolved: {error}") from None


def parameters_of(module: types.ModuleType, name: str) -> Mapping[str, inspect.Parameter]:
    """Those of a function of an experiment file; none of what is not there or doesn't tell."""
    try:
        return inspect.signature(getattr(module, name)).parameters
    except (AttributeError, TypeError, ValueError):
        return {}


def _describe(error: BaseException, module: types.ModuleType, path: str) -> str:
    """What went wrong in an experiment file, and the line of it that was reached last."""
    file = module.__file__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    where = f" line {lines[-1]}:" if lines else ""
    what = str(error.msg if isinstance(error, SyntaxError) else error).strip().partition("\n")[0]
    return f"--config={path}:{where} {type(error).__name__}" + (f": {what}" if what else "")
