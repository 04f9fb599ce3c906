"""Groups against their definitions."""

import itertools
import math

import numpy as np
import pytest

from deltajax.data import groups


@pytest.mark.parametrize(
    "name, order, commutative",
    [
        ("S1", 1, True),
        ("S2", 2, True),
        ("S3", 6, False),
        ("S4", 24, False),
        ("S5", 120, False),
        ("A1", 1, True),
        ("A2", 1, True),
        ("A3", 3, True),
        ("A4", 12, False),
        ("A5", 60, False),
        ("Z1", 1, True),
        ("Z60", 60, True),
        ("D1", 2, True),
        ("D2", 4, True),
        ("D3", 6, False),
        ("D4", 8, False),
        ("A4xZ5", 60, False),
        ("Z2xZ2xZ2", 8, True),
        ("(0 1)", 2, True),
        ("(0 1 2 3 4), (0 1)(2 3)", 60, False),
        ("(0 1 2 3 4), (0 1)", 120, False),
    ],
)
def test_order_and_axioms(name, order, commutative):
    group = groups.group(name)
    table = group.table
    everything = np.arange(order)
    assert len(group) == order and table.shape == (order, order)
    np.testing.assert_array_equal(table[0], everything)  # the identity
    np.testing.assert_array_equal(table[:, 0], everything)
    for line in (*table, *table.T):
        np.testing.assert_array_equal(np.sort(line), everything)  # inverses
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 200))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == commutative


@pytest.mark.parametrize("n", [3, 4, 5])
def test_symmetric_and_alternating_are_all_and_the_even_permutations(n):
    everything = set(itertools.permutations(range(n)))
    even = {p for p in everything if np.linalg.det(np.eye(n)[list(p)]) > 0}
    assert set(groups.group(f"S{n}").elements) == everything
    assert set(groups.group(f"A{n}").elements) == even
    assert len(even) == math.factorial(n) // 2


def test_table_composes_permutations_first_then_second():
    group = groups.group("S4")
    for a, b in itertools.product(range(24), repeat=2):
        product = group.elements[group.table[a, b]]
        assert product == tuple(group.elements[b][group.elements[a][i]] for i in range(4))


def test_generators_are_those_given():
    group = groups.group("(0 1 2), (0 1)")
    assert [group.elements[g] for g in group.generators] == [(1, 2, 0), (1, 0, 2)]


def test_a_group_is_made_once_and_cannot_be_changed():
    """Every example of a word problem asks for its group; making S5 anew took 18 ms, most of a training step."""
    group = groups.group("S5")
    assert groups.group("S5") is group
    with pytest.raises(ValueError, match="read-only"):
        group.table[0, 0] = 1


@pytest.mark.parametrize("name", ["", "S", "S0", "Q8", "S7", "Z1001", "A4x", "(0 1", "(0 1)(1 2)", "(0 99999)", "5"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="group") as error:
        groups.group(name)
    assert "\n" not in str(error.value)
