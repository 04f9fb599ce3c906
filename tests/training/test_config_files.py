"""Whatever is wrong in an experiment file is one line with the file's name, and with its line where there is one."""

import re

import pytest
from training_runs import TINY

from deltajax import rehearse, report, sweep, train
from deltajax.training import sweeps
from deltajax.training.config import load_config

LOAD = (
    f"import importlib.util as u\ns = u.spec_from_file_location('tiny', {TINY!r})\n"
    "m = u.module_from_spec(s)\ns.loader.exec_module(m)\n"
)


def written(folder, text: str | bytes) -> str:
    path = folder / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("def get_config(:\n", ": line 1: SyntaxError: invalid syntax"),
        ("x = 1\n  y = 2\n", ": line 2: IndentationError: unexpected indent"),
        (b"x = '\xff'\n", ": line 1: SyntaxError: "),
        (b"x = 1\0\n", ": SyntaxError: source code string cannot contain null bytes"),
        ("x = 1\nx / 0\n", ": line 2: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", ": line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit\n", ": line 1: SystemExit"),
        ("raise BaseException('of all')\n", ": line 1: BaseException: of all"),
        ("raise ValueError('first\\nsecond')\n", ": line 1: ValueError: first"),
        ("", ": ValueError: the file defines no get_config()"),
        ("get_config = 3\n", ": get_config must be a function, got int"),
        ("def get_config():\n    return {}\n", ": get_config() must return a TrainConfig, got dict"),
        ("def get_config():\n    yield\n", ": get_config() must return a TrainConfig, got generator"),
        ("def get_config():\n    x = 1\n    return x.y\n", ": line 3: AttributeError: 'int' object has no attribute 'y'"),
        ("def get_config(size):\n    pass\n", ": TypeError: get_config() missing 1 required positional argument: 'size'"),
        (f"{LOAD}def get_config():\n    m.TrainConfig(steps=1)\n", ": line 6: TypeError: TrainConfig.__init__() missing"),
        (f"{LOAD}def get_config():\n    m.Optimizer(b1='x')\n", ": line 6: ValueError: Optimizer.b1 must be a number"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [train.main, rehearse.main])
def test_what_is_wrong_is_one_line_with_the_file(text, said, command, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (written(tmp_path, text), "mine.py"):
        assert command(["command", f"--config={path}"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1, err
        assert err.startswith(f"error: --config={path}{said}"), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "definition",
    [
        "import functools\ndef made(size, seed: int = 0): return replace(m.get_config(), seed=seed)\n"
        "get_config = functools.partial(made, 'small')",
        "def get_config(seed: int = 0) -> 'NotImported': return replace(m.get_config(), seed=seed)",
        "from __future__ import annotations\ndef get_config(seed: int = 0) -> NotImported:\n"
        "    return replace(m.get_config(), seed=seed)",
        "class Made:\n    def __call__(self, seed: 'int' = 0): return replace(m.get_config(), seed=seed)\nget_config = Made()",
        "get_config = lambda **given: replace(m.get_config(), seed=int(given['seed']))",
    ],
)
def test_functions_of_all_kinds_take_arguments(definition, tmp_path):
    future = "from __future__ import annotations\n"
    text = future * definition.startswith(future) + LOAD + "from dataclasses import replace\n"
    assert load_config(f"{written(tmp_path, text + definition.removeprefix(future))}:seed=7").seed == 7


@pytest.mark.parametrize(
    "definition, arguments, said",
    [
        ("def get_config(seed: 'Missing' = 0): pass", "seed=1", "seed=1: its annotation 'Missing' can't be resolved: "),
        ("def get_config(seed: int = 0): pass", "seed=x", "seed=x: must be an integer"),
        ("get_config = __import__('functools').partial(dict, a=1)", "seed=1", "get_config() takes no 'seed'"),
        ("def get_config(seed, /): pass", "seed=1", "TypeError: get_config() got some positional-only arguments"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(definition, arguments, said, tmp_path):
    path = f"{written(tmp_path, definition)}:{arguments}"
    with pytest.raises(ValueError, match=f"^--config={re.escape(path)}: {re.escape(said)}|{re.escape(said)}"):
        load_config(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("get_grid = 3", ": get_grid must be a function, got int"),
        ("def get_grid(): return 3", ": get_grid() must return mappings from names to lists of values, got 3"),
        ("def get_grid(): return {'config.seed': 3}", ": get_grid() must return mappings from names to lists of values, got "),
        ("def get_grid(): return {'config.seed': '12'}", ": get_grid() must return mappings from names to lists of values, got "),
        ("def get_grid(): return [[1, 2]]", ": get_grid() must return mappings from names to lists of values, got "),
        ("def get_grid(): return {1: [2]}", ": get_grid() must return mappings from names to lists of values, got "),
        ("def get_grid(): return None", ": get_grid() must return mappings from names to lists of values, got None"),
        ("def get_grid():\n    return 1 / 0", ": line 2: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_grids_that_are_none(text, said, tmp_path, capfd):
    path = written(tmp_path, text)
    assert sweep.main(["sweep", f"--config={path}", f"--workdir={tmp_path / 'new'}"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: --config={path}{said}"), err
    assert not (tmp_path / "new").exists()


def test_a_grid_that_is_yielded(tmp_path):
    path = written(
        tmp_path, f"{LOAD}get_config = m.get_config\ndef get_grid():\n    yield {{'config.seed': range(2)}}\n"
    )
    assert [member.config.seed for member in sweeps.members(path)] == [0, 1]


def test_a_report_that_is_none(tmp_path, capfd):
    path = written(tmp_path, "def get_report():\n    return undefined\n")
    assert report.main(["report", f"--experiments={path}", f"--output={tmp_path / 'page.md'}"]) == 2
    assert f"error: --config={path}: line 2: NameError: name 'undefined' is not" in capfd.readouterr().err
