"""AdamW, Muon and gradient descent as Optax chains, their schedule, and which parameters each rule touches."""

import dataclasses
import math
from typing import Any

import jax
import optax
from optax import contrib

from deltajax.layers.param import ParamSpec, is_spec
from deltajax.training import config as config_lib

# Root mean square of a Muon update, matched to AdamW's so that one learning rate serves both: arXiv 2502.16982, eq. 4.
MUON_RMS = 0.2


def make_schedule(config: config_lib.Schedule, peak: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates done (0-based), for a run of `steps` updates."""
    decay_steps = 0 if config.decay == "constant" else config.decay_steps or steps - config.warmup_steps
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_fraction, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.decay]()
    # Shifted by one update: the first one is not wasted on a learning rate of zero.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules(
        [warmup, optax.constant_schedule(peak), decay], [config.warmup_steps, steps - decay_steps]
    )


def trained(config: config_lib.Optimizer, specs: Any) -> Any:
    """Tree of bools like `specs`: the parameters that `config.trainable` names.

    Raises:
      ValueError: it names none.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), specs, is_leaf=is_spec
    )
    for wanted in config.trainable:
        if not any(_is_below(name, wanted) for name in jax.tree.leaves(names)):
            there = sorted({".".join(name.split(".")[: wanted.count(".") + 1]) for name in jax.tree.leaves(names)})
            raise ValueError(f"optimizer.trainable: no parameter is at {wanted!r} (there are: {', '.join(there)})")
    return jax.tree.map(lambda name: not config.trainable or any(_is_below(name, x) for x in config.trainable), names)


def _is_below(name: str, path: str) -> bool:
    return f"{name}.".startswith(f"{path}.")


def make_optimizer(
    config: config_lib.Optimizer, schedule: optax.Schedule, specs: Any
) -> optax.GradientTransformationExtraArgs:
    """Clip, precondition (Adam, Muon where it applies, or momentum), decay, scale by the learning rate.

    Args:
      specs: tree of ParamSpec; says what is decayed and what Muon takes.
    """
    if config.trainable:
        mask = trained(config, specs)
        chosen = jax.tree.map(lambda yes, spec: spec if yes else optax.MaskedNode(), mask, specs)
        rule = make_optimizer(dataclasses.replace(config, trainable=()), schedule, chosen)
        return optax.partition({True: rule, False: optax.set_to_zero()}, mask)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    direction: Any = adam
    if config.name == "sgd":
        direction = optax.trace(config.momentum)
    if config.name == "muon":
        dimensions = jax.tree.map(_muon_dimensions, specs, is_leaf=is_spec)
        labels = jax.tree.map(lambda d: "adam" if _is_masked(d) else "muon", dimensions, is_leaf=_is_dimensions)
        muon = optax.chain(
            contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
            _scale_to_rms(dimensions),
        )
        direction = optax.partition({"muon": muon, "adam": adam}, labels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, jax.tree.map(lambda s: s.weight_decay, specs, is_leaf=is_spec)),
        optax.scale_by_learning_rate(schedule),
    )


def _muon_dimensions(spec: ParamSpec) -> contrib.MuonDimensionNumbers | optax.MaskedNode:
    """Which axes of a weight form its matrix: "embed" is one side, the rest but "layers" the other.

    Embeddings, vectors, gates and convolutions are no maps between hidden spaces: Adam's (a MaskedNode).
    """
    axes = [i for i, axis in enumerate(spec.axes) if axis != "layers"]
    if not spec.weight_decay or "vocab" in spec.axes or "embed" not in spec.axes or len(axes) < 2:
        return optax.MaskedNode()
    embed = spec.axes.index("embed")
    others = tuple(i for i in axes if i != embed)
    return (
        contrib.MuonDimensionNumbers((embed,), others)
        if embed < others[0]
        else contrib.MuonDimensionNumbers(others, (embed,))
    )


def _scale_to_rms(dimensions: Any) -> optax.GradientTransformation:
    """An orthogonalised [m, n] matrix has root mean square 1 / sqrt(max(m, n)); bring it to `MUON_RMS`."""

    def scale(update: Any, d: contrib.MuonDimensionNumbers) -> Any:
        sides = [math.prod(update.shape[i] for i in side) for side in d]
        return update * (MUON_RMS * math.sqrt(max(sides)))

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, dimensions))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_dimensions(x: Any) -> bool:
    return isinstance(x, contrib.MuonDimensionNumbers) or _is_masked(x)
