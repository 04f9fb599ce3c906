"""Figures of the rows of sweeps: curves, and one metric against others."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from deltajax.training.results import ANY, Row, Where, group, median, member, name_of, select

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Curves:
    """A figure of curves: the median over members that differ in nothing shown, and the range from worst to best.

    Attributes:
      name: of the file.
      caption: what is seen.
      x, y: a column ("position", "step", or a setting), and a metric.
      line: columns whose values tell the curves of a panel apart; panel: columns that tell the panels apart.
      where: which rows.
      marks: x -> label of vertical lines, e.g. the training length.
      levels: label -> y of horizontal lines.
      log: axes with logarithmic scale, of "x" and "y".
      labels: value of a column -> how it is written.
    """

    name: str
    caption: str
    x: str
    y: str
    line: Sequence[str]
    panel: Sequence[str] = ()
    where: Where = dataclasses.field(default_factory=dict)
    marks: Mapping[float, str] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """That it reads."""
        return [self.x, *self.line, *self.panel, *self.where]

    def draw(self, rows: Sequence[Row]) -> Figure | None:
        """The figure; None if no row is for it."""
        chosen = select(rows, {"metric": self.y, self.x: ANY} | dict(self.where))
        if not chosen:
            return None
        panels = list(dict.fromkeys(tuple(row.get(c, "") for c in self.panel) for row in chosen))
        width = min(len(panels), 3)
        height = math.ceil(len(panels) / width)
        drawing, axes = plt.subplots(
            height, width, figsize=(3.6 * width + 1.8, 3 * height), layout="constrained", squeeze=False, sharey=True
        )
        names = list(dict.fromkeys(tuple(row.get(c, "") for c in self.line) for row in chosen))
        for axis, panel in itertools.zip_longest(axes.flat, panels):
            if panel is None:
                axis.set_axis_off()
                continue
            here = [row for row in chosen if tuple(row.get(c, "") for c in self.panel) == panel]
            for i, name in enumerate(names):
                of_line = [row for row in here if tuple(row.get(c, "") for c in self.line) == name]
                points = sorted((float(x), values) for (x,), values in group(of_line, [self.x]).items())
                if points:
                    xs, values = zip(*points, strict=True)
                    style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                    style["linewidth"] = 4 - 3 * i / max(len(names) - 1, 1)  # curves that coincide are all seen
                    axis.plot(xs, [median(v) for v in values], label=name_of(self.line, name, self.labels), **style)
                    axis.fill_between(
                        xs, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=style["color"]
                    )
            for x, label in self.marks.items():
                axis.axvline(x, color="gray", linewidth=0.8, linestyle=":")
                axis.annotate(label, (x, 0.03), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="right")
            for label, y in self.levels.items():
                axis.axhline(y, color="gray", linewidth=0.8, linestyle="--", label=label)
            axis.set(xlabel=self.x, title=name_of(self.panel, panel, self.labels))
            for which in self.log:
                getattr(axis, f"set_{which}scale")("log", base=2 if which == "x" else 10)
            if self.y == "accuracy":
                axis.set_ylim(-0.03, 1.03)
                members = {member(row) for row in here}
                chance = [float(row["value"]) for row in rows if row["metric"] == "chance" and member(row) in members]
                if chance:
                    axis.axhline(median(chance), color="gray", linewidth=0.8, linestyle="--", label="random guess")
            axis.grid(alpha=0.3)
        for axis in axes[:, 0]:
            axis.set_ylabel(self.y)
        handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        drawing.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        return drawing


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """A figure of one metric over others: a point a run, and lines through the medians of runs that differ in nothing named.

    Attributes:
      name: of the file.
      caption: what is seen.
      x: metric -> how its panel's axis is called.
      y: metric.
      series: label -> which rows.
      along: the setting whose values a line joins.
      level: rows whose median of y is drawn as a line, and what it is called; None: none.
    """

    name: str
    caption: str
    x: Mapping[str, str]
    y: str
    series: Mapping[str, Where]
    along: str
    level: tuple[str, Where] | None = None

    @property
    def columns(self) -> list[str]:
        """That it reads."""
        return [self.along, *(column for where in self.series.values() for column in where)]

    def draw(self, rows: Sequence[Row]) -> Figure | None:
        """The figure; None if no row is for it."""
        of_y = {"metric": self.y, "step": "last"}
        drawing, axes = plt.subplots(
            1, len(self.x), figsize=(3.6 * len(self.x) + 1.8, 3.4), layout="constrained", squeeze=False, sharey=True
        )
        drawn = False
        for axis, (metric, label) in zip(axes.flat, self.x.items(), strict=True):
            over = {member(row): float(row["value"]) for row in select(rows, {"metric": metric, "step": "last"})}
            for n, (name, where) in enumerate(self.series.items()):
                runs: dict[str, list[tuple[float, float]]] = {}
                for row in select(rows, of_y | dict(where)):
                    if member(row) in over:
                        runs.setdefault(row.get(self.along, ""), []).append((over[member(row)], float(row["value"])))
                middles = sorted(tuple(map(median, zip(*runs[k], strict=True))) for k in runs)
                if middles:
                    drawn = True
                    axis.plot(*zip(*middles, strict=True), "o-", color=f"C{n}", markersize=4, linewidth=1, label=name)
                    points = itertools.chain.from_iterable(runs.values())
                    axis.scatter(*zip(*points, strict=True), s=12, color=f"C{n}", alpha=0.5, linewidths=0)
            if self.level is not None:
                level = [float(row["value"]) for row in select(rows, of_y | dict(self.level[1]))]
                if level:
                    axis.axhline(median(level), color="gray", linewidth=0.8, linestyle="--", label=self.level[0])
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel(self.y)
        handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        drawing.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        if drawn:
            return drawing
        plt.close(drawing)
        return None
