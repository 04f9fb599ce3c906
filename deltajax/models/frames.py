"""A convolutional network over the frames of a clip, with delta activations where convolutions and head read (arXiv 2107.07305).

Every frame goes through the network by itself and the logits are averaged over the clip. With `delta` the activations are
quantised, and a penalty on their change from frame to frame makes training trade accuracy for operations saved. Without it the
same network is the baseline, or, with the penalty "spatial", the one that is trained for plain sparsity.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import delta_activation
from deltajax.layers.param import init_params
from deltajax.models import efficientnet, fan_out, resnet
from deltajax.models.losses import cross_entropy_sums
from deltajax.ops import delta_activation as ops

NETWORKS: dict[type, Any] = {resnet.Config: resnet, efficientnet.Config: efficientnet}
Penalty = Literal["temporal", "tile", "spatial"]
SHOWN = ("temporal_sparsity",)
TILE = 8  # rows and columns, at the size of the frames, for the metric "tile_sparsity"


@dataclasses.dataclass(frozen=True)
class Config:
    """A network over frames.

    Attributes:
      network: of `models.resnet` or `models.efficientnet` (`models.mobilenet` too).
      frame_size: (height, width) of the frames; operations are counted for it.
      delta: the delta activations; None: none.
      rate: of the penalty, >= 0. Penalties carry fan-outs (hundreds), so useful rates are small.
      penalty: "temporal": mean |D|, the paper's; "tile": a smooth count of the tiles that changed, for what the streaming
        runner can skip; "spatial": mean of the absolute activations themselves, with or without delta activations.
      init_steps: (beginning of a place's name, its steps at the start) where `delta.init_step` is not to hold; the first
        that fits: (("input", 0.05), ("stages.3", 4.0)).
      tile: of the penalty "tile": rows and columns of a tile at the size of the frames; deeper maps have smaller ones, down
        to one pixel.
    """

    network: resnet.Config | efficientnet.Config
    frame_size: tuple[int, int]
    delta: delta_activation.Config | None = None
    rate: float = dataclasses.field(default=0.0, metadata=CHANGEABLE)
    penalty: Penalty = dataclasses.field(default="temporal", metadata=CHANGEABLE)
    tile: int = dataclasses.field(default=8, metadata=CHANGEABLE)
    init_steps: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "tile")
        size = self.frame_size
        if min(size) < 1:
            raise ValueError(f"frame_size must be two integers >= 1, got {size!r}")
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"rate must be a number >= 0, got {self.rate!r}")
        for begin, step in self.init_steps:
            if not 0 < step < float("inf"):
                raise ValueError(f"init_steps must have steps > 0 for names, got {(begin, step)!r}")
        if self.init_steps and self.delta is None:
            raise ValueError(f"init_steps are of delta activations, which this network has none of: {self.init_steps}")

    @property
    def num_classes(self) -> int:
        """Of the network's logits."""
        return self.network.num_classes

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a frame."""
        return (*self.frame_size, self.network.in_channels)


@functools.lru_cache(maxsize=64)
def activations(network: Any, frame_size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], float]]:
    """Per place of a delta activation: the shape of one frame's activations there, and their fan-out."""
    module = NETWORKS[type(network)]
    shapes: dict[str, tuple[int, ...]] = {}

    def run(params, stats, frame):
        def tap(where, x):
            shapes[where] = x.shape[1:]
            return fan_out.mark(where, x)

        return module.apply(params, stats, network, frame, tap=tap)[0]

    frame = jax.ShapeDtypeStruct((1, *frame_size, network.in_channels), jnp.float32)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), module.param_specs(network)))
    fed = fan_out.operations(run, params, jax.eval_shape(lambda: module.init_stats(network)), frame)
    return {where: (shape, fed[where] / float(_size(shape))) for where, shape in shapes.items()}


