"""Kernels in C++ for CPUs, called through XLA's foreign function interface: compiled at first use and kept.

The compiler is $CXX, else c++, g++ or clang++. What it makes is kept in $DELTAJAX_CACHE, else $XDG_CACHE_HOME/deltajax, else
~/.cache/deltajax, else (none can be written to) for this process only.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import jax
import jaxlib.version
from absl import logging

from deltajax import children

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300  # seconds for a compiler
_lock = threading.Lock()


def register(source: str, targets: tuple[str, ...]) -> ctypes.CDLL:
    """Make the functions of a file beside this one callable by `jax.ffi.ffi_call`, on the platform "cpu".

    Args:
      source: file name; headers beside it are part of it.
      targets: XLA FFI handlers that it defines with C linkage; these are their names for XLA too.

    Raises:
      NotImplementedError: nothing here compiles it; the message says what was tried.
    """
    with _lock:
        library, reason = _registered(source, targets)
    if library is None:
        raise NotImplementedError(reason)
    return library


@functools.cache
def _registered(source: str, targets: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why there is none): a compiler that fails is not asked again by this process."""
    command = compiler()
    if not command:
        return None, f"needs a C++ compiler: none of {', '.join(COMPILERS)} is on PATH, and CXX is not set"
    path = Path(__file__).with_name(source)
    try:
        library = _library(path, command)
        for name in targets:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        return library, ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        reason = f"{shlex.join(command)} does not compile {source}: {(lines or [str(error)])[0].strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{source} by {shlex.join(command)}: {error}"
    logging.warning("no kernel for CPUs: %s", reason)
    return None, reason


def compiler() -> list[str]:
    """The words of the command; none: there is no compiler."""
    asked = os.environ.get("CXX")
    if not asked:
        return [name for name in COMPILERS if shutil.which(name)][:1]
    try:
        return [asked] if shutil.which(asked) else shlex.split(asked)
    except ValueError:  # a quotation that does not end
        return [asked]


def _library(path: Path, command: list[str]) -> ctypes.CDLL:
    """The one that is kept, or made anew if there is none or what is there is not what was written."""
    folder = _folder()
    kept = folder / f"{path.stem}-{_fingerprint(path, command)}.so"
    written = kept.with_suffix(".sha256")
    try:
        whole = written.read_text() == _sum(kept)
    except (OSError, ValueError):
        whole = False
    if not whole:
        _compile(path, command, kept, written)
    return ctypes.CDLL(str(kept))


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _folder() -> Path:
    """Where libraries are kept, made if need be."""
    try:
        asked = os.environ.get("DELTAJAX_CACHE")
        caches = os.environ.get("XDG_CACHE_HOME")
        folder = Path(asked) if asked else (Path(caches) if caches else Path.home() / ".cache") / "deltajax"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except (OSError, RuntimeError) as error:  # the latter: there is no home
        logging.warning("compiled kernels are not kept: %s", error)
        return Path(_folder_of_this_process().name)


@functools.cache
def _folder_of_this_process() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="deltajax-")


def _fingerprint(path: Path, command: list[str]) -> str:
    """Of all that the machine code depends on; a home directory may be shared by hosts with other processors."""
    version = _run([*command, "--version"]).stdout
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
    return "\n".join(next((line for line in lines if line.split(":")[0].strip() == field), "") for field in fields)


def _compile(path: Path, command: list[str], kept: Path, written: Path) -> None:
    """All of the library or none of it: other processes may compile it, too, and this one may be killed."""
    logging.info("compiling %s, once for this machine: %s", path.name, kept)
    for left in kept.parent.glob(
        "making-*"
    ):  # of a process that was killed, or of one that is about to remove it itself
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="making-") as folder:
        made = Path(folder) / kept.name
        _run([*command, *FLAGS, f"-I{jax.ffi.include_dir()}", str(path), "-o", str(made)])
        (Path(folder) / written.name).write_text(_sum(made))
        made.replace(kept)
        (Path(folder) / written.name).replace(written)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    tied = children.tied(command)
    return subprocess.run(**tied, capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE)
