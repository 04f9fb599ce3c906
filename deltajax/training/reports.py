"""From the tables of sweeps to figures, tables and a page of results.

An experiment file says in `get_report()` what its numbers are shown as: a `Report` of figures, tables and claims. Nothing
measured is written by hand: a claim carries the condition it must meet, and the page says whether the numbers meet it.
"""

import dataclasses
import glob
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import pyplot as plt

from deltajax.training import paired
from deltajax.training.config import call, load_experiment
from deltajax.training.figures import Curves, Tradeoff
from deltajax.training.results import Row, Where, check_unique, group, median, member, name_of, read, select, unify


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
    """A figure that draws itself.

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
      pictures: figures of something else.
      notes: what was not run, and why figures differ from the paper's.
      also: names of more tables, whose rows claims, figures and tables see too; those that are not there are left out.
    """

    title: str
    text: str
    claims: Sequence[Claim] = ()
    figures: Sequence[Curves | Tradeoff] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[paired.Paired] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    also: Sequence[str] = ()


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
    guesses = {line: 0.0 if table.scaled else median(x) for line, x in _chances(chosen, chance, table.rows)}
    head = [", ".join(table.labels.get(c, c) for c in table.rows)]
    head += [name_of(table.columns, column, table.labels) or table.metric for column in columns]
    head += ["random guess"] * bool(guesses) + ["paper"] * bool(table.published)
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        name = name_of(table.rows, line, table.labels)
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
    """Return the median, and the range from the worst to the best; or how many values are no numbers."""
    missing = sum(map(math.isnan, values))
    if missing:
        return f"nan ({missing} of n={len(values)} are no numbers)"
    worst, best = sorted((min(values), max(values)), reverse=better == "low")
    spread = f"{worst:z.{digits}f} to {best:z.{digits}f}, " if len(values) > 1 else ""
    return f"{median(values):z.{digits}f} ({spread}n={len(values)})"


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
    if any(math.isnan(value) for values in found.values() for value in values):
        verdict = "**Not shown.**"  # a run without a number has no median, whatever the others say
    else:
        verdict = "Shown." if claim.holds(*map(median, found.values())) else "**Not shown.**"
    return f"- {verdict} {claim.text} Medians: {', '.join(f'{k} {_summary(v, 4)}' for k, v in found.items())}."


def section(report: Report, rows: Sequence[Row], name: str, folder: Path, page: Path) -> str:
    """The section in Markdown; its figures are written to `folder`."""
    parts = [f"## {report.title}", report.text.strip()]
    _check_columns(report, rows, name)
    rows = unify(rows)
    failed = {member(row) for row in rows if row["status"] != "complete"}
    complete = {member(row) for row in rows if row["status"] == "complete"}
    table = os.path.relpath(folder / f"{name}.csv", page.parent)
    parts.append(f"{len(complete)} runs, [all their numbers]({table})" + f"; {len(failed)} failed" * bool(failed) + ".")
    more = [folder / f"{other}.csv" for other in report.also]
    rows = unify([*rows, *(row for path in more if path.exists() for row in read(path))])
    check_unique(rows, name)
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
    drawings = [(figure, figure.draw(rows)) for figure in report.figures]
    for of, drawing in [*drawings, *((picture, picture.draw(folder)) for picture in report.pictures)]:
        if drawing is not None:
            path = folder / f"{name}_{of.name}.png"
            drawing.savefig(path, dpi=110)
            plt.close(drawing)
            parts.append(f"![{of.caption}]({os.path.relpath(path, page.parent)})\n\n{of.caption}")
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts)


def _check_columns(report: Report, rows: Sequence[Row], name: str) -> None:
    """A misspelt column would match nothing, and read as if nothing had been run."""
    asked: list[str] = [column for claim in report.claims for where in claim.values.values() for column in where]
    for table in report.tables:
        asked += [*table.rows, *table.columns, *table.where]
    for figure in report.figures:
        asked += figure.columns
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