def _size(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def param_specs(config: Config) -> dict:
    """{"network", "delta": {place: {"step"}}}."""
    specs = {"network": NETWORKS[type(config.network)].param_specs(config.network)}
    if config.delta is not None:
        places = activations(config.network, config.frame_size)
        for begin, _ in config.init_steps:
            if not any(where.startswith(begin) for where in places):
                raise ValueError(f"init_steps: no place begins with {begin!r}; places: {', '.join(places)}")
        specs["delta"] = {}
        for where, (shape, _) in places.items():
            start = next((x for begin, x in config.init_steps if where.startswith(begin)), config.delta.init_step)
            delta = dataclasses.replace(config.delta, init_step=start)
            specs["delta"][where] = delta_activation.param_specs(delta, shape)
    return specs


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """Running statistics of the network's batch norms: {"network"}."""
    return {"network": NETWORKS[type(config.network)].init_stats(config.network)}


def apply(
    params: dict,
    stats: dict,
    config: Config,
    frames: Float[Array, "B T H W C"],
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
    observe: Callable[[str, Array], None] = lambda where, o: None,
) -> tuple[Float[Array, "B T classes"], dict]:
    """Logits of every frame, and the running statistics.

    Args:
      params, stats: from `init` and `init_stats`.
      config: static under jit.
      frames: of clips; T is free.
      train: see the network.
      key: of the network's dropout.
      observe: called with the place and the activations [B, T, ...] that go on there, quantised if there are delta activations.
    """
    batch, time = frames.shape[:2]

    def tap(where: str, x: Array) -> Array:
        clips = x.reshape(batch, time, *x.shape[1:])
        if config.delta is not None:
            clips, _ = delta_activation.apply(params["delta"][where], config.delta, clips)
        observe(where, clips)
        return clips.reshape(x.shape)

    module = NETWORKS[type(config.network)]
    logits, network = module.apply(
        params["network"],
        stats["network"],
        config.network,
        frames.reshape(batch * time, *frames.shape[2:]),
        train=train,
        key=key,
        tap=tap,
    )
    return logits.reshape(batch, time, -1), {"network": network}


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """Cross entropy of the clip's mean logits plus rate times penalty; operation sparsities; sparsity of D per place.

    Entries besides "loss", "weight" and "accuracy": "cross_entropy", "penalty" (before the rate), "spatial_sparsity" and
    "temporal_sparsity" (operations, as in the paper: of the activations, and of their changes without the first frame),
    "pixel_sparsity" and "tile_sparsity" (operations of pixels, and of tiles of 8 x 8 pixels of the frame, without any
    change), "sparsity/<place>" (elements of D that are zero).

    Args:
      batch: frames [B, T, H, W, C] floats with T >= 2, targets [B] integers, weights [B] floats.
    """
    frames, weights = batch["frames"], batch["weights"].astype(jnp.float32)
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[2:] != config.frame_shape:
        raise ValueError(f"frames must be [B, T >= 2, {', '.join(map(str, config.frame_shape))}], got {frames.shape}")
    seen: dict[str, Array] = {}
    logits, stats = apply(
        params, stats, config, frames, train=train, key=key if train else None, observe=seen.__setitem__
    )
    sums = cross_entropy_sums(jnp.mean(logits, axis=1), batch["targets"], weights)
    sums["cross_entropy"] = sums["loss"]
    places = activations(config.network, config.frame_size)
    total = sum(_size(shape) * fan for shape, fan in places.values())

    def over_clips(function, x):
        return jnp.sum(jax.vmap(lambda clip: function(clip[None]))(x) * weights)

    penalty = jnp.zeros(())
    saved = dict.fromkeys(("spatial_sparsity", "temporal_sparsity", "pixel_sparsity", "tile_sparsity"), jnp.zeros(()))
    for where, o in seen.items():
        shape, fan = places[where]
        tile, measured = (max(1, n * shape[0] // config.frame_size[0]) for n in (config.tile, TILE))
        d = ops.differences(o)
        if config.penalty == "tile":
            penalty += over_clips(functools.partial(ops.tile_sparsity_loss, fan_out=fan, tile=tile), d)
        else:
            of = d if config.penalty == "temporal" else o
            penalty += over_clips(functools.partial(ops.sparsity_loss, fan_out=fan), of)
        zeros = {
            "spatial_sparsity": over_clips(lambda x: 1 - ops.nonzeros(x), o[:, 1:]),
            "temporal_sparsity": over_clips(lambda x: 1 - ops.nonzeros(x), d),
            "pixel_sparsity": over_clips(lambda x: 1 - ops.changed_tiles(x, 1), d),
            "tile_sparsity": over_clips(lambda x, tile=measured: 1 - ops.changed_tiles(x, tile), d),
        }
        for name, value in zeros.items():
            saved[name] += value * (_size(shape) * fan / total)
        sums[f"sparsity/{where}"] = zeros["temporal_sparsity"]
    sums |= {"penalty": penalty, **saved}
    sums["loss"] = sums["cross_entropy"] + config.rate * penalty
    return sums, stats
