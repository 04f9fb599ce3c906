"""The five-parameter law fitted to trajectories: values with intervals, what the data cannot tell, rivals, kinds.

fits = fit_trajectories(steps, ratios)               # [T], [L, T]
fits[3].estimates["peak_step"], fits[3].kind, fits[3].curve(steps)
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import scipy.stats
from jaxtyping import Float

from deltajax.massive_activations import laws
from deltajax.massive_activations.least_squares import Solution, solve

MIN_POINTS = 8
LEVEL = 0.95
PARAMETERS = ("A", "lambda", "gamma", "t0", "K")
WIDEST = math.log(2)  # an interval that reaches beyond half or twice the value is no identification
PLATEAU = 0.05  # of the curve's range: how near to K the last step must come
Kind = Literal["early peak", "log increase", "none"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval, or the reason why the data do not give it.

    Attributes:
      value, low, high: None where the data do not identify it.
      problem: "" or why not.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a law describes a series.

    Attributes:
      r2: share of the variance explained; 0 for a constant.
      aic: n log(RSS / n) + 2 times the number of parameters: lower is better, by differences only.
    """

    r2: float
    aic: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law on one series.

    Attributes:
      parameters: A, lambda, gamma, t0, K of the best curve, in the data's units. The curve is determined by the data; each
        number need not be: see `estimates`.
      estimates: the same five and "peak_step", each with its interval or with what is missing.
      score: of the law.
      rivals: of "first_order", "second_order" (step responses) and "constant".
      kind: "early peak": rises and falls again inside the data; "log increase": rises and stays; "none".
      problem: "" or why there is no fit; everything else is then empty.
    """

    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    estimates: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    score: Score | None = None
    rivals: dict[str, Score] = dataclasses.field(default_factory=dict)
    kind: Kind = "none"
    problem: str = ""

    def curve(self, steps: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
        """The law's values at these steps."""
        return laws.modulated_logarithm(steps, *(self.parameters[name] for name in PARAMETERS))


