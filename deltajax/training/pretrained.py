"""What was trained before: the model in a run's checkpoints or in a file of weights, to be used or to begin from."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from deltajax.errors import RunError
from deltajax.interop import vision
from deltajax.layers.param import abstract_params
from deltajax.models import frames, registry
from deltajax.training import checksums, distributed
from deltajax.training import mesh as mesh_lib
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import TrainConfig
from deltajax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A run's model as one of its checkpoints has it.

    Attributes:
      config: the run's.
      step: batches that the run had consumed.
      params, stats: the model's parameters and running statistics.
      progress: what else the checkpoint holds, see `Checkpoints.save`.
    """

    config: TrainConfig
    step: int
    params: Any
    stats: Any
    progress: dict


def load(
    workdir: str | Path, checkpoint: Literal["latest", "best"] = "latest", mesh: jax.sharding.Mesh | None = None
) -> Pretrained:
    """The model of a run, which is left as it is. If its latest checkpoint cannot be read, the one before, with a warning.

    Args:
      workdir: of the run.
      checkpoint: "best": that of the lowest validation loss.
      mesh: its devices hold the arrays as in training; None: one device holds them.

    Raises:
      RunError: there is no checkpoint, or none can be read.
      ValueError: its config is of another version of deltajax; the message names file and field.
    """
    with contextlib.closing(Checkpoints(Path(workdir), read_only=True)) as checkpoints:
        steps = distributed.on_first(
            lambda: [checkpoints.best_step()] if checkpoint == "best" else checkpoints.steps()[::-1]
        )
        for step in steps:
            found, problem = None, None
            sums: dict[str, checksums.Sums] = {}
            try:
                found, sums = _read(checkpoints, step, mesh)
            except RunError as error:
                problem = str(error)
            problem = distributed.first_problem(problem)
            if found is not None and not problem:
                try:
                    checkpoints.check_model(step, found.progress, found.params, found.stats, sums)
                except RunError as error:
                    problem = str(error)
            if found is not None and not problem:
                return found
            if step == steps[-1]:
                raise RunError(problem)
            if distributed.is_first():
                print(f"warning: {problem}; trying the one before it", file=sys.stderr)
    raise AssertionError  # there is a step, or opening has failed


def _read(
    checkpoints: Checkpoints, step: int, mesh: jax.sharding.Mesh | None
) -> tuple[Pretrained, dict[str, checksums.Sums]]:
    progress = checkpoints.progress(step)
    config = progress["config"]
    module = registry.module_of(config.model)
    specs = module.param_specs(config.model)
    params, stats = abstract_params(specs), jax.eval_shape(lambda: module.init_stats(config.model))
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    of_params = jax.tree.map(lambda _: one, params) if mesh is None else mesh_lib.param_shardings(specs, mesh)
    of_stats = jax.tree.map(lambda _: one if mesh is None else mesh_lib.replicated(mesh), stats)

    def laid_out(shapes, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    params, stats, sums = checkpoints.restore_model(step, laid_out(params, of_params), laid_out(stats, of_stats))
    return Pretrained(config, step, params, stats, progress), sums


def begin_from(path: Path, state: TrainState, model: Any) -> TrainState:
    """`state` with parameters and statistics from elsewhere where paths and shapes agree: see `TrainConfig.init_from`."""
    if path.suffix == ".safetensors":
        within = "network" if isinstance(model, frames.Config) else ""
        found = vision.load(path, model.network if within else model, new_head=jax.random.key(0), say=print)
        old_params, old_stats = ({within: tree} if within else tree for tree in found)
        (old_params[within] if within else old_params).pop("head")
        origin = str(path)
    else:
        if not path.is_dir():
            problem = "is neither a run's folder nor a .safetensors file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"init_from: {str(path)!r} {problem}")
        before = load(path, mesh=jax.tree.leaves(state.params)[0].sharding.mesh)
        old_params, old_stats, origin = before.params, before.stats, f"step {before.step} of {path}"
    taken = 0

    def merge(new: Any, old: Any) -> Any:
        before = dict(jax.tree.leaves_with_path(old))

        def pick(path, leaf):
            nonlocal taken
            found = before.get(path)
            if found is None or found.shape != leaf.shape:
                return leaf
            taken += leaf.size
            return jax.device_put(found, leaf.sharding)

        return jax.tree_util.tree_map_with_path(pick, new)

    params = merge(state.params, old_params)
    if not taken:
        raise ValueError(f"init_from: no parameter of {str(path)!r} has a name and shape of this model's")
    print(f"{taken:,} parameters from {origin}")
    return dataclasses.replace(state, params=params, stats=merge(state.stats, old_stats))
