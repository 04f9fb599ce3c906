"""ArrayRecord shards: a corpus tokenised once, read at random.

A folder of shards holds `INDEX`, written last, `validation.txt`, the raw validation documents for the
comparison with compressors, and per split files of records. A record is at most `RECORD_TOKENS` tokens of one
document, so that a window of a long document does not read all of it. Document i lives in shard i mod N: the
shards stay balanced and the place of each record follows from the documents' lengths.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int

from deltajax.data.documents import SHARD_SUFFIX, SPLITS, Split
from deltajax.data.tokenizer import Tokenizer

INDEX = "deltajax-shards.json"
_OF_DOCUMENTS = ("documents", "record_tokens", "dtype", "shards")  # keys in it that `ShardedDocuments` reads
FORMAT = "deltajax shards 1"
RECORD_TOKENS = 8192


def is_converted(corpus: str) -> bool:
    """Whether the path is a folder with an index, which only a completed conversion has."""
    return (Path(corpus).expanduser() / INDEX).is_file()


def write_shards(
    output: str | Path,
    documents: Iterable[tuple[Split, bytes]],
    tokenizer: Tokenizer,
    *,
    num_shards: int,
    validation_fraction: float,
) -> dict:
    """Tokenise documents into a new folder, which appears under its name only when it is complete.

    Args:
      output: the folder; must not exist.
      documents: (split, content), as `documents.read_documents` gives them.
      tokenizer: its identity is kept, and compared when the shards are read.
      num_shards: N >= 1, files per split.
      validation_fraction: kept, and compared when the shards are read.

    Returns:
      The index.

    Raises:
      FileExistsError: the folder exists.
      OSError: the disk is full, or the folder cannot be written.
      ValueError: num_shards < 1.
    """
    output = Path(output).expanduser()
    if num_shards < 1:
        raise ValueError(f"shards: got {num_shards}; allowed: >= 1")
    if output.exists():
        raise FileExistsError(f"output: {str(output)!r} exists; allowed: a folder that does not exist yet")
    unfinished = output.with_name(f"{output.name}.unfinished-{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        index = _write(unfinished, documents, tokenizer, num_shards, validation_fraction)
        os.rename(unfinished, output)
    except RuntimeError as error:  # what ArrayRecord raises
        raise OSError(f"output: {str(output)!r} could not be written: {error}") from error
    finally:  # after Ctrl-C too; what a kill leaves behind keeps the unfinished name
        shutil.rmtree(unfinished, ignore_errors=True)
    return index


def _write(folder, documents, tokenizer, num_shards, validation_fraction) -> dict:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
    names = {
        split: [f"{split}-{i:05d}-of-{num_shards:05d}{SHARD_SUFFIX}" for i in range(num_shards)] for split in SPLITS
    }
    # Grain reads records one by one, which needs groups of one.
    writers = {
        split: [ArrayRecordWriter(str(folder / name), "group_size:1") for name in names[split]] for split in SPLITS
    }
    lengths: dict[Split, dict[str, list[int]]] = {split: {"tokens": [], "bytes": []} for split in SPLITS}
    with open(folder / "validation.txt", "wb") as validation_text:
        for split, content in documents:
            tokens = tokenizer.encode(content).astype(dtype)
            writer = writers[split][len(lengths[split]["tokens"]) % num_shards]
            for start in range(0, len(tokens), RECORD_TOKENS):
                writer.write(tokens[start : start + RECORD_TOKENS].tobytes())
            lengths[split]["tokens"].append(len(tokens))
            lengths[split]["bytes"].append(len(content))
            if split == "validation":
                validation_text.write(content)
    for writer in (w for split in SPLITS for w in writers[split]):
        writer.close()
    for file in folder.iterdir():
        _sync(file)
    index = {
        "format": FORMAT,
        "tokenizer": tokenizer.identity,
        "dtype": dtype.str,
        "record_tokens": RECORD_TOKENS,
        "validation_fraction": validation_fraction,
        "file_sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "shards": names,
        "documents": lengths,
    }
    (folder / INDEX).write_text(json.dumps(index))
    _sync(folder / INDEX)
    return index


def _sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


class ShardedDocuments:
    """The documents of one split, read from its shards."""

    def __init__(self, folder: Path, index: dict, split: Split):
        self.lengths = np.array(index["documents"][split]["tokens"], np.int64)
        self._record_tokens = index["record_tokens"]
        self._dtype = np.dtype(index["dtype"])
        self._folder = str(folder)
        files = [str(folder / name) for name in index["shards"][split]]
        try:
            self._records = grain.sources.ArrayRecordDataSource(files)
        except RuntimeError as error:
            raise ValueError(f"corpus: {self._folder!r} holds a foreign or corrupted shard: {error}") from error
        records = -(-self.lengths // self._record_tokens)
        self._first_record = np.empty_like(records)
        total = 0
        for shard in range(len(files)):
            here = records[shard :: len(files)]
            self._first_record[shard :: len(files)] = total + np.cumsum(here) - here
            total += int(here.sum())
        if total != len(self._records):
            raise ValueError(
                f"corpus: {str(folder)!r} holds {len(self._records)} {split} records, its index says {total}"
            )

    def read(self, document: int, start: int, stop: int) -> Int[np.ndarray, "stop-start"]:
        """Tokens [start, stop) of one document."""
        low, high = start // self._record_tokens, -(-stop // self._record_tokens)
        first = int(self._first_record[document])
        try:
            parts = [np.frombuffer(self._records[first + i], self._dtype) for i in range(low, high)]
        except RuntimeError as error:  # ArrayRecord's checksums
            raise ValueError(f"corpus: document {document} in {self._folder!r} is corrupted: {error}") from error
        tokens = np.concatenate(parts)[start - low * self._record_tokens : stop - low * self._record_tokens]
        if len(tokens) != stop - start:
            raise ValueError(f"corpus: document {document} in {self._folder!r} is shorter than its index says")
        return tokens


def open_shards(
    corpus: str, tokenizer: Tokenizer, validation_fraction: float
) -> tuple[ShardedDocuments, ShardedDocuments, bytes]:
    """(training documents, validation documents, raw validation text) of a converted corpus.

    Raises:
      ValueError: the folder is not one that `write_shards` wrote, a file in it is missing or has another
        size, or it was written with another tokenizer or validation fraction.
    """
    folder = Path(corpus).expanduser()
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
        found = index["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != FORMAT:
        raise ValueError(f"corpus: {str(folder / INDEX)!r} has format {found!r}; allowed: {FORMAT!r}")
    missing = sorted({"tokenizer", "validation_fraction", "file_sizes", *_OF_DOCUMENTS} - index.keys())
    if missing:
        raise ValueError(f"corpus: {str(folder / INDEX)!r} is damaged: {missing[0]} is missing")
    for key, here in (("tokenizer", tokenizer.identity), ("validation_fraction", validation_fraction)):
        if index[key] != here:
            raise ValueError(f"{key}: got {here!r}, but {corpus!r} was converted with {index[key]!r}")
    for name, size in index["file_sizes"].items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if actual != size:
            raise ValueError(f"corpus: {str(folder / name)!r} is torn: {actual} bytes, its index says {size}")
    train, validation = (ShardedDocuments(folder, index, split) for split in SPLITS)
    return train, validation, (folder / "validation.txt").read_bytes()
