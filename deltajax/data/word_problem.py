"""Word problems of finite groups: after each token, the product of all elements so far (state tracking).

Merrill, Petty and Sabharwal, arXiv 2404.08819; as used for DeltaProduct, arXiv 2502.10297.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from deltajax.data import generated, groups
from deltajax.data.loader import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(generated.Config):
    """A word problem; what `generated.Config` says, and:

    Attributes:
      group: a name or generators, see `groups.group`.
      letters: the tokens are all elements of the group, or its generators only.
      bos: a first token that begins the sequence, counted in the length; the product before any element, the identity,
        is its target, which weighs nothing.
    """

    group: str = "S3"
    letters: Literal["elements", "generators"] = "elements"
    bos: bool = True

    def __post_init__(self):
        """Check every field."""
        super().__post_init__()
        groups.group(self.group)

    @property
    def vocab_size(self) -> int:
        """Ids of elements or letters, and of the beginning."""
        group = groups.group(self.group)
        return max(len(group), len(group.generators)) + self.bos


def load(config: Config) -> Dataset:
    """The word problem of the group. A token is the index of an element, or of a generator; a target that of an element.

    With `bos` the last id of the vocabulary begins every sequence.
    """
    group = groups.group(config.group)
    n = len(group)
    letters = range(n) if config.letters == "elements" else group.generators
    begin = [config.vocab_size - 1] * config.bos
    steps = group.table[:, list(letters)].tolist()  # [state][letter]

    def draw(length: int) -> generated.Draw:
        def make(rng: np.random.Generator) -> generated.Example:
            word = rng.integers(len(letters), size=length - config.bos).tolist()
            states = list(itertools.accumulate(word, lambda state, letter: steps[state][letter], initial=0))
            made = generated.example([*begin, *word], {})
            made["targets"][:] = states if config.bos else states[1:]
            made["weights"][config.bos :] = 1
            return made

        return make

    return generated.dataset(config, draw, vocab_size=config.vocab_size, chance=1 / n)
