"""The five parameters of the law from a model's architecture, before it is trained (arXiv 2508.03616).

    python -m deltajax.massive_activations.predict --fits=fits.csv --csv=scores.csv
    python -m deltajax.massive_activations.predict --fits=published.csv --columns=lambda=lam,layer=block --architecture=410m

The paper splits rows at random, so blocks of one model stand on both sides. Beside that stands the split that answers the
question asked: every model predicted by what was learned from models of all other architectures.
"""

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tqdm
from absl import flags
from jaxtyping import Float
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, PowerTransformer, StandardScaler

from deltajax import cli
from deltajax.massive_activations import features, fits, tables
from deltajax.massive_activations.fit import PARAMETERS
from deltajax.massive_activations.fits import Table

Split = Literal["random rows", "leave one model out"]
SPLITS: tuple[Split, ...] = ("random rows", "leave one model out")
COLUMNS = ("parameter", "split", "estimator", "r2", "lowest", "highest")
MIN_ROWS = 10


def _forest() -> Any:
    return RandomForestRegressor(50, random_state=0)


# Name -> (estimator, values of its most telling setting), of which 5-fold cross-validation chooses.
ESTIMATORS: dict[str, tuple[Callable[[], Any], Mapping[str, Sequence[float]]]] = {
    "ridge": (lambda: make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": (0.1, 1, 10, 100)}),
    "lasso": (lambda: make_pipeline(StandardScaler(), Lasso()), {"lasso__alpha": (0.003, 0.03, 0.3)}),
    "random forest": (_forest, {"min_samples_leaf": (1, 4)}),
    "gradient boosting": (lambda: GradientBoostingRegressor(random_state=0), {"max_depth": (1, 3)}),
}
try:
    import xgboost
except ImportError:  # the extra "boosting"
    pass
else:
    ESTIMATORS["xgboost"] = (lambda: xgboost.XGBRegressor(n_estimators=100, n_jobs=1), {"max_depth": (1, 3)})


def signed_log1p(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """log(1 + x) of a magnitude, with its sign: the paper's log1p where x >= 0, and defined for a negative A."""
    return np.sign(x) * np.log1p(np.abs(x))


def _transformer(parameter: str) -> Any:
    """The paper's: log1p, and Yeo-Johnson for K."""
    if parameter == "K":
        return PowerTransformer("yeo-johnson")
    inverse = lambda x: np.sign(x) * np.expm1(np.abs(x))  # noqa: E731
    # Standardised, as Yeo-Johnson is, so that a penalty means the same for gamma, of order 1e-4, as for A.
    return make_pipeline(FunctionTransformer(signed_log1p, inverse, check_inverse=False), StandardScaler())


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A fitted estimator of one parameter.

    Attributes:
      scale: transformer of the parameter, fitted to the rows learned from.
      regressor: features -> transformed parameter.
      low, high: of the transformed parameter in the rows learned from.
    """

    scale: Any
    regressor: Any
    low: float
    high: float

    def scaled(self, y: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The parameter, transformed."""
        return self.scale.transform(y[:, None])[:, 0]

    def predict(self, x: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N"]:
        """In the data's units, within the range of what was learned from: beyond it the transforms have no inverse."""
        return self.scale.inverse_transform(np.clip(self.regressor.predict(x), self.low, self.high)[:, None])[:, 0]


def train(
    x: Float[np.ndarray, "N F"], y: Float[np.ndarray, "N"], groups: np.ndarray | None, parameter: str, estimator: str
) -> Predictor:
    """An estimator of ESTIMATORS with its setting chosen by cross-validation in (up to) 5 folds.

    Args:
      groups: [N], rows of one group stay in one fold; None: rows are spread at random.
    """
    make, grid = ESTIMATORS[estimator]
    folds: Any = KFold(min(5, len(y)), shuffle=True, random_state=0)
    if groups is not None and len(set(groups)) > 1:
        folds = GroupKFold(min(5, len(set(groups))))
    scale = _transformer(parameter).fit(y[:, None])
    z = scale.transform(y[:, None])[:, 0]
    search = GridSearchCV(make(), dict(grid), cv=folds, scoring="neg_mean_squared_error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the settings that are then not chosen
        search.fit(x, z, groups=groups)
    return Predictor(scale, search.best_estimator_, float(z.min()), float(z.max()))


@dataclasses.dataclass(frozen=True)
class Score:
    """How well rows that were held out are predicted.

    Attributes:
      r2: 1 - squared error / that of the mean of the rows learned from, both on the transformed scale; the median over
        repetitions of the random split; over the rows of all models, each once, when models are left out.
      lowest, highest: of the repetitions, or of the models by themselves.
    """

    parameter: str
    split: Split
    estimator: str
    r2: float
    lowest: float
    highest: float


def _splits(table: Table, split: Split, repeats: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if split == "random rows":
        yield from ShuffleSplit(repeats, test_size=0.2, random_state=0).split(table.x)
        return
    for one in dict.fromkeys(table.architectures):
        yield np.flatnonzero(table.architectures != one), np.flatnonzero(table.architectures == one)


def _errors(model: Predictor, x: np.ndarray, y: np.ndarray, learned: np.ndarray) -> tuple[float, float]:
    """Sums of squares of a predictor, and of the mean of what it learned from, on its transformed scale."""
    truth, known = model.scaled(y), model.scaled(learned)
    return float(((truth - model.regressor.predict(x)) ** 2).sum()), float(((truth - known.mean()) ** 2).sum())


def check(table: Table) -> None:
    """Refuse a table that is too small to be split.

    Raises:
      ValueError: fewer than 10 rows or 2 architectures.
    """
    models = len(set(table.architectures))
    if len(table.models) < MIN_ROWS or models < 2:
        skipped = f"; {len(table.left_out)} rows left out, the first {table.left_out[0]}" if table.left_out else ""
        raise ValueError(
            f"{len(table.models)} rows of {models} architectures; at least {MIN_ROWS} of 2 are needed to hold some out{skipped}"
        )


def evaluate(table: Table, repeats: int = 5, estimators: Sequence[str] | None = None) -> list[Score]:
    """Every estimator on every parameter in both splits.

    Raises:
      ValueError: see `check`.
    """
    check(table)
    scores = []
    tasks = [(p, s, e) for p in table.y for s in SPLITS for e in estimators or ESTIMATORS]
    for parameter, split, estimator in tqdm.tqdm(tasks, disable=not sys.stderr.isatty()):
        y, sums = table.y[parameter], []
        for learn, test in _splits(table, split, repeats):
            groups = table.architectures[learn] if split == "leave one model out" else None
            model = train(table.x[learn], y[learn], groups, parameter, estimator)
            sums.append(_errors(model, table.x[test], y[test], y[learn]))
        each = [1 - error / max(total, 1e-12) for error, total in sums]
        error, total = np.sum(sums, axis=0)
        whole = float(np.median(each)) if split == "random rows" else 1 - error / max(total, 1e-12)
        scores.append(Score(parameter, split, estimator, whole, min(each), max(each)))
    return scores


def best(scores: Sequence[Score]) -> dict[tuple[str, Split], Score]:
    """Return the best estimator of each parameter and split; a score of NaN is the lowest."""
    found: dict[tuple[str, Split], Score] = {}
    for score in scores:
        key = score.parameter, score.split
        if key not in found or not score.r2 <= found[key].r2 or math.isnan(found[key].r2):
            found[key] = score
    return found


def importance(table: Table, parameter: str, estimator: str, repeats: int = 10) -> dict[str, float]:
    """How much the R2 of left-out models falls when a group of features is permuted among all rows; mean over permutations.

    Args:
      estimator: one of ESTIMATORS.

    Returns:
      Name of the group (see `features.GROUPS`) -> fall. Groups without effect, or constant in the table, have 0.
    """
    check(table)
    y, rng = table.y[parameter], np.random.default_rng(0)
    models = [
        (train(table.x[learn], y[learn], table.architectures[learn], parameter, estimator), learn, test)
        for learn, test in _splits(table, "leave one model out", 1)
    ]

    def r2(x: np.ndarray) -> float:
        error, total = np.sum([_errors(m, x[test], y[test], y[learn]) for m, learn, test in models], axis=0)
        return 1 - error / max(total, 1e-12)

    whole, found = r2(table.x), {}
    for group, names in features.GROUPS.items():
        columns = [features.FEATURES.index(name) for name in names]
        falls = []
        for _ in range(repeats):
            x = table.x.copy()
            x[:, columns] = x[rng.permutation(len(x))][:, columns]
            falls.append(whole - r2(x))
        found[group] = float(np.mean(falls))
    return found


def predict(
    table: Table, architecture: features.Architecture, estimators: Mapping[str, str]
) -> dict[str, Float[np.ndarray, "L"]]:
    """Parameters of every block of a model that is not in the table.

    Args:
      estimators: parameter -> which of ESTIMATORS.
    """
    x = np.stack([architecture.features(layer) for layer in range(architecture.layers)])
    return {
        name: train(table.x, table.y[name], table.architectures, name, estimator).predict(x)
        for name, estimator in estimators.items()
    }


def _parse_columns(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [
        text for text, (name, equals, theirs) in zip(texts, pairs, strict=True) if not (name and equals and theirs)
    ]
    if wrong:
        raise ValueError(f"--columns={wrong[0]}: must be ours=theirs,...")
    return {name: theirs for name, _, theirs in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_list("fits", [], "tables of fitted parameters", flag_values=values)
    flags.DEFINE_list("columns", [], "ours=theirs, where a table's columns have other names", flag_values=values)
    flags.DEFINE_list("estimators", list(ESTIMATORS), "which to try", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "repetitions of the random split", 1, flag_values=values)
    flags.DEFINE_string("csv", None, "write the scores to this file", flag_values=values)
    flags.DEFINE_string("importance", None, "write what permuting features costs to this file", flag_values=values)
    flags.DEFINE_string(
        "architecture", None, "also predict this model: a Pythia size, or layers=,d_model=,...", flag_values=values
    )

    def action(_: dict[str, str]) -> None:
        if not values.fits:
            raise ValueError("--fits: a table of fitted parameters is missing")
        wrong = [name for name in values.estimators if name not in ESTIMATORS]
        if wrong:
            hint = "; pip install 'deltajax[boosting]'" if wrong[0] == "xgboost" else ""
            raise ValueError(f"--estimators={wrong[0]}: must be among {', '.join(ESTIMATORS)}{hint}")
        wanted = values.architecture and features.parse("--architecture", values.architecture)
        table = fits.read(values.fits, _parse_columns(values.columns))
        print(f"{len(table.models)} blocks of {len(set(table.models))} models; {len(table.left_out)} rows left out")
        scores = evaluate(table, values.repeats, values.estimators)
        chosen = best(scores)
        print(f"{'best R2':<10}" + "".join(f"{split:<36}" for split in SPLITS))
        for name in PARAMETERS:
            cells = [f"{chosen[name, s].r2:+.3f} ({chosen[name, s].estimator})" for s in SPLITS]
            print(f"{name:<10}" + "".join(f"{cell:<36}" for cell in cells).rstrip())
        if values.csv:
            write(values.csv, scores)
        if values.importance:
            write_importance(values.importance, table, scores)
        if wanted:
            found = predict(table, wanted, {name: chosen[name, SPLITS[1]].estimator for name in PARAMETERS})
            print("layer  " + "".join(f"{name:<12}" for name in PARAMETERS).rstrip())
            for layer in range(wanted.layers):
                print(f"{layer:<7}" + "".join(f"{found[name][layer]:<12.4g}" for name in PARAMETERS).rstrip())

    return cli.run(action, values, __doc__ or "", argv, result_is_printed=True)


def write(path: str | Path, scores: Sequence[Score]) -> None:
    """Scores as a table of COLUMNS."""
    numbers = ("r2", "lowest", "highest")
    rows = ({**dataclasses.asdict(s), **{name: f"{getattr(s, name):.4f}" for name in numbers}} for s in scores)
    tables.write(path, COLUMNS, rows)


def write_importance(path: str | Path, table: Table, scores: Sequence[Score]) -> None:
    """`importance` for the estimator that predicts each parameter of left-out models best."""
    rows = (
        {"parameter": name, "estimator": score.estimator, "features": group, "fall": f"{fall:.4f}"}
        for (name, split), score in best(scores).items()
        if split == "leave one model out"
        for group, fall in importance(table, name, score.estimator).items()
    )
    tables.write(path, ("parameter", "estimator", "features", "fall"), rows)


if __name__ == "__main__":
    sys.exit(main())
