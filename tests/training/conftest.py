"""A tiny corpus, a finished tiny run, and ways to run the command line in this process or in another."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from training_runs import ROOT, TINY

from deltajax import train
from deltajax.training.config import TrainConfig, load_config


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """A corpus of a few of this project's files; every tiny program is compiled once, for all processes."""
    corpus = tmp_path_factory.mktemp("corpus")
    for path in sorted((ROOT / "deltajax").rglob("*.py"))[:12]:
        shutil.copy(path, corpus / "_".join(path.relative_to(ROOT).parts))
    cache = str(tmp_path_factory.mktemp("jax_cache"))
    before = dict(os.environ)
    os.environ |= {
        "TINY_CORPUS": str(corpus),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }
    settings = {
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    saved = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in saved.items():
        jax.config.update(name, value)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run_train(capfd) -> Callable:
    """`run_train(workdir, *flags) -> (exit code, stdout, stderr)`, in this process."""

    def run(workdir: Path, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = train.main(["train", f"--config={TINY}", f"--workdir={workdir}", *arguments])
        return (code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, _environment) -> Path:
    """The workdir of an uninterrupted tiny run. Copy it before changing anything in it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(["train", f"--config={TINY}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def tiny_config() -> TrainConfig:
    """What the tiny experiment file returns."""
    return load_config(TINY)
