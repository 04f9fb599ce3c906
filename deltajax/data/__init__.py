"""Corpora and tasks as Grain sources. A task: a file with a `Config` and a `load`, a line in `LOADERS`."""

from collections.abc import Callable
from typing import Any

from deltajax.data import formal, mad, moving_digits, mqar, text, ucf101, vision, word_problem
from deltajax.data.loader import Batch, Dataset
from deltajax.data.text import Config, compressed_bits_per_byte
from deltajax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

LOADERS: dict[type, Callable[[Any], Dataset]] = {
    text.Config: text.load,
    word_problem.Config: word_problem.load,
    formal.Config: formal.load,
    mqar.Config: mqar.load,
    mad.Config: mad.load,
    moving_digits.Config: moving_digits.load,
    ucf101.Config: ucf101.load,
    vision.Config: vision.load,
}


def load(config: Any) -> Dataset:
    """The dataset that a task's config describes.

    Raises:
      ValueError: as `loader_of`. What else is raised is the task's own.
    """
    return loader_of(config)(config)


def loader_of(config: Any) -> Callable[[Any], Dataset]:
    """The `load` of the task that a config is of.

    Raises:
      ValueError: no task has a config of this type.
    """
    if type(config) not in LOADERS:
        known = ", ".join(f"{c.__module__}.{c.__name__}" for c in LOADERS)
        raise ValueError(f"data must be a config of one of {known}, got {type(config).__name__}")
    return LOADERS[type(config)]


__all__ = [
    "Batch",
    "ByteTokenizer",
    "Config",
    "Dataset",
    "FileTokenizer",
    "Tokenizer",
    "compressed_bits_per_byte",
    "load",
    "load_tokenizer",
    "loader_of",
]
