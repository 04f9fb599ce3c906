"""A language model with delta activations over its tokens (arXiv 2107.07305, where the axis is that of video frames).

Where a mixer or a SwiGLU layer reads the normalised residual stream, a delta activation quantises it, and a penalty on the change
from token to token makes training trade loss for products that need not be made.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import delta_activation
from deltajax.layers.param import init_params, stack_specs
from deltajax.models import fan_out, lm
from deltajax.models.losses import cross_entropy_sums
from deltajax.ops import delta_activation as ops
from deltajax.ops import taps

PLACES = ("mixer_input", "mlp_input")  # tags of `models.lm`, one of each in a layer
SHOWN = ("temporal_sparsity",)


@dataclasses.dataclass(frozen=True)
class Config:
    """A language model with delta activations.

    Attributes:
      lm: the model.
      delta: the delta activations, each layer's with steps of its own; None: none, the baseline.
      rate: of the penalty, >= 0; in training only, so that the validation loss is that of the text.
    """

    lm: lm.Config
    delta: delta_activation.Config | None = None
    rate: float = dataclasses.field(default=0.0, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"rate must be a number >= 0, got {self.rate!r}")
        if self.delta is not None and self.delta.steps == "neuron":
            raise ValueError("steps must be one of channel, layer: tokens have no other neurons than channels")

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.lm.vocab_size


def param_specs(config: Config) -> dict:
    """{"lm", "delta": {place: {"step", stacked over the layers}}}."""
    specs = {"lm": lm.param_specs(config.lm)}
    if config.delta is not None:
        one = delta_activation.param_specs(config.delta, (config.lm.d_model,))
        specs["delta"] = {place: stack_specs(one, len(config.lm.pattern)) for place in PLACES}
    return specs


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """There are no running statistics."""
    return {}


def init_state(config: Config, batch: int, max_length: int) -> list:
    """State before the first token; see `lm.init_state`."""
    return lm.init_state(config.lm, batch, max_length)


def apply(
    params: dict,
    config: Config,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: list | None = None,
) -> tuple[Float[Array, "B T vocab"], list | None]:
    """Logits of the quantised model; see `lm.apply`."""
    return _observed(params, config, tokens, segment_ids, state, lambda place, o: ())[0]


def _observed(params, config, tokens, segment_ids, state, observe):
    """What `lm.apply` returns, and {place: observe(place, O) [layers, ...]}."""

    def visit(place, x, layer):
        if config.delta is not None:
            of_layer = jax.tree.map(lambda leaf: leaf[layer], params["delta"][place])
            x, _ = delta_activation.apply(of_layer, config.delta, x)
        return x, observe(place, x)

    def run(of_lm, tokens, segment_ids, state):
        return lm.apply(of_lm, config.lm, tokens, segment_ids=segment_ids, state=state)

    visits = {place: functools.partial(visit, place) for place in PLACES}
    return taps.replace_and_capture(run, visits)(params["lm"], tokens, segment_ids, state)


@functools.lru_cache(maxsize=64)
def operations(config: lm.Config) -> dict[str, float]:
    """Per place: multiply-accumulates of projections that one token's activations of one layer feed, mean over the layers.

    The head reads the stream after its last norm, where no delta activation stands, and is not counted.
    """
    flat = dataclasses.replace(config, scan_layers=False, remat="none")
    abstract: Any = jax.eval_shape(lambda: init_params(jax.random.key(0), lm.param_specs(flat)))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    fed = fan_out.operations(lambda params, tokens: lm.apply(params, flat, tokens)[0], abstract, tokens)
    return {place: fed[place] / len(config.pattern) for place in PLACES}


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """Cross entropy, in training plus rate times penalty; operation sparsities; sparsity of D per place.

    Entries besides "loss", "weight" and "accuracy": "cross_entropy", "penalty" (before the rate), "spatial_sparsity" and
    "temporal_sparsity" (operations of projections that zeros make superfluous: of the activations, and of their changes from
    token to token, document boundaries included), "sparsity/<place>" (elements of D that are zero).

    Args:
      batch: as of `lm.loss_sums`.
    """
    fed = operations(config.lm)

    def observe(place, o):
        d = ops.differences(o)
        fan = fed[place] / o.shape[-1]
        return ops.sparsity_loss(d, fan), 1 - ops.nonzeros(o[:, 1:]), 1 - ops.nonzeros(d)

    (logits, _), seen = _observed(params, config, batch["tokens"], batch["segment_ids"], None, observe)
    sums = cross_entropy_sums(logits, batch["targets"], batch["weights"])
    total, weight = sum(fed.values()), sums["weight"]
    penalty = weight * sum(jnp.sum(of_place[0]) for of_place in seen.values())
    sums["cross_entropy"] = sums["loss"]
    for i, name in enumerate(("spatial_sparsity", "temporal_sparsity"), 1):
        sums[name] = weight * sum(fed[place] / total * jnp.mean(of_place[i]) for place, of_place in seen.items())
    sums |= {f"sparsity/{place}": weight * jnp.mean(of_place[2]) for place, of_place in seen.items()}
    sums["penalty"] = penalty
    if train:
        sums["loss"] = sums["loss"] + config.rate * penalty
    return sums, stats
