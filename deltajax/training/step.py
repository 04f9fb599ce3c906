"""The state of a run and the jitted functions that advance and evaluate it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from deltajax.models import registry
from deltajax.ops.activation_statistics import padding_mask, with_statistics
from deltajax.training import mesh as mesh_lib
from deltajax.training.distributed import compiled_together

Batch = dict[str, Array]  # as the model's `loss_sums` takes it; the first axis of each array is the batch
Sums = dict[str, Float[Array, ""]]

_ON_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
}
# Platform or kind of device -> what lets a step compute while arrays travel. On TPU v5e the compiler does so itself; CPUs cannot.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "TPU v5": _ON_SPARSE_CORES,
    "TPU v6 lite": _ON_SPARSE_CORES,
    "TPU7x": _ON_SPARSE_CORES,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "stats", "opt_state", "rng", "step", "skipped", "streak"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      params: float32 master copy; the model casts to its own computation dtype.
      stats: the model's running statistics.
      opt_state: of the Optax chain.
      rng: key data, fixed over the run; random things fold the step into it.
      step: batches consumed.
      skipped, streak: updates skipped because they were not finite or a spike, in all and since the last good one.
    """

    params: Any
    stats: Any
    opt_state: Any
    rng: UInt32[Array, "2"]
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]


def gradients(
    params: Any,
    stats: Any,
    model: Any,
    batch: Batch,
    key: PRNGKeyArray,
    microbatches: int,
    probed_sequences: int = 0,
    by_example: bool = False,
    trained: Any = None,
) -> tuple[Any, Sums, Any, dict[str, Array]]:
    """(gradient of the mean loss, the model's sums, its statistics, what probes saw) over the whole global batch.

    Sums are accumulated over microbatches and divided once, so the result does not depend on how weights are spread. A
    batch with "rescale" [B] multiplies the examples' weights by it, but the gradient is still divided by the weights as
    they were: the estimate of the whole data's gradient that `hard_batches.InfoBatch` wants.

    Args:
      probed_sequences: of each microbatch, for `with_statistics` of the activations of this very forward pass; 0: no probes.
      by_example: the sums get "example_losses" [B], the mean loss of each example: for any model the loss' derivatives by
        the weights.
      trained: tree of bools like `params`: the gradient of the others is 0 and costs nothing; None: all.
    """
    unscaled = jnp.float32(1)
    if "rescale" in batch:
        weights, factors = batch["weights"], batch["rescale"]
        scaled = weights * factors.reshape(-1, *[1] * (weights.ndim - 1))
        unscaled = jnp.sum(scaled) / jnp.maximum(jnp.sum(weights), 1)
        batch = {k: x for k, x in batch.items() if k != "rescale"} | {"weights": scaled}

    def loss(variables, stats, batch, key):
        params, weights = variables
        if trained is not None:
            params = jax.tree.map(lambda x, yes: x if yes else jax.lax.stop_gradient(x), params, trained)
        batch = {**batch, **weights}

        def sums_of(params, stats, batch):
            return registry.module_of(model).loss_sums(params, stats, model, batch, key=key, train=True)

        if not probed_sequences:
            sums, stats = sums_of(params, stats, batch)
            return sums["loss"], (sums, stats, {})
        probed = with_statistics(sums_of, probed_sequences, lambda params, stats, batch: padding_mask(batch))
        (sums, stats), seen = probed(params, stats, batch)
        return sums["loss"], (sums, stats, seen)

    def differentiate(params, stats, batch, key):
        weights = {"weights": batch["weights"]} if by_example else {}
        (grads, by_weight), (sums, stats, seen) = jax.grad(loss, has_aux=True)((params, weights), stats, batch, key)
        return (grads, sums), stats, seen, by_weight

    if microbatches == 1:
        (grads, sums), stats, seen, by_weight = differentiate(params, stats, batch, key)
    else:
        # Every microbatch takes rows from every device's block, so splitting moves no data.
        split = {k: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}

        def accumulate(carry, x):
            total, stats = carry
            microbatch, n = x
            found, stats, *rest = differentiate(params, stats, microbatch, jax.random.fold_in(key, n))
            return (jax.tree.map(jnp.add, total, found), stats), rest

        shapes, *_ = jax.eval_shape(differentiate, params, stats, {k: x[0] for k, x in split.items()}, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((grads, sums), stats), rest = jax.lax.scan(accumulate, (zeros, stats), (split, jnp.arange(microbatches)))
        seen = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1), rest[0])
        by_weight = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rest[1])
    if by_example:
        sums = sums | {"example_losses": _by_example(by_weight["weights"], batch["weights"])}
    count = jnp.maximum(sums["weight"], 1) / unscaled
    return jax.tree.map(lambda g: g / count, grads), sums, stats, seen


