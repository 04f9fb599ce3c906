"""Kernels in C++ for CPUs, called through XLA's foreign function interface: compiled at first use and kept.

The compiler is $CXX, else c++, g++ or clang++. What it makes is kept in $DELTAJAX_CACHE, else $XDG_CACHE_HOME/deltajax, else
~/.cache/deltajax, else (none can be written to) for this process only.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import jaxlib.version
from absl import logging

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def register(source: str, targets: tuple[str, ...]) -> ctypes.CDLL:
    """Make the functions of a file beside this one callable by `jax.ffi.ffi_call`, on the platform "cpu".

    Args:
      source: file name; headers beside it are part of it.
      targets: XLA FFI handlers that it defines with C linkage; these are their names for XLA too.

    Raises:
      NotImplementedError: nothing here compiles it; the message says what was tried.
    """
    library, reason = _load(source)
    if library is None:
        raise NotImplementedError(reason)
    for name in targets:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def compiler() -> list[str]:
    """The words of the command; none: there is no compiler."""
    asked = os.environ.get("CXX")
    return shlex.split(asked) if asked else [name for name in COMPILERS if shutil.which(name)][:1]


@functools.cache
def _load(source: str) -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why there is none): a compiler that fails is not asked again by this process."""
    command = compiler()
    if not command:
        return None, f"needs a C++ compiler: none of {', '.join(COMPILERS)} is on PATH, and CXX is not set"
    path = Path(__file__).with_name(source)
    try:
        kept = _folder() / f"{path.stem}-{_fingerprint(path, command)}.so"
        if not kept.exists():
            _compile(path, command, kept)
        return ctypes.CDLL(str(kept)), ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        return None, f"{shlex.join(command)} does not compile {source}: {(lines or [str(error)])[0].strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{source} by {shlex.join(command)}: {error}"


def _folder() -> Path:
    """Where libraries are kept, made if need be."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DELTAJAX_CACHE") or Path(caches) / "deltajax")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logging.warning("compiled kernels are not kept: %s", error)
        return Path(_folder_of_this_process().name)


@functools.cache
def _folder_of_this_process() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="deltajax-")


def _fingerprint(path: Path, command: list[str]) -> str:
    """Of all that the machine code depends on; a home directory may be shared by hosts with other processors."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*command, version, *FLAGS, jaxlib.version.__version__, platform.system(), platform.machine(), _processor()]
    parts += [file.read_text() for file in (path, *sorted(path.parent.glob("*.h")))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native sees of the processor, as far as Linux says; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(_first(lines, field) for field in fields)


def _first(lines: Iterable[str], field: str) -> str:
    return next((line for line in lines if line.split(":")[0].strip() == field), "")


def _compile(path: Path, command: list[str], kept: Path) -> None:
    """All of the library or none of it: other processes may compile it, too, and this one may be killed."""
    logging.info("compiling %s, once for this machine: %s", path.name, kept)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / kept.name
        subprocess.run(
            [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", str(path), "-o", str(made)],
            capture_output=True,
            text=True,
            check=True,
        )
        made.replace(kept)
