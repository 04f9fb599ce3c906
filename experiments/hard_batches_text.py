"""Learning from hard batches with documents: a byte-level Gated DeltaNet on a part of the standard library.

Claim examined: what arXiv 2304.03486 says of images, the hardest batches teach more per update, holds for text.
Command: python -m experiments.hard_batches_text (irreducible losses, sweep, RESULTS.md)
Time: 100 minutes on one core of an overloaded machine; 14 to 23 seconds of training a run where the core is free.
Result: not shown, see RESULTS.md.
"""

import sys
import sysconfig

from deltajax import data
from deltajax.layers import delta as delta_mixer
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Sampling, Schedule, TrainConfig
from deltajax.training.reports import Report
from experiments import hard_batches_common as common

NAME = "hard_batches_text"
FOLDERS = ("json", "wsgiref")
STEPS = 300
NOTES = (
    "Plainly: what the paper claims of images does not show on text. No policy and no delta has a last or a best loss below "
    "that of plain training by more than its interval.",
    "Of the updates to reach the best of plain training one change is beyond its interval: 15 updates, one evaluation, at delta "
    "= 0.5. Of 14 settings chance would bring about as much; and where plain training is at its best at the "
    "end, a run that reaches it can only be as late or earlier.",
    "Choosing by loss is worth more than choosing at random where few batches are chosen: at delta = 0.1 hard batches end "
    "0.04 nats below as many random ones, beyond the interval; at 0.2, 0.5 and 0.8 not.",
    "Seconds do not compare: 2 to 16 programs shared the 2 cores while the runs were made.",
    "300 updates are 3.2 passes over the text: after the first one only 205 updates were chosen by loss.",
)


def get_config(
    policy: common.Policy = "hard", delta: float = 0.5, seed: int = 0, half: common.Half = "all"
) -> TrainConfig:
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
            half=half,
            selection=common.selection(policy, delta, seed, NAME),
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
    """All policies, and all deltas of the paper's."""
    return common.grid(seeds)


def get_report() -> Report:
    """See `common.report`."""
    return common.report(
        NAME,
        "documents",
        """The same policies for a byte-level Gated DeltaNet of two layers on a part of the standard library: 767 windows
of 128 bytes, 95 batches of 8, 300 updates for every policy, 5 seeds. Loss in nats per byte. The baseline is `in_order`, `random`
the control.""",
        "loss",
        "low",
        NOTES,
    )


if __name__ == "__main__":
    sys.exit(common.run(NAME))
