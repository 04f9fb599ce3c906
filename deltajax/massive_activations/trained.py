"""A run's trained model, ready to be looked into."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from deltajax import data
from deltajax.layers.param import abstract_params
from deltajax.models import registry
from deltajax.training import serialize
from deltajax.training.checkpoint import Checkpoints, abstract_like
from deltajax.training.config import TrainConfig

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The last checkpoint of a run.

    Attributes:
      name: of its folder.
      config: the run's.
      step: updates that the parameters have seen.
      params: the model's parameters.
      sums: (params, batch) -> the model's sums, "loss" and "weight" among them, in evaluation mode.
      batches: of the validation data.
    """

    name: str
    config: TrainConfig
    step: int
    params: Any
    sums: Callable[[Any, Any], dict[str, Array]]
    batches: Sequence[Batch]


def load(workdir: str | Path, num_batches: int = 10) -> Trained:
    """The last checkpoint of a run, on one device.

    Raises:
      RunError: there is none, or it cannot be read.
      ValueError: its model keeps running statistics (batch norm), which no residual stream of tokens has.
    """
    checkpoints = Checkpoints(Path(workdir), read_only=True)
    step = checkpoints.steps()[-1]
    config = serialize.from_json(checkpoints.progress(step)["config"])
    module = registry.module_of(config.model)
    stats = module.init_stats(config.model)
    if stats:
        raise ValueError(
            f"--workdir={workdir}: {type(config.model).__name__} of {module.__name__} has no residual stream"
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoints.restore_params(step, abstract_like(abstract_params(module.param_specs(config.model)), device))

    def sums(params: Any, batch: Any) -> dict[str, Array]:
        return module.loss_sums(params, stats, config.model, batch, key=None, train=False)[0]

    batches = list(data.load(config.data).validation_batches(num_batches))
    return Trained(Path(workdir).resolve().name, config, step, params, sums, batches)
