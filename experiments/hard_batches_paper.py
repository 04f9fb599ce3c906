"""The recipes of learning from hard batches (arXiv 2304.03486): five networks on CIFAR-10, CIFAR-100 and STL-10.

Claim of the paper: ResNet-18 gains 7.26 points of top-1 accuracy on CIFAR-100, EfficientNet-B4 generalises on STL-10 in 26.47 %
fewer epochs.
Command: python -m deltajax.train --config=experiments/hard_batches_paper.py:dataset=cifar100,network=resnet18,folder=DATA
with the official archive in the folder DATA; delta=1 is the paper's baseline, data.selection=random_batches the control.
Time and result: not run at scale. CI trains the recipe of every data set on tiny archives of the same format.
"""

from collections.abc import Callable
from typing import Any, Literal

from deltajax.data import vision
from deltajax.hard_batches import HardBatches
from deltajax.models import efficientnet, mobilenet, resnet
from deltajax.training.config import Checkpoint, Evaluation, Optimizer, Schedule, TrainConfig

Dataset = Literal["cifar10", "cifar100", "stl10"]
Network = Literal["resnet18", "resnet50", "efficientnet_b4", "efficientnet_v2_s", "mobilenet_v3_small"]

NETWORKS: dict[str, Callable[..., Any]] = {
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
    "efficientnet_b4": efficientnet.b4,
    "efficientnet_v2_s": efficientnet.v2_s,
    "mobilenet_v3_small": mobilenet.v3_small,
}
TRAIN_EXAMPLES = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 5_000}


def get_config(
    dataset: Dataset = "cifar10",
    network: Network = "resnet18",
    delta: float = 0.5,
    batch_size: int = 512,
    epochs: int = 100,
    seed: int = 0,
    folder: str = "data",
) -> TrainConfig:
    """Momentum SGD at 0.005, images of 128 pixels, E N updates whatever delta is; one evaluation per epoch."""
    data = vision.Config(
        name=dataset,
        folder=folder,
        image_size=128,
        batch_size=batch_size,
        seed=seed,
        selection=HardBatches(delta=delta),
    )
    batches = max(TRAIN_EXAMPLES[dataset] // batch_size, 1)  # N; of a batch that is too large the loader complains
    return TrainConfig(
        model=NETWORKS[network](num_classes=data.num_classes),
        data=data,
        steps=epochs * batches,
        seed=seed,
        optimizer=Optimizer(name="sgd", learning_rate=0.005, momentum=0.9, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(decay="constant", warmup_steps=0),
        checkpoint=Checkpoint(every=batches),
        evaluation=Evaluation(every=batches),
    )


def get_grid(seeds: int = 5) -> dict[str, list]:
    """Every network with the paper's deltas; `--config=...:dataset=stl10` says on what."""
    return {"network": list(NETWORKS), "delta": [0.2, 0.5, 0.8, 1.0], "seed": list(range(seeds))}
