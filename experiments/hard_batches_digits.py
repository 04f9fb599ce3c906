"""Learning from hard batches (arXiv 2304.03486) against its control and its rivals: a small ResNet on scikit-learn's digits.

Claim of the paper: training on the hardest share delta of the batches generalises in fewer epochs and better.
Command: python -m experiments.hard_batches_digits (irreducible losses, sweep, RESULTS.md)
Time: 8 minutes on one core of a shared machine.
Result: not shown, see RESULTS.md.
"""

import sys

from deltajax.data import vision
from deltajax.models import resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig
from deltajax.training.reports import Report
from experiments import hard_batches_common as common

NAME = "hard_batches_digits"
EPOCHS = 20
BATCH = 64
NOTES = (
    "Plainly: neither claim of the paper shows on the digits. At the last update no policy and no delta is better than plain "
    "training by more than its interval, none reaches the best of plain training in fewer updates, and the smallest delta "
    "needs more. That one best accuracy stands out (delta = 0.5) is what chance would bring, and a best is chosen on the test "
    "images, so it is no result by itself.",
    "Nor does choosing by loss do consistently better than choosing at random: of four deltas one.",
    "What is smaller than the intervals, which reach up to 5 of the 360 test images to each side, may still be there.",
    "The authors' images, networks and 100 epochs were not run; `experiments/hard_batches_paper.py` has the recipes.",
)
BATCHES = (1797 - vision.DIGITS_TEST) // BATCH  # N: an epoch is N updates for every policy


def get_config(
    policy: common.Policy = "hard", delta: float = 0.5, seed: int = 0, half: common.Half = "all"
) -> TrainConfig:
    """`EPOCHS` N updates, a constant rate as in the authors' code; `seed` is of the parameters, the batches and the draws."""
    steps = EPOCHS * BATCHES
    return TrainConfig(
        model=resnet.resnet_small(in_channels=1, blocks=(1, 1), widths=(8, 16)),
        data=vision.Config(
            batch_size=BATCH, seed=seed, half=half, selection=common.selection(policy, delta, seed, NAME)
        ),
        steps=steps,
        seed=seed,
        optimizer=Optimizer(name="sgd", learning_rate=0.02, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(decay="constant", warmup_steps=0),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=BATCHES // 2),
        log_every=BATCHES // 2,
    )


def get_grid(seeds: int = 5) -> list[dict[str, list]]:
    """All policies, and all deltas of the paper's."""
    return common.grid(seeds)


def get_report() -> Report:
    """See `common.report`."""
    return common.report(
        NAME,
        "digits",
        """arXiv 2304.03486 trains on the share delta of the batches with the highest recorded losses and reports fewer
epochs to generalise and better accuracy. Here: scikit-learn's digits (1,437 for training, 360 for testing), a small ResNet
of 5,122 parameters, momentum SGD at a constant rate, 20 epochs of 22 updates for every policy, 5 seeds of parameters, batches
and draws together. Batch norm is in evaluation mode, with running statistics of the training batches only. The baseline is
`in_order`, plain training on the same batches; `random` is the control, equally many batches drawn at random.
Seconds were measured while other programs shared the 2 cores: read them only roughly.""",
        "accuracy",
        "high",
        NOTES,
    )


if __name__ == "__main__":
    sys.exit(common.run(NAME))
