"""Massive activations while small models train: a Pythia-shaped family, its cures, and models of the delta rule.

Claim: the ratio of the largest to the median activation follows the five-parameter law of arXiv 2508.03616 in models trained
here, too; a pure DeltaNet, which has no softmax to dump attention in, is compared with attention at the same size.
Command: python -m experiments.massive_activations (sweep, study, RESULTS.md)
Time: about 90 minutes on one of 2 CPU cores of a shared machine, most of it the largest model.
Result: ratios of 6 to 22, far from massive; the law beats its rivals in most blocks, with an R2 of .75 (paper: .98); DeltaNet's
ratio is attention's; there is nothing for the cures to cure. See RESULTS.md.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltajax import data
from deltajax.csv_table import read_rows
from deltajax.layers import attention, delta
from deltajax.massive_activations import figures, trajectories
from deltajax.models import gpt_neox, lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Probes, Schedule, TrainConfig
from deltajax.training.reports import Claim, Picture, Report, Table

VOCAB = 257  # bytes and the token that begins a document


def _neox(layers: int, width: int, **fields: Any) -> gpt_neox.Config:
    """Heads of 16, of which 4 dimensions are rotated."""
    return gpt_neox.Config(VOCAB, width, layers, width // 16, **fields)


def _lm(pattern: Sequence[str], **mixers: Any) -> lm.Config:
    return lm.Config(VOCAB, 64, tuple(pattern), mixers, mlp_dim=192)


_DELTA = delta.deltanet(4, 16)
_ATTENTION = attention.Config(4, 16)
MODELS: dict[str, Callable[[], Any]] = {
    "neox-2x32": lambda: _neox(2, 32),
    "neox-4x32": lambda: _neox(4, 32),
    "neox-4x64": lambda: _neox(4, 64),
    "neox-6x48": lambda: _neox(6, 48),
    "neox-8x64": lambda: _neox(8, 64),
    "neox-14m": lambda: gpt_neox.pythia("14m", vocab_size=VOCAB),  # Pythia's smallest, on bytes: 1.2M parameters
    "neox-4x64-kv": lambda: _neox(4, 64, sink="kv"),
    "neox-4x64-one": lambda: _neox(4, 64, sink="one"),
    "neox-4x64-gated": lambda: _neox(4, 64, gated=True),
    "attention-4x64": lambda: _lm(["a"] * 4, a=_ATTENTION),
    "deltanet-4x64": lambda: _lm(["d"] * 4, d=_DELTA),
    "gated_deltanet-4x64": lambda: _lm(["g"] * 4, g=delta.gated_deltanet(4, 16)),
    "deltaproduct-4x64": lambda: _lm(["p"] * 4, p=delta.deltaproduct(4, 16)),
    "hybrid-4x64": lambda: _lm(["d", "a"] * 2, d=_DELTA, a=_ATTENTION),
}
# Names that end so train one of the models above in another way.
TRAINING: Mapping[str, dict[str, Any]] = {
    "-decay0": {"optimizer": {"weight_decay": 0.0}},
    "-constant": {"schedule": {"decay": "constant"}},
}
SEEDED = ("neox-4x64", "attention-4x64", "deltanet-4x64")  # those with three seeds


def get_grid() -> list[dict[str, Any]]:
    """All models once, three of them with three seeds, and one of these without weight decay and at a constant rate."""
    others = [name for name in MODELS if name not in SEEDED] + [SEEDED[0] + suffix for suffix in TRAINING]
    return [{"model": SEEDED, "seed": range(3)}, {"model": others, "seed": [0]}]


def get_config(model: str = SEEDED[0], seed: int = 0, steps: int | None = None) -> TrainConfig:
    """One run: 1,024 bytes a step of the standard library's source; 1,200 steps, of the largest model 4,000."""
    steps = steps or (4000 if model == "neox-14m" else 1200)
    base, changes = model, {}
    for suffix in TRAINING:
        if model.endswith(suffix):
            base, changes = model.removesuffix(suffix), TRAINING[suffix]
    if base not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {base!r}")
    config = TrainConfig(
        model=MODELS[base](),
        data=data.Config(corpus="stdlib", seq_len=128, batch_size=8, validation_fraction=0.02, seed=seed),
        steps=steps,
        seed=seed,
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule(warmup_steps=min(100, steps - 1)),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=steps, batches=40),
        probes=Probes(every=50),
    )
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **parts)


