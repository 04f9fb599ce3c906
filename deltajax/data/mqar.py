"""Multi-query associative recall (MQAR): Arora et al., Zoology, arXiv 2312.04927."""

import dataclasses
import functools

import numpy as np

from deltajax.data import generated
from deltajax.data.loader import Dataset
from deltajax.errors import check_integers, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(generated.Config):
    """MQAR; what `generated.Config` says, and:

    Attributes:
      pairs: keys bound to values at the beginning of an example; at most a quarter of seq_len. Sets of other `lengths`
        have as many times more pairs as they have tokens.
      min_pairs: training and validation examples have a random number of pairs from this one on; None: all have `pairs`.
      vocab_size: 0 is blank, the other ids below the middle are keys, those from the middle on values.
      power: a of the power law a x^(a - 1) by which places of queries are drawn: with 1 all are alike, below 1 a query
        follows soon.
      noise: fill the places between queries with random ids, not with blanks.
    """

    pairs: int = 8
    min_pairs: int | None = None
    vocab_size: int = 8192
    power: float = 0.01
    noise: bool = True

    def __post_init__(self):
        """Check every field."""
        super().__post_init__()
        check_integers(self, 1, "pairs", "min_pairs")
        check_integers(self, 4, "vocab_size")
        check_number(self, "power", 0, 1)
        if self.min_pairs is not None and self.min_pairs > self.pairs:
            raise ValueError(f"min_pairs must be <= pairs = {self.pairs}, got {self.min_pairs}")
        for length in (self.seq_len, *self.lengths):
            pairs = self.pairs_at(length)
            if not 4 <= 4 * pairs <= length:
                raise ValueError(f"pairs must be in [1, {length // 4}] for {length} tokens, got {pairs}")
            if pairs > self.vocab_size // 2 - 1:
                raise ValueError(f"vocab_size must be > {2 * pairs + 1} for {pairs} pairs, got {self.vocab_size}")

    def pairs_at(self, length: int) -> int:
        """Pairs of an evaluation example of this length."""
        return self.pairs * length // self.seq_len


def load(config: Config) -> Dataset:
    """Pairs "key value key value ...", then every key once more; the target at its second coming is its value."""

    def draw(length: int) -> generated.Draw:
        most = config.pairs_at(length)
        fewest = config.min_pairs if config.min_pairs is not None and length == config.seq_len else most
        # Queries stand at every other place, so that an answer would have room.
        places = (length - 2 * most) // 2
        density = config.power * np.arange(1, places + 1) ** (config.power - 1)
        return functools.partial(_example, config, length, fewest, most, density / density.sum())

    return generated.dataset(config, draw, vocab_size=config.vocab_size, chance=1 / (config.vocab_size // 2))


def _example(
    config: Config, length: int, fewest: int, most: int, density: np.ndarray, rng: np.random.Generator
) -> generated.Example:
    pairs = int(rng.integers(fewest, most + 1))
    middle = config.vocab_size // 2
    keys = 1 + rng.choice(middle - 1, pairs, replace=False)
    values = middle + rng.choice(config.vocab_size - middle, pairs, replace=False)
    tokens = rng.integers(config.vocab_size, size=length) if config.noise else np.zeros(length, np.int64)
    tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    at = 2 * pairs + 2 * rng.choice(len(density), pairs, replace=False, p=density)
    tokens[at] = keys
    return generated.example(tokens, dict(zip(at.tolist(), values.tolist(), strict=True)))
