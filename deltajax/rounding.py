"""Whole numbers from shares: 0.29 of 100 is 29, though the product of the floats is 28.999999999999996."""

import math
from fractions import Fraction

_SIMPLE = 10**6  # largest denominator of a fraction that somebody means by a float, such as 1/49


def exact(share: float) -> Fraction:
    """The fraction that a float was written as: of 0.29 it is 29/100, of 1/49 it is 1/49, of 1 - 0.9 it is 1/10.

    A float that is no such fraction, up to the rounding of a few operations, is taken as its decimal digits.
    """
    simple = Fraction(share).limit_denominator(_SIMPLE)
    return simple if math.isclose(simple, share, rel_tol=1e-15, abs_tol=1e-15) else Fraction(repr(float(share)))


def floor_of(share: float, count: int) -> int:
    """The largest integer that is at most `share` of `count`."""
    return math.floor(exact(share) * count)


def round_of(share: float, count: int) -> int:
    """The integer nearest to `share` of `count`; a half goes to the even one."""
    return round(exact(share) * count)
