"""Everything that can be said of the massive activations of a family of runs, as tables.

    python -m deltajax.massive_activations.study --runs='runs/massive_activations/*' --out=docs/results/massive_activations

Of runs with probes (`--config.probes.every=N`). The folder gets trajectories/<model>.csv, fits.csv, interventions.csv,
surface_<model>.csv, and, where there are enough models, scores.csv and importance.csv of the predictor. Beside it,
`<out>_measures.csv` sums every run up in the columns of a sweep's table, for `deltajax.report`.
"""

import glob
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from deltajax import cli
from deltajax.errors import RunError
from deltajax.massive_activations import fits, predict, tables, trajectories
from deltajax.massive_activations.fit import Fit
from deltajax.massive_activations.trajectories import Trajectories

LAST = 5  # probed steps at the end of a run over which a measure is a mean: a maximum over few sequences is noisy
MEASURES = ("status", "step", "set", "position", "metric", "value")


def settings_of(folder: str) -> dict[str, str]:
    """What sets a member of a sweep apart, by its folder's name: "model=a,seed=0" -> {"model": "a", "seed": "0"}."""
    found = dict(re.findall(r"(?:^|,)([^,=]+)=([^,]*)", folder))
    return found or {"model": folder}


def name_of(folder: str) -> str:
    """The model as the tables call it, such as "a-0"."""
    return "-".join(settings_of(folder).values())


def summary(log: Trajectories, found: Mapping[int, Fit], losses: Mapping[int, Mapping[Any, float]]) -> dict[str, float]:
    """Metric -> value of one run.

    Args:
      log: what probes saw.
      found: the law fitted to each block's ratio.
      losses: of interventions, see `intervene.losses`.

    Returns:
      ratio, top1, first_token_share: of the block where each is largest, means over the last 5 probed steps; massive_blocks: how
      many pass the base paper's test (above 100 and 1,000 times the median) at the last step; fit_r2: median over blocks;
      law_is_best: share of blocks where the law has the lowest AIC; early_peak, log_increase: shares of blocks; zero, mean,
      neighbours: change of the loss at the block where zero matters most.
    """

    def last(statistic: str) -> float:
        return float(np.max([np.mean(x[-LAST:]) for x in log.values[statistic].values()]))  # NaN if a block is

    values = {"ratio": last("ratio"), "top1": last("top1")}
    pairs = [(top1[-1], log.values["median"][layer][-1]) for layer, top1 in log.values["top1"].items()]
    values["massive_blocks"] = sum(top > 100 and top > 1000 * median for top, median in pairs)
    shares = [x for x in log.values.get("first_token_share", {}).values() if np.isfinite(x).all()]
    if shares:
        values["first_token_share"] = max(float(np.mean(x[-LAST:])) for x in shares)
    fitted = [fit for fit in found.values() if fit.score is not None]
    if fitted:
        values["fit_r2"] = float(np.median([fit.score.r2 for fit in fitted if fit.score]))
        best = [fit.score.aic < min(rival.aic for rival in fit.rivals.values()) for fit in fitted if fit.score]
        values["law_is_best"] = float(np.mean(best))
        for kind in ("early peak", "log increase"):
            values[kind.replace(" ", "_")] = float(np.mean([fit.kind == kind for fit in fitted]))
    if losses:
        worst = max(losses.values(), key=lambda of: (math.isnan(of["zero"]), of["zero"]))
        values |= {mode: worst[mode] - worst["none"] for mode in ("zero", "mean", "neighbours")}
    return values


