"""Curves y(t) = A phi(t; theta) + K that a trajectory may follow, each with the derivative of phi.

Every law is linear in A and K, so a fit searches over theta only (variable projection, Golub and Pereyra 1973). theta holds
positive numbers and is searched by its logarithm.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import scipy.special
from jaxtyping import Float

Basis = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Law:
    """A family of curves.

    Attributes:
      name: as results and tables call it.
      parameters: names of theta.
      basis: (t [T], log theta [N, P]) -> phi [N, T] and its derivative by log theta [N, T, P].
      low, high: bounds of theta where t runs to 1.
      points: of theta tried as beginnings of the search, per dimension.
    """

    name: str
    parameters: tuple[str, ...]
    basis: Basis
    low: tuple[float, ...]
    high: tuple[float, ...]
    points: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters of the curve, A and K among them."""
        return len(self.parameters) + (2 if self.parameters else 1)

    def grid(self) -> Float[np.ndarray, "G P"]:
        """log theta of every beginning, the last parameter fastest."""
        axes = [np.linspace(np.log(a), np.log(b), n) for a, b, n in zip(self.low, self.high, self.points, strict=True)]
        return np.array(list(itertools.product(*axes)))


def _modulated_logarithm(t, log_theta):
    """phi = exp(-lambda x) log x, x = gamma t + t0 (arXiv 2508.03616)."""
    rate, gamma, t0 = np.exp(log_theta).T[:, :, None]
    growth = gamma * t
    x = growth + t0
    log_x, decay = np.log(x), np.exp(-rate * x)
    phi = decay * log_x
    by_x = decay / x - rate * phi
    return phi, np.stack([-rate * x * phi, growth * by_x, t0 * by_x], axis=-1)


def _first_order(t, log_theta):
    """phi = 1 - exp(-t / tau): what a first-order system answers to a step."""
    age = t / np.exp(log_theta)
    decay = np.exp(-age)
    return 1 - decay, (-age * decay)[..., None]


def _second_order(t, log_theta):
    """What y'' / w^2 + 2 zeta y' / w + y = step answers: one formula for over- and underdamped by complex poles."""
    frequency, zeta = np.exp(log_theta).T[:, :, None]
    age = frequency * t
    squared = 1 - zeta**2
    squared = np.where(np.abs(squared) < 1e-4, 1e-4, squared)  # critical damping is a removable singularity
    root = np.sqrt(squared.astype(complex))
    up, down = np.exp((-zeta + 1j * root) * age), np.exp((-zeta - 1j * root) * age)
    impulse = ((up - down) / (2j * root)).real
    cosine = ((up + down) / 2).real
    phi = 1 - cosine - zeta * impulse
    return phi, np.stack([age * impulse, -zeta * (impulse - age * cosine) / squared], axis=-1)


MODULATED_LOGARITHM = Law(
    "modulated_logarithm",
    ("lambda", "gamma", "t0"),
    _modulated_logarithm,
    low=(1e-3, 1e-2, 1e-3),
    high=(30.0, 3e4, 30.0),
    points=(19, 25, 14),
)
FIRST_ORDER = Law("first_order", ("tau",), _first_order, (1e-4,), (10.0,), (60,))
SECOND_ORDER = Law("second_order", ("frequency", "zeta"), _second_order, (0.1, 0.03), (3e4, 30.0), (40, 24))
LAWS = (MODULATED_LOGARITHM, FIRST_ORDER, SECOND_ORDER)


def modulated_logarithm(
    t: Float[np.ndarray, "T"], a: float, rate: float, gamma: float, t0: float, k: float
) -> Float[np.ndarray, "T"]:
    """f(t) = A exp(-lambda x) log(x) + K with x = gamma t + t0 (arXiv 2508.03616)."""
    x = gamma * np.asarray(t, np.float64) + t0
    return a * np.exp(-rate * x) * np.log(x) + k


def peak_step(rate: float, gamma: float, t0: float) -> float:
    """Where the law peaks: x* log x* = 1 / lambda, so x* = exp(W(1 / lambda)); t = (x* - t0) / gamma, may be negative."""
    return (np.exp(scipy.special.lambertw(1 / rate).real) - t0) / gamma


def log_peak_gradient(rate: float, gamma: float, t0: float) -> Float[np.ndarray, "3"]:
    """Derivative of log `peak_step` by the logarithms of lambda, gamma and t0; the peak must lie after step 0."""
    by_rate = -1 / (rate * (1 + scipy.special.lambertw(1 / rate).real)) / gamma
    peak = peak_step(rate, gamma, t0)
    return np.array([by_rate, -peak, -t0 / gamma]) / peak
