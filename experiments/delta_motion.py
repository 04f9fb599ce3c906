"""Refinement with delta activations: accuracy against operation sparsity on moving digits (arXiv 2107.07305).

First the baselines, then this grid, then the page:

    python -m deltajax.sweep --config=experiments/motion.py --csv=docs/results/motion.csv &&
    python -m deltajax.sweep --config=experiments/delta_motion.py --csv=docs/results/delta_motion.csv && python -m deltajax.report
"""

import dataclasses
from typing import Literal

from deltajax.layers import delta_activation
from deltajax.ops.delta_activation import StepGradient
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig
from experiments import motion

STEPS = 400


def get_config(
    seed: int = 0,
    penalty: Literal["temporal", "tile", "spatial"] = "temporal",
    rate: float = 1e-5,
    step_gradient: StepGradient = "raise",
    baselines: str = "runs/motion",
) -> TrainConfig:
    """Goes on from the baseline of the same seed. "spatial" is the paper's rival: an L1 penalty, no delta activations."""
    base = motion.get_config(seed)
    delta = None if penalty == "spatial" else delta_activation.Config(step_gradient=step_gradient)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, delta=delta, rate=rate, penalty=penalty),
        steps=STEPS,
        init_from=f"{baselines}/seed={seed}",
        optimizer=Optimizer(learning_rate=2e-3, weight_decay=1e-2),
        schedule=Schedule(warmup_steps=20),
        checkpoint=Checkpoint(every=STEPS),
        evaluation=Evaluation(every=200),
    )
