"""Tokenizers: bytes in, token ids out. Every document starts with one beginning-of-sequence (BOS) token."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int

COMPARED_BYTES = 2**22  # of a split that are decoded again to see whether they come back

Tokens = Sequence[int] | Int[np.ndarray, "T"]


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
      vocab_size: ids are in [0, vocab_size); a model may pad its embedding beyond that.
      bos: the id that starts every document; it represents no byte.
      unknown: the id of text that the vocabulary cannot represent; None if it represents all text.
      identity: equal for two tokenizers that give equal ids, so that shards are read with the right one.
    """

    vocab_size: int
    bos: int
    unknown: int | None
    identity: str

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """Ids of one document: BOS, then its text; int32."""

    def decode(self, tokens: Tokens, context: Tokens = ()) -> bytes:
        """Return the text that the ids add to the text of `context`, the ids before them.

        Special tokens and ids past the vocabulary add nothing. Without its context, a continuation
        can lose the space that it begins with.
        """


class ByteTokenizer:
    """Ids 0..255 are the bytes themselves, 256 is BOS: lossless, and one target is one byte."""

    vocab_size = 257
    bos = 256
    unknown: int | None = None
    identity = "byte"

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return np.concatenate([np.array([self.bos], np.int32), np.frombuffer(text, np.uint8)])

    def decode(self, tokens: Tokens, context: Tokens = ()) -> bytes:
        """See `Tokenizer`."""
        return bytes(int(t) for t in tokens if t < 256)


class FileTokenizer:
    """A Hugging Face `tokenizers` JSON file. Text is decoded as UTF-8, bad bytes becoming U+FFFD.

    BOS is the first of `BOS_NAMES` in the vocabulary; a vocabulary without any gets one id more.
    Documents are text: "<|endoftext|>" spelled in one is these characters, not the special token.
    """

    BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "[BOS]", "<|endoftext|>", "[CLS]")

    def __init__(self, path: str | Path, special_tokens: bool = False):
        """Read the file; special_tokens: special tokens that are spelled in a text become themselves.

        Raises:
          FileNotFoundError, ValueError: the file is missing, cannot be read, or is something else.
        """
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
        self._tokenizer.encode_special_tokens = not special_tokens
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        known = [vocabulary[name] for name in self.BOS_NAMES if name in vocabulary]
        self.bos = known[0] if known else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.bos + 1)
        self.unknown = _unknown(json.loads(content)["model"], vocabulary)
        self.identity = "sha256:" + hashlib.sha256(content).hexdigest() + "+special_tokens" * special_tokens

    def encode(self, text: bytes) -> Int[np.ndarray, "T"]:
        """See `Tokenizer`."""
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.array([self.bos, *encoding.ids], np.int32)

    def decode(self, tokens: Tokens, context: Tokens = ()) -> bytes:
        """See `Tokenizer`."""
        before = self._text(context)
        whole = self._text([*context, *tokens])
        # A prefix of the context's text can change, as where a character's bytes were incomplete.
        kept = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[kept:].encode()

    def _text(self, tokens: Tokens) -> str:
        return self._tokenizer.decode([int(t) for t in tokens if t != self.bos]) if len(tokens) else ""


def _unknown(model: dict, vocabulary: dict[str, int]) -> int | None:
    """Return the id that a tokenizers file gives to what its vocabulary lacks, or None."""
    if model.get("byte_fallback") or model.get("unk_token") is model.get("unk_id") is None:
        return None
    return model["unk_id"] if model.get("unk_token") is None else vocabulary.get(model["unk_token"])


def load_tokenizer(name: str, special_tokens: bool = False) -> Tokenizer:
    """Return `"byte"`'s tokenizer, or that of a Hugging Face `tokenizers` JSON file, given by its path.

    Args:
      special_tokens: see `FileTokenizer`; bytes have none.
    """
    return ByteTokenizer() if name == "byte" else FileTokenizer(Path(name).expanduser(), special_tokens)


def text_problem(tokenizer: Tokenizer, documents: Iterable[Tokens], text: bytes) -> str | None:
    """Return why bits per byte of a text would mislead: unknown tokens, or text that is changed; else None.

    Args:
      documents: the ids of each document, BOS first.
      text: the documents' bytes, one after the other.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return None
    unknown = total = 0
    decoded, size = [], 0
    for tokens in documents:
        total += len(tokens) - 1
        unknown += 0 if tokenizer.unknown is None else int(np.count_nonzero(np.asarray(tokens) == tokenizer.unknown))
        if size < COMPARED_BYTES:
            decoded.append(tokenizer.decode(tokens))
            size += len(decoded[-1])
    if unknown:
        return f"{unknown:,} of {total:,} tokens are unknown to it"
    same = text.decode("utf-8", errors="replace").encode().startswith(b"".join(decoded))
    return None if same else "it changes the text"
