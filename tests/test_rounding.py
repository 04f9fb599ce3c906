"""Whole numbers from shares, against integer arithmetic."""

import itertools

import numpy as np
import pytest

from deltajax.data import mad
from deltajax.layers import attention
from deltajax.models import efficientnet
from deltajax.rounding import floor_of, round_of


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_decimal_shares(digits):
    """Of 0.29 and 100 the floats' product is below 29; with three digits 4 % of the floors would be wrong."""
    one = 10**digits
    for share, count in itertools.product(range(one + 1), (1, 7, 10, 49, 50, 100, 1000, 95 * 8)):
        assert floor_of(share / one, count) == share * count // one, (share, count)
        whole, rest = divmod(share * count, one)
        nearest = whole + (2 * rest > one or (2 * rest == one and whole % 2))
        assert round_of(share / one, count) == nearest, (share, count)


def test_shares_that_were_computed():
    """1 / 49 times 49 is below 1 in floats, and so is (1 - 0.9) times 10."""
    for count in range(1, 150):
        for part in range(1, count + 1):
            for share in (part / count, 1 - (count - part) / count):
                assert floor_of(share, count) == part
                assert floor_of(share, 7 * count) == 7 * part


def test_shares_are_not_rounded_up():
    """Only what the rounding of floats took away is given back."""
    assert floor_of(0.333333333, 3) == 0
    assert floor_of(0.2899999999, 100) == 28
    assert floor_of(1e-9, 10**9) == 1 and floor_of(1e-9, 10**9 - 1) == 0
    assert floor_of(0.123456789, 10**9) == 123456789


def test_who_uses_them():
    """Each of these products is below a whole number, or a half, in floats."""
    assert attention.Config(num_heads=1, head_dim=100, rope_fraction=0.58).rotary_dims == 58
    assert int(100 * 0.58) == 57
    assert efficientnet.Squeeze(ratio=0.29, of="hidden").reduced(100, 400) == 120  # of 116: up to a multiple of 8
    assert int(400 * 0.29 + 4) // 8 * 8 == 112
    example = mad._recall(mad.Config(task="noisy_recall"), 100, np.random.default_rng(0), noise=0.545)
    pairs = np.sum(example["tokens"] < 8)  # keys; one more token is left of 46 than of the 45 that floats give
    assert pairs == 23 and (100 - round(0.545 * 100)) // 2 == 22
