"""Learning from hard batches with documents: a byte-level Gated DeltaNet on a part of the standard library.

Claim examined: what arXiv 2304.03486 says of images, the hardest batches teach more per update, holds for text.
Command: python -m experiments.hard_batches_text (irreducible losses, sweep, RESULTS.md)
Time: 14 to 23 seconds of training a run, on one core of a shared machine.
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
    "Plainly: what the paper claims of images does not show on text. No policy and no delta is better than plain training by "
    "more than its interval, in the last loss, the best loss or the updates.",
    "At delta = 0.2 hard batches end below as many random ones, beyond the interval only in the best loss; at 0.5 not.",
    "Plain training in a fixed order has a lower best loss than with a new shuffle each epoch; why was not looked into.",
    "Not run: delta = 0.8 and 1, and random batches at 0.1 and 0.8. Seconds of rho_loss and of delta = 0.1 were measured while "
    "more programs shared the machine: they do not compare with the others.",
    "300 updates are three passes over the text: after the first one only 205 updates were chosen by loss.",
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
the control. Seconds are those of one core of a shared machine.""",
        "loss",
        "low",
        NOTES,
    )


if __name__ == "__main__":
    sys.exit(common.run(NAME))
