"""Tables of fitted parameters, a row per model and block: written from trajectories, read from ours and from other people's.

    python -m deltajax.massive_activations.fits --trajectories=pythia-70m.csv,pythia-160m.csv --out=fits.csv

A table of somebody else needs the columns model, layer (from 0), A, lambda, gamma, t0 and K, as published_fits.csv in
docs/massive_activations, whose numbers we made up. Columns of other names are mapped ({"lambda": "lam"}). The architecture comes
from the columns layers, d_model, num_heads, mlp_dim, rotary_base and rotary_fraction, or from a Pythia model's name.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float

from deltajax import cli
from deltajax.csv_table import read_table
from deltajax.massive_activations import features, tables, trajectories
from deltajax.massive_activations.features import Architecture
from deltajax.massive_activations.fit import PARAMETERS
from deltajax.massive_activations.trajectories import Trajectories

ARCHITECTURE = tuple(field.name for field in dataclasses.fields(Architecture))
_INTERVALS = (*PARAMETERS, "peak_step")
COLUMNS = (
    *("model", "layer", "kind", "problem", *PARAMETERS, "peak_step"),
    *(f"{name}_{end}" for name in _INTERVALS for end in ("low", "high")),
    *("r2", "aic", "first_order_r2", "first_order_aic", "second_order_r2", "second_order_aic", "constant_aic"),
    *ARCHITECTURE,
)


@dataclasses.dataclass(frozen=True)
class Table:
    """What a predictor learns from.

    Attributes:
      models: [N] names.
      architectures: [N]; models of one architecture, such as seeds, are held out together.
      x: [N, features], see `features.FEATURES`.
      y: parameter -> [N].
      left_out: why rows are not among them, "model, layer: reason" each.
    """

    models: np.ndarray
    architectures: np.ndarray
    x: Float[np.ndarray, "N F"]
    y: Mapping[str, Float[np.ndarray, "N"]]
    left_out: Sequence[str] = ()


def rows(log: Trajectories, architecture: Architecture | None, statistic: str = "ratio") -> list[dict[str, object]]:
    """A row per block, as COLUMNS; those of the architecture are empty where it is None.

    Parameters are those of the best curve, and their intervals are empty where the data leave them open. A block that cannot be
    fitted has its reason under `problem` and nothing else.
    """
    result: list[dict[str, object]] = []
    for layer, fit in log.fits(statistic).items():
        row: dict[str, object] = {"model": log.model, "layer": layer, "kind": fit.kind, "problem": fit.problem}
        row |= {} if architecture is None else dataclasses.asdict(architecture)
        if fit.score is not None:
            row |= {name: _text(value) for name, value in fit.parameters.items()}
            for name, estimate in fit.estimates.items():
                ends = {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                row |= {column: _text(value) for column, value in ends.items() if value is not None}
            if fit.estimates["peak_step"].value is not None:
                row["peak_step"] = _text(fit.estimates["peak_step"].value)
            for law, score in {"": fit.score, **fit.rivals}.items():
                prefix = f"{law}_" if law else ""
                row |= {f"{prefix}r2": f"{score.r2:.4f}", f"{prefix}aic": f"{score.aic:.1f}"}
            row.pop("constant_r2")
        result.append(row)
    return result


def _text(value: float) -> str:
    return f"{value:.6g}"


def write(path: str | Path, table: Iterable[Mapping[str, object]]) -> None:
    """Rows of `rows`, of any number of models."""
    tables.write(path, COLUMNS, table)


def read(paths: Sequence[str | Path], columns: Mapping[str, str] | None = None) -> Table:
    """The rows of several tables that have all five parameters.

    Args:
      columns: our name of a column -> its name in these tables, where they differ.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a column is missing, something is no number, a model is not known, a block comes twice or its model is
        not that deep.
    """
    models: list[str] = []
    architectures: list[str] = []
    x: list[np.ndarray] = []
    y: dict[str, list[float]] = {name: [] for name in PARAMETERS}
    left_out: list[str] = []
    seen: set[tuple[str, int]] = set()
    needed = ("model", "layer", *PARAMETERS)
    names = {name: name for name in (*needed, *ARCHITECTURE, "problem")} | dict(columns or {})
    unknown = [name for name in columns or {} if name not in (*needed, *ARCHITECTURE)]
    if unknown:
        raise ValueError(f"column {unknown[0]!r} is not one of ours ({', '.join((*needed, *ARCHITECTURE))})")
    for path in map(Path, paths):
        there, lines = read_table(path)
        missing = [names[name] for name in needed if names[name] not in there]
        if missing:
            raise ValueError(
                f"{path}: column {missing[0]} is missing (there: {', '.join(there)}); map it with --columns"
            )
        for number, line in lines:
            row = {name: line.get(column) or "" for name, column in names.items()}
            where = f"{path}: line {number}"
            if any(not row[name].strip() for name in PARAMETERS):
                left_out.append(f"{row['model']}, layer {row['layer']}: {row['problem'] or 'parameters are missing'}")
                continue
            try:
                layer = int(row["layer"])
                numbers = [float(row[name]) for name in PARAMETERS]
                architecture = _architecture(row)
                of_block = architecture.features(layer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not np.isfinite(numbers).all():
                left_out.append(f"{row['model']}, layer {layer}: parameters are not finite")
                continue
            if (row["model"], layer) in seen:
                raise ValueError(f"{where}: layer {layer} of {row['model']} comes twice")
            seen.add((row["model"], layer))
            models.append(row["model"])
            architectures.append(str(dataclasses.astuple(architecture)))
            x.append(of_block)
            for name, value in zip(PARAMETERS, numbers, strict=True):
                y[name].append(value)
    shape = (len(models), len(features.FEATURES))
    return Table(
        np.array(models),
        np.array(architectures),
        np.reshape(x, shape),
        {name: np.array(v) for name, v in y.items()},
        left_out,
    )


def _architecture(row: Mapping[str, str]) -> Architecture:
    given = {name: row[name] for name in ARCHITECTURE if row[name]}
    if not given:
        try:
            return features.of_name(row["model"])
        except ValueError as error:
            raise ValueError(f"{error}; of others the table must have the columns {', '.join(ARCHITECTURE)}") from None
    required = [field.name for field in dataclasses.fields(Architecture) if field.default is dataclasses.MISSING]
    absent = [name for name in required if name not in given]
    if absent:
        raise ValueError(f"{absent[0]} of {row['model']} is missing")
    return Architecture(**{name: int(x) if name in required else float(x) for name, x in given.items()})  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_list("trajectories", [], "tables of trajectories, one per model", flag_values=values)
    flags.DEFINE_enum("statistic", "ratio", trajectories.STATISTICS, "what is fitted", flag_values=values)
    flags.DEFINE_string(
        "architecture",
        None,
        "of these models: a Pythia size, or layers=,d_model=,...; default: by their names, where they are Pythia's",
        flag_values=values,
    )
    flags.DEFINE_string("out", "fits.csv", "the table", flag_values=values)

    def action(_: dict[str, str]) -> None:
        if not values.trajectories:
            raise ValueError("--trajectories: tables of trajectories are missing")
        given = values.architecture and features.parse("--architecture", values.architecture)
        logs = [trajectories.read(path) for path in values.trajectories]
        for path, log in zip(values.trajectories, logs, strict=True):
            if values.statistic not in log.values:
                raise ValueError(f"{path}: column {values.statistic} is missing")
        twice = [model for model, count in Counter(log.model for log in logs).items() if count > 1]
        if twice:
            raise ValueError(f"--trajectories: two tables are of a model {twice[0]!r}")
        found = [row for log in logs for row in rows(log, given or _of_name(log.model), values.statistic)]
        write(values.out, found)
        for row in found:
            said = row["problem"] or f"{row['kind']}, R2 {row['r2']}"
            print(f"{row['model']}, layer {row['layer']}: {said}")
        print(f"{values.out}: {len(found)} blocks of {len(logs)} models")

    return cli.run(action, values, __doc__ or "", argv)


def _of_name(model: str) -> Architecture | None:
    try:
        return features.of_name(model)
    except ValueError:  # a model of our own; a predictor will ask for it
        return None


if __name__ == "__main__":
    sys.exit(main())
