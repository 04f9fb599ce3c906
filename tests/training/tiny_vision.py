"""The smallest run on images: `tiny.py` for the digits."""

from deltajax.data import vision
from deltajax.hard_batches import HardBatches
from deltajax.models import resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig


def get_config() -> TrainConfig:
    """12 steps on 5 batches: a first pass, then rounds of 2."""
    return TrainConfig(
        model=resnet.resnet_small(in_channels=1, widths=(4,), blocks=(1,)),
        data=vision.Config(batch_size=256, selection=HardBatches(delta=0.4)),
        steps=12,
        optimizer=Optimizer(name="sgd", learning_rate=0.05, clip_norm=None),
        schedule=Schedule(decay="constant", warmup_steps=0),
        checkpoint=Checkpoint(every=4),
        evaluation=Evaluation(every=12),
        log_every=1,
    )
