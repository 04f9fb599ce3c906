"""Documents: which files a corpus name stands for, and which split each belongs to."""

import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
SHARD_SUFFIX = ".array_record"

# Tests hold long tables of data, packages differ between machines, and pydoc_data is one generated file of
# prose, so long that it would outweigh the rest of a validation split.
STDLIB_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}
ALLOWED = "a folder, a file, a glob pattern, several of these joined by commas, or 'stdlib'"


def find_files(corpus: str) -> list[Path]:
    """The files of a corpus, sorted by path, each once.

    Args:
      corpus: a folder (all its files, recursively and through links, without hidden ones), a file, a glob
        pattern (with `**`), several of these joined by commas, or "stdlib": the running interpreter's own
        library, `*.py` without tests and installed packages. A folder that is reached twice counts once.

    Raises:
      FileNotFoundError: a part names nothing.
      ValueError: a part names a folder without files, or shards whose conversion was not completed; or there
        is a folder that cannot be read, a link that leads nowhere, or something else than a file.
    """
    if corpus == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not STDLIB_EXCLUDED.intersection(f.relative_to(root).parts)]
        return sorted(f for f in files if f.is_file())
    parts = [corpus] if Path(corpus).expanduser().exists() else [part.strip() for part in corpus.split(",")]
    return sorted({file for part in parts for file in _files_of_part(part)})


def _files_of_part(part: str) -> list[Path]:
    path = Path(part).expanduser()
    found = [path] if path.exists() else _matches(path)
    if not part or not found:
        raise FileNotFoundError(f"corpus: nothing found at {part!r}; allowed: {ALLOWED}")
    files = [file for path in found for file in (_files_in(path) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"corpus: the folder {part!r} holds no files; allowed: {ALLOWED}")
    for file in files:
        if file.suffix == SHARD_SUFFIX:
            raise ValueError(f"corpus: {str(file)!r} is a shard, not text; allowed: the whole converted folder, alone")
    return files


def _matches(pattern: Path) -> list[Path]:
    """Return what a glob pattern matches."""
    if "**" in pattern.parts:  # glob leaves out folders that it cannot read
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
        for _ in os.walk(Path(*fixed), onerror=_unreadable, followlinks=False):
            pass
    return [Path(p) for p in glob.glob(str(pattern), recursive=True)]


def _files_in(folder: Path) -> list[Path]:
    files, visited = [], set()
    for root, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        here = os.path.realpath(root)
        if here in visited:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if not path.is_file():
                what = "a link that leads nowhere" if path.is_symlink() else "neither a file nor a folder"
                raise ValueError(f"corpus: {str(path)!r} is {what}; remove it or name the files by a pattern")
            files.append(path)
    return files


def _unreadable(error: OSError) -> None:
    raise ValueError(f"corpus: {str(error.filename)!r} cannot be read: {error.strerror}") from None


def split_of(content: bytes, validation_fraction: float) -> Split:
    """The split of a document, from a hash of its content: copies of a document never stand on both sides."""
    draw = int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64
    return "validation" if draw < validation_fraction else "train"


def read_documents(corpus: str, validation_fraction: float) -> Iterator[tuple[Split, bytes]]:
    """(split, content) of every file that is not empty, in the order and with the errors of `find_files`."""
    for file in find_files(corpus):
        content = file.read_bytes()
        if content:
            yield split_of(content, validation_fraction), content
