"""Synthetic tasks: examples made on demand, each a pure function of (seed, split, index)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from deltajax.data.loader import Dataset
from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE

Example = dict[str, Int[np.ndarray, "L"] | Float[np.ndarray, "L"]]
Draw = Callable[[np.random.Generator], Example]

ENDLESS = 2**31 - 1  # examples of a split that has no end: never reached, and Grain can still permute them
SPLITS = ("train", "validation", "evaluation")


@dataclasses.dataclass(frozen=True)
class Generated:
    """A random-access source for Grain that stores nothing.

    Attributes:
      draw: makes an example from a random generator; its arrays have the same keys, shapes and dtypes every time.
      size: number of examples.
      seed: seed of the generators, together with the index.
    """

    draw: Draw
    size: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        """See `loader.Source`."""
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Example:
        """See `loader.Source`."""
        i = index.__index__()
        if not 0 <= i < self.size:
            raise IndexError(f"index {i} of {self.size} examples")
        return self.draw(np.random.default_rng((*self.seed, i)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What all synthetic tasks share.

    Attributes:
      seq_len: L, tokens of a training or validation example.
      batch_size: examples per global batch.
      seed: of the examples of every split, and of their order.
      train_examples: size of the training set; None: never the same example twice.
      validation_examples: of the same length as the training ones, and never among them.
      lengths: further evaluation sets, `length_<n>` of n tokens each, scored when the run ends.
      evaluation_examples: in each of these.
    """

    seq_len: int = 64
    batch_size: int = dataclasses.field(default=64, metadata=CHANGEABLE)
    seed: int = 0
    train_examples: int | None = None
    validation_examples: int = dataclasses.field(default=512, metadata=CHANGEABLE)
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata=CHANGEABLE)
    evaluation_examples: int = dataclasses.field(default=512, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check every field."""
        check_types(self)
        check_integers(self, 1, "seq_len", "batch_size", "train_examples", "validation_examples", "evaluation_examples")
        check_integers(self, 0, "seed")
        if any(n < 1 for n in self.lengths):
            raise ValueError(f"lengths must be integers >= 1, got {self.lengths!r}")


def dataset(config: Config, draw: Callable[[int], Draw], *, vocab_size: int, chance: float) -> Dataset:
    """The splits of a task.

    Args:
      draw: sequence length -> how an example of that length is made.
      vocab_size: tokens and targets are in [0, vocab_size).
      chance: accuracy of a guess that knows which answers are possible.
    """

    def source(split: str, length: int, size: int | None) -> Generated:
        return Generated(draw(length), size or ENDLESS, (config.seed, SPLITS.index(split), length))

    return Dataset(
        train=source("train", config.seq_len, config.train_examples),
        validation=source("validation", config.seq_len, config.validation_examples),
        evaluations={f"length_{n}": source("evaluation", n, config.evaluation_examples) for n in config.lengths},
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=vocab_size,
        chance=chance,
    )


def example(tokens: Any, answers: Mapping[int, int] | Any) -> Example:
    """A language model's example with one segment.

    Args:
      tokens: [L] ids.
      answers: position -> target; the targets of other positions weigh nothing.
    """
    tokens = np.asarray(tokens, np.int32)
    targets, weights = np.zeros_like(tokens), np.zeros(len(tokens), np.float32)
    for position, answer in dict(answers).items():
        targets[position], weights[position] = answer, 1
    return {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens), "weights": weights}
