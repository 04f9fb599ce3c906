"""Grids of runs, trained by worker processes, all results in one tidy table."""

import asyncio
import collections
import csv
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from deltajax.csv_table import read_table
from deltajax.errors import RunError
from deltajax.layers.param import count_params
from deltajax.models import registry
from deltajax.training import grids, metrics, overrides, serialize
from deltajax.training.config import TrainConfig, folder_name, load_config, slug, split_arguments
from deltajax.training.experiment_file import call, load_experiment, parameters_of
from deltajax.training.lock import InUse, lock
from deltajax.training.sweep_workers import CONFIG_FILE, Worker, share

COLUMNS = ("status", "step", "set", "position", "metric", "value")  # after one column per setting
CONFIG = "config."


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      settings: what sets it apart, as the grid names it.
      path: experiment file with arguments, for --config.
      changes: keys of the config to their values, for --config.<key>.
      config: what these make.
      folder: the name that its folder has already; "": the one that follows from the settings.
    """

    settings: Mapping[str, str]
    path: str
    changes: Mapping[str, str]
    config: TrainConfig
    folder: str = ""

    @property
    def name(self) -> str:
        """The name of its folder, another one for every member."""
        return self.folder or folder_name(self._text) or "only"

    @property
    def older_name(self) -> str:
        """The name that an older deltajax gave the folder, perhaps to several members."""
        return slug(self._text) or "only"

    @property
    def _text(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.by_column.items())

    @property
    def by_column(self) -> dict[str, str]:
        """Its settings by the names that they have in the table."""
        return {name.removeprefix(CONFIG): value for name, value in self.settings.items()}


def members(path: str, grid: Sequence[str] = (), changes: Mapping[str, str] | None = None) -> list[Member]:
    """All members, each checked: a grid with a mistake starts nothing.

    Args:
      path: experiment file, perhaps with arguments, which go to `get_grid` and to every `get_config`, those they take.
      grid: "name=value,value" each; none: `get_grid()` of the file, a mapping from names to values, or several of them,
        whose products are then joined.
      changes: keys of the config that are the same for all.

    Raises:
      ValueError: a name, value or config is wrong, or two members are the same.
    """
    file, arguments = split_arguments(path)
    module = load_experiment(file)
    if grid:
        given = [grids.parse(text) for text in grid]
        tables: Any = dict(given)
        names = [name.removeprefix(CONFIG) for name, _ in given]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"--grid: {twice} is given twice; its values are joined by commas")
    else:
        takes = parameters_of(module, "get_grid")
        tables = grids.check(call(module, "get_grid", {k: v for k, v in arguments.items() if k in takes}, path), path)
        # What only get_grid takes is meant for it; what neither takes get_config shall complain about.
        arguments = {k: v for k, v in arguments.items() if k not in takes or k in parameters_of(module, "get_config")}
    found = []
    for settings in grids.products([tables] if isinstance(tables, Mapping) else tables):
        of_file = arguments | {k: v for k, v in settings.items() if not k.startswith(CONFIG)}
        keys = {k.removeprefix(CONFIG): v for k, v in settings.items() if k.startswith(CONFIG)}
        keys = dict(changes or {}) | keys
        of_member = file + (":" + ",".join(f"{k}={v}" for k, v in of_file.items()) if of_file else "")
        found.append(Member(settings, of_member, keys, overrides.apply(load_config(of_member), keys)))
    if not found:
        raise ValueError("--grid: there are no members")
    _check_distinct(found)
    return found


def _check_distinct(found: Sequence[Member]) -> None:
    """Refuse members that are the same run, also where their settings are spelled in two ways."""
    alike: dict[Any, list[Member]] = {}
    for member in found:
        settings = frozenset((name, overrides.normal(value)) for name, value in member.by_column.items())
        before = alike.setdefault(settings, [])
        for other in before:
            if other.name == member.name:
                raise ValueError(f"--grid: the member {member.name} occurs twice")
            if other.config == member.config:
                raise ValueError(f"--grid: the members {other.name} and {member.name} are the same run")
        before.append(member)


def run(found: Sequence[Member], workdir: Path, table: Path, *, jobs: int = 1, bins: int = 32) -> None:
    """Train the members that are not complete, `jobs` at a time, and keep `table` up to date.

    What the table holds of runs that are not of this grid stays in it.

    Raises:
      ValueError: the table is a folder or one of something else, or a member's folder holds a run of another config; nothing
        was trained.
      RunError: interrupted, or some members failed or belong to other runs; all others are complete by then.
    """
    if table.is_dir():
        raise ValueError(f"--csv={table}: must be a file, is a folder")
    table.parent.mkdir(parents=True, exist_ok=True)
    with lock(workdir):
        found = [_in_its_folder(member, workdir) for member in found]
        older = {field for member in found for field in _check_folder(member, workdir / member.name)}
        if older:
            print(
                f"warning: {workdir} has runs of an older deltajax; they are read with {', '.join(sorted(older))}",
                file=sys.stderr,
            )
        others = _others(found, table)
        waiting = [member for member in found if not _is_complete(member, workdir)]
        print(f"{len(found)} members, {len(found) - len(waiting)} of them complete; results in {table}", flush=True)
        failures: dict[str, str] = {}
        busy: list[str] = []
        write = functools.partial(write_table, found, workdir, table, failures, bins, others)
        try:
            asyncio.run(_run_all(waiting, workdir, failures, busy, jobs, write))
        except KeyboardInterrupt:
            complete = sum(_is_complete(member, workdir) for member in found)
            raise RunError(
                f"interrupted; {complete} of {len(found)} members are complete, the same command continues"
            ) from None
        write()
    if failures:
        name, reason = next(iter(failures.items()))
        raise RunError(f"{len(failures)} of {len(found)} members failed; the first is {name}: {reason}")
    if busy:
        raise RunError(
            f"{len(busy)} of {len(found)} members are in use by other runs; the first is {busy[0]}; "
            "the same command trains what is missing"
        )


async def _run_all(waiting, workdir, failures, busy, jobs, write):
    """Let `jobs` workers take members from one queue; a worker that dies takes one member with it and is replaced."""
    queue = collections.deque(waiting)
    bar = tqdm.tqdm(total=len(waiting), unit="run", disable=not sys.stderr.isatty())
    done = itertools.count(1)

    async def work(cores):
        worker = Worker(workdir, cores)
        try:
            while queue:
                member, started = queue.popleft(), time.perf_counter()
                try:
                    reason = await worker.train(member)
                    if reason is not None:
                        failures[member.name] = reason
                    outcome = f"failed: {reason}" if reason is not None else _describe(workdir / member.name)
                except InUse as error:
                    busy.append(member.name)
                    outcome = f"left out: {error}"
                bar.update()
                bar.clear()
                seconds = time.perf_counter() - started
                print(f"[{next(done)}/{len(waiting)}] {member.name}: {outcome} ({seconds:.0f} s)", flush=True)
                write()
        finally:
            await worker.close()

    with bar:
        await asyncio.gather(*(work(cores) for cores in share(jobs)))


def _in_its_folder(member: Member, workdir: Path) -> Member:
    """The member, in the folder that an older deltajax gave it if that holds its run."""
    if member.name == member.older_name or (workdir / member.name).exists():
        return member
    try:
        stored = serialize.from_json(json.loads((workdir / member.older_name / CONFIG_FILE).read_text()))
    except (OSError, ValueError):
        return member
    return dataclasses.replace(member, folder=member.older_name) if stored == member.config else member


def _check_folder(member: Member, folder: Path) -> list[str]:
    """Refuse to go on with a run of another config: its numbers would stand under this one.

    Returns:
      What the run's config did not have yet, see `serialize.defaulted`.
    """
    try:
        text = (folder / CONFIG_FILE).read_bytes()
    except FileNotFoundError:
        return []
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        if not (folder / "checkpoints").exists() and not (folder / metrics.SUMMARY).exists():
            return []  # a sweep was killed before it trained anything
        raise ValueError(f"{folder / CONFIG_FILE}: is damaged; take another --workdir, or remove {folder}") from None
    try:
        before, defaulted = serialize.from_json(stored), serialize.defaulted(stored)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}; take another --workdir, or remove {folder}") from None
    if before != member.config:
        what = (serialize.differences(before, member.config) or ["the same values of another kind"])[0]
        raise ValueError(f"{folder} holds a run of another config ({what}); take another --workdir, or remove it")
    return defaulted


def _is_complete(member: Member, workdir: Path) -> bool:
    """Whether its run, which `_check_folder` has found to be of this config, ended."""
    return metrics.read_summary(workdir / member.name) is not None


def _summary(folder: Path) -> dict[str, Any]:
    summary = metrics.read_summary(folder)
    if summary is None:
        raise RunError(f"{folder / metrics.SUMMARY}: is missing or damaged; the same command writes it anew")
    return summary


def _describe(folder: Path) -> str:
    summary = _summary(folder)
    scores = {k: v for k, v in summary.items() if k.startswith("validation_")}
    scores |= {f"{name} {k}": v for name, of in summary.get("evaluations", {}).items() for k, v in of.items()}
    scores |= {"chance": summary["chance"]} if "chance" in summary else {}
    return ", ".join(f"{k.removeprefix('validation_')} {v:.4f}" for k, v in scores.items() if "loss" not in k) or (
        f"loss {summary['validation_loss']:.4f}"
    )


def _columns(found: Sequence[Member]) -> list[str]:
    """Names in the table of what sets members apart."""
    return list(dict.fromkeys(name for member in found for name in member.by_column))


def _others(found: Sequence[Member], table: Path) -> list[dict[str, str]]:
    """Rows that the table already holds of runs that are not in `found`.

    Raises:
      ValueError: it is not a table of a sweep over the same settings.
    """
    if not table.exists():
        return []
    columns = _columns(found)
    try:
        header, numbered = read_table(table)
    except ValueError as error:
        raise ValueError(f"--csv={error}") from None
    rows = [row for _, row in numbered]
    names = [name for name in header if name not in COLUMNS]
    if set(names) != set(columns) or not set(COLUMNS) <= set(header):
        they = f"of runs that differ in {', '.join(names)}" if names else "of something else"
        raise ValueError(f"--csv={table}: a table {they}, not in {', '.join(columns)}; name another file")
    mine = {tuple(overrides.normal(member.by_column.get(c, "")) for c in columns) for member in found}
    return [row for row in rows if tuple(overrides.normal(row[c]) for c in columns) not in mine]


def write_table(
    found: Sequence[Member],
    workdir: Path,
    table: Path,
    failures: Mapping[str, str],
    bins: int = 32,
    others: Sequence[Mapping[str, str]] = (),
) -> None:
    """The results of all members so far: a row per number, see `results`; one row with its reason for a failed member.

    Args:
      others: rows to begin with, by the names of the columns.
    """
    columns = _columns(found)
    temporary = table.with_name(table.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*columns, *COLUMNS])
        rows.writerows([row[name] for name in (*columns, *COLUMNS)] for row in others)
        for member in found:
            settings = [member.by_column.get(name, "") for name in columns]
            if member.name in failures:
                rows.writerow([*settings, f"failed: {failures[member.name]}", "", "", "", "", ""])
            elif _is_complete(member, workdir):
                try:
                    lines = list(results(member, workdir / member.name, bins))
                except RunError as error:
                    rows.writerow([*settings, f"failed: {error}", "", "", "", "", ""])
                else:
                    rows.writerows([*settings, "complete", *line] for line in lines)
    os.replace(temporary, table)


def results(member: Member, folder: Path, bins: int) -> Iterator[tuple]:
    """(step, set, position, metric, value) of a complete run.

    Numbers of the whole run have neither set nor position; evaluations name their set (the validation set: every one of
    them, by step); those by position are means over equal bins, whose last position is given.
    """
    summary = _summary(folder)
    last = summary["steps"]
    yield (
        last,
        "",
        "",
        "parameters",
        count_params(registry.module_of(member.config.model).param_specs(member.config.model)),
    )
    for name, value in summary.items():
        if isinstance(value, int | float) and name != "steps" and not name.startswith("validation_"):
            yield last, "", "", name, _short(value)
    for row in metrics.read_rows(folder):
        for name, value in row.items():
            if name.startswith("validation_"):
                yield row["step"], "validation", "", name.removeprefix("validation_"), _short(value)
    for of_set, scores in summary.get("evaluations", {}).items():
        for name, value in scores.items():
            yield last, of_set, "", name, _short(value)
    for of_set, position, name, value in _binned(metrics.read_positions(folder), bins):
        yield last, of_set, position, name, _short(value)


def _binned(rows: Sequence[Mapping[str, str]], bins: int) -> Iterator[tuple[str, int, str, float]]:
    for of_set in dict.fromkeys(row["set"] for row in rows):
        chosen = [row for row in rows if row["set"] == of_set]
        position = np.array([int(row["position"]) for row in chosen])
        weight = np.array([float(row["weight"]) for row in chosen])
        width = -(-position.max() // bins)
        index = (position - 1) // width
        for name in (n for n in chosen[0] if n not in ("set", "position", "weight") and chosen[0][n]):
            value = np.array([float(row[name]) for row in chosen])
            for i in np.unique(index):
                here = index == i
                mean = np.sum(value[here] * weight[here]) / np.sum(weight[here])
                yield of_set, int((i + 1) * width), name, float(mean)


def _short(value: float) -> str:
    return f"{value:.6g}"
