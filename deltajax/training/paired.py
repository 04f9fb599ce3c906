"""Differences of runs that share a seed: what a setting is worth against a baseline, with intervals over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from scipy import stats

CONFIDENCE = 0.95
REACH = ("updates to reach", "reached", "change in updates")
COSTS = {
    "updates": "updates",
    "examples": "examples",
    "examples_scored": "scored only",
    "seconds": "seconds",
}  # -> column
DEFINITION = (
    f"Differences: mean over seeds of paired differences, with {CONFIDENCE:.0%} t intervals; bold where the interval excludes "
    "0. Updates to reach the baseline: the first evaluated update at which a run is at least as good as the best that the "
    "baseline's run of the same seed reaches at any evaluation; for the baseline itself, when it first reaches it. A run that "
    "never does is counted as not reached; the change in updates is over the seeds whose runs do, and has an interval only where "
    "all do: it leaves the worst runs out."
)


@dataclasses.dataclass(frozen=True)
class Paired:
    """A table and a figure of every setting against a baseline, paired by seed.

    Attributes:
      name: of the figure's file.
      caption: what is seen.
      settings: columns whose values name a row.
      baseline: values of these columns; one that is not named has the row's own value.
      metric: of the validation set.
      better: which value is the best.
      seed: the column that pairs runs.
      where: column -> allowed value or values; others are left out.
    """

    name: str
    caption: str
    settings: Sequence[str]
    baseline: Mapping[str, Any]
    metric: str = "accuracy"
    better: Literal["high", "low"] = "high"
    seed: str = "seed"
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run says.

    Attributes:
      curve: update -> the validation metric.
      costs: updates, examples trained on, examples only scored, seconds.
    """

    curve: dict[int, float] = dataclasses.field(default_factory=dict)
    costs: dict[str, float] = dataclasses.field(default_factory=dict)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its two-sided t interval at `CONFIDENCE` (infinite for one value).

    A value that is not finite leaves neither a mean nor an interval: (NaN, infinity).
    """
    if not all(map(math.isfinite, values)):
        return math.nan, math.inf
    if len(values) < 2:
        return statistics.mean(values), math.inf
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return statistics.mean(values), float(quantile * statistics.stdev(values) / len(values) ** 0.5)


def updates_to_reach(curve: Mapping[int, float], level: float, better: str) -> int | None:
    """The first update whose value is at least as good as `level`; None: there is none."""
    sign = 1 if better == "high" else -1
    return next((step for step, value in sorted(curve.items()) if sign * value >= sign * level), None)


def tabulate(paired: Paired, rows: Iterable[Mapping[str, str]]) -> str:
    """The table in Markdown, and what stands out of it; `DEFINITION` says what the columns are."""
    compared = _compare(paired, rows)
    if not compared:
        return f"Not run: there are no numbers for the baseline {', '.join(map(str, paired.baseline.values()))}."
    last, best = f"last {paired.metric}", f"best {paired.metric}"
    out = [_row(*paired.settings, last, "difference", best, "difference", *REACH, *COSTS.values(), "seeds")]
    out.append(_row(*["---"] * (out[0].count("|") - 1)))
    for setting, (cells, differences) in compared.items():
        shown = ["baseline"] * 3
        if differences is not None:
            shown = [_signed(x, digits) if x else "" for x, digits in zip(differences, (4, 4, 0), strict=True)]
        out.append(_row(*setting, cells[0], shown[0], cells[1], shown[1], *cells[2:4], shown[2], *cells[4:]))
    others = {" ".join(setting): differences for setting, (_, differences) in compared.items() if differences}
    by_chance = (1 - CONFIDENCE) * len(others)
    out += [
        "",
        f"Beyond the interval, of {len(others)} (by chance alone about {by_chance:.1f} in each line at most):",
        "",
    ]
    for i, criterion in enumerate((last, best, "updates to reach the baseline")):
        up = 1 if paired.better == "high" and i < 2 else -1
        gains = {setting: (up * x[i][0], x[i][1]) for setting, x in others.items() if x[i]}
        better = [setting for setting, (mean, half) in gains.items() if mean > half]
        worse = [setting for setting, (mean, half) in gains.items() if -mean > half]
        out.append(f"- {criterion}: better {', '.join(better) or 'none'}; worse {', '.join(worse) or 'none'}.")
    return "\n".join(out)


def draw(paired: Paired, rows: Iterable[Mapping[str, str]], path: Path) -> bool:
    """Write a figure (PNG) of the differences to the baseline with their intervals; whether there are any."""
    others = {" ".join(setting): x for setting, (_, x) in _compare(paired, rows).items() if x}
    if not others:
        return False
    figure = Figure(figsize=(9, 0.9 + 0.28 * len(others)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, i, label in ((axes[0], 0, f"difference of the last {paired.metric}"), (axes[1], 2, REACH[2])):
        for y, differences in enumerate(others.values()):
            mean, half = differences[i] or (math.nan, math.nan)
            bar = half if math.isfinite(half) else None
            axis.errorbar(mean, y, xerr=bar, fmt="o", markersize=4, color="C3" if abs(mean) > half else "C0")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_xlabel(f"{label} ({paired.better if i == 0 else 'low'} is better)")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(others)), list(others))
    axes[0].set_ylim(len(others) - 0.5, -0.5)
    figure.savefig(path, dpi=110)
    return True


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _read(paired: Paired, rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, ...], dict[str, Run]]:
    """Setting -> seed -> run."""
    runs: dict[tuple[str, ...], dict[str, Run]] = {}
    for row in rows:
        if row["status"] != "complete" or row["position"] or not _chosen(row, paired.where):
            continue
        run = runs.setdefault(tuple(row[c] for c in paired.settings), {}).setdefault(row[paired.seed], Run())
        if row["set"] == "validation" and row["metric"] == paired.metric:
            run.curve[int(row["step"])] = float(row["value"])
        elif row["metric"] in COSTS:
            run.costs.update({row["metric"]: float(row["value"]), "updates": float(row["step"])})
    return runs


def _compare(paired: Paired, rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, ...], tuple[list[str], Any]]:
    """Setting -> cells, and (mean, half the interval) of how it differs: last, best, updates to reach; None: a baseline."""
    runs = _read(paired, rows)
    compared: dict[tuple[str, ...], tuple[list[str], Any]] = {}
    for setting, by_seed in runs.items():
        base = tuple(str(paired.baseline.get(c, own)) for c, own in zip(paired.settings, setting, strict=True))
        if base in runs:
            cells, differences = _differences(paired, by_seed, runs[base])
            compared[setting] = cells, None if setting == base else differences
    return compared


def _differences(
    paired: Paired, runs: Mapping[str, Run], base: Mapping[str, Run]
) -> tuple[list[str], list[tuple[float, float] | None]]:
    seeds = [seed for seed in runs if seed in base]
    cells: list[str] = []
    differences: list[tuple[float, float] | None] = []
    for of in (lambda run: run.curve[max(run.curve)], lambda run: _best(run, paired.better)):
        cells.append(f"{statistics.mean(of(runs[s]) for s in seeds):.4f}")
        differences.append(interval([of(runs[s]) - of(base[s]) for s in seeds]))
    reached, changes = [], []
    for seed in seeds:
        level = _best(base[seed], paired.better)
        mine, theirs = (updates_to_reach(of[seed].curve, level, paired.better) for of in (runs, base))
        if mine is not None and theirs is not None:
            reached.append(mine)
            changes.append(mine - theirs)
    cells += [f"{statistics.median(reached):g}" if reached else "none", f"{len(reached)} of {len(seeds)}"]
    change = interval(changes) if changes else None
    differences.append(change if change is None or len(changes) == len(seeds) else (change[0], math.inf))
    cells += [f"{statistics.mean(runs[s].costs.get(cost, 0) for s in seeds):,.0f}" for cost in COSTS]
    return [*cells, str(len(seeds))], differences


def _best(run: Run, better: str) -> float:
    """The best value at any evaluation; NaN if none is finite."""
    values = [value for value in run.curve.values() if math.isfinite(value)]
    return (max if better == "high" else min)(values, default=math.nan)


def _chosen(row: Mapping[str, str], where: Mapping[str, Any]) -> bool:
    return all(
        row[column] in {str(value) for value in (allowed if isinstance(allowed, list | tuple) else [allowed])}
        for column, allowed in where.items()
    )


def _signed(difference: tuple[float, float], digits: int) -> str:
    """A difference with its interval, if there is one: a single value has none."""
    mean, half = difference
    text = f"{round(mean, digits) + 0.0:+.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
    return f"**{text}**" if abs(mean) > half else text
