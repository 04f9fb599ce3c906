"""UCF101 with delta activations as in the paper's section on video (arXiv 2107.07305): a baseline, then its refinement.

With ImageNet weights of torchvision's or timm's ResNet-50 in WEIGHTS.safetensors, and the official folder and split files:

    F=folder=UCF-101,splits=ucfTrainTestlist
    T="python -m deltajax.train"
    $T --workdir=runs/head --config=experiments/ucf101.py:$F,start=WEIGHTS.safetensors &&
    $T --workdir=runs/conv5 --config=experiments/ucf101.py:$F,phase=conv5,start=runs/head &&
    $T --workdir=runs/delta --config=experiments/ucf101.py:$F,phase=delta,start=runs/conv5 &&
    $T --workdir=runs/delta_short --config=experiments/ucf101.py:$F,phase=delta_short,start=runs/delta

The paper: accuracy 73 % at an operation sparsity of 49.1 % without delta activations, 67.6 % at 93.1 % with them. Not run by
us: it needs an accelerator. `size=small` is the same on a network and frames for 2 CPU cores, and what the tests run.

From the paper are the order (head, then conv5, then everything with delta activations, then shorter clips), SGD with 1e-3
and 0.9, the rates of the penalty, the clips, and steps that begin at 3 to 4. Which stage begins where, how long each phase
is and how the input is scaled are not known to us: our choice is below.
"""

import dataclasses
from typing import Literal

from deltajax.data import ucf101
from deltajax.layers import delta_activation
from deltajax.models import frames, resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

TRAINING_VIDEOS = 9537  # of split 1
EPOCHS = 5  # of each phase
HEAD, CONV5 = "network.head", "network.stages.3"
# Frames have a deviation of about 1: three of 255 levels are 0.05.
STEPS = (("input", 0.05), ("stem", 3.0), ("stages.0", 3.0), ("stages.1", 3.0), ("stages.2", 4.0), ("stages.3", 4.0))


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is trained, from the paper; `trainable` (): everything; `rate` 0: without delta activations."""

    trainable: tuple[str, ...] = ()
    rate: float = 0.0
    clip: int = 8


PHASES = {
    "head": Phase((HEAD,)),
    "conv5": Phase((HEAD, CONV5)),
    "delta": Phase(rate=1e-4),
    "delta_short": Phase(rate=1e-6, clip=2),
}


def get_config(
    folder: str = "UCF-101",
    splits: str = "ucfTrainTestlist",
    phase: Literal["head", "conv5", "delta", "delta_short"] = "head",
    start: str = "",
    size: Literal["paper", "small"] = "paper",
    rate: float | None = None,
    clip: int | None = None,
    classes: int = 101,
) -> TrainConfig:
    """One phase.

    Args:
      folder, splits: of videos, of the official lists.
      phase: see `PHASES`.
      start: the weights' file, or the folder of the phase before.
      size: "small": for 2 CPU cores.
      rate, clip: of the penalty, frames; others than the phase's.
      classes: of `splits`.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    own, paper = PHASES[phase], size == "paper"
    if own.trainable and not start:
        raise ValueError(
            f"phase {phase} trains {' and '.join(own.trainable)} only: it needs start=, weights for the rest"
        )
    pixels = 224 if paper else 32
    data = ucf101.Config(
        folder,
        splits,
        frames=own.clip if clip is None else clip,
        resize=256 if paper else 36,
        size=pixels,
        batch_size=8 if paper else 2,
    )
    if paper:
        network = resnet.resnet50(num_classes=classes, head_hidden=1024, dropout=0.5, dtype="bfloat16")
    else:
        network = resnet.resnet_small(blocks=(1, 1), widths=(4, 8), num_classes=classes, head_hidden=8, dropout=0.5)
    trainable = own.trainable if paper else tuple(x.replace(CONV5, "network.stages.1") for x in own.trainable)
    with_delta = own.rate > 0
    model = frames.Config(
        network,
        (pixels, pixels),
        delta_activation.Config() if with_delta else None,
        rate=own.rate if rate is None else rate,
        init_steps=STEPS if with_delta and paper else (),
    )
    steps = EPOCHS * TRAINING_VIDEOS // data.batch_size if paper else 4
    return TrainConfig(
        model=model,
        data=data,
        steps=steps,
        init_from=start,
        optimizer=Optimizer(
            name="sgd",
            learning_rate=1e-3 if with_delta else 1e-2,
            momentum=0.9,
            weight_decay=1e-4,
            trainable=trainable,
        ),
        schedule=Schedule(warmup_steps=steps // 20),
        checkpoint=Checkpoint(every=max(1, steps // 10)),
        evaluation=Evaluation(every=max(1, steps // 10)),
        log_every=50 if paper else 1,
    )
