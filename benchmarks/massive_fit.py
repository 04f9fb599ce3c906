"""The five-parameter law refitted to trajectories drawn from it: how often values, intervals and refusals are right.

    python -m benchmarks.massive_fit --csv=benchmarks/results/massive_fit.csv

Steps are Pythia's 154 checkpoints; parameters are drawn around the one published fit (first layer of the 410M model, arXiv
2508.03616: lambda .12, gamma times the last step 16, t0 .62, K half the curve's range), widely enough that peaks lie inside and
beyond the data, and plateaus are reached or not; noise is normal, 5 % of each curve's range.
"""

import dataclasses
import time

import numpy as np
from absl import app, flags
from jaxtyping import Float

from benchmarks import table
from deltajax.massive_activations import laws
from deltajax.massive_activations.fit import PARAMETERS, fit_trajectories

STEPS = np.array([0, *(2**i for i in range(10)), *range(1000, 143001, 1000)], np.float64)
NOISE = 0.05

_COUNT = flags.DEFINE_integer("count", 1000, "trajectories of each seed", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "independent draws of them", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Trajectories of known parameters; truth has PARAMETERS and "peak_step", [N] each."""

    truth: dict[str, np.ndarray]
    clean: Float[np.ndarray, "N T"]
    noisy: Float[np.ndarray, "N T"]


def draw(count: int, seed: int = 0) -> Draws:
    """Trajectories over ranges that hold the published fit."""
    rng = np.random.default_rng(seed)

    def log_uniform(low, high):
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    rate, gamma, t0 = log_uniform(0.03, 1), log_uniform(4, 300) / STEPS[-1], rng.uniform(0.3, 1.2, count)
    a = log_uniform(0.1, 1000)
    shapes = np.array([laws.modulated_logarithm(STEPS, 1, *theta, 0) for theta in zip(rate, gamma, t0, strict=True)])
    k = a * np.ptp(shapes, axis=1) * rng.uniform(0.3, 2, count)
    clean = a[:, None] * shapes + k[:, None]
    noise = NOISE * np.ptp(clean, axis=1)[:, None] * rng.normal(size=clean.shape)
    peak = np.array([laws.peak_step(*theta) for theta in zip(rate, gamma, t0, strict=True)])
    truth = dict(zip((*PARAMETERS, "peak_step"), (a, rate, gamma, t0, k, peak), strict=True))
    return Draws(truth, clean, clean + noise)


def figures(draws: Draws) -> dict[str, float]:
    """What the issue asks for, as fractions of the draws that each row concerns, and the seconds that the fit took."""
    start = time.perf_counter()
    fits = fit_trajectories(STEPS, draws.noisy)
    found = {"seconds": time.perf_counter() - start}
    total = ((draws.noisy - draws.noisy.mean(1, keepdims=True)) ** 2).sum(1)
    of_truth = 1 - ((draws.noisy - draws.clean) ** 2).sum(1) / total
    r2 = np.array([fit.score.r2 if fit.score else -np.inf for fit in fits])
    found["R2 within 0.01 of the truth's"] = float(np.mean(r2 >= of_truth - 0.01))
    k, peak = draws.truth["K"], draws.truth["peak_step"]
    reached = np.abs(draws.clean[:, -1] - k) <= 0.05 * np.ptp(draws.clean, axis=1)
    inside = (peak > 0) & (peak < STEPS[-1])
    values = {name: np.array([fit.estimates[name].value or np.nan for fit in fits], np.float64) for name in draws.truth}
    found["K within 5 % where the plateau is reached"] = float(np.mean(np.abs(values["K"] / k - 1)[reached] < 0.05))
    off = np.abs(values["peak_step"] / peak - 1)
    found["t_peak within 10 % where it lies inside"] = float(np.mean(off[inside] < 0.1))
    found["peaks far beyond the last step that are refused"] = float(np.mean(np.isnan(off[peak > 1.5 * STEPS[-1]])))
    for name, truth in draws.truth.items():
        known = [(fit.estimates[name], x) for fit, x in zip(fits, truth, strict=True) if fit.estimates[name].value]
        found[f"{name}: identified"] = len(known) / len(fits)
        found[f"{name}: covered by the 95 % interval"] = float(np.mean([e.low <= x <= e.high for e, x in known]))
    return found


def main(_):
    """Print and write the table."""
    found = [figures(draw(_COUNT.value, seed)) for seed in range(_SEEDS.value)]
    rows = []
    for name in found[0]:
        values = {f"seed {seed}": f"{of_seed[name]:.3f}" for seed, of_seed in enumerate(found)}
        print(f"{name:<50}" + "".join(f"{value:>8}" for value in values.values()))
        rows.append({"figure": name, **values, "trajectories": _COUNT.value})
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
