"""How activations change while a model trains, as one tidy table per model.

    python -m deltajax.massive_activations.trajectories --workdir=runs/mine --out=mine.csv
    python -m deltajax.massive_activations.trajectories --checkpoints=pythia-70m --text=FILE --out=pythia-70m.csv

The first takes what probes logged during one of our runs (`--config.probes.every`). The second runs every checkpoint of a folder
on a text: directories in Hugging Face's GPT-NeoX layout whose names end in step<N>, as Pythia's revisions are called.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from deltajax import cli
from deltajax.csv_table import read_table
from deltajax.massive_activations import tables
from deltajax.massive_activations.fit import Fit, check_steps, fit_trajectories

STATISTICS = ("top1", "top2", "top3", "median", "ratio", "kurtosis", "position", "channel", "first_token_share")
COLUMNS = ("model", "step", "layer", *STATISTICS)
LOG = "activations.csv"  # of probes, in a workdir
_NEEDED = ("step", "layer", "ratio")


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Of one model.

    Attributes:
      model: its name.
      steps: [T] per layer, in the order of the table.
      values: statistic -> [T] per layer; NaN where the table has nothing.
    """

    model: str
    steps: Mapping[int, np.ndarray]
    values: Mapping[str, Mapping[int, np.ndarray]]

    def fits(self, statistic: str = "ratio") -> dict[int, Fit]:
        """The law on each layer; a layer that cannot be fitted, or whose steps are out of order, says so in its `problem`."""
        fits: dict[int, Fit] = {}
        together: dict[bytes, list[int]] = {}
        for layer, steps in self.steps.items():
            try:
                check_steps(steps)
            except ValueError as error:
                fits[layer] = Fit(problem=str(error))
            else:
                together.setdefault(steps.tobytes(), []).append(layer)
        for layers in together.values():
            rows = np.stack([self.values[statistic][layer] for layer in layers])
            fits |= dict(zip(layers, fit_trajectories(self.steps[layers[0]], rows), strict=True))
        return dict(sorted(fits.items()))


def read(path: str | Path) -> Trajectories:
    """A table, ours or another with at least the columns step, layer and ratio; without a column model the file's name is it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: columns or rows are missing, the rows are of several models, or a number is none. A last line
        without an end, which a run may still be writing, is left out.
    """
    path = Path(path)
    columns, numbered = read_table(path, _NEEDED, unfinished_last_line=True)  # a run may still be writing it
    rows = [row for _, row in numbered]
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    models = sorted({str(row["model"]) for row in rows}) if "model" in columns else [path.stem]
    if len(models) > 1:
        raise ValueError(f"{path}: rows of {len(models)} models ({', '.join(models[:3])}); a table holds one")
    steps: dict[int, list[float]] = {}
    values: dict[str, dict[int, list[float]]] = {name: {} for name in STATISTICS if name in columns}
    for number, row in numbered:
        try:
            layer, step = int(row["layer"]), float(row["step"])
            for name, of_layer in values.items():
                of_layer.setdefault(layer, []).append(np.nan if row[name] == "" else float(row[name]))
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: line {number}: {','.join(str(v) for v in row.values())} is not made of numbers"
            ) from None
        steps.setdefault(layer, []).append(step)
    return Trajectories(
        models[0],
        {layer: np.array(x) for layer, x in sorted(steps.items())},
        {name: {layer: np.array(x) for layer, x in sorted(of.items())} for name, of in values.items()},
    )


def write(path: str | Path, model: str, rows: Iterator[tuple[int, Mapping[str, np.ndarray]]]) -> int:
    """A table from (step, statistics [layers]) pairs, written as they come; the number of pairs."""
    count = 0

    def lines() -> Iterator[dict[str, object]]:
        nonlocal count
        for step, statistics in rows:
            count += 1
            for layer in range(len(statistics["ratio"])):
                cells = {name: f"{x[layer]:.7g}" for name, x in statistics.items() if not np.isnan(x[layer])}
                yield {"model": model, "step": step, "layer": layer, **cells}

    tables.write(path, COLUMNS, lines())
    return count


