"""From the tables of sweeps to figures, tables and a page of results.

An experiment file says in `get_report()` what its numbers are shown as: a `Report` of figures, tables and claims. Nothing
measured is written by hand: a claim carries the condition it must meet, and the page says whether the numbers meet it.
"""

import csv
import dataclasses
import glob
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib

from deltajax.training import paired
from deltajax.training.config import call, load_experiment

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, str]
Where = Mapping[str, Any]  # column -> value, or several allowed ones


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


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of medians over members that differ in nothing shown, with the worst and the best in brackets.

    Attributes:
      caption: what is seen.
      rows, columns: settings that make the rows and columns.
      metric: what is shown.
      where: which rows of the data.
      published: the values of a row, as the sweep's table has them and joined by ", " -> what the paper has.
      scaled: show (accuracy - chance) / (1 - chance).
      better: which value is the best.
      labels: value of a column -> how it is written.
      digits: after the point.
    """

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    metric: str = "accuracy"
    where: Where = dataclasses.field(default_factory=dict)
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scaled: bool = False
    better: Literal["high", "low"] = "high"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digits: int = 3


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something the numbers must show.

    Attributes:
      text: the claim.
      values: name -> which rows; the median over members of `metric` is the value of that name.
      holds: the condition on these values.
      metric: see above.
    """

    text: str
    values: Mapping[str, Where]
    holds: Callable[..., bool]
    metric: str = "accuracy"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure that is not of curves.

    Attributes:
      name: of the file.
      caption: what is seen.
      draw: folder of the results -> matplotlib's figure; None: what it needs is not there.
    """

    name: str
    caption: str
    draw: Callable[[Path], Any | None]


@dataclasses.dataclass(frozen=True)
class Report:
    """A section of the page.

    Attributes:
      title: its heading.
      text: what was done, with the paper's figures; Markdown.
      claims, figures, tables, comparisons: what is shown of the numbers.
      pictures: figures that draw themselves.
      notes: what was not run, and why figures differ from the paper's.
      also: names of more tables, whose rows claims, figures and tables see too; those that are not there are left out.
    """

    title: str
    text: str
    claims: Sequence[Claim] = ()
    figures: Sequence[Curves] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[paired.Paired] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    also: Sequence[str] = ()


def read(path: Path) -> list[Row]:
    """The rows of a sweep's table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def select(rows: Iterable[Row], where: Where) -> list[Row]:
    """Complete rows whose columns have one of the allowed values, compared as numbers where both are.

    `step="last"` keeps the last step of each member; a column that `where` does not name may be anything, but rows of
    single positions are only selected by naming "position".
    """
    where = {"position": ""} | dict(where)
    chosen = []
    last = where.pop("step", None) == "last"
    for row in rows:
        if row["status"] == "complete" and all(_matches(row.get(k, ""), allowed) for k, allowed in where.items()):
            chosen.append(row)
    if last:
        final: dict[tuple, int] = {}
        for row in chosen:
            final[member(row)] = max(final.get(member(row), 0), int(row["step"]))
        chosen = [row for row in chosen if int(row["step"]) == final[member(row)]]
    return chosen


ANY = object()  # in `where`: whatever is not empty


def _matches(value: str, allowed: Any) -> bool:
    if allowed is ANY:
        return value != ""
    if isinstance(allowed, list | tuple | set):
        return any(_matches(value, one) for one in allowed)
    try:
        return float(value) == float(allowed)
    except ValueError:
        return value == str(allowed)


_NOT_SETTINGS = ("status", "step", "set", "position", "metric", "value")


def member(row: Row) -> tuple[str, ...]:
    """What tells a member of a sweep from the others."""
    return tuple(v for k, v in row.items() if k not in _NOT_SETTINGS)


