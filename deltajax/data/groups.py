"""Finite groups as multiplication tables, by name or by generators."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

LARGEST = 1000  # elements: the table is their square
ALLOWED = (
    "S<n>, A<n>, Z<n>, D<n> (2 n elements), products such as A4xZ5, or generators in cycle notation such as "
    f"'(0 1), (0 1 2)'; at most {LARGEST} elements"
)

Permutation = tuple[int, ...]  # p[i] is where i goes


@dataclasses.dataclass(frozen=True)
class Group:
    """A finite group of permutations.

    Attributes:
      elements: the permutations in lexicographic order; the first is the identity.
      table: table[a, b] is the element "first a, then b", by their indices.
      generators: indices of the elements that generate the group, in the order given.
    """

    elements: tuple[Permutation, ...]
    table: Int[np.ndarray, "n n"]
    generators: tuple[int, ...]

    def __len__(self) -> int:
        """The order of the group."""
        return len(self.elements)


@functools.lru_cache(maxsize=32)
def group(name: str) -> Group:
    """The group of this name, or the one that these generators generate.

    Args:
      name: "S5" (all permutations of 5 points), "A5" (the even ones), "Z7" (cyclic), "D4" (the 8 symmetries of a
        square), a direct product "A4xZ5", or generators in cycle notation: "(0 1 2 3 4), (0 1)(2 3)".

    Raises:
      ValueError: not such a name, or more than `LARGEST` elements.
    """
    generators = _cycles(name) if name.lstrip().startswith("(") else _product(name)
    return generate(generators, name)


def generate(generators: Sequence[Permutation], name: str = "generators") -> Group:
    """The group that permutations of the same points generate."""
    identity = tuple(range(len(generators[0])))
    found, frontier = {identity}, [identity]
    while frontier:
        reached = {_then(p, g) for p in frontier for g in generators} - found
        found |= reached
        frontier = list(reached)
        if len(found) > LARGEST:
            raise ValueError(f"group must be {ALLOWED}; got {name!r} with more")
    elements = tuple(sorted(found))
    index = {p: i for i, p in enumerate(elements)}
    table = np.array([[index[_then(a, b)] for b in elements] for a in elements], np.int32)
    table.setflags(write=False)
    return Group(elements, table, tuple(index[tuple(g)] for g in generators))


def _then(a: Permutation, b: Permutation) -> Permutation:
    return tuple(b[i] for i in a)


def _product(name: str) -> list[Permutation]:
    """Generators of the factors, each on points of its own."""
    factors = [_named(factor, name) for factor in name.split("x")]
    sizes = [len(generators[0]) for generators in factors]
    starts = [0, *itertools.accumulate(sizes)]
    generators = []
    for start, of_factor in zip(starts, factors, strict=False):
        for g in of_factor:
            image = list(range(starts[-1]))
            image[start : start + len(g)] = [start + i for i in g]
            generators.append(tuple(image))
    return generators


def _named(factor: str, name: str) -> list[Permutation]:
    match = re.fullmatch(r"([SAZD])([1-9]\d{0,3})", factor)
    if not match:
        raise ValueError(f"group must be {ALLOWED}; got {name!r}")
    family, n = match[1], int(match[2])
    rotation = tuple((i + 1) % n for i in range(n))
    if family == "Z":
        return [rotation]
    if family == "D" and n > 2:
        return [rotation, tuple(-i % n for i in range(n))]
    if family == "D":  # on fewer than three points a reflection would be a rotation
        return _product({1: "Z2", 2: "Z2xZ2"}[n])
    if family == "S":
        return [(1, 0, *range(2, n)), rotation] if n > 1 else [(0,)]
    three_cycles = [(1, i, *(j if j != i else 0 for j in range(2, n))) for i in range(2, n)]  # 0 -> 1 -> i -> 0
    return three_cycles or [tuple(range(n))]


def _cycles(text: str) -> list[Permutation]:
    """Permutations in cycle notation, separated by commas: "(0 1), (0 1 2)"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"(\(\s*\d+(\s+\d+)*\s*\)\s*)+", part) for part in parts):
        raise ValueError(f"group must be {ALLOWED}; got {text!r}")
    cycles = [[[int(i) for i in c.split()] for c in re.findall(r"\(([^)]*)\)", part)] for part in parts]
    size = 1 + max(i for part in cycles for cycle in part for i in cycle)
    if size > LARGEST:
        raise ValueError(f"group must act on at most {LARGEST} points; got {text!r}")
    generators = []
    for part in cycles:
        points = [i for cycle in part for i in cycle]
        if len(points) != len(set(points)):
            raise ValueError(f"group: the cycles of one permutation must not share points; got {text!r}")
        image = list(range(size))
        for cycle in part:
            for i, j in itertools.pairwise([*cycle, cycle[0]]):
                image[i] = j
        generators.append(tuple(image))
    return generators
