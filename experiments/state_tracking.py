"""State tracking: R Householder steps per token, accuracy against length (DeltaProduct, arXiv 2502.10297, section 5.1)."""

from typing import Literal

from deltajax.data import word_problem
from deltajax.layers import delta
from deltajax.models import lm
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

STEPS = {"S3": 1000, "S4": 400, "A5": 400, "S5": 400}


def get_config(
    size: Literal["paper", "small"] = "small",
    group: Literal["S3", "S4", "A5", "S5"] = "S3",
    householder: int = 2,
    beta_max: float = 2.0,
) -> TrainConfig:
    """One layer without convolution or gate on the word problem of a group; accuracy at all lengths to 8 times the training."""
    mixer = delta.Config(
        num_heads={"paper": 12 if group == "S5" else 8, "small": 8}[size],
        head_dim={"paper": 32, "small": 16}[size],
        num_householder=householder,
        beta_max=beta_max,
        conv_width=0,
    )
    seq_len = {"paper": 128, "small": 32}[size]
    letters: Literal["elements", "generators"] = "elements" if size == "paper" or group == "S3" else "generators"
    examples, batch_size = {"paper": (2_000_000 if group == "S5" else 100_000, 2048), "small": (None, 64)}[size]
    steps = {"paper": 100 * (examples or 0) // batch_size, "small": STEPS[group]}[size]
    data = word_problem.Config(
        group={"paper": group, "small": GENERATORS.get(group, group)}[size],
        letters=letters,
        seq_len=seq_len,
        batch_size=batch_size,
        train_examples=examples,
        validation_examples=256,
        lengths=(8 * seq_len,),
        evaluation_examples=256,
    )
    return TrainConfig(
        model=lm.Config(
            vocab_size=data.vocab_size,
            d_model={"paper": 128, "small": 64}[size],
            pattern=("mixer",),
            mixers={"mixer": mixer},
            mlp_dim={"paper": None, "small": 64}[size],
            tie_embeddings=False,
        ),
        data=data,
        steps=steps,
        optimizer={
            "paper": Optimizer(learning_rate=1e-3, weight_decay=1e-6),
            "small": Optimizer(name="muon", learning_rate=1e-2, weight_decay=0),
        }[size],
        schedule=Schedule(warmup_steps=50, final_fraction=0.02),
        checkpoint=Checkpoint(every=steps),
        evaluation=Evaluation(every=200),
        log_every=50,
    )


# Two letters each: a transposition and a cycle of all points; a cycle and a double transposition for the even ones.
GENERATORS = {"S4": "(0 1), (0 1 2 3)", "A5": "(0 1)(2 3), (0 1 2 3 4)", "S5": "(0 1), (0 1 2 3 4)"}


def get_grid(size: Literal["paper", "small"] = "small") -> list[dict[str, list]]:
    """S3, where one step fails and two suffice; S5 by the number of steps; then the groups in between, and beta in (0, 1)."""
    seeds = [0, 1, 2]
    return [
        {"group": ["S3"], "householder": [2, 1], "beta_max": [2.0], "config.seed": seeds},
        {"group": ["S5"], "householder": [4, 3, 2, 1], "beta_max": [2.0], "config.seed": seeds},
        {"group": ["A5", "S4"], "householder": [2, 1], "beta_max": [2.0], "config.seed": seeds},
        {"group": ["S3", "A5"], "householder": [2], "beta_max": [1.0], "config.seed": seeds},
        {"group": ["S5"], "householder": [4], "beta_max": [1.0], "config.seed": seeds},
        {"group": ["A5", "S4"], "householder": [3, 4], "beta_max": [2.0], "config.seed": seeds},
        {"group": ["S3"], "householder": [3, 4], "beta_max": [2.0], "config.seed": seeds},
    ]
