"""Kernels for CPUs in a process of their own, by a compiler of their own."""

import os
import subprocess
import sys
from pathlib import Path

from pallas_kernels import native

TESTS = Path(__file__).parents[1]


def run(code, **settings):
    """Standard error of a fresh Python, which must end well."""
    paths = [TESTS.parent, TESTS / "ops", TESTS / "delta_activations"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(map(str, paths))} | settings
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def compiler(folder, *options):
    """A compiler that gives these options last."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nexec {native.compiler()[0]} "$@" {" ".join(options)}\n')
    script.chmod(0o755)
    return str(script)
