"""Tokenizers: bytes in, token ids out. Every document starts with one beginning-of-sequence (BOS) token."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
      vocab_size: ids are in [0, vocab_size); a model may pad its embedding beyond that.
      bos: the id that starts every document; it stands for no byte.
      identity: equal for two tokenizers that give equal ids, so that shards are read with the right one.
    """

    vocab_size: int
    bos: int
    identity: str

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """Ids of one document: BOS, then its text; int32."""

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "T"]) -> bytes:
        """The text that the ids stand for; special tokens and ids past the vocabulary stand for nothing."""


class ByteTokenizer:
    """Ids 0..255 are the bytes themselves, 256 is BOS: lossless, and one target is one byte."""

    vocab_size = 257
    bos = 256
    identity = "byte"

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return np.concatenate([np.array([self.bos], np.int32), np.frombuffer(text, np.uint8)])

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "T"]) -> bytes:
        """See `Tokenizer`."""
        return bytes(int(t) for t in tokens if t < 256)


class FileTokenizer:
    """A Hugging Face `tokenizers` JSON file. Text is decoded as UTF-8, bad bytes becoming U+FFFD.

    BOS is the first of `BOS_NAMES` in the vocabulary; a vocabulary without any gets one id more.
    """

    BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "[BOS]", "<|endoftext|>", "[CLS]")

    def __init__(self, path: str | Path):
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"tokenizer: {str(path)!r} does not exist; give 'byte' or a file") from None
        except OSError as error:
            raise ValueError(f"tokenizer: {str(path)!r} cannot be read: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exceptions
            reason = str(error).splitlines()[0]
            raise ValueError(f"tokenizer: {str(path)!r} is not a Hugging Face tokenizers JSON file: {reason}") from None
        self._tokenizer.no_truncation()  # such settings in the file would lose text
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        known = [vocabulary[name] for name in self.BOS_NAMES if name in vocabulary]
        self.bos = known[0] if known else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.bos + 1)
        self.identity = "sha256:" + hashlib.sha256(content).hexdigest()

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """See `Tokenizer`."""
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.array([self.bos, *encoding.ids], np.int32)

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "T"]) -> bytes:
        """See `Tokenizer`."""
        return self._tokenizer.decode([int(t) for t in tokens if t != self.bos]).encode()


def load_tokenizer(name: str) -> Tokenizer:
    """`"byte"`, or the path of a Hugging Face `tokenizers` JSON file."""
    return ByteTokenizer() if name == "byte" else FileTokenizer(name)