def _by_example(losses: Float[Array, "B ..."], weights: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """Weighted mean of each row."""
    rows = (len(weights), -1)
    return (losses * weights).reshape(rows).sum(1) / jnp.maximum(weights.reshape(rows).sum(1), 1e-9)


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Every entry but the weight, over the weight."""
    return {name: x / jnp.maximum(sums["weight"], 1) for name, x in sums.items() if name != "weight"}


class Step:
    """One model, one optimiser, one mesh: `init`, `train` and `evaluate` compiled for them.

    Attributes:
      reading_group: which part of each batch this process reads, see `mesh.reading_group`.
      shardings: TrainState of NamedShardings.
      abstract: TrainState of jax.ShapeDtypeStructs with those shardings.
      init: seed -> TrainState.
      train: (state, batch) -> (state, metrics); consumes the state it is given. Metrics are float32 scalars.
      train_probed: the same step, which also returns statistics of the residual stream after every block, of the activations of
        this very pass: see `with_statistics`, [blocks, sequences] each.
      evaluate: (params, stats, batch) -> the model's sums.
      score: (params, stats, batch) -> mean loss [B] of each example, as in evaluation.
      evaluate_positions: the same with an axis of positions; None: the model's outputs have none.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: jax.sharding.Mesh,
        grad_accumulation: int = 1,
        probed_sequences: int = 10,
        by_example: bool = False,
        max_grad_norm: float | None = None,
        trained: Any = None,
    ):
        """Nothing is computed before the first call; what is never called is never compiled.

        Args:
          probed_sequences: what `train_probed` measures, of each microbatch.
          by_example: the training metrics get "example_losses" [B].
          max_grad_norm: updates with a larger gradient norm are skipped; None: all sizes are taken.
          trained: see `gradients`; the optimiser must leave the same parameters alone.
        """
        whole = mesh_lib.replicated(mesh)
        within = functools.partial(mesh_lib.within, mesh)
        self.batch_sharding = mesh_lib.batch_sharding(mesh)
        self.reading_group = mesh_lib.reading_group(mesh)
        shapes = jax.eval_shape(functools.partial(_init, model, optimizer), 0)
        params = mesh_lib.param_shardings(registry.module_of(model).param_specs(model), mesh)
        self.shardings = _state_shardings(shapes, params, whole)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
        )
        self.init: Callable[[int], TrainState] = functools.partial(_init, model, optimizer, shardings=self.shardings)
        device = mesh.devices.flat[0]
        options = COMPILER_OPTIONS.get(device.device_kind, COMPILER_OPTIONS.get(device.platform))
        train = functools.partial(
            _train, model, optimizer, schedule, grad_accumulation, by_example, max_grad_norm, trained
        )
        self.train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]] = _jit(
            within(lambda state, batch: train(state, batch)[:2]),
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
            compiler_options=options,
        )
        self.train_probed: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array], dict[str, Any]]] = _jit(
            within(functools.partial(train, probed_sequences=probed_sequences)),
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, whole, whole),
            donate_argnums=0,
            compiler_options=options,
        )
        self.evaluate: Callable[[Any, Any, Batch], Sums] = _jit(
            within(functools.partial(_evaluate, model)),
            in_shardings=(self.shardings.params, self.shardings.stats, self.batch_sharding),
            out_shardings=whole,
        )
        self.score: Callable[[Any, Any, Batch], Array] = _jit(
            within(functools.partial(_score, model)),
            in_shardings=(self.shardings.params, self.shardings.stats, self.batch_sharding),
            out_shardings=whole,
        )
        by_position = getattr(registry.module_of(model), "position_sums", None)
        self.evaluate_positions: Callable[[Any, Any, Batch], Sums] | None = by_position and _jit(
            within(lambda params, stats, batch: by_position(params, stats, model, batch)),
            in_shardings=(self.shardings.params, self.shardings.stats, self.batch_sharding),
            out_shardings=whole,
        )

    def put(self, batch: dict[str, Any]) -> Batch:
        """Make global arrays of which this process' rows are a part."""
        with jax.transfer_guard_host_to_device("allow"):  # of several processes JAX counts it as implicit
            return {k: jax.make_array_from_process_local_data(self.batch_sharding, x) for k, x in batch.items()}


