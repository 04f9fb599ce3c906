"""Text as a task: a corpus and a tokenizer become packed windows for a language model."""

import dataclasses
import gzip
import hashlib
import lzma
import sys
from typing import Literal

import numpy as np
from jaxtyping import Int

from deltajax.data import documents, shards
from deltajax.data.loader import Dataset, half_of
from deltajax.data.packing import Documents, FullWindows, PackedWindows
from deltajax.data.tokenizer import Tokenizer, load_tokenizer, text_problem
from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE
from deltajax.hard_batches import Selection, Shuffled


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train on.

    Attributes:
      corpus: see `documents.find_files`; or the folder that `python -m deltajax.data.convert` wrote.
      tokenizer: "byte", or the path of a Hugging Face `tokenizers` JSON file.
      seq_len: L, predictions per window, >= 1.
      batch_size: windows per global batch, >= 1.
      seed: of the order of the windows, in [0, 2**32).
      validation_fraction: expected part of the documents that is held out, in (0, 1).
      lengths: evaluation sets `length_<n>`, scored when the run ends: windows of n predictions within one held-out
        document each, for the loss by position.
      evaluation_windows: in each of these at most.
      half: train on all windows, or on those of even or odd index only, to score the others (`deltajax.score`).
      selection: which windows the next update learns from, see `hard_batches`.
      special_tokens: special tokens that are spelled in a document, such as "<|endoftext|>", become
        themselves. By default a document is text, whatever it spells.

    Raises:
      ValueError: a field is out of its range.
    """

    corpus: str = dataclasses.field(default="stdlib", metadata=CHANGEABLE)
    tokenizer: str = "byte"
    seq_len: int = 512
    batch_size: int = dataclasses.field(default=16, metadata=CHANGEABLE)
    seed: int = 0
    validation_fraction: float = 0.05
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata=CHANGEABLE)
    evaluation_windows: int = dataclasses.field(default=128, metadata=CHANGEABLE)
    half: Literal["all", "even", "odd"] = "all"
    selection: Selection = dataclasses.field(default_factory=Shuffled)
    special_tokens: bool = False

    def __post_init__(self):
        """Check every field."""
        check_types(self)
        for name in ("corpus", "tokenizer"):
            value = getattr(self, name)
            if not value:
                raise ValueError(f"{name}: got {value!r}; allowed: a string that is not empty")
        for name, low, high in (("seq_len", 1, 2**22), ("batch_size", 1, 2**31), ("seed", 0, 2**32)):
            value = getattr(self, name)
            if not low <= value < high:
                raise ValueError(f"{name}: got {value!r}; allowed: an integer in [{low}, {high})")
        check_integers(self, 1, "evaluation_windows")
        if any(n < 1 for n in self.lengths):
            raise ValueError(f"lengths: got {self.lengths!r}; allowed: integers >= 1")
        value = self.validation_fraction
        if not 0 < value < 1:
            raise ValueError(f"validation_fraction: got {value!r}; allowed: a number between 0 and 1, both excluded")


def load(config: Config) -> Dataset:
    """Find, tokenise and pack the corpus.

    Raises:
      FileNotFoundError: the corpus or the tokenizer's file does not exist.
      ValueError: no text in a split, or shards that are foreign, torn or made with other settings.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.special_tokens)
    train: Documents
    validation: Documents
    if shards.is_converted(config.corpus):
        train, validation, text = shards.open_shards(config.corpus, tokenizer, config.validation_fraction)
    else:
        train, validation, text = _tokenise(config, tokenizer)
    sources = {}
    for split, docs in (("train", train), ("validation", validation)):
        sources[split] = PackedWindows(docs, config.seq_len)
        if not len(sources[split]):
            raise ValueError(
                f"corpus: {config.corpus!r} has no text in its {split} split at validation_fraction = "
                f"{config.validation_fraction}; allowed: a corpus with text in both (files are drawn whole)"
            )
    evaluations = {f"length_{n}": FullWindows(validation, n, config.evaluation_windows) for n in config.lengths}
    for name, windows in evaluations.items():
        if not len(windows):
            longest = int(np.max(validation.lengths - 1))
            raise ValueError(f"lengths: {name} is longer than every held-out document; allowed: up to {longest}")
    held_out = (validation.read(n, 0, int(length)) for n, length in enumerate(validation.lengths))
    problem = text_problem(tokenizer, held_out, text)
    if problem:
        print(
            f"warning: tokenizer {config.tokenizer!r}: {problem} in the validation text; bits per byte, which "
            "would compare it with compressors, are not reported",
            file=sys.stderr,
        )
    return Dataset(
        evaluations=evaluations,
        train=half_of(sources["train"], config.half),
        validation=sources["validation"],
        vocab_size=tokenizer.vocab_size,
        batch_size=config.batch_size,
        seed=config.seed,
        selection=config.selection,
        tokenizer=tokenizer,
        validation_text=text,
        bytes_per_target=None if problem else len(text) / int(np.sum(validation.lengths - 1)),
        fingerprint=_fingerprint(tokenizer.identity, text, train.lengths, validation.lengths),
    )


def _fingerprint(identity: str, text: bytes, *lengths: np.ndarray) -> str:
    """Of what is at hand without reading a large corpus: every document's length, and the validation text."""
    digest = hashlib.sha256(identity.encode() + text)
    for of_split in lengths:
        digest.update(np.asarray(of_split, "<i8").tobytes())
    return digest.hexdigest()


class TokensInMemory:
    """Documents as one flat array."""

    def __init__(self, tokens: list[Int[np.ndarray, "T"]]):
        self.lengths = np.array([len(t) for t in tokens], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)

    def read(self, document: int, start: int, stop: int) -> Int[np.ndarray, "stop-start"]:
        """Tokens [start, stop) of one document."""
        offset = self._starts[document]
        return self._tokens[offset + start : offset + stop]


def _tokenise(config: Config, tokenizer: Tokenizer) -> tuple[TokensInMemory, TokensInMemory, bytes]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # large corpora: half the memory of int32, mostly
    tokens: dict[documents.Split, list[np.ndarray]] = {split: [] for split in documents.SPLITS}
    text = []
    for split, content in documents.read_documents(config.corpus, config.validation_fraction):
        tokens[split].append(tokenizer.encode(content).astype(dtype))
        if split == "validation":
            text.append(content)
    train, validation = (TokensInMemory(tokens[split]) for split in documents.SPLITS)
    return train, validation, b"".join(text)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the same text, to stand beside a model's.

    All documents are compressed as one stream, which favours the compressors: they may copy from earlier
    documents, while the model sees one document at a time. They have, on the other hand, seen no training
    text.
    """
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
