"""Refinement with delta activations: accuracy against operation sparsity on moving digits (arXiv 2107.07305).

First the baselines, then this grid, then the page:

    python -m deltajax.sweep --config=experiments/motion.py --csv=docs/results/motion.csv &&
    python -m deltajax.sweep --config=experiments/delta_motion.py --csv=docs/results/delta_motion.csv && python -m deltajax.report
"""

import dataclasses
from typing import Literal

from deltajax.layers import delta_activation
from deltajax.models.frames import Penalty
from deltajax.ops.delta_activation import StepGradient
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig
from experiments import motion

STEPS = 160


def get_config(
    seed: int = 0,
    penalty: Penalty | Literal["none"] = "temporal",
    rate: float = 1e-2,
    step_gradient: StepGradient = "raise",
    baselines: str = "runs/motion",
) -> TrainConfig:
    """Goes on from the baseline of the same seed.

    "none" is the baseline trained as much longer as the others; "spatial" is the paper's rival: an L1 penalty on the
    activations, no delta activations.
    """
    base = motion.get_config(seed)
    delta = None if penalty in ("none", "spatial") else delta_activation.Config(step_gradient=step_gradient)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            delta=delta,
            rate=0.0 if penalty == "none" else rate,
            penalty="temporal" if penalty == "none" else penalty,
        ),
        steps=STEPS,
        init_from=f"{baselines}/seed={seed}",
        optimizer=Optimizer(learning_rate=5e-3, weight_decay=1e-2),
        schedule=Schedule(warmup_steps=10),
        checkpoint=Checkpoint(every=STEPS),
        evaluation=Evaluation(every=STEPS),
    )


def get_grid() -> list[dict[str, list]]:
    """Three seeds of each; three rates of the paper's penalty."""
    seeds = [0, 1, 2]
    return [
        {"penalty": ["none"], "rate": [0.0], "step_gradient": ["raise"], "seed": seeds},
        {"penalty": ["temporal"], "rate": [1e-3, 1e-2, 3e-2], "step_gradient": ["raise"], "seed": seeds},
        {"penalty": ["spatial"], "rate": [1e-2], "step_gradient": ["raise"], "seed": seeds},
        {"penalty": ["tile"], "rate": [1e-2], "step_gradient": ["raise"], "seed": seeds},
        {"penalty": ["temporal"], "rate": [1e-2], "step_gradient": ["lsq"], "seed": seeds},
    ]