def fit_trajectories(steps: Float[np.ndarray, "T"], values: Float[np.ndarray, "L T"], restarts: int = 4) -> list[Fit]:
    """Fit each row; a row that cannot be fitted says why in its `problem` and does not disturb the others.

    Intervals are Wald's, on logarithms for what is positive, with Student's quantile; the residual variance is multiplied by
    (1 + r) / (1 - r), r >= 0 being the residuals' lag-1 correlation, for neighbouring steps see nearly the same weights.

    Raises:
      ValueError: shapes that do not go together; steps that are negative or do not increase; restarts < 1.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps.ndim != 1 or values.ndim != 2 or values.shape[1] != len(steps):
        raise ValueError(f"steps must be [T] and values [L, T], got {steps.shape} and {values.shape}")
    if restarts < 1:
        raise ValueError(f"restarts must be >= 1, got {restarts}")
    check_steps(steps)
    problems = [_problem(row) for row in values]
    good = np.array([not p for p in problems], bool)
    fits = [Fit(problem=p) for p in problems]
    if good.any():
        for i, fit in zip(np.flatnonzero(good), _fit(steps, values[good], restarts), strict=True):
            fits[i] = fit
    return fits


def check_steps(steps: Float[np.ndarray, "T"]) -> None:
    """Refuse steps that are negative, not finite, repeated or out of order.

    Raises:
      ValueError: names the first that is.
    """
    if not np.isfinite(steps).all() or (len(steps) and steps.min() < 0):
        raise ValueError(f"steps must be finite and >= 0, got {steps[~(np.isfinite(steps) & (steps >= 0))][0]}")
    known, counts = np.unique(steps, return_counts=True)
    if len(known) < len(steps):
        raise ValueError(f"step {known[counts > 1][0]:g} comes twice; rows of several models?")
    wrong = np.flatnonzero(np.diff(steps) < 0)
    if len(wrong):
        raise ValueError(f"steps must increase, got {steps[wrong[0]]:g} before {steps[wrong[0] + 1]:g}")


def _problem(row: np.ndarray) -> str:
    if len(row) < MIN_POINTS:
        return f"{len(row)} points; at least {MIN_POINTS} are needed for five parameters"
    if not np.isfinite(row).all():
        return f"{int((~np.isfinite(row)).sum())} of {len(row)} values are not finite"
    if np.ptp(row) <= 1e-9 * np.abs(row).max():
        return f"constant at {row[0]:g}"
    return ""


def _fit(steps: np.ndarray, values: np.ndarray, restarts: int) -> list[Fit]:
    """Rows that can be fitted: in units in which the last step is 1 and values lie between 0 and 1, then scaled back."""
    low, height = values.min(1, keepdims=True), np.ptp(values, axis=1)[:, None]
    t, y = steps / steps[-1], (values - low) / height
    solutions = {law.name: solve(law, t, y, restarts) for law in laws.LAWS}
    law = solutions[laws.MODULATED_LOGARITHM.name]
    fits = []
    for i, row in enumerate(y):
        total = float(((row - row.mean()) ** 2).sum())
        scores = {law.name: _score(solutions[law.name].rss[i], total, len(t), law.num_parameters) for law in laws.LAWS}
        scores["constant"] = _score(total, total, len(t), 1)
        fits.append(_one(t, row, steps[-1], float(low[i, 0]), float(height[i, 0]), law, i, scores))
    return fits


def _score(rss: float, total: float, count: int, parameters: int) -> Score:
    rss = max(float(rss), count * 1e-24)  # a perfect fit has an AIC too
    return Score(1 - rss / total, count * math.log(rss / count) + 2 * parameters)


def _one(
    t: np.ndarray,
    y: np.ndarray,
    last: float,
    low: float,
    height: float,
    solution: Solution,
    i: int,
    scores: dict[str, Score],
) -> Fit:
    log_theta, a, k = solution.log_theta[i], float(solution.a[i]), float(solution.k[i])
    rate, gamma, t0 = map(float, np.exp(log_theta))
    curve = laws.modulated_logarithm(t, a, rate, gamma, t0, k)
    residual = y - curve
    norm = float((residual**2).sum())
    correlation = max(0.0, float(residual[1:] @ residual[:-1]) / norm) if norm > 0 else 0.0
    inflation = (1 + min(correlation, 0.95)) / (1 - min(correlation, 0.95))
    quantile = scipy.stats.t.ppf((1 + LEVEL) / 2, max(len(t) - len(PARAMETERS), 1))
    covariance = inflation * solution.covariance[i]
    half = quantile * np.sqrt(np.diagonal(covariance))  # of log lambda, log gamma, log t0, A, K

    bounds = zip(laws.MODULATED_LOGARITHM.low, laws.MODULATED_LOGARITHM.high, strict=True)
    estimates = {"A": _positive(a * height, half[3] / abs(a) if a else math.inf)}
    for j, (name, unit, bound) in enumerate(zip(PARAMETERS[1:4], (1, 1 / last, 1), bounds, strict=True)):
        at_bound = math.isclose(log_theta[j], math.log(bound[0])) or math.isclose(log_theta[j], math.log(bound[1]))
        estimates[name] = _positive(math.exp(log_theta[j]) * unit, math.inf if at_bound else half[j])
    span = float(np.ptp(curve))
    estimates["K"] = _plateau(k, half[4], abs(curve[-1] - k), span, low, height)
    estimates["peak_step"] = _peak(a, (rate, gamma, t0), covariance[:3, :3], quantile, t[0], last)
    values = (a * height, rate, gamma / last, t0, low + k * height)
    noise = math.sqrt(norm / len(t))
    score = scores.pop(laws.MODULATED_LOGARITHM.name)
    return Fit(
        dict(zip(PARAMETERS, map(float, values), strict=True)),
        estimates,
        score,
        scores,
        _kind(curve, noise, span, score.aic - scores["constant"].aic),
    )


def _positive(value: float, half: float) -> Estimate:
    """An interval on the logarithm."""
    if not half <= WIDEST:
        return Estimate(None, problem="the data leave it open by more than a factor of 2")
    low, high = sorted((value * math.exp(-half), value * math.exp(half)))
    return Estimate(value, low, high)


def _plateau(k: float, half: float, gap: float, span: float, low: float, height: float) -> Estimate:
    if gap > PLATEAU * span:
        return Estimate(None, problem="no plateau: the last step is far from it")
    if not half <= span / 4:
        return Estimate(None, problem="the data leave it open by more than a quarter of the curve's range")
    return Estimate(low + k * height, low + (k - half) * height, low + (k + half) * height)


def _peak(
    a: float, theta: tuple[float, float, float], covariance: np.ndarray, quantile: float, first: float, last: float
) -> Estimate:
    """By the delta method on the logarithm of the peak's time, which Lambert's W gives."""
    if a <= 0:
        return Estimate(None, problem="no peak: A is negative")
    peak = laws.peak_step(*theta)
    if peak <= first:
        return Estimate(None, problem="no peak: the curve falls from the first step on")
    if peak > 1:
        return Estimate(None, problem="the peak lies beyond the last step")
    gradient = laws.log_peak_gradient(*theta)
    variance = gradient @ covariance @ gradient if np.isfinite(covariance).all() else math.inf
    return _positive(peak * last, quantile * math.sqrt(max(variance, 0.0)))


def _kind(curve: np.ndarray, noise: float, span: float, aic_over_constant: float) -> Kind:
    """By the fitted curve: it must beat a constant (by 10 in AIC), and rise or fall by more than noise and a tenth."""
    rise, fall = curve.max() - curve[0], curve.max() - curve[-1]
    clear = max(0.1 * span, 2 * noise)
    if aic_over_constant > -10 or rise <= clear:
        return "none"
    return "early peak" if fall > clear else "log increase"
