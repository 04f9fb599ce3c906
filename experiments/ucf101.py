"""UCF101 with delta activations as in the paper's section on video (arXiv 2107.07305): a baseline, then its refinement.

With ImageNet weights of torchvision's or timm's ResNet-50 in WEIGHTS.safetensors, and the official folder and split files:

    python -m deltajax.train --config=experiments/ucf101.py:folder=UCF-101,splits=ucfTrainTestlist,weights=WEIGHTS.safetensors
    python -m deltajax.train --config=experiments/ucf101.py:folder=UCF-101,splits=ucfTrainTestlist,baseline=runs/ucf101

The paper: accuracy 73 % at an operation sparsity of 49.1 % without delta activations, 67.6 % at 93.1 % with them. Not run by
us: it needs an accelerator. `size=small` is the same on a network and frames for 2 CPU cores, and what the tests run.
"""

from typing import Literal

from deltajax.data import ucf101
from deltajax.layers import delta_activation
from deltajax.models import frames, resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

TRAINING_VIDEOS = 9537  # of split 1


def get_config(
    folder: str = "UCF-101",
    splits: str = "ucfTrainTestlist",
    size: Literal["paper", "small"] = "paper",
    weights: str = "",
    baseline: str = "",
    rate: float = 1e-4,
    clip: int = 8,
    classes: int = 101,
) -> TrainConfig:
    """The baseline, or with the folder of one its refinement; the paper goes on with `rate=1e-6` and `clip=2`."""
    pixels = {"paper": 224, "small": 32}[size]
    data = ucf101.Config(
        folder,
        splits,
        frames=clip,
        resize={"paper": 256, "small": 36}[size],
        size=pixels,
        batch_size=8 if size == "paper" else 2,
    )
    network = {
        "paper": resnet.resnet50(num_classes=classes, head_hidden=1024, dropout=0.5, dtype="bfloat16"),
        "small": resnet.resnet_small(blocks=(1, 1), widths=(4, 8), num_classes=classes, head_hidden=8, dropout=0.5),
    }[size]
    delta = delta_activation.Config(init_step=3.0 if size == "paper" else 0.1) if baseline else None
    steps = {"paper": 10 * TRAINING_VIDEOS // data.batch_size, "small": 4}[size]
    return TrainConfig(
        model=frames.Config(network, (pixels, pixels), delta, rate=rate if baseline else 0.0),
        data=data,
        steps=steps,
        init_from=baseline or weights,
        optimizer=Optimizer(name="sgd", learning_rate=1e-3 if baseline else 1e-2, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(warmup_steps=steps // 20),
        checkpoint=Checkpoint(every=max(1, steps // 10)),
        evaluation=Evaluation(every=max(1, steps // 10)),
        log_every=1 if size == "small" else 50,
    )
