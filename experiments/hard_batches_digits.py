"""Learning from hard batches (arXiv 2304.03486) against its control and its rivals: a small ResNet on scikit-learn's digits.

Claim of the paper: training on the hardest share delta of the batches generalises in fewer epochs and better.
Command: python -m experiments.hard_batches_digits (irreducible losses, sweep, RESULTS.md)
Time: 8 minutes on one core of a shared machine.
Result: RESULTS.md.
"""

import sys
from pathlib import Path
from typing import Any, Literal

from deltajax import hard_batches
from deltajax.data import vision
from deltajax.models import resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig
from deltajax.training.paired import Paired
from deltajax.training.reports import Curves, Report

EPOCHS = 20
BATCH = 64
BATCHES = (1797 - vision.DIGITS_TEST) // BATCH  # N: an epoch is N updates for every policy
TABLE = Path("runs/hard_batches_digits/irreducible.npy")

Policy = Literal["shuffled", "in_order", "hard", "easy", "random", "selective_backprop", "info_batch", "rho_loss"]


def selection(policy: Policy, delta: float, seed: int, table: Path) -> Any:
    """The policy of this name. Batches have one composition for each seed, the same for all policies."""
    return {
        "shuffled": lambda: hard_batches.Shuffled(),
        "in_order": lambda: hard_batches.InOrder("seeded"),
        "hard": lambda: hard_batches.HardBatches("seeded", delta),
        "easy": lambda: hard_batches.EasyBatches("seeded", delta),
        "random": lambda: hard_batches.RandomBatches("seeded", delta, seed),
        "selective_backprop": lambda: hard_batches.SelectiveBackprop(seed, beta=1 / delta - 1),
        "info_batch": lambda: hard_batches.InfoBatch(seed, ratio=1 - delta),
        "rho_loss": lambda: hard_batches.RhoLoss(seed, table=str(table), pool=round(1 / delta)),
    }[policy]()


def get_config(
    policy: Policy = "hard", delta: float = 0.5, seed: int = 0, half: Literal["all", "even", "odd"] = "all"
) -> TrainConfig:
    """`EPOCHS` N updates, a constant rate as in the authors' code; `seed` is of the parameters, the batches and the draws."""
    steps = EPOCHS * BATCHES
    return TrainConfig(
        model=resnet.resnet_small(in_channels=1, blocks=(1, 1), widths=(8, 16)),
        data=vision.Config(batch_size=BATCH, seed=seed, half=half, selection=selection(policy, delta, seed, TABLE)),
        steps=steps,
        seed=seed,
        optimizer=Optimizer(name="sgd", learning_rate=0.02, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(decay="constant", warmup_steps=0),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=BATCHES // 2),
        log_every=BATCHES // 2,
    )


def get_grid(seeds: int = 5) -> list[dict[str, list]]:
    """Every policy at delta = 0.5, the paper's also at the others with the control beside it."""
    each = list(range(seeds))
    return [
        {"policy": ["in_order", "hard", "random", "easy"], "delta": [0.5], "seed": each},
        {"policy": ["hard", "random"], "delta": [0.2, 0.8, 0.1], "seed": each},
        {"policy": ["hard"], "delta": [1.0], "seed": each},
        {"policy": ["shuffled"], "delta": [0.5], "seed": each},
        {"policy": ["selective_backprop", "info_batch", "rho_loss"], "delta": [0.5], "seed": each},
    ]


def get_report() -> Report:
    """Differences to plain training, paired by seed, and the curves."""
    return Report(
        title="Learning from hard batches: digits",
        text="""arXiv 2304.03486 trains on the share delta of the batches with the highest recorded losses and reports fewer
epochs to generalise and better accuracy. Here: scikit-learn's digits (1,437 for training, 360 for testing), a small ResNet
of 5,122 parameters, momentum SGD at a constant rate, 20 epochs of 22 updates for every policy, 5 seeds of parameters, batches
and draws together. Batch norm is in evaluation mode, with running statistics of the training batches only. The baseline is
`in_order`, plain training on the same batches; `random` is the control, equally many batches drawn at random.
Seconds were measured while other programs shared the 2 cores: read them only roughly.

Command: `python -m experiments.hard_batches_digits`""",
        comparisons=[
            Paired(
                "Every policy against plain training on the same batches (bold: the interval excludes 0).",
                settings=("policy", "delta"),
                baseline={"policy": "in_order", "delta": 0.5},
                metric="accuracy",
                better="high",
            ),
            *(
                Paired(
                    f"Hard batches against the control, as many random ones, at delta = {delta}.",
                    settings=("policy", "delta"),
                    baseline={"policy": "random", "delta": delta},
                    where={"policy": ["random", "hard"], "delta": delta},
                    metric="accuracy",
                    better="high",
                )
                for delta in (0.2, 0.5)
            ),
        ],
        figures=[
            Curves(
                "curves",
                "Validation accuracy by update, delta = 0.5: median and range over seeds.",
                x="step",
                y="accuracy",
                line=("policy",),
                where={"delta": 0.5, "set": "validation"},
            )
        ],
        notes=["The column delta says nothing for in_order and shuffled, which take every batch."],
    )


def main() -> int:
    """Two halves, the losses that RHO-loss needs, the sweep, the page: each step continues where it stopped."""
    from deltajax import report, score, sweep, train

    config, results = "experiments/hard_batches_digits.py", "docs/results/hard_batches_digits.csv"
    halves = {half: TABLE.parent / f"half_{half}" for half in ("even", "odd")}
    steps = [
        *((train.main, [f"--config={config}:policy=shuffled,half={h}", f"--workdir={w}"]) for h, w in halves.items()),
        (score.main, [*(f"--workdir={w}" for w in halves.values()), f"--output={TABLE}"]),
        (sweep.main, [f"--config={config}", f"--workdir={TABLE.parent / 'sweep'}", f"--csv={results}"]),
        (report.main, []),
    ]
    return next((code for command, flags in steps if (code := command(["", *flags]))), 0)


if __name__ == "__main__":
    sys.exit(main())
