"""What the experiments on hard batches share: the policies by name, the report, and the order of the commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from deltajax import hard_batches
from deltajax.training.paired import Paired
from deltajax.training.reports import Curves, Report

Policy = Literal["shuffled", "in_order", "hard", "easy", "random", "selective_backprop", "info_batch", "rho_loss"]
Half = Literal["all", "even", "odd"]


def selection(policy: Policy, delta: float, seed: int, experiment: str) -> Any:
    """The policy of this name; rivals use about the share `delta` too. Batches have one composition for each seed."""
    return {
        "shuffled": lambda: hard_batches.Shuffled(),
        "in_order": lambda: hard_batches.InOrder("seeded"),
        "hard": lambda: hard_batches.HardBatches("seeded", delta),
        "easy": lambda: hard_batches.EasyBatches("seeded", delta),
        "random": lambda: hard_batches.RandomBatches("seeded", delta, seed),
        "selective_backprop": lambda: hard_batches.SelectiveBackprop(seed, beta=1 / delta - 1),
        "info_batch": lambda: hard_batches.InfoBatch(seed, ratio=1 - delta),
        "rho_loss": lambda: hard_batches.RhoLoss(seed, table=str(_table(experiment)), pool=round(1 / delta)),
    }[policy]()


def grid(seeds: int) -> list[dict[str, list]]:
    """Every policy at delta = 0.5, the paper's also at the others with the control beside it."""
    each = list(range(seeds))
    return [
        {"policy": ["in_order", "hard", "random", "easy"], "delta": [0.5], "seed": each},
        {"policy": ["hard", "random"], "delta": [0.2, 0.8, 0.1], "seed": each},
        {"policy": ["hard"], "delta": [1.0], "seed": each},
        {"policy": ["shuffled", "selective_backprop", "info_batch", "rho_loss"], "delta": [0.5], "seed": each},
    ]


def report(
    experiment: str, title: str, text: str, metric: str, better: Literal["high", "low"], notes: Sequence[str]
) -> Report:
    """Differences to plain training and to the control, paired by seed, and the curves."""
    return Report(
        title=f"Learning from hard batches: {title}",
        text=f"{text.strip()}\n\nCommand: `python -m experiments.{experiment}`",
        comparisons=[
            Paired(
                "against_plain",
                "Every policy against plain training on the same batches.",
                settings=("policy", "delta"),
                baseline={"policy": "in_order", "delta": 0.5},
                metric=metric,
                better=better,
            ),
            Paired(
                "against_random",
                "Hard batches against the control, as many random ones.",
                settings=("policy", "delta"),
                baseline={"policy": "random"},
                where={"policy": ["random", "hard"], "delta": [0.1, 0.2, 0.5, 0.8]},
                metric=metric,
                better=better,
            ),
        ],
        figures=[
            Curves(
                "curves",
                f"Validation {metric} by update, delta = 0.5: median and range over seeds.",
                x="step",
                y=metric,
                line=("policy",),
                where={"delta": 0.5, "set": "validation"},
            )
        ],
        notes=[*notes, "The column delta says nothing for in_order and shuffled, which take every batch."],
    )


def run(experiment: str) -> int:
    """Two halves, the losses that RHO-loss needs, the sweep, the page: each step continues where it stopped."""
    from deltajax import report, score, sweep, train

    config, table = f"experiments/{experiment}.py", _table(experiment)
    halves = {half: table.parent / f"half_{half}" for half in ("even", "odd")}
    steps = [
        *((train.main, [f"--config={config}:policy=shuffled,half={h}", f"--workdir={w}"]) for h, w in halves.items()),
        (score.main, [*(f"--workdir={w}" for w in halves.values()), f"--output={table}"]),
        (
            sweep.main,
            [f"--config={config}", f"--workdir={table.parent / 'sweep'}", f"--csv=docs/results/{experiment}.csv"],
        ),
        (report.main, []),
    ]
    return next((code for command, flags in steps if (code := command(["", *flags]))), 0)


def _table(experiment: str) -> Path:
    return Path("runs") / experiment / "irreducible.npy"