def _jit(f: Callable, **settings: Any) -> Any:
    return compiled_together(jax.jit(f, **settings))


def _init(model: Any, optimizer: optax.GradientTransformation, seed: int, shardings: Any = None) -> TrainState:
    params_key, rng = jax.random.split(jax.random.key(seed))
    # Not jitted: XLA takes far longer to compile all draws as one program than each distinct one by itself.
    module = registry.module_of(model)
    params = module.init(params_key, model)

    def complete(params, rng):
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, module.init_stats(model), optimizer.init(params), jax.random.key_data(rng), *zeros)

    return jax.jit(complete, out_shardings=shardings)(params, rng)


def _train(
    model: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    grad_accumulation: int,
    by_example: bool,
    max_grad_norm: float | None,
    trained: Any,
    state: TrainState,
    batch: Batch,
    probed_sequences: int = 0,
) -> tuple[TrainState, dict[str, Array], dict[str, Any]]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, sums, stats, seen = gradients(
        state.params, state.stats, model, batch, key, grad_accumulation, probed_sequences, by_example, trained
    )
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
    if max_grad_norm is not None:
        good &= norm <= max_grad_norm
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, stats, opt_state = jax.tree.map(
        functools.partial(jnp.where, good), (params, stats, opt_state), (state.params, state.stats, state.opt_state)
    )
    skip = 1 - good.astype(jnp.int32)
    metrics = {
        **means({name: x for name, x in sums.items() if name != "example_losses"}),
        "weight": sums["weight"],
        "grad_norm": norm,
        "learning_rate": schedule(state.step - state.skipped),
        "skipped": state.skipped + skip,
        "streak": (state.streak + 1) * skip,
    }
    if by_example:
        metrics["example_losses"] = sums["example_losses"]
    state = TrainState(params, stats, opt_state, state.rng, state.step + 1, metrics["skipped"], metrics["streak"])
    return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics), seen


def _evaluate(model: Any, params: Any, stats: Any, batch: Batch) -> Sums:
    return registry.module_of(model).loss_sums(params, stats, model, batch, key=None, train=False)[0]


def _score(model: Any, params: Any, stats: Any, batch: Batch) -> Float[Array, "B"]:
    def loss(weights):
        return _evaluate(model, params, stats, {**batch, "weights": weights})["loss"]

    return _by_example(jax.grad(loss)(batch["weights"]), batch["weights"])


def _state_shardings(shapes: TrainState, params: Any, whole: NamedSharding) -> TrainState:
    """Optimiser arrays that mirror a parameter (same path below them, same shape) are laid out like it."""
    by_path = {path: s for path, s in jax.tree.leaves_with_path(params)}
    shape_of = {path: x.shape for path, x in jax.tree.leaves_with_path(shapes.params)}

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        suffixes = (path[i:] for i in range(len(path)))
        match = next((s for s in suffixes if s in by_path and shape_of[s] == leaf.shape), None)
        return whole if match is None else by_path[match]

    return jax.tree_util.tree_map_with_path(sharding, shapes)