def of_run(workdir: str | Path) -> Trajectories:
    """What probes logged in a run's folder; the model is called as the folder.

    Raises:
      FileNotFoundError: no probe log there.
      ValueError: as `read`.
    """
    path = Path(workdir) / LOG
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; train with --config.probes.every=N")
    return dataclasses.replace(read(path), model=Path(workdir).resolve().name)


def of_log(log: Trajectories) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The pairs that `write` takes; steps that not every layer has are left out."""
    for step in next(iter(log.steps.values()), ()):
        at = [np.flatnonzero(steps == step) for steps in log.steps.values()]
        if all(len(i) for i in at):
            rows = {
                name: np.array([x[i[0]] for x, i in zip(of.values(), at, strict=True)])
                for name, of in log.values.items()
            }
            yield int(step), rows


def steps_of(folder: str | Path) -> dict[int, Path]:
    """step -> directory of each checkpoint in a folder, ascending.

    Raises:
      ValueError: no directory's name ends in step<N>.
    """
    by_step: dict[int, Path] = {}
    for path in sorted(Path(folder).glob("*")):
        match = re.search(r"step_?(\d+)$", path.name)
        if path.is_dir() and match:
            other = by_step.setdefault(int(match[1]), path)
            if other != path:
                raise ValueError(f"--checkpoints={folder}: {other.name} and {path.name} are of one step; remove one")
    if not by_step:
        raise ValueError(f"--checkpoints={folder}: holds no directories whose names end in step<N>")
    return dict(sorted(by_step.items()))


def of_checkpoints(
    folder: str | Path, text: bytes, tokenizer: str | None = None, sequences: int = 10, length: int = 512
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, statistics [layers]) of each checkpoint, on the first sequences x length tokens of a text.

    Args:
      tokenizer: see `data.load_tokenizer`; None: tokenizer.json of the first checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `interop.gpt_neox.load` and `trained.read_tokens`; the checkpoints are of several models.
    """
    from deltajax.interop import gpt_neox as interop  # here, so that Ctrl-C while JAX is imported is one line too
    from deltajax.massive_activations import trained
    from deltajax.massive_activations.measure import measurer
    from deltajax.models import gpt_neox

    paths = steps_of(folder)
    first, *others = paths.values()
    config = interop.read_config(first)
    for path in others:
        if interop.read_config(path) != config:
            raise ValueError(f"{path}: its config.json is of another model than that of {first}")
    tokens = trained.read_tokens(text, tokenizer, first, sequences, length, config.vocab_size)
    measure = measurer(lambda params, tokens: gpt_neox.apply(params, config, tokens)[0])
    for step, path in paths.items():
        yield step, measure(interop.load(path)[0], tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("workdir", None, "a run of ours with probes", flag_values=values)
    flags.DEFINE_string("checkpoints", None, "folder of checkpoints", flag_values=values)
    flags.DEFINE_string("text", None, "text file to run them on", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "'byte' or a tokenizer.json; default: the checkpoint's", flag_values=values)
    flags.DEFINE_integer("sequences", 10, "sequences of the text", 1, flag_values=values)
    flags.DEFINE_integer("length", 512, "tokens of each", 1, flag_values=values)
    flags.DEFINE_string("model", None, "name of the model; default: the folder's", flag_values=values)
    flags.DEFINE_string("out", None, "the table; default: <model>.csv", flag_values=values)

    def action(_: dict[str, str]) -> None:
        if (values.workdir is None) == (values.checkpoints is None):
            raise ValueError("give either --workdir or --checkpoints")
        model = values.model or Path(values.workdir or values.checkpoints).resolve().name
        out = Path(values.out or f"{model}.csv")
        if values.workdir:
            count = write(out, model, of_log(of_run(values.workdir)))
        else:
            if not values.text:
                raise ValueError("--text: a text file is missing")
            text = Path(values.text).read_bytes()
            rows = of_checkpoints(values.checkpoints, text, values.tokenizer, values.sequences, values.length)
            count = write(out, model, rows)
        print(f"{out}: {count} steps of {model}")

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
