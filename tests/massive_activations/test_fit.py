"""The law recovered from trajectories of known parameters; its derivatives, its rivals, its refusals."""

import numpy as np
import pytest

from benchmarks import massive_fit
from deltajax.massive_activations import laws
from deltajax.massive_activations.fit import fit_trajectories

STEPS = massive_fit.STEPS


def test_a_thousand_trajectories():
    """The bounds of the project's issue on 1,000 draws with 5 % noise."""
    table = massive_fit.figures(massive_fit.draw(1000))
    assert table["R2 within 0.01 of the truth's"] >= 0.95
    assert table["K within 5 % where the plateau is reached"] >= 0.95
    assert table["t_peak within 10 % where it lies inside"] >= 0.95
    assert table["peaks far beyond the last step that are refused"] >= 0.95
    for name in ("A", "lambda", "gamma", "t0", "K", "peak_step"):
        assert table[f"{name}: identified"] >= 0.3
        assert 0.90 <= table[f"{name}: covered by the 95 % interval"] <= 0.99, name


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.name)
def test_derivatives(law):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 40)
    log_theta = rng.uniform(np.log(law.low) / 2, np.log(law.high) / 2, (30, len(law.low)))
    _, derivative = law.basis(t, log_theta)
    for p in range(len(law.low)):
        change = np.zeros(len(law.low))
        change[p] = 1e-6
        numeric = (law.basis(t, log_theta + change)[0] - law.basis(t, log_theta - change)[0]) / 2e-6
        np.testing.assert_allclose(derivative[..., p], numeric, rtol=1e-5, atol=1e-7)


def test_peak_is_where_the_curve_is_highest():
    rng = np.random.default_rng(1)
    for rate, gamma, t0 in zip(
        rng.uniform(0.05, 2, 20), rng.uniform(0.5, 5, 20), rng.uniform(0.01, 1, 20), strict=True
    ):
        peak = laws.peak_step(rate, gamma, t0)
        near = peak * np.linspace(0.99, 1.01, 2001)
        assert near[np.argmax(laws.modulated_logarithm(near, 1, rate, gamma, t0, 0))] == pytest.approx(peak, rel=2e-5)
        gradient = laws.log_peak_gradient(rate, gamma, t0)
        for i in range(3):
            up, down = (np.array([rate, gamma, t0]) * np.exp(np.eye(3)[i] * h) for h in (1e-5, -1e-5))
            numeric = np.log(laws.peak_step(*up) / laws.peak_step(*down)) / 2e-5
            assert gradient[i] == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def test_without_noise_the_parameters_come_back_in_the_data_s_units():
    """A published fit (410M, first layer, medians), and the same a thousand times as large."""
    published = dict(zip(("A", "lambda", "gamma", "t0", "K"), (0.1991, 0.1245, 1.124e-4, 0.6212, 0.1219), strict=True))
    curve = laws.modulated_logarithm(STEPS, *published.values())
    for factor, fit in zip((1, 1000), fit_trajectories(STEPS, np.stack([curve, 1000 * curve])), strict=True):
        for name, value in published.items():
            unit = factor if name in "AK" else 1
            assert fit.parameters[name] == pytest.approx(unit * value, rel=1e-4)
        assert fit.estimates["peak_step"].value == pytest.approx(laws.peak_step(0.1245, 1.124e-4, 0.6212), rel=1e-4)
        assert fit.estimates["K"].problem == "no plateau: the last step is far from it"
        np.testing.assert_allclose(fit.curve(STEPS), factor * curve, rtol=1e-6)


def test_rivals_win_on_their_own_curves_and_kinds_are_told_apart():
    t = STEPS / STEPS[-1]
    noise = 0.02 * np.random.default_rng(2).normal(size=(5, len(t)))
    first = laws.FIRST_ORDER.basis(t, np.log([[0.2]]))[0][0]
    second = laws.SECOND_ORDER.basis(t, np.log([[30, 0.3]]))[0][0]
    peaked = laws.modulated_logarithm(t, 1, 0.3, 40, 1, 0)
    late = laws.modulated_logarithm(t, 1, 0.002, 40, 1, 0) / 4
    fits = fit_trajectories(STEPS, np.stack([first, second, np.zeros_like(t), peaked, late]) + noise)
    best = [min({"law": f.score, **f.rivals}.items(), key=lambda x: x[1].aic)[0] for f in fits]
    assert best[1:4] == ["second_order", "constant", "law"]
    assert fits[0].rivals["first_order"].r2 == pytest.approx(fits[0].score.r2, abs=0.01)
    assert [f.kind for f in fits] == ["log increase", "log increase", "none", "early peak", "log increase"]
    assert fits[2].rivals["constant"].r2 == 0
    assert fits[4].estimates["peak_step"].value is None


def test_what_falls_from_the_beginning_or_dips_has_no_peak():
    t = STEPS / STEPS[-1]
    falling = np.exp(-5 * t)
    dipping = -laws.modulated_logarithm(t, 1, 0.3, 40, 1, 0)
    for fit in fit_trajectories(STEPS, np.stack([falling, dipping])):
        assert fit.kind == "none"
        assert fit.estimates["peak_step"].problem.startswith("no peak: ")


def test_bad_series_are_named_and_the_others_fitted():
    good = laws.modulated_logarithm(STEPS, 1, 0.3, 3e-4, 1, 2)
    bad = good.copy()
    bad[[3, 9]] = np.nan, np.inf
    fits = fit_trajectories(STEPS, np.stack([np.full_like(good, 7), good, bad]))
    assert [f.problem for f in fits] == ["constant at 7", "", "2 of 154 values are not finite"]
    assert fits[1].score.r2 > 0.999
    (few,) = fit_trajectories(STEPS[:7], good[None, :7])
    assert few.problem == "7 points; at least 8 are needed for five parameters"


@pytest.mark.parametrize(
    ("steps", "values", "message"),
    [
        ([0, 1, 1], np.ones((1, 3)), "step 1 comes twice"),
        ([0, 5, 2], np.ones((1, 3)), "steps must increase, got 5 before 2"),
        ([-1, 5, 7], np.ones((1, 3)), "steps must be finite and >= 0, got -1"),
        ([0, 5, 7], np.ones((1, 4)), r"steps must be \[T\] and values \[L, T\], got \(3,\) and \(1, 4\)"),
    ],
)
def test_bad_steps_are_named(steps, values, message):
    with pytest.raises(ValueError, match=message):
        fit_trajectories(np.array(steps, float), values)
