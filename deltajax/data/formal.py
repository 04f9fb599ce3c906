"""Formal languages: parity, and modular arithmetic without and with brackets.

The tasks of Grazzi et al., arXiv 2411.12537, table 2, after Deletang et al., arXiv 2207.02098.
"""

import dataclasses
import functools
import string
from typing import Literal

import numpy as np

from deltajax.data import generated
from deltajax.data.loader import Dataset
from deltajax.errors import check_integers

OPERATORS = "+-*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(generated.Config):
    """A formal language; what `generated.Config` says, and:

    Attributes:
      task: "parity" of a string of bits; value of an arithmetic expression over the integers modulo `modulus`, with
        multiplication before addition and subtraction ("arithmetic"), and with brackets and signs too ("brackets").
      modulus: of the two arithmetics, in [2, 10].
      min_length: shortest string of bits or symbols.
      every_prefix: ask for the value of each prefix that has one, not only of the whole; not with brackets.
    """

    task: Literal["parity", "arithmetic", "brackets"] = "parity"
    modulus: int = 5
    min_length: int = 3
    every_prefix: bool = False

    def __post_init__(self):
        """Check every field."""
        super().__post_init__()
        check_integers(self, 1, "min_length")
        check_integers(self, 2, "modulus")
        if self.modulus > 10:
            raise ValueError(f"modulus must be in [2, 10], got {self.modulus}")
        if self.every_prefix and self.task == "brackets":
            raise ValueError("every_prefix must be false for brackets: the prefix of a bracket has no value")
        shortest = min((self.seq_len, *self.lengths)) - 1
        if self.min_length > shortest:
            raise ValueError(f"min_length must be < seq_len and lengths = {shortest + 1}, got {self.min_length}")

    @property
    def symbols(self) -> str:
        """One character per token id: digits, operators, brackets, "=" (asks for the value) and "." (padding)."""
        digits = 2 if self.task == "parity" else self.modulus
        rest = {"parity": "", "arithmetic": OPERATORS, "brackets": OPERATORS + "()"}[self.task]
        return string.digits[:digits] + rest + "=."


def load(config: Config) -> Dataset:
    """A string of uniformly random length, "=", padding; the target at "=" is the value of the string.

    An expression without brackets has an odd number of symbols. With `every_prefix` the target at each digit is the value of
    the string that ends there, and all strings are as long as fits.
    """
    digits = 2 if config.task == "parity" else config.modulus

    ids = {symbol: i for i, symbol in enumerate(config.symbols)}

    def draw(length: int) -> generated.Draw:
        return functools.partial(_example, config, ids, length)

    return generated.dataset(config, draw, vocab_size=len(ids), chance=1 / digits)


def _example(config: Config, ids: dict[str, int], length: int, rng: np.random.Generator) -> generated.Example:
    longest = length - 1
    size = longest if config.every_prefix else int(rng.integers(config.min_length, longest + 1))
    text, values = {"parity": _parity, "arithmetic": _arithmetic, "brackets": _brackets}[config.task](
        rng, size, config.modulus
    )
    answers = {i: v for i, v in values.items() if config.every_prefix or i == len(text) - 1}
    answers = answers if config.every_prefix else {len(text): answers[len(text) - 1]}
    tokens = [ids[c] for c in (text + "=").ljust(length, ".")]
    return generated.example(tokens, answers)


# Each makes a text of at most `size` symbols, and the value of every prefix that has one, by the index of its last symbol.


def _parity(rng: np.random.Generator, size: int, modulus: int) -> tuple[str, dict[int, int]]:
    bits = rng.integers(2, size=size)
    return "".join(map(str, bits)), dict(enumerate((np.cumsum(bits) % 2).tolist()))


def _arithmetic(rng: np.random.Generator, size: int, modulus: int) -> tuple[str, dict[int, int]]:
    digits = rng.integers(modulus, size=(size + 1) // 2).tolist()
    operators = rng.choice(list(OPERATORS), size=len(digits) - 1).tolist()
    total, product = 0, digits[0]  # the value is total + product
    values, text = {0: digits[0]}, [str(digits[0])]
    for operator, digit in zip(operators, digits[1:], strict=True):
        if operator == "*":
            product *= digit
        else:
            total, product = total + product, digit if operator == "+" else -digit
        total, product = total % modulus, product % modulus
        text += [operator, str(digit)]
        values[len(text) - 1] = (total + product) % modulus
    return "".join(text), values


def _brackets(rng: np.random.Generator, size: int, modulus: int) -> tuple[str, dict[int, int]]:
    """An expression of exactly `size` symbols: digit | -digit | -(e) | (e o e), the operands' sizes drawn uniformly.

    With every binary operation in brackets, precedence plays no part.
    """

    def make(size: int) -> tuple[str, int]:
        if size <= 2:
            digit = int(rng.integers(modulus))
            return ("-" * (size - 1) + str(digit)), (digit if size == 1 else -digit) % modulus
        if size <= 4 or rng.random() < 1 / 4:
            if size == 3:
                text, value = make(1)
                return f"({text})", value
            text, value = make(size - 3)
            return f"-({text})", -value % modulus
        left = int(rng.integers(1, size - 3))
        (a, x), (b, y) = make(left), make(size - 3 - left)
        operator = OPERATORS[rng.integers(3)]
        value = {"+": x + y, "-": x - y, "*": x * y}[operator] % modulus
        return f"({a}{operator}{b})", value

    text, value = make(size)
    return text, {size - 1: value}
