"""Residual networks (arXiv 1512.03385) as in torchvision and timm: the stride of a bottleneck is on its 3 x 3 convolution."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import batch_norm, classifier, conv_norm
from deltajax.layers.param import count_params, init_params
from deltajax.models.losses import cross_entropy_sums

EXPANSION = 4  # output channels of a bottleneck over the channels of its 3 x 3 convolution

Tap = Callable[[str, Array], Array]  # (where, activations) -> activations


@dataclasses.dataclass(frozen=True)
class Config:
    """A residual network; `resnet18`, `resnet50`, `resnet_small` set the sizes.

    Attributes:
      blocks: blocks of each stage; every stage but the first halves the image.
      widths: channels of each stage (a bottleneck's output has 4 times as many).
      bottleneck: blocks of 1 x 1, 3 x 3, 1 x 1 convolutions instead of two 3 x 3.
      stem: "imagenet": 7 x 7 with stride 2, then max-pooling with stride 2; "small": 3 x 3, for images of about 32 pixels.
      in_channels: of the images.
      num_classes: of the logits.
      head_hidden: width of a hidden layer (ReLU) before the logits; None: none.
      dropout: before the last linear map, in [0, 1).
      norm: of the batch norms.
      dtype: of the activations and of the products' inputs.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem: Literal["imagenet", "small"] = "imagenet"
    in_channels: int = 3
    num_classes: int = 1000
    head_hidden: int | None = None
    dropout: float = dataclasses.field(default=0.0, metadata=CHANGEABLE)
    norm: batch_norm.Config = dataclasses.field(default_factory=batch_norm.Config)
    dtype: Literal["float32", "bfloat16"] = dataclasses.field(default="float32", metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "in_channels", "num_classes", "head_hidden")
        if not self.blocks or len(self.blocks) != len(self.widths) or min(*self.blocks, *self.widths) < 1:
            raise ValueError(
                f"blocks and widths must be equally many integers >= 1, got {self.blocks} and {self.widths}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")


resnet18 = Config
resnet50 = functools.partial(Config, blocks=(3, 4, 6, 3), bottleneck=True)
resnet_small = functools.partial(Config, blocks=(1, 1, 1), widths=(16, 32, 64), stem="small", num_classes=10)


def _stages(config: Config) -> list[list[tuple[int, int, int, int]]]:
    """(channels in, width, channels out, stride) of every block of every stage."""
    stages = []
    channels = config.widths[0]
    for i, (blocks, width) in enumerate(zip(config.blocks, config.widths, strict=True)):
        out = width * (EXPANSION if config.bottleneck else 1)
        first = (channels, width, out, 1 if i == 0 else 2)
        stages.append([first] + [(out, width, out, 1)] * (blocks - 1))
        channels = out
    return stages


def param_specs(config: Config) -> dict:
    """{"stem", "stages": one list of blocks each, "head"}; a block is {"1", "2", ("3"), ("shortcut")}, `conv_norm` each."""

    def block(channels: int, width: int, out: int, stride: int) -> dict:
        if config.bottleneck:
            sizes = [(1, channels, width), (3, width, width), (1, width, out)]
        else:
            sizes = [(3, channels, width), (3, width, out)]
        specs = {str(i): conv_norm.param_specs(*size) for i, size in enumerate(sizes, 1)}
        if stride > 1 or channels != out:
            specs["shortcut"] = conv_norm.param_specs(1, channels, out)
        return specs

    stages = _stages(config)
    return {
        "stem": conv_norm.param_specs(7 if config.stem == "imagenet" else 3, config.in_channels, config.widths[0]),
        "stages": [[block(*sizes) for sizes in stage] for stage in stages],
        "head": classifier.param_specs(stages[-1][-1][2], config.head_hidden, config.num_classes),
    }


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """Running mean 0 and variance 1 of every batch norm, at the paths of the parameters."""
    return batch_norm.init_stats(param_specs(config))


def num_params(config: Config) -> int:
    """Number of parameters; nothing is allocated."""
    return count_params(param_specs(config))


def apply(
    params: dict,
    stats: dict,
    config: Config,
    images: Float[Array, "B H W C"],
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
    tap: Tap = lambda where, x: x,
) -> tuple[Float[Array, "B classes"], dict]:
    """Logits in float32 and the running statistics, which change only if `train`.

    Args:
      params, stats: from `init` and `init_stats`.
      config: static under jit.
      images: any height and width.
      train: batch norm by the statistics of this batch.
      key: of the dropout; None: no dropout.
      tap: called with a name and the activations wherever a convolution or the head reads them: "input", "stem",
        "stages.0.0.1" (after the ReLU of a block's convolution), "stages.0.0" (after its residual add and ReLU). What
        it returns goes on.
    """
    unit = functools.partial(conv_norm.apply, config=config.norm, train=train)
    x = tap("input", images.astype(config.dtype))
    new: dict[str, Any] = {"stages": []}
    x, new["stem"] = unit(params["stem"], stats["stem"], x=x, stride=2 if config.stem == "imagenet" else 1)
    x = jax.nn.relu(x)
    if config.stem == "imagenet":
        x = max_pool(x)
    x = tap("stem", x)
    for i, stage in enumerate(_stages(config)):
        advanced = []
        for j, (_, _, _, stride) in enumerate(stage):
            where = f"stages.{i}.{j}"
            x, moved = _block(unit, params["stages"][i][j], stats["stages"][i][j], x, stride, tap, where)
            advanced.append(moved)
        new["stages"].append(advanced)
    return classifier.apply(params["head"], x, dropout=config.dropout, key=key), new


def _block(unit: Callable, params: dict, stats: dict, x: Array, stride: int, tap: Tap, where: str) -> tuple:
    """relu(shortcut(x) + convolutions(x)), and the new statistics."""
    new = {}
    convolutions = [name for name in params if name != "shortcut"]
    strided = convolutions[-2]  # the 3 x 3 of a bottleneck, the first of a basic block
    y = x
    for name in convolutions:
        y, new[name] = unit(params[name], stats[name], x=y, stride=stride if name == strided else 1)
        if name != convolutions[-1]:
            y = tap(f"{where}.{name}", jax.nn.relu(y))
    if "shortcut" in params:
        x, new["shortcut"] = unit(params["shortcut"], stats["shortcut"], x=x, stride=stride)
    return tap(where, jax.nn.relu(x + y)), new


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """Largest of 3 x 3 values with stride 2, padded by one on every side."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """`cross_entropy_sums` of the labels; see `registry`.

    Args:
      batch: images [B, H, W, C] floats, targets [B] integers, weights [B] floats.
    """
    logits, stats = apply(params, stats, config, batch["images"], train=train, key=key if train else None)
    return cross_entropy_sums(logits, batch["targets"], batch["weights"]), stats