def group(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
    """Values by the columns' values, in the order of the table."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(c, "") for c in columns), []).append(float(row["value"]))
    return groups


def draw(figure: Curves, rows: Sequence[Row], path: Path) -> None:
    """Write the figure as a PNG."""
    chosen = select(rows, {"metric": figure.y, figure.x: ANY} | dict(figure.where))
    panels = list(dict.fromkeys(tuple(row.get(c, "") for c in figure.panel) for row in chosen))
    width = min(len(panels), 3)
    height = math.ceil(len(panels) / width)
    drawing, axes = plt.subplots(
        height, width, figsize=(3.6 * width + 1.8, 3 * height), layout="constrained", squeeze=False, sharey=True
    )
    names = list(dict.fromkeys(tuple(row.get(c, "") for c in figure.line) for row in chosen))
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        here = [row for row in chosen if tuple(row.get(c, "") for c in figure.panel) == panel]
        for i, name in enumerate(names):
            of_line = [row for row in here if tuple(row.get(c, "") for c in figure.line) == name]
            points = sorted((float(x), values) for (x,), values in group(of_line, [figure.x]).items())
            if points:
                xs, values = zip(*points, strict=True)
                style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                style["linewidth"] = 4 - 3 * i / max(len(names) - 1, 1)  # curves that coincide are all seen
                axis.plot(
                    xs, [statistics.median(v) for v in values], label=_name(figure.line, name, figure.labels), **style
                )
                axis.fill_between(
                    xs, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=style["color"]
                )
        for x, label in figure.marks.items():
            axis.axvline(x, color="gray", linewidth=0.8, linestyle=":")
            axis.annotate(label, (x, 0.03), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="right")
        for label, y in figure.levels.items():
            axis.axhline(y, color="gray", linewidth=0.8, linestyle="--", label=label)
        axis.set(xlabel=figure.x, title=_name(figure.panel, panel, figure.labels))
        for which in figure.log:
            getattr(axis, f"set_{which}scale")("log", base=2 if which == "x" else 10)
        if figure.y == "accuracy":
            axis.set_ylim(-0.03, 1.03)
            members = {member(row) for row in here}
            chance = [float(row["value"]) for row in rows if row["metric"] == "chance" and member(row) in members]
            if chance:
                axis.axhline(
                    statistics.median(chance), color="gray", linewidth=0.8, linestyle="--", label="random guess"
                )
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(figure.y)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _name(columns: Sequence[str], values: Sequence[str], labels: Mapping[str, str]) -> str:
    """Such as "R = 2, beta_max = 1" for numbers and "S5, attention" for words; `labels` may say otherwise."""
    parts = []
    for column, value in zip(columns, values, strict=True):
        if value in labels:
            parts.append(labels[value])
        elif re.fullmatch(r"-?\d+(\.\d*)?(e[-+]?\d+)?", value):
            number = float(value)
            parts.append(f"{labels.get(column, column)} = {number:g}")
        else:
            parts.append(value)
    return ", ".join(parts)


def tabulate(table: Table, rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    chosen = select(rows, {"metric": table.metric, "step": "last"} | dict(table.where))
    chance = {member(row): float(row["value"]) for row in rows if row["metric"] == "chance"}
    if table.scaled:
        scaled = []
        for row in chosen:
            if member(row) not in chance:
                raise ValueError(
                    f"no level of chance is known of {', '.join(member(row))}: its accuracy cannot be scaled"
                )
            by_chance = chance[member(row)]
            scaled.append({**row, "value": str((float(row["value"]) - by_chance) / (1 - by_chance))})
        chosen = scaled
    if not chosen:
        return "No numbers."
    lines = list(group(chosen, table.rows))
    columns = list(group(chosen, table.columns)) or [()]
    cells = group(chosen, [*table.rows, *table.columns])
    guesses = {line: 0.0 if table.scaled else statistics.median(x) for line, x in _chances(chosen, chance, table.rows)}
    head = [", ".join(table.labels.get(c, c) for c in table.rows)]
    head += [_name(table.columns, column, table.labels) or table.metric for column in columns]
    head += ["random guess"] * bool(guesses) + ["paper"] * bool(table.published)
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        name = _name(table.rows, line, table.labels)
        cols = [name, *(_cell(cells.get((*line, *column), []), table) for column in columns)]
        cols += [f"{guesses[line]:.3f}" if line in guesses else ""] * bool(guesses)
        cols += [table.published.get(", ".join(line), "")] * bool(table.published)
        out.append("| " + " | ".join(cols) + " |")
    return "\n".join(out)


def _chances(chosen, chance, columns):
    found: dict[tuple, list[float]] = {}
    for row in chosen:
        if row["metric"] == "accuracy" and member(row) in chance:
            found.setdefault(tuple(row.get(c, "") for c in columns), []).append(chance[member(row)])
    return found.items()


def _cell(values: Sequence[float], table: Table) -> str:
    return _summary(values, table.digits, table.better) if values else "not run"


def _summary(values: Sequence[float], digits: int, better: str = "high") -> str:
    """The median, and from the worst to the best."""
    worst, best = sorted((min(values), max(values)), reverse=better == "low")
    spread = f"{worst:.{digits}f} to {best:.{digits}f}, " if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f} ({spread}n={len(values)})"


def told(docstring: str | None) -> str:
    """An experiment's docstring without its first line, which is the section's title in other words."""
    return (docstring or "").partition("\n")[2]


def check(claim: Claim, rows: Sequence[Row]) -> str:
    """A line of Markdown: whether the claim holds, and on which numbers."""
    found: dict[str, list[float]] = {}
    for name, where in claim.values.items():
        values = [float(row["value"]) for row in select(rows, {"metric": claim.metric, "step": "last"} | dict(where))]
        if not values:
            return f"- **Not run.** {claim.text} (no numbers for {name})"
        found[name] = values
    verdict = "Shown." if claim.holds(*map(statistics.median, found.values())) else "**Not shown.**"
    return f"- {verdict} {claim.text} Medians: {', '.join(f'{k} {_summary(v, 4)}' for k, v in found.items())}."


def section(report: Report, rows: Sequence[Row], name: str, folder: Path, page: Path) -> str:
    """The section in Markdown; its figures are written to `folder`."""
    parts = [f"## {report.title}", report.text.strip()]
    _check_columns(report, rows, name)
    failed = {member(row) for row in rows if row["status"] != "complete"}
    complete = {member(row) for row in rows if row["status"] == "complete"}
    table = os.path.relpath(folder / f"{name}.csv", page.parent)
    parts.append(f"{len(complete)} runs, [all their numbers]({table})" + f"; {len(failed)} failed" * bool(failed) + ".")
    more = [folder / f"{other}.csv" for other in report.also]
    rows = [*rows, *(row for path in more if path.exists() for row in read(path))]
    if report.claims:
        parts.append("\n".join(check(claim, rows) for claim in report.claims))
    for shown in report.tables:
        parts += [f"{shown.caption} Median over seeds (worst to best, number of seeds).", tabulate(shown, rows)]
    for comparison in report.comparisons:
        parts += [comparison.caption, paired.tabulate(comparison, rows)]
        path = folder / f"{name}_{comparison.name}.png"
        if paired.draw(comparison, rows, path):
            parts.append(f"![{comparison.caption}]({os.path.relpath(path, page.parent)})")
    if report.comparisons:
        parts.append(paired.DEFINITION)
    for figure in report.figures:
        path = folder / f"{name}_{figure.name}.png"
        if select(rows, {"metric": figure.y, figure.x: ANY} | dict(figure.where)):
            draw(figure, rows, path)
            parts.append(f"![{figure.caption}]({os.path.relpath(path, page.parent)})\n\n{figure.caption}")
    for picture in report.pictures:
        drawing = picture.draw(folder)
        if drawing is not None:
            path = folder / f"{name}_{picture.name}.png"
            drawing.savefig(path, dpi=110)
            plt.close(drawing)
            parts.append(f"![{picture.caption}]({os.path.relpath(path, page.parent)})\n\n{picture.caption}")
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts)


def _check_columns(report: Report, rows: Sequence[Row], name: str) -> None:
    """A misspelt column would match nothing, and read as if nothing had been run."""
    asked: list[str] = [column for claim in report.claims for where in claim.values.values() for column in where]
    for table in report.tables:
        asked += [*table.rows, *table.columns, *table.where]
    for figure in report.figures:
        asked += [figure.x, *figure.line, *figure.panel, *figure.where]
    known = {column for row in rows for column in row}
    unknown = next((column for column in asked if column not in known), None)
    if rows and unknown is not None and not report.also:
        raise ValueError(f"{name}.csv has no column {unknown!r} (it has {', '.join(rows[0])})")


HEAD = """# Results

Written by `python -m deltajax.report` from the tables in `docs/results`, which the commands of each section make (some in
parts, joined member by member); do not edit. Where a section says nothing else, its runs are the `small` ones, on 2 CPU cores
of a shared machine, and seeds are those of the initial parameters: data, their order and the sets for evaluation are the same
for all. A claim is judged by medians; the range and the number of runs stand beside them, and a single run (n=1) shows little.
"""


def write(patterns: Sequence[str], results: Path, page: Path) -> None:
    """The page with a section for every experiment that has a report and a table.

    Raises:
      ValueError: a pattern names nothing, or an experiment's table lacks what its report asks for.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise ValueError(f"--experiments={pattern}: no such file")
        files += found
    sections = []
    for file in dict.fromkeys(files):
        module = load_experiment(file)
        if not hasattr(module, "get_report"):
            continue
        name = Path(file).stem
        report = call(module, "get_report", {}, file)
        if not isinstance(report, Report):
            raise ValueError(f"{file}: get_report() must return a Report, got {type(report).__name__}")
        if (results / f"{name}.csv").exists():
            sections.append(section(report, read(results / f"{name}.csv"), name, results, page))
        else:
            sections.append(f"## {report.title}\n\n{report.text.strip()}\n\nNot run: there is no `{name}.csv`.")
    page.write_text("\n\n".join([HEAD.strip(), *sections]) + "\n")
    print(f"{page}: {len(sections)} sections")
