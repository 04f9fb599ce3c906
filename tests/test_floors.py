"""Imports only run downwards: from each floor to lower ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"deltajax.children"},
    {
        "pallas_kernels",
        "deltajax.errors",
        "deltajax.streams",
        "deltajax.fields",
        "deltajax.rounding",
        "deltajax.csv_table",
    },
    {"deltajax.hard_batches"},
    {"deltajax.ops", "deltajax.data"},
    {"deltajax.layers"},
    {"deltajax.models"},
    {"deltajax.interop", "deltajax.delta_activations"},
    {"deltajax.training"},
    {"deltajax.massive_activations"},
]
FLOOR = {package: n for n, packages in enumerate(FLOORS) for package in packages}
FILES = [path for top in ("deltajax", "pallas_kernels") for path in sorted((ROOT / top).rglob("*.py"))]


def _package(module: str) -> str:
    top = module.split(".")
    return top[0] if top[0] == "pallas_kernels" else ".".join(top[:2])


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {_package(name) for name in names if name.startswith(("deltajax.", "pallas_kernels"))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    """Commands, the modules that can be run, stand above everything."""
    text = path.read_text()
    mine = _package(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if mine not in FLOOR or '__name__ == "__main__"' in text:
        return
    for theirs in _imported(ast.parse(text)):
        assert theirs == mine or FLOOR.get(theirs, len(FLOORS)) < FLOOR[mine], f"{mine} imports {theirs}"
