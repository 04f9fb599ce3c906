"""The six tasks of MAD, mechanistic architecture design: Poli et al., arXiv 2403.17844, section 3 and appendix B.

In all of them a target stands at the position whose prefix determines it, as for every language model here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from deltajax.data import generated
from deltajax.data.loader import Dataset
from deltajax.errors import check_integers, check_number
from deltajax.rounding import round_of

TASKS = ("recall", "fuzzy_recall", "noisy_recall", "selective_copying", "compression", "memorisation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(generated.Config):
    """A MAD task; what `generated.Config` says, and:

    Attributes:
      task: one of `TASKS`.
      vocab_size: symbols of the task; half keys, half values where it has both. Special ids follow them.
      noise: noisy_recall: part of the tokens that are noise, in (0, 1), from as many ids of their own as there are symbols.
      longest: fuzzy_recall: keys and values are strings of 1 to this many symbols.
      copies: selective_copying: symbols to copy.
    """

    task: Literal["recall", "fuzzy_recall", "noisy_recall", "selective_copying", "compression", "memorisation"] = (
        "recall"
    )
    vocab_size: int = 16
    noise: float = 0.2
    longest: int = 3
    copies: int = 16

    def __post_init__(self):
        """Check every field."""
        super().__post_init__()
        check_integers(self, 4, "vocab_size")
        check_integers(self, 1, "longest", "copies")
        check_number(self, "noise", 0, 1)
        shortest = min((self.seq_len, *self.lengths))
        need = {"selective_copying": 2 * self.copies + 1, "fuzzy_recall": 4 * self.longest}.get(self.task, 4)
        if shortest < need:
            raise ValueError(f"seq_len and lengths must be >= {need} for {self.task}, got {shortest}")
        if self.task == "noisy_recall" and shortest - round_of(self.noise, shortest) < 4:
            raise ValueError(
                f"noise must leave 4 of the {shortest} tokens or more, for a key that comes twice, got {self.noise}"
            )


def load(config: Config) -> Dataset:
    """Targets and chance by task, V = vocab_size:

    - recall: "key value key value ..." by a map drawn per example; at a key that came before, its value. 2 / V.
    - fuzzy_recall: the same with strings for symbols, no key the beginning of another; each symbol of the value of a key
      that came before, from the end of the key on. 2 / V.
    - noisy_recall: recall with noise between the pairs.
    - selective_copying: symbols among blanks, then one request after the other; at the n-th request, the n-th symbol. 1 / V.
    - compression: random symbols and a last token; the batch is for `models.autoencoder`, which must give back all symbols
      from the representation of the last token: its inputs are called "sequence", for a language model would copy. 1 / V.
    - memorisation: "key request key request ..."; at the request, the key's value by a map that is the same in all
      examples of all splits. 2 / V.
    """
    makers: dict[str, Callable[..., generated.Example]] = {
        "recall": functools.partial(_recall, noise=0.0),
        "noisy_recall": functools.partial(_recall, noise=config.noise),
        "fuzzy_recall": _fuzzy_recall,
        "selective_copying": _selective_copying,
        "compression": _compression,
        "memorisation": functools.partial(_memorisation, values=_dictionary(config)),
    }
    special = {
        "recall": 0,
        "noisy_recall": config.vocab_size,
        "fuzzy_recall": 1,
        "selective_copying": 2,
        "compression": 1,
        "memorisation": 1,
    }[config.task]
    answers = config.vocab_size // (1 if config.task in ("selective_copying", "compression") else 2)
    return generated.dataset(
        config,
        lambda length: functools.partial(makers[config.task], config, length),
        vocab_size=config.vocab_size + special,
        chance=1 / answers,
    )


def _recall(config: Config, length: int, rng: np.random.Generator, *, noise: float) -> generated.Example:
    keys = config.vocab_size // 2
    value_of = rng.integers(keys, config.vocab_size, size=keys)
    pairs = (length - round_of(noise, length)) // 2
    is_pair = rng.permutation(np.arange(length - pairs) < pairs)  # what remains is noise
    at = np.flatnonzero(is_pair) + np.arange(pairs)
    tokens = config.vocab_size + rng.integers(config.vocab_size, size=length) if noise else np.zeros(length, int)
    tokens[at] = rng.integers(keys, size=pairs)
    tokens[at + 1] = value_of[tokens[at]]
    seen: set[int] = set()
    answers = {}
    for position in at.tolist():
        key = int(tokens[position])
        if key in seen:
            answers[position] = int(value_of[key])
        seen.add(key)
    return generated.example(tokens, answers)


def _fuzzy_recall(config: Config, length: int, rng: np.random.Generator) -> generated.Example:
    half, blank = config.vocab_size // 2, config.vocab_size

    def string(first: int, last: int) -> tuple[int, ...]:
        return tuple(rng.integers(first, last, size=rng.integers(1, config.longest + 1)).tolist())

    keys: list[tuple[int, ...]] = []
    for _ in range(4 * half):  # some are rejected: usually about half of the symbols' number is found
        key = string(0, half)
        if len(keys) < half and not any(key[: len(k)] == k[: len(key)] for k in keys):
            keys.append(key)
    values = [string(half, config.vocab_size) for _ in keys]
    tokens: list[int] = []
    answers: dict[int, int] = {}
    seen: set[int] = set()
    while True:
        pair = int(rng.integers(len(keys)))
        if len(tokens) + len(keys[pair]) + len(values[pair]) > length:
            break
        tokens += keys[pair]
        if pair in seen:
            answers |= {len(tokens) - 1 + i: value for i, value in enumerate(values[pair])}
        tokens += values[pair]
        seen.add(pair)
    return generated.example(tokens + [blank] * (length - len(tokens)), answers)


def _selective_copying(config: Config, length: int, rng: np.random.Generator) -> generated.Example:
    blank, request = config.vocab_size, config.vocab_size + 1
    start = length - config.copies
    tokens = np.full(length, blank)
    symbols = rng.integers(config.vocab_size, size=config.copies)
    tokens[np.sort(rng.choice(start, config.copies, replace=False))] = symbols
    tokens[start:] = request
    return generated.example(tokens, {start + i: symbol for i, symbol in enumerate(symbols.tolist())})


def _compression(config: Config, length: int, rng: np.random.Generator) -> generated.Example:
    symbols = rng.integers(config.vocab_size, size=length - 1)
    example = generated.example([*symbols, config.vocab_size], dict(enumerate(symbols.tolist())))
    example["sequence"] = example.pop("tokens")
    return example


def _dictionary(config: Config) -> np.ndarray:
    keys = config.vocab_size // 2
    return np.random.default_rng((config.seed, keys)).integers(keys, config.vocab_size, size=keys)


def _memorisation(config: Config, length: int, rng: np.random.Generator, *, values: np.ndarray) -> generated.Example:
    keys = rng.integers(len(values), size=length // 2)
    tokens = np.full(length, config.vocab_size)
    tokens[: 2 * len(keys) : 2] = keys
    return generated.example(tokens, {2 * i + 1: int(values[key]) for i, key in enumerate(keys)})
