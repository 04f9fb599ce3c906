"""The smallest run that has everything: an experiment file, for `--config` and for import."""

import os

from deltajax import data
from deltajax.layers import attention, delta
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Sampling, Schedule, TrainConfig


def get_config() -> TrainConfig:
    """12 steps; checkpoints at 3, 6, 9, 12 and where the validation loss, measured every 4 steps, is the best so far."""
    return TrainConfig(
        model=lm.Config(
            vocab_size=264,
            d_model=32,
            pattern=("delta", "swa"),
            mixers={
                "delta": delta.gated_deltanet(num_heads=2, head_dim=16),
                "swa": attention.Config(num_heads=2, head_dim=16, window=8),
            },
            mlp_dim=64,
        ),
        data=data.Config(corpus=os.environ["TINY_CORPUS"], seq_len=32, batch_size=8, validation_fraction=0.3),
        steps=12,
        optimizer=Optimizer(name="muon", learning_rate=1e-2),
        schedule=Schedule(warmup_steps=2),
        checkpoint=Checkpoint(every=3),
        evaluation=Evaluation(every=4, batches=2),
        log_every=1,
        prompt="def ",
        sampling=Sampling(max_tokens=8),
    )
