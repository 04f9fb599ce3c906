"""A trained model, ready to be looked into: a run's last checkpoint, or a directory of Hugging Face's."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from deltajax import data
from deltajax.interop import gpt_neox as interop
from deltajax.models import registry
from deltajax.ops import taps
from deltajax.training import pretrained

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters and data to run it on.

    Attributes:
      name: of its folder.
      config: the model's.
      step: updates that the parameters have seen; None: not known.
      params: the model's parameters.
      sums: (params, batch) -> the model's sums, "loss" and "weight" among them, in evaluation mode.
      batches: that its training did not see.
      blocks: places of the residual stream.
    """

    name: str
    config: Any
    step: int | None
    params: Any
    sums: Callable[[Any, Any], dict[str, Array]]
    batches: Sequence[Batch]
    blocks: int


def load(workdir: str | Path, num_batches: int = 10) -> Trained:
    """The last checkpoint of a run, on one device, with batches of its validation data.

    Raises:
      RunError: there is none, or it cannot be read.
      ValueError: its model has no residual stream (of tokens: running statistics of a batch norm are not read).
    """
    found = pretrained.load(workdir)
    batches = list(data.load(found.config.data).validation_batches(num_batches))
    return _trained(workdir, found.config.model, found.step, found.params, batches)


def load_directory(
    directory: str | Path, text: bytes, tokenizer: str | None = None, sequences: int = 10, length: int = 512
) -> Trained:
    """A GPT-NeoX model as Hugging Face stores it, Pythia's for instance, with sequences of a text, one a batch.

    Raises:
      FileNotFoundError, ValueError: as `interop.gpt_neox.load` and `read_tokens`.
    """
    params, config = interop.load(directory)
    tokens = read_tokens(text, tokenizer, directory, sequences, length + 1, config.vocab_size)
    ones = np.ones((1, length), np.int32)
    of_all = {"segment_ids": ones, "weights": ones.astype(np.float32)}
    batches = [{"tokens": row[None, :-1], "targets": row[None, 1:], **of_all} for row in tokens]
    return _trained(directory, config, None, params, batches)


def _trained(path: str | Path, config: Any, step: int | None, params: Any, batches: Sequence[Batch]) -> Trained:
    module = registry.module_of(config)
    stats = module.init_stats(config)

    def sums(params: Any, batch: Any) -> dict[str, Array]:
        return module.loss_sums(params, stats, config, batch, key=None, train=False)[0]

    blocks = 0 if stats else taps.tags(sums, params, batches[0]).count("residual")
    if not blocks:
        raise ValueError(f"{path}: {type(config).__name__} of {module.__name__} has no residual stream")
    return Trained(Path(path).resolve().name, config, step, params, sums, batches, blocks)


def read_tokens(
    text: bytes, tokenizer: str | None, directory: str | Path, sequences: int, length: int, vocab_size: int
) -> Int[np.ndarray, "sequences length"]:
    """The first sequences x length tokens of a text, without a token that begins it: the paper's begin within a text.

    Args:
      tokenizer: see `data.load_tokenizer`; None: tokenizer.json of `directory`.

    Raises:
      ValueError: no such tokenizer, the text is too short, or it has tokens that are not below `vocab_size`.
    """
    tokens = data.load_tokenizer(tokenizer or str(Path(directory) / "tokenizer.json")).encode(text)[1:]
    if len(tokens) < sequences * length:
        raise ValueError(f"text: {len(tokens)} tokens are fewer than {sequences} sequences of {length}")
    tokens = tokens[: sequences * length].reshape(sequences, length)
    if tokens.max() >= vocab_size:
        raise ValueError(f"text: token {tokens.max()} is not below the vocab_size = {vocab_size} of {directory}")
    return tokens