NAME = "massive_activations"
SHOWN = ("neox-4x64-0", "neox-8x64-0", "neox-14m-0", "attention-4x64-0", "deltanet-4x64-0", "deltaproduct-4x64-0")
FAMILY = [name for name in MODELS if name.startswith("neox") and name.count("-") == 1]


def get_report() -> Report:
    """What `python -m deltajax.report` shows: numbers of the study beside those of the sweep."""

    def of(model: str | Sequence[str], metric: str, **where: Any) -> dict:
        return {"model": model, "metric": metric, **where}

    everyone = [*MODELS, *(SEEDED[0] + suffix for suffix in TRAINING)]
    return Report(
        title="Massive activations while small models train",
        text=TEXT,
        also=[f"{NAME}_measures"],
        claims=[
            Claim(
                "In small models trained briefly there are massive activations by the base paper's test (above 100 and 1,000 "
                "times the median).",
                {"blocks that pass, median over all runs": of(everyone, "massive_blocks")},
                lambda blocks: blocks >= 1,
            ),
            Claim(
                "The law explains the ratio over training (paper: mean R2 .984 over 188 blocks of Pythia).",
                {"R2, median over the Pythia-shaped runs of their blocks' median": of(FAMILY, "fit_r2")},
                lambda r2: r2 >= 0.9,
            ),
            Claim(
                "By AIC it beats both step responses and a constant in most blocks.",
                {"share of blocks": of(FAMILY, "law_is_best")},
                lambda share: share > 0.5,
            ),
            Claim(
                "At equal size a pure DeltaNet has a lower ratio than softmax attention.",
                {"DeltaNet": of("deltanet-4x64", "ratio"), "attention": of("attention-4x64", "ratio")},
                lambda delta, attention: delta < attention,
            ),
            Claim(
                "Cures lower the ratio.",
                {"none": of(SEEDED[0], "ratio")} | {cure: of(f"{SEEDED[0]}-{cure}", "ratio") for cure in CURES},
                lambda none, *cures: all(cure < none for cure in cures),
            ),
            Claim(
                "Setting the 5 largest values of a sequence to zero costs more than setting them to their mean.",
                {"zero": of(everyone, "zero"), "mean": of(everyone, "mean")},
                lambda zero, mean: zero > mean,
            ),
        ],
        tables=[
            Table(
                "At the end of training: the largest ratio and activation of any block (means over the last 5 probed steps), R2 "
                "of the law and the share of blocks where it beats its rivals by AIC, and attention on the first token (not "
                "run: there is no attention). Best is lowest.",
                ["model"],
                ["metric"],
                where={"metric": ["ratio", "top1", "fit_r2", "law_is_best", "first_token_share", "bits_per_byte"]},
                better="low",
                labels=LABELS,
            ),
            Table(
                "Interventions, in the block where zero matters most: change of the loss (nats) when the 5 largest values of "
                "each sequence are overwritten, or their neighbours. Best is lowest.",
                ["model"],
                ["metric"],
                where={"metric": ["zero", "mean", "neighbours"]},
                better="low",
                labels=LABELS,
                digits=5,
            ),
        ],
        pictures=[
            Picture(
                "trajectories",
                "Ratio of every block over training (points) with the law fitted (lines).",
                _trajectories,
            ),
            Picture("surface", "|h| over token and channel, after the block with the largest ratio.", _surface),
            Picture(
                "depth",
                "Parameters of the law against relative depth; filled where the data identify them. One seed of each "
                "Pythia-shaped model.",
                _depth,
            ),
            Picture(
                "predictor",
                "Parameters of the law predicted from the architecture: best estimator in a random split of rows, as "
                "published, and with every architecture predicted from the others; and what the R2 of the latter loses when "
                "features are permuted.",
                _predictor,
            ),
        ],
        notes=NOTES,
    )


CURES = ("kv", "one", "gated")
LABELS = {
    "ratio": "ratio",
    "top1": "largest",
    "fit_r2": "R2 of the law",
    "law_is_best": "law is best",
    "first_token_share": "first token's share",
    "bits_per_byte": "bits per byte",
    "zero": "set to zero",
    "mean": "set to their mean",
    "neighbours": "neighbours to zero",
}


def _trajectories(results: Path) -> Any:
    paths = [path for name in SHOWN if (path := results / NAME / "trajectories" / f"{name}.csv").exists()]
    if not paths:
        return None
    drawing, axes = figures.plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained", squeeze=False)
    for axis, path in zip(axes.flat, paths, strict=False):
        log = trajectories.read(path)
        figures.trajectories(axis, log, log.fits())
        axis.legend(fontsize=6, ncols=2)
    for axis in axes.flat[len(paths) :]:
        axis.set_axis_off()
    return drawing


