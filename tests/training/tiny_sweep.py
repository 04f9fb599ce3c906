"""The smallest sweep: an experiment file with arguments, a grid, and evaluation at another length."""

from deltajax.data import word_problem
from deltajax.layers import attention
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, NonFinite, Optimizer, Schedule, TrainConfig


def get_config(group: str = "S3", learning_rate: float = 1e-2) -> TrainConfig:
    """4 steps; a learning rate of 1e30 ends in numbers that are not finite."""
    data = word_problem.Config(
        group=group, seq_len=6, batch_size=4, validation_examples=6, lengths=(11,), evaluation_examples=10
    )
    return TrainConfig(
        model=lm.Config(
            vocab_size=30, d_model=8, pattern=("a",), mixers={"a": attention.Config(num_heads=1, head_dim=4)}, mlp_dim=8
        ),
        data=data,
        steps=4,
        optimizer=Optimizer(learning_rate=learning_rate),
        schedule=Schedule(warmup_steps=0),
        checkpoint=Checkpoint(every=4),
        evaluation=Evaluation(every=2),
        nonfinite=NonFinite(max_consecutive=0),
    )


def get_grid(rates: int = 2) -> list[dict[str, list]]:
    """One group with every rate, another with the first."""
    learning_rates = [1e-2, 1e30][:rates]
    return [
        {"group": ["S3"], "learning_rate": learning_rates},
        {"group": ["(0 1), (0 1 2 3)"], "config.seed": [1]},
    ]