def run(patterns: Sequence[str], out: Path, surfaces: Sequence[str], family: str, batches: int, top: int) -> None:
    """Write all tables.

    Args:
      patterns: globs of workdirs.
      surfaces: models whose |h| over token and channel is kept.
      family: pattern of the names of the models that the predictor learns from.

    Raises:
      ValueError: a pattern names no run with probes, or a surface no model.
      RunError: none of the runs has a log and a checkpoint that can be read; some without are left out, which is said.
    """
    from deltajax.massive_activations import features, intervene, surface, trained

    workdirs = _workdirs(patterns)
    unknown = sorted(set(surfaces) - {name_of(path.name) for path in workdirs})
    if unknown:
        raise ValueError(f"--surfaces={unknown[0]}: no such model")
    of_fits: list[dict[str, object]] = []
    interventions: list[dict[str, object]] = []
    measures: list[dict[str, object]] = []
    for workdir in workdirs:
        name = name_of(workdir.name)
        try:
            log, model = trajectories.of_run(workdir), trained.load(workdir, batches)
        except (RunError, ValueError) as error:
            print(f"{name}: left out: {error}")
            continue
        path = out / "trajectories" / f"{name}.csv"
        trajectories.write(path, name, trajectories.of_log(log))
        log = trajectories.read(path)
        of_fits += fits.rows(log, features.of_config(model.config))
        losses = intervene.losses(model.sums, model.params, model.batches, range(model.blocks), top)
        interventions += intervene.rows(name, losses, top)
        whole = settings_of(workdir.name) | {"status": "complete", "step": str(model.step)}
        found = summary(log, log.fits(), losses)
        measures += [{**whole, "metric": metric, "value": f"{value:.6g}"} for metric, value in found.items()]
        if name in surfaces:
            layer, magnitude = surface.magnitudes(model.sums, model.params, model.batches[0])
            np.savetxt(out / f"surface_{name}.csv", magnitude, "%.3g", ",", header=f"block {layer}")
        print(f"{name}: ratio {found['ratio']:.3g}, R2 of the law {found.get('fit_r2', np.nan):.3f}", flush=True)
    if not measures:
        raise RunError(f"none of the {len(workdirs)} runs has a log and a checkpoint that can be read")
    fits.write(out / "fits.csv", of_fits)
    tables.write(out / "interventions.csv", intervene.COLUMNS, interventions)
    settings = list(dict.fromkeys(key for row in measures for key in row if key not in MEASURES))
    tables.write(out.with_name(f"{out.name}_measures.csv"), (*settings, *MEASURES), measures)
    _predict(out, [row for row in of_fits if re.fullmatch(family, str(row["model"]))])


def _workdirs(patterns: Sequence[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        paths = [p for p in map(Path, sorted(glob.glob(pattern))) if (p / trajectories.LOG).exists()]
        if not paths:
            raise ValueError(f"--runs={pattern}: no run with probes there; train with --config.probes.every=N")
        found += paths
    return found


def _predict(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Scores of all estimators, and of the best the importance of each group of features for models left out."""
    learned = out / "predictor_fits.csv"
    fits.write(learned, rows)
    table = fits.read([learned])
    learned.unlink()
    try:
        predict.check(table)
    except ValueError as error:
        print(f"no predictor: {error}")
        return
    scores = predict.evaluate(table)
    predict.write(out / "scores.csv", scores)
    predict.write_importance(out / "importance.csv", table, scores)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_list("runs", [], "globs of workdirs of runs with probes", flag_values=values)
    flags.DEFINE_string("out", "docs/results/massive_activations", "folder of the tables", flag_values=values)
    flags.DEFINE_list("surfaces", [], "models whose |h| over token and channel is kept", flag_values=values)
    flags.DEFINE_string("family", ".*", "names of the models that the predictor learns from", flag_values=values)
    flags.DEFINE_integer("batches", 10, "validation batches for the interventions", 1, flag_values=values)
    flags.DEFINE_integer("top", 5, "values per sequence that they overwrite", 1, flag_values=values)

    def action(_: dict[str, str]) -> None:
        if not values.runs:
            raise ValueError("--runs: workdirs of runs with probes are missing")
        try:
            re.compile(values.family)
        except re.error as error:
            raise ValueError(f"--family={values.family}: {error}") from None
        run(values.runs, Path(values.out), values.surfaces, values.family, values.batches, values.top)

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
