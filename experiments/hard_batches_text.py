"""Learning from hard batches with documents: a byte-level Gated DeltaNet on a part of the standard library.

Claim examined: what arXiv 2304.03486 says of images, the hardest batches teach more per update, holds for text.
Command: python -m deltajax.sweep --config=experiments/hard_batches_text.py --csv=docs/results/hard_batches_text.csv
"""

import sysconfig
from typing import Any, Literal

from deltajax import data, hard_batches
from deltajax.layers import delta as delta_mixer
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Sampling, Schedule, TrainConfig
from deltajax.training.paired import Paired
from deltajax.training.reports import Curves, Report

FOLDERS = ("json", "wsgiref")
STEPS = 300

Policy = Literal["shuffled", "in_order", "hard", "easy", "random", "selective_backprop", "info_batch"]


def selection(policy: Policy, delta: float, seed: int) -> Any:
    """The policy of this name. Batches have one composition for each seed, the same for all policies."""
    return {
        "shuffled": lambda: hard_batches.Shuffled(),
        "in_order": lambda: hard_batches.InOrder("seeded"),
        "hard": lambda: hard_batches.HardBatches("seeded", delta),
        "easy": lambda: hard_batches.EasyBatches("seeded", delta),
        "random": lambda: hard_batches.RandomBatches("seeded", delta, seed),
        "selective_backprop": lambda: hard_batches.SelectiveBackprop(seed, beta=1 / delta - 1),
        "info_batch": lambda: hard_batches.InfoBatch(seed, ratio=1 - delta),
    }[policy]()


def get_config(policy: Policy = "hard", delta: float = 0.5, seed: int = 0) -> TrainConfig:
    """Two layers on 95 batches of text; `seed` is of the parameters, the batches and the draws."""
    library = sysconfig.get_path("stdlib")
    return TrainConfig(
        model=lm.Config(
            vocab_size=257,
            d_model=64,
            pattern=("delta", "delta"),
            mixers={"delta": delta_mixer.gated_deltanet(num_heads=2, head_dim=32)},
            mlp_dim=128,
        ),
        data=data.Config(
            corpus=",".join(f"{library}/{folder}/*.py" for folder in FOLDERS),
            seq_len=128,
            batch_size=8,
            seed=seed,
            validation_fraction=0.15,
            selection=selection(policy, delta, seed),
        ),
        steps=STEPS,
        seed=seed,
        optimizer=Optimizer(learning_rate=5e-3),
        schedule=Schedule(decay="constant", warmup_steps=20),
        checkpoint=Checkpoint(every=STEPS),
        evaluation=Evaluation(every=15),
        log_every=15,
        sampling=Sampling(max_tokens=1),
    )


def get_grid(seeds: int = 5) -> list[dict[str, list]]:
    """Every policy at delta = 0.5, the paper's and the control also at 0.2."""
    each = list(range(seeds))
    return [
        {"policy": ["in_order", "hard", "random", "easy"], "delta": [0.5], "seed": each},
        {"policy": ["hard", "random"], "delta": [0.2], "seed": each},
        {"policy": ["shuffled", "selective_backprop", "info_batch"], "delta": [0.5], "seed": each},
    ]


def get_report() -> Report:
    """Differences to plain training, paired by seed, and the curves."""
    return Report(
        title="Learning from hard batches: documents",
        text="""The same policies for a byte-level Gated DeltaNet of two layers on a part of the standard library: 767 windows
of 128 bytes, 95 batches of 8, 300 updates for every policy, 5 seeds. Loss in nats per byte. The baseline is `in_order`, `random`
the control. RHO-loss was not run on text. Seconds are those of one core of a shared machine.

Command: `python -m deltajax.sweep --config=experiments/hard_batches_text.py --csv=docs/results/hard_batches_text.csv`""",
        comparisons=[
            Paired(
                "Every policy against plain training on the same batches (bold: the interval excludes 0).",
                settings=("policy", "delta"),
                baseline={"policy": "in_order", "delta": 0.5},
                metric="loss",
                better="low",
            ),
            *(
                Paired(
                    f"Hard batches against the control, as many random ones, at delta = {delta}.",
                    settings=("policy", "delta"),
                    baseline={"policy": "random", "delta": delta},
                    where={"policy": ["random", "hard"], "delta": delta},
                    metric="loss",
                    better="low",
                )
                for delta in (0.2, 0.5)
            ),
        ],
        figures=[
            Curves(
                "curves",
                "Validation loss by update, delta = 0.5: median and range over seeds.",
                x="step",
                y="loss",
                line=("policy",),
                where={"delta": 0.5, "set": "validation"},
            )
        ],
        notes=["The column delta says nothing for in_order and shuffled, which take every batch."],
    )