def _surface(results: Path) -> Any:
    paths = sorted((results / NAME).glob("surface_*.csv"))
    if not paths:
        return None
    size: dict[str, Any] = {"figsize": (6 * len(paths), 4.5), "layout": "constrained", "squeeze": False}
    drawing, axes = figures.plt.subplots(1, len(paths), subplot_kw={"projection": "3d"}, **size)
    for axis, path in zip(axes.flat, paths, strict=True):
        block = path.read_text().partition("\n")[0].strip("# ")
        try:
            magnitudes = np.loadtxt(path, delimiter=",")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        figures.surface(axis, magnitudes, f"{path.stem.removeprefix('surface_')}, {block}")
    return drawing


def _depth(results: Path) -> Any:
    path = results / NAME / "fits.csv"
    if not path.exists():
        return None
    rows = [row for row in read_rows(path) if row["model"].removesuffix("-0") in FAMILY]
    drawing, axes = figures.plt.subplots(1, 5, figsize=(14, 3.2), layout="constrained")
    figures.depth(axes, rows)
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return drawing


def _predictor(results: Path) -> Any:
    paths = [results / NAME / name for name in ("scores.csv", "importance.csv")]
    if not all(path.exists() for path in paths):
        return None
    drawing, axes = figures.plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(3, 2))
    figures.scores(axes[0], read_rows(paths[0]))
    figures.importance(axes[1], read_rows(paths[1]))
    return drawing


TEXT = """
Claim (arXiv 2508.03616, 2402.17762): the ratio of the largest to the median activation of a block follows one five-parameter law
over training, whose parameters follow from the architecture; setting massive activations to zero destroys a model, setting them
to their mean does not; a key and value of each head's own, or a gate on attention, makes them superfluous. Nothing published is
known to us on models of the delta rule, which have no softmax that needs a sink.

**These models show less than large ones.** They have at most 1.3 million parameters and saw at most 2 million bytes of Python's
standard library; Pythia's have 14 million to 12 billion and saw 300 billion tokens. Ratios here stay far below the 1,000 that is
called massive, and attention does not settle on the first token, so there is nothing yet for the cures to cure. What the section
shows is that the instruments work, and what they read before the phenomenon.

Command: `python -m experiments.massive_activations` (the runs, the tables of `deltajax.massive_activations.study`, this page)
"""
NOTES = [
    "neox-14m, Pythia's smallest on bytes, was stopped at 1,760 of its 4,000 steps: its learning rate had not come down, and its "
    "loss is not among the numbers.",
    "One seed each, but three of neox-4x64, attention-4x64 and deltanet-4x64: a difference smaller than their ranges means "
    "nothing.",
    "The law has five parameters for 30 points of a series that hardly rises: many are open (no interval in fits.csv), and those "
    "of the best curve are then extreme (lambda at its bound of 30, A of order 1e15). The predictor learns from them as the "
    "paper's did from its own; scores here say what such fits allow, not what Pythia's would. With 30 blocks a random split "
    "flatters most parameters, and from other architectures none but K and gamma (R2 of .12 and .10, the best of five "
    "estimators) is predicted better than by its mean. XGBoost, one of the five, needs `pip install 'deltajax[boosting]'`.",
    "The authors' published fits could not be had when this was made: the predictor reads tables of them (an example of ours: "
    "docs/massive_activations/published_fits.csv), and its scores on them are unmeasured.",
    "What probes cost a step: benchmarks/results/massive_probes.csv. How well the fit finds known parameters: "
    "benchmarks/results/massive_fit.csv.",
]


def main() -> int:
    """All runs, their tables, the page; each step continues where it stopped."""
    from deltajax import report, sweep
    from deltajax.massive_activations import study

    runs, tables = f"runs/{NAME}", f"docs/results/{NAME}"
    looked_at = ["--surfaces=neox-14m-0,deltanet-4x64-0", r"--family=neox-(\d+x\d+|14m)-0", "--batches=3"]
    steps = [
        (sweep.main, [f"--config=experiments/{NAME}.py", f"--workdir={runs}", f"--csv={tables}.csv", "--jobs=2"]),
        (study.main, [f"--runs={runs}/model=*", f"--out={tables}", *looked_at]),
        (report.main, []),
    ]
    return next((code for command, flags in steps if (code := command(["", *flags]))), 0)


if __name__ == "__main__":
    sys.exit(main())
