"""Paired differences against numbers worked out by hand."""

import pytest

from deltajax.training.paired import Paired, draw, interval, tabulate, updates_to_reach


def rows(policy, seed, curve, seconds=2.0):
    common = {"policy": policy, "seed": str(seed), "status": "complete", "position": ""}
    for step, value in curve.items():
        yield common | {"step": str(step), "set": "validation", "metric": "accuracy", "value": str(value)}
    yield common | {"step": "3", "set": "", "metric": "seconds", "value": str(seconds)}


def test_differences_and_updates(tmp_path):
    """Seed 0 gains 0.1 at the end and reaches 0.8 at 20 instead of 30; seed 1 gains 0.3 and is at 0.5 at 10 instead of 20."""
    table = [
        *rows("plain", 0, {10: 0.5, 20: 0.7, 30: 0.8}),
        *rows("plain", 1, {10: 0.4, 20: 0.5, 30: 0.5}),
        *rows("other", 0, {10: 0.6, 20: 0.8, 30: 0.9}),
        *rows("other", 1, {10: 0.5, 20: 0.9, 30: 0.8}),
        *rows("worse", 0, {10: 0.1, 20: 0.2, 30: 0.1}),
        *rows("worse", 1, {10: 0.1, 20: 0.2, 30: 0.1}),
    ]
    text = tabulate(Paired("", "", ("policy",), {"policy": "plain"}), table)
    half = 12.7062 * 0.1414214 / 2**0.5  # t quantile of one degree of freedom, deviation of 0.1 and 0.3
    assert f"| other | 0.8500 | +0.2000 ± {half:.4f} | 0.9000 |" in text
    assert "| 15 | 2 of 2 | **-10 ± 0** | 3 | 0 | 0 | 2 | 2 |" in text
    assert "| plain | 0.6500 | baseline | 0.6500 | baseline | 25 | 2 of 2 | baseline |" in text
    assert "| worse | 0.1000 | **-0.5500 ±" not in text  # two seeds say little
    assert "| none | 0 of 2 |  |" in text
    assert "of 2 (by chance alone about 0.1 in each line at most)" in text
    assert "- last accuracy: better none; worse none.\n" in text
    assert text.endswith("- updates to reach the baseline: better other; worse none.")
    fewer = tabulate(Paired("", "", ("policy",), {"policy": "plain"}, where={"policy": ["plain", "worse"]}), table)
    assert "| other" not in fewer and "| worse" in fewer
    one = tabulate(Paired("", "", ("policy",), {"policy": "plain"}), [row for row in table if row["seed"] == "0"])
    assert "| other | 0.9000 | +0.1000 | 0.9000 | +0.1000 | 20 | 1 of 1 | -10 |" in one
    grouped = [{**row, "delta": delta} for row in table for delta in "12"]
    both = tabulate(Paired("", "", ("policy", "delta"), {"policy": "plain"}), grouped)  # of the same delta each
    assert both.count("| baseline |") == 6 and f"| other | 2 | 0.8500 | +0.2000 ± {half:.4f} |" in both
    assert "of 4 (by chance" in both
    assert draw(Paired("", "", ("policy",), {"policy": "plain"}), table, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert not draw(Paired("", "", ("policy",), {"policy": "absent"}), table, tmp_path / "y.png")
    absent = tabulate(Paired("", "", ("policy",), {"policy": "absent"}), table)
    assert absent == "Not run: there are no numbers for the baseline absent."


def test_runs_that_never_reach_leave_no_interval():
    """Two of three seeds reach the baseline 10 updates earlier: that is no gain beyond doubt."""
    table = [row for seed in range(3) for row in rows("plain", seed, {10: 0.5, 20: 0.6, 30: 0.8})]
    table += [row for seed in range(2) for row in rows("other", seed, {10: 0.5, 20: 0.9, 30: 0.8})]
    text = tabulate(Paired("", "", ("policy",), {"policy": "plain"}), [*table, *rows("other", 2, {30: 0.7})])
    assert "| 20 | 2 of 3 | -10 | 3 |" in text
    assert text.endswith("- updates to reach the baseline: better none; worse none.")
    assert "| 20 | 3 of 3 | **-10 ± 0** | 3 |" in tabulate(
        Paired("", "", ("policy",), {"policy": "plain"}), [*table, *rows("other", 2, {20: 0.8, 30: 0.7})]
    )


def test_interval_and_direction():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3, pytest.approx(2.776445 * 1.581139 / 5**0.5, rel=1e-5))
    assert interval([1.0]) == (1.0, float("inf"))
    near = [*rows("other", 0, {3: 0.49997}), *rows("other", 1, {3: 0.50001})]
    table = [*rows("plain", 0, {3: 0.5}), *rows("plain", 1, {3: 0.5}), *near]
    assert "| +0.0000 ± 0.0003 |" in tabulate(Paired("", "", ("policy",), {"policy": "plain"}), table)  # not -0.0000
    curve = {30: 0.2, 10: 0.9, 20: 0.5}
    assert (updates_to_reach(curve, 0.5, "low"), updates_to_reach(curve, 0.5, "high")) == (20, 10)
    assert updates_to_reach(curve, 0.1, "low") is None


def test_the_best_is_never_nan():
    """Whatever comes first: a run that diverged in between has a best value, one without finite values has none."""
    for curve in ({10: 0.4, 20: float("nan"), 30: 0.5}, {10: float("nan"), 20: 0.5, 30: 0.4}):
        table = [*rows("plain", 0, {10: 0.5, 20: 0.5, 30: 0.5}), *rows("other", 0, curve)]
        text = tabulate(Paired("", "", ("policy",), {"policy": "plain"}), table)
        assert "| 0.5000 | +0.0000 |" in text
        assert f"| {30 if curve[30] == 0.5 else 20} | 1 of 1 |" in text
    never = [*rows("plain", 0, {10: 0.5}), *rows("other", 0, {10: float("nan")})]
    assert "| none | 0 of 1 |" in tabulate(Paired("", "", ("policy",), {"policy": "plain"}), never)


def test_an_interval_over_a_run_without_a_number():
    """The interval is not a number either, whatever the order of the runs."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        for values in ([0.1, bad, 0.2], [bad, 0.1], [bad]):
            mean, half = interval(values)
            assert mean != mean and half == float("inf")
