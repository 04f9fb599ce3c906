"""Least squares for many series at once: a grid of beginnings, then Levenberg-Marquardt by variable projection."""

import dataclasses

import numpy as np
import scipy.ndimage
from jaxtyping import Float

from deltajax.massive_activations.laws import Law

_TINY = 1e-300


@dataclasses.dataclass(frozen=True)
class Solution:
    """The best curve of one law through each of N series.

    Attributes:
      log_theta: [N, P].
      a, k: [N].
      rss: [N], sum of squared residuals.
      covariance: [N, P + 2, P + 2] of (log theta, A, K); infinite where the data do not determine them.
    """

    log_theta: np.ndarray
    a: np.ndarray
    k: np.ndarray
    rss: np.ndarray
    covariance: np.ndarray


def solve(law: Law, t: Float[np.ndarray, "T"], y: Float[np.ndarray, "N T"], restarts: int = 4) -> Solution:
    """Fit each series; t runs to 1, y should be of order 1.

    The grid's residuals cost one matrix product for all series; the `restarts` deepest of its local minima are refined, with
    log theta kept between the law's bounds, and the best one is returned.
    """
    centred = y - y.mean(1, keepdims=True)
    starts = _starts(law, t, centred, restarts)
    count, number, _ = starts.shape
    log_theta, rss = _refine(law, t, np.repeat(centred, number, 0), starts.reshape(count * number, -1))
    best = rss.reshape(count, number).argmin(1)
    log_theta = log_theta.reshape(count, number, -1)[np.arange(count), best]
    phi, derivative = law.basis(t, log_theta)
    mean = phi.mean(1, keepdims=True)
    a = _slope(phi - mean, centred)
    k = y.mean(1) - a * mean[:, 0]
    residual = y - a[:, None] * phi - k[:, None]
    rss = (residual**2).sum(1)
    jacobian = np.concatenate([a[:, None, None] * derivative, phi[..., None], np.ones((*phi.shape, 1))], -1)
    variance = rss / max(len(t) - jacobian.shape[-1], 1)
    return Solution(log_theta, a, k, rss, variance[:, None, None] * _inverse_gram(jacobian))


def _slope(phi: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (phi * y).sum(-1) / np.maximum((phi**2).sum(-1), _TINY)


def _starts(law: Law, t: np.ndarray, y: np.ndarray, number: int) -> np.ndarray:
    """log theta [N, number, P] of the grid's deepest local minima; the deepest again where there are fewer."""
    grid = law.grid()
    phi, _ = law.basis(t, grid)
    phi = phi - phi.mean(1, keepdims=True)
    norm = np.sqrt((phi**2).sum(1, keepdims=True))
    phi = np.divide(phi, norm, out=np.zeros_like(phi), where=norm > 1e-12)
    starts = np.empty((len(y), number, grid.shape[1]))
    for first in range(0, len(y), 200):  # bounded memory
        gain = (y[first : first + 200] @ phi.T) ** 2
        shaped = gain.reshape(-1, *law.points)
        peak = shaped == scipy.ndimage.maximum_filter(shaped, size=(1,) + (3,) * len(law.points), mode="nearest")
        candidates = np.where(peak.reshape(gain.shape), gain, -1.0)
        order = np.argsort(-candidates, axis=1)[:, :number]
        missing = np.take_along_axis(candidates, order, 1) < 0
        starts[first : first + 200] = grid[np.where(missing, order[:, :1], order)]
    return starts


def _residuals(law: Law, t: np.ndarray, y: np.ndarray, log_theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """(residual, its negative Jacobian by log theta, rss) after A and K are solved for (Kaufman's approximation)."""
    phi, derivative = law.basis(t, log_theta)
    phi = phi - phi.mean(1, keepdims=True)
    derivative = derivative - derivative.mean(1, keepdims=True)
    norm = np.maximum((phi**2).sum(1), _TINY)[:, None]
    a = _slope(phi, y)[:, None]
    along = np.einsum("nt,ntp->np", phi, derivative) / norm
    residual = y - a * phi
    jacobian = a[..., None] * (derivative - phi[..., None] * along[:, None, :])
    return residual, jacobian, (residual**2).sum(1)


def _refine(law: Law, t: np.ndarray, y: np.ndarray, log_theta: np.ndarray, iterations: int = 200) -> tuple:
    """Levenberg-Marquardt on all series together; those that have converged are left out of the work."""
    low, high = np.log(law.low), np.log(law.high)
    log_theta = log_theta.copy()
    residual, jacobian, rss = _residuals(law, t, y, log_theta)
    damping = np.full(len(y), 1e-2)
    total = (y**2).sum(1)
    active = np.arange(len(y))
    eye = np.eye(log_theta.shape[1])
    for _ in range(iterations):
        if not len(active):
            break
        gradient = np.einsum("ntp,nt->np", jacobian, residual)
        now = log_theta[active]
        held = ((now <= low) & (gradient < 0)) | ((now >= high) & (gradient > 0))
        gradient = np.where(held, 0, gradient)
        gram = np.einsum("ntp,ntq->npq", jacobian, jacobian)
        gram = np.where(held[:, :, None] | held[:, None, :], 0, gram)
        diagonal = np.einsum("npp->np", gram)
        scale = np.maximum(diagonal, 1e-9 * diagonal.max(1, keepdims=True)) + _TINY
        system = gram + eye * (damping[active][:, None] * scale)[:, None, :] + eye * np.where(held, 1, 0)[:, None, :]
        step = np.clip(np.linalg.solve(system, gradient[..., None])[..., 0], -2, 2)
        tried = np.clip(now + step, low, high)
        new = _residuals(law, t, y[active], tried)
        better = new[2] < rss[active]
        gained = np.where(better, rss[active] - new[2], 0)
        log_theta[active[better]] = tried[better]
        rss[active[better]] = new[2][better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.2, 5.0), 1e-12, None)
        settled = better & (gained <= 1e-9 * rss[active]) & (damping[active] < 1)
        stuck = ~better & (damping[active] > 1e8)
        exact = rss[active] <= 1e-20 * total[active]
        going = ~(settled | stuck | exact)
        residual = np.where(better[:, None], new[0], residual)[going]
        jacobian = np.where(better[:, None, None], new[1], jacobian)[going]
        active = active[going]
    return log_theta, rss


def _inverse_gram(jacobian: Float[np.ndarray, "N T P"]) -> Float[np.ndarray, "N P P"]:
    """(J' J)^-1 by the singular values of J with columns of unit length; infinite where J has no full rank."""
    norm = np.sqrt((jacobian**2).sum(1))
    scaled = jacobian / np.maximum(norm, _TINY)[:, None, :]
    _, singular, right = np.linalg.svd(scaled, full_matrices=False)
    full = (singular[:, -1] > 1e-10 * singular[:, 0]) & (norm > 0).all(1)
    weighted = right / np.where(full[:, None], singular, 1)[:, :, None]
    inverse = np.einsum("nki,nkj->nij", weighted, weighted) / np.maximum(norm[:, :, None] * norm[:, None, :], _TINY)
    return np.where(full[:, None, None], inverse, np.inf)
