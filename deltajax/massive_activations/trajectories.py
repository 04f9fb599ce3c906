"""How activations change while a model trains, as one tidy table per model.

    python -m deltajax.massive_activations.trajectories --workdir=runs/mine --out=mine.csv
    python -m deltajax.massive_activations.trajectories --checkpoints=DIR --text=FILE --out=pythia.csv

The first takes what probes logged during one of our runs (`--config.probes.every`). The second runs every checkpoint of a folder
on a text: directories in Hugging Face's GPT-NeoX layout whose names end in step<N>, as Pythia's revisions are called.
"""

import csv
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from deltajax import cli
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
      ValueError: columns are missing, the rows are of several models, a number is none, or a step comes twice in a layer.
    """
    path = Path(path)
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: column {missing[0]} is missing (needed: {', '.join(_NEEDED)})")
    models = sorted({row["model"] for row in rows}) if "model" in (reader.fieldnames or ()) else [path.stem]
    if len(models) > 1:
        raise ValueError(f"{path}: rows of {len(models)} models ({', '.join(models[:3])}); a table holds one")
    steps: dict[int, list[float]] = {}
    values: dict[str, dict[int, list[float]]] = {name: {} for name in STATISTICS if name in (reader.fieldnames or ())}
    for number, row in enumerate(rows, 2):
        try:
            layer, step = int(row["layer"]), float(row["step"])
            for name, of_layer in values.items():
                of_layer.setdefault(layer, []).append(float(row[name]) if row[name] else np.nan)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: line {number}: {','.join(str(v) for v in row.values())} is not made of numbers"
            ) from None
        if step in steps.get(layer, ()):
            raise ValueError(
                f"{path}: line {number}: step {step:g} of layer {layer} comes twice; rows of several models?"
            )
        steps.setdefault(layer, []).append(step)
    return Trajectories(
        models[0] if models else path.stem,
        {layer: np.array(x) for layer, x in sorted(steps.items())},
        {name: {layer: np.array(x) for layer, x in sorted(of.items())} for name, of in values.items()},
    )


def write(path: str | Path, model: str, rows: Iterator[tuple[int, Mapping[str, np.ndarray]]]) -> int:
    """A table from (step, statistics [layers]) pairs, written as they come; the number of pairs."""
    count = 0
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for step, statistics in rows:
            for layer in range(len(statistics["ratio"])):
                cells = {name: f"{x[layer]:.7g}" for name, x in statistics.items() if not np.isnan(x[layer])}
                writer.writerow({"model": model, "step": step, "layer": layer, **cells})
            file.flush()
            count += 1
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
    found = {
        int(match[1]): path
        for path in Path(folder).glob("*")
        if path.is_dir() and (match := re.search(r"step_?(\d+)$", path.name))
    }
    if not found:
        raise ValueError(f"--checkpoints={folder}: holds no directories whose names end in step<N>")
    return dict(sorted(found.items()))


def of_checkpoints(
    folder: str | Path, text: bytes, tokenizer: str | None = None, sequences: int = 10, length: int = 512
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, statistics [layers]) of each checkpoint, on the first sequences x length tokens of a text.

    Args:
      tokenizer: see `data.load_tokenizer`; None: tokenizer.json of the first checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `interop.gpt_neox.load`; the text is too short, or its tokens too many for a model.
    """
    from deltajax import data  # here, so that Ctrl-C while JAX is imported is one line too
    from deltajax.interop import gpt_neox as interop

    paths = steps_of(folder)
    name = tokenizer or str(next(iter(paths.values())) / "tokenizer.json")
    tokens = data.load_tokenizer(name).encode(text)[1:]  # the paper's sequences begin within a text
    if len(tokens) < sequences * length:
        raise ValueError(f"text: {len(tokens)} tokens are fewer than {sequences} sequences of {length}")
    tokens = tokens[: sequences * length].reshape(sequences, length)
    measure = measured = None
    for step, path in paths.items():
        params, config = interop.load(path)
        if tokens.max() >= config.vocab_size:
            raise ValueError(f"{path}: token {tokens.max()} is not below its vocab_size = {config.vocab_size}")
        if measure is None or config != measured:
            measured, measure = config, _measurer(config, tokens)
        yield step, measure(params)


def _measurer(config: Any, tokens: np.ndarray) -> Callable[[Any], dict[str, np.ndarray]]:
    import jax.numpy as jnp

    from deltajax.massive_activations.measure import measurer
    from deltajax.models import gpt_neox

    return measurer(lambda params: gpt_neox.apply(params, config, jnp.asarray(tokens))[0])


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
