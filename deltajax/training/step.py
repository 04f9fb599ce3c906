"""The state of a run and the jitted functions that advance and evaluate it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt32

from deltajax.models import lm
from deltajax.training import mesh as mesh_lib

Batch = dict[str, Array]  # tokens, targets, segment_ids [B, T] integers; weights [B, T] floats


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "rng", "step", "skipped", "streak"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      params: float32 master copy; the model casts to its own computation dtype.
      opt_state: of the Optax chain.
      rng: key data, fixed over the run; random things fold the step into it.
      step: batches consumed.
      skipped, streak: updates skipped because they were not finite, in all and since the last good one.
    """

    params: Any
    opt_state: Any
    rng: UInt32[Array, "2"]
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]


def loss_sums(params: Any, model: lm.Config, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the batch's tokens, in float32: weight times cross entropy (nats), and weight."""
    logits, _ = lm.apply(params, model, batch["tokens"], segment_ids=batch["segment_ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])
    weights = batch["weights"].astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(weights)


def gradients(params: Any, model: lm.Config, batch: Batch, microbatches: int) -> tuple[Any, Array, Array]:
    """(gradient of the mean loss, mean loss, sum of weights) over the whole global batch.

    Sums are accumulated over microbatches and divided once, so the result does not depend on how weights are spread.
    """
    sums = jax.value_and_grad(loss_sums, has_aux=True)
    if microbatches == 1:
        (loss, weight), grads = sums(params, model, batch)
    else:
        # Every microbatch takes rows from every device's block, so splitting moves no data.
        split = {k: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}

        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, sums(params, model, microbatch)), None

        first = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        ((loss, weight), grads), _ = jax.lax.scan(accumulate, first, split)
    count = jnp.maximum(weight, 1)
    return jax.tree.map(lambda g: g / count, grads), loss / count, weight


class Step:
    """One model, one optimiser, one mesh: `init`, `train` and `evaluate` compiled for them.

    Attributes:
      shardings: TrainState of NamedShardings.
      abstract: TrainState of jax.ShapeDtypeStructs with those shardings.
      init: seed -> TrainState.
      train: (state, batch) -> (state, metrics); consumes the state it is given. Metrics are float32 scalars.
      evaluate: (params, batch) -> `loss_sums`.
    """

    def __init__(
        self,
        model: lm.Config,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: jax.sharding.Mesh,
        grad_accumulation: int = 1,
    ):
        """Nothing is computed before the first call."""
        whole = mesh_lib.replicated(mesh)
        self.batch_sharding = mesh_lib.batch_sharding(mesh)
        shapes = jax.eval_shape(functools.partial(_init, model, optimizer), 0)
        params = mesh_lib.param_shardings(lm.param_specs(model), mesh)
        self.shardings = _state_shardings(shapes, params, whole)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
        )
        self.init: Callable[[int], TrainState] = functools.partial(_init, model, optimizer, shardings=self.shardings)
        self.train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]] = jax.jit(
            functools.partial(_train, model, optimizer, schedule, grad_accumulation),
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self.evaluate: Callable[[Any, Batch], tuple[Array, Array]] = jax.jit(
            lambda params, batch: loss_sums(params, model, batch),
            in_shardings=(params, self.batch_sharding),
            out_shardings=whole,
        )

    def put(self, batch: dict[str, Any]) -> Batch:
        """Make global arrays of which this process' rows are a part."""
        return {k: jax.make_array_from_process_local_data(self.batch_sharding, x) for k, x in batch.items()}


def _init(model: lm.Config, optimizer: optax.GradientTransformation, seed: int, shardings: Any = None) -> TrainState:
    params_key, rng = jax.random.split(jax.random.key(seed))
    # Not jitted: XLA takes far longer to compile all draws as one program than each distinct one by itself.
    params = lm.init(params_key, model)

    def complete(params, rng):
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, optimizer.init(params), jax.random.key_data(rng), *zeros)

    return jax.jit(complete, out_shardings=shardings)(params, rng)


def _train(
    model: lm.Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    grad_accumulation: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    grads, loss, weight = gradients(state.params, model, batch, grad_accumulation)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        functools.partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
    )
    skip = 1 - finite.astype(jnp.int32)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": schedule(state.step - state.skipped),
        "tokens": weight,
        "skipped": state.skipped + skip,
        "streak": (state.streak + 1) * skip,
    }
    state = TrainState(params, opt_state, state.rng, state.step + 1, metrics["skipped"], metrics["streak"])
    return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def _state_shardings(shapes: TrainState, params: Any, whole: NamedSharding) -> TrainState:
    """Optimiser arrays that mirror a parameter (same path below them, same shape) are laid out like it."""
    by_path = {path: s for path, s in jax.tree.leaves_with_path(params)}
    shape_of = {path: x.shape for path, x in jax.tree.leaves_with_path(shapes.params)}

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        suffixes = (path[i:] for i in range(len(path)))
        match = next((s for s in suffixes if s in by_path and shape_of[s] == leaf.shape), None)
        return whole if match is None else by_path[match]

    return jax.tree_util.tree_map_with_path(sharding, shapes)
