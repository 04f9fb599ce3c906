"""Differences of runs that share a seed: what a setting is worth against a baseline, with intervals over seeds."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from scipy import stats

CONFIDENCE = 0.95
DEFINITION = (
    "Updates to reach the baseline: the first evaluated update at which a run's {metric} is at least as good as the best "
    "that the baseline's run of the same seed reaches at any evaluation; for the baseline itself, when it first reaches it. "
    "A run that never does is counted as not reached, and the change in updates is over the seeds whose runs do."
)


@dataclasses.dataclass(frozen=True)
class Paired:
    """A table of every setting against a baseline, paired by seed.

    Attributes:
      caption: what is seen.
      settings: columns whose values name a row.
      baseline: values of these columns.
      metric: of the validation set.
      better: which value is the best.
      seed: the column that pairs runs.
      where: column -> allowed value or values; others are left out.
    """

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
      costs: examples trained on, examples only scored, seconds.
    """

    curve: dict[int, float] = dataclasses.field(default_factory=dict)
    costs: dict[str, float] = dataclasses.field(default_factory=dict)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its two-sided t interval at `CONFIDENCE` (infinite for one value)."""
    if len(values) < 2:
        return statistics.mean(values), float("inf")
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return statistics.mean(values), float(quantile * statistics.stdev(values) / len(values) ** 0.5)


def updates_to_reach(curve: Mapping[int, float], level: float, better: str) -> int | None:
    """The first update whose value is at least as good as `level`; None: there is none."""
    sign = 1 if better == "high" else -1
    return next((step for step, value in sorted(curve.items()) if sign * value >= sign * level), None)


def tabulate(paired: Paired, rows: Iterable[Mapping[str, str]]) -> str:
    """The table in Markdown, with the definition of its last columns.

    Raises:
      ValueError: the baseline has no runs.
    """
    runs: dict[tuple[str, ...], dict[str, Run]] = {}
    for row in rows:
        if row["status"] != "complete" or row["position"] or not _chosen(row, paired.where):
            continue
        run = runs.setdefault(tuple(row[c] for c in paired.settings), {}).setdefault(row[paired.seed], Run())
        if row["set"] == "validation" and row["metric"] == paired.metric:
            run.curve[int(row["step"])] = float(row["value"])
        elif row["metric"] in ("examples", "examples_scored", "seconds"):
            run.costs[row["metric"]] = float(row["value"])
    name = tuple(str(paired.baseline[c]) for c in paired.settings)
    if name not in runs:
        raise ValueError(f"the baseline {', '.join(name)} has no runs")
    base = runs[name]
    choose = max if paired.better == "high" else min
    levels = {seed: choose(run.curve.values()) for seed, run in base.items()}
    head = [*paired.settings, f"last {paired.metric}", "difference", f"best {paired.metric}", "difference"]
    head += ["updates to reach", "reached", "change in updates", "examples", "scored only", "seconds", "seeds"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    verdicts: dict[str, list[str]] = {"better": [], "worse": []}
    for setting, by_seed in runs.items():
        seeds = [seed for seed in by_seed if seed in base]
        cells = list(setting)
        last = interval([_last(by_seed[s]) - _last(base[s]) for s in seeds])
        if abs(last[0]) > last[1]:
            verdicts["better" if (last[0] > 0) == (paired.better == "high") else "worse"].append(" ".join(setting))
        for of in (_last, lambda run: choose(run.curve.values())):
            cells.append(f"{statistics.mean(of(by_seed[s]) for s in seeds):.4f}")
            difference = interval([of(by_seed[s]) - of(base[s]) for s in seeds])
            cells.append("baseline" if setting == name else _signed(*difference, digits=4))
        reach = {s: updates_to_reach(by_seed[s].curve, levels[s], paired.better) for s in seeds}
        found = {s: step for s, step in reach.items() if step is not None}
        cells.append(f"{statistics.median(found.values()):g}" if found else "none")
        cells.append(f"{len(found)} of {len(seeds)}")
        changes = [step - (updates_to_reach(base[s].curve, levels[s], paired.better) or 0) for s, step in found.items()]
        cells.append("baseline" if setting == name else _signed(*interval(changes), digits=0) if changes else "")
        for cost in ("examples", "examples_scored", "seconds"):
            cells.append(f"{statistics.mean(by_seed[s].costs.get(cost, 0) for s in seeds):,.0f}")
        out.append("| " + " | ".join([*cells, str(len(seeds))]) + " |")
    differences = f"Differences: mean over seeds of paired differences, with {CONFIDENCE:.0%} t intervals."
    verdict = "; ".join(f"{name}: {', '.join(found) or 'none'}" for name, found in verdicts.items())
    out += ["", f"At the last update, beyond the interval, {verdict} (of {len(runs) - 1})."]
    return "\n".join([*out, "", differences + " " + DEFINITION.format(metric=paired.metric)])


def _last(run: Run) -> float:
    return run.curve[max(run.curve)]


def _chosen(row: Mapping[str, str], where: Mapping[str, Any]) -> bool:
    return all(
        row[column] in {str(value) for value in (allowed if isinstance(allowed, list | tuple) else [allowed])}
        for column, allowed in where.items()
    )


def _signed(mean: float, half: float, digits: int) -> str:
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text
