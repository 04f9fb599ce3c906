"""Moving digits whose class is the motion: a small ResNet over frames, the baseline of `delta_motion.py` (arXiv 2107.07305).

    python -m deltajax.sweep --config=experiments/motion.py --csv=docs/results/motion.csv

Under a minute for each of the 6 runs on 2 idle cores.
"""

from deltajax.data import moving_digits
from deltajax.models import frames, resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

STEPS = 200


def get_config(seed: int = 0, flicker: float = 0.0) -> TrainConfig:
    """A network of 3 stages on frames of 32 x 32 pixels, two successive pictures each; `flicker`: noise of a camera."""
    data = moving_digits.Config(seed=seed, flicker=flicker)
    return TrainConfig(
        model=frames.Config(
            network=resnet.resnet_small(widths=(8, 16, 32), in_channels=data.stack, num_classes=6),
            frame_size=(data.size, data.size),
        ),
        data=data,
        steps=STEPS,
        seed=seed,
        optimizer=Optimizer(learning_rate=5e-3, weight_decay=1e-2),
        schedule=Schedule(warmup_steps=20),
        checkpoint=Checkpoint(every=STEPS),
        evaluation=Evaluation(every=STEPS),
        log_every=50,
    )


def get_grid() -> dict[str, list]:
    """Three seeds, without and with a camera's noise."""
    return {"flicker": [0.0, 0.03], "seed": [0, 1, 2]}
