"""Networks of inverted residuals: EfficientNet (arXiv 1905.11946), EfficientNetV2-S (2104.00298), MobileNets (`mobilenet`).

A network is a table of stages. `b4()` and `v2_s()` are torchvision's, `lite(0)` timm's; timm's `tf_` weights want
`padding="same", norm=batch_norm.Config(eps=1e-3)`. `interop.vision` refuses weights that were made for other settings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import batch_norm, classifier, conv2d, conv_norm, squeeze_excitation
from deltajax.layers.activation import ACTIVATIONS, Name
from deltajax.layers.param import count_params, init_params
from deltajax.models.losses import cross_entropy_sums
from deltajax.models.resnet import Tap
from deltajax.rounding import exact, round_of


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """Squeeze and excitation inside a block.

    Attributes:
      ratio: reduced width over the reference width.
      of: the reference: the block's input ("input", EfficientNet) or its expanded channels ("hidden", MobileNetV3, whose
        result is rounded to a multiple of 8).
      activation, gate: after the first and the second map.
    """

    ratio: float = 0.25
    of: Literal["input", "hidden"] = "input"
    activation: Name = "silu"
    gate: Name = "sigmoid"

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_number(self, "ratio", 0, 1)

    def reduced(self, channels: int, hidden: int) -> int:
        """Width between the two maps."""
        return round_channels(self.ratio, hidden) if self.of == "hidden" else max(1, round_of(self.ratio, channels))


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one output width.

    Attributes:
      block: "inverted": 1 x 1 expansion, depthwise K x K, 1 x 1 projection; "fused": K x K expansion, 1 x 1 projection. With
        expansion 1 the 1 x 1 expansion, or the projection of a fused block, is left out.
      channels: of the output.
      repeats: blocks; all but the first have stride 1.
      kernel, stride: K, and the stride of the first block.
      expansion: hidden channels over input channels, one for all blocks or one each; products are rounded to a multiple of 8.
      squeeze: squeeze and excitation after the depthwise convolution (after the expansion of a fused block), or None.
      activation: of the block.
    """

    block: Literal["inverted", "fused"]
    channels: int
    repeats: int = 1
    kernel: int = 3
    stride: int = 1
    expansion: float | tuple[float, ...] = 1.0
    squeeze: Squeeze | None = None
    activation: Name = "silu"

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "channels", "repeats", "kernel", "stride")
        if len(self.expansions) != self.repeats or not all(0 < x < math.inf for x in self.expansions):
            raise ValueError(
                f"expansion must be a number > 0, or repeats = {self.repeats} of them, got {self.expansion!r}"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def expansions(self) -> tuple[float, ...]:
        """One for each block."""
        return self.expansion if isinstance(self.expansion, tuple) else (self.expansion,) * self.repeats


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of inverted residuals.

    Attributes:
      stem: channels of the first convolution, 3 x 3 with stride 2.
      stages: the table.
      head: channels of the last convolution, 1 x 1.
      head_hidden: width of a hidden layer before the logits; None: none.
      activation: of stem and head.
      padding: see `conv2d.apply`.
      in_channels: of the images.
      num_classes: of the logits.
      dropout: before the last linear map, in [0, 1).
      drop_path: probability that a residual block is skipped for an example (stochastic depth, arXiv 1603.09382) at the last
        block, rising linearly from 0 at the first, in [0, 1).
      norm: of the batch norms.
      dtype: of the activations and of the products' inputs.
    """

    stem: int
    stages: tuple[Stage, ...]
    head: int
    head_hidden: int | None = None
    activation: Name = "silu"
    padding: conv2d.Padding = "symmetric"
    in_channels: int = 3
    num_classes: int = 1000
    dropout: float = dataclasses.field(default=0.0, metadata=CHANGEABLE)
    drop_path: float = dataclasses.field(default=0.0, metadata=CHANGEABLE)
    norm: batch_norm.Config = dataclasses.field(default_factory=batch_norm.Config)
    dtype: Literal["float32", "bfloat16"] = dataclasses.field(default="float32", metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "stem", "head", "head_hidden", "in_channels", "num_classes")
        if not self.stages:
            raise ValueError("stages must hold at least one stage, got ()")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {getattr(self, name)!r}")


def round_channels(factor: float, channels: int) -> int:
    """The multiple of 8 that is nearest to the product, at least 8 and never below 0.9 of it (the papers' rule)."""
    product = exact(factor) * channels
    rounded = max(8, int(product + 4) // 8 * 8)
    return rounded if 10 * rounded >= 9 * product else rounded + 8


Row = tuple[int, int, int, int, int]  # kernel, expansion, channels, repeats, stride
_B0: tuple[Row, ...] = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1), (2.2, 3.6))
_SQUEEZE = Squeeze()
_V2_S = (
    Stage("fused", 24, 2),
    Stage("fused", 48, 4, 3, 2, 4),
    Stage("fused", 64, 4, 3, 2, 4),
    Stage("inverted", 128, 6, 3, 2, 4, _SQUEEZE),
    Stage("inverted", 160, 9, 3, 1, 6, _SQUEEZE),
    Stage("inverted", 256, 15, 3, 2, 6, _SQUEEZE),
)


def scaled_stages(
    rows: tuple[Row, ...], width: float, depth: float, activation: Name, squeeze: Squeeze | None, fixed_ends: bool
) -> tuple[Stage, ...]:
    """Stages with their channels times `width` and their blocks times `depth`, rounded up (arXiv 1905.11946, section 3.3).

    Args:
      rows: of the network that is scaled.
      width, depth: factors.
      activation, squeeze: of all stages.
      fixed_ends: keep the numbers of blocks of the first and the last stage.
    """
    stages = []
    for i, (kernel, expansion, channels, repeats, stride) in enumerate(rows):
        blocks = repeats if fixed_ends and i in (0, len(rows) - 1) else math.ceil(exact(depth) * repeats)
        stages.append(
            Stage("inverted", round_channels(width, channels), blocks, kernel, stride, expansion, squeeze, activation)
        )
    return tuple(stages)


def b(number: int, **changes: Any) -> Config:
    """EfficientNet-B0 to B8, torchvision's and timm's; B5 to B7 of torchvision want `norm=batch_norm.Config(eps=1e-3)`."""
    width, depth = SCALES[number]
    stages = scaled_stages(_B0, width, depth, "silu", _SQUEEZE, fixed_ends=False)
    made = {"stem": round_channels(width, 32), "stages": stages, "head": round_channels(width, 1280)}
    return Config(**{**made, **changes})


def lite(number: int, **changes: Any) -> Config:
    """EfficientNet-Lite0 to Lite4, with relu6 and without squeeze and excitation, timm's."""
    width, depth = SCALES[:5][number]
    stages = scaled_stages(_B0, width, depth, "relu6", None, fixed_ends=True)
    return Config(**{"stem": 32, "stages": stages, "head": 1280, "activation": "relu6", **changes})


b4 = functools.partial(b, 4)
v2_s = functools.partial(Config, stem=24, stages=_V2_S, head=1280, norm=batch_norm.Config(eps=1e-3))


def _blocks(config: Config) -> Iterator[list[tuple[Stage, int, int, int]]]:
    """Per stage: (stage, channels in, hidden channels, stride) of each block."""
    channels = config.stem
    for stage in config.stages:
        blocks = []
        for i, expansion in enumerate(stage.expansions):
            hidden = channels if expansion == 1 else round_channels(expansion, channels)
            blocks.append((stage, channels, hidden, stage.stride if i == 0 else 1))
            channels = stage.channels
        yield blocks


def param_specs(config: Config) -> dict:
    """{"stem", "stages": one list of blocks each, "last", "head"}; a block is {"expand", "depthwise", "squeeze", "project"}."""

    def block(stage: Stage, channels: int, hidden: int, _: int) -> dict:
        specs = {}
        alone = stage.block == "fused" and hidden == channels
        if stage.block == "fused":
            specs["expand"] = conv_norm.param_specs(stage.kernel, channels, stage.channels if alone else hidden)
        else:
            if hidden != channels:
                specs["expand"] = conv_norm.param_specs(1, channels, hidden)
            specs["depthwise"] = conv_norm.param_specs(stage.kernel, hidden, hidden, groups=hidden)
        if stage.squeeze:
            specs["squeeze"] = squeeze_excitation.param_specs(hidden, stage.squeeze.reduced(channels, hidden))
        if not alone:
            specs["project"] = conv_norm.param_specs(1, hidden, stage.channels)
        return specs

    return {
        "stem": conv_norm.param_specs(3, config.in_channels, config.stem),
        "stages": [[block(*sizes) for sizes in blocks] for blocks in _blocks(config)],
        "last": conv_norm.param_specs(1, config.stages[-1].channels, config.head),
        "head": classifier.param_specs(config.head, config.head_hidden, config.num_classes),
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
      key: of dropout and stochastic depth; None: neither.
      tap: as in `resnet.apply`: "input", "stem", "stages.0.0.expand", "stages.0.0.depthwise" (before squeeze and excitation),
        "stages.0.0" (the block's output after its residual add), "last".
    """
    unit = functools.partial(conv_norm.apply, config=config.norm, train=train, padding=config.padding)
    activation = ACTIVATIONS[config.activation]
    new: dict[str, Any] = {"stages": []}
    x, new["stem"] = unit(params["stem"], stats["stem"], x=tap("input", images.astype(config.dtype)), stride=2)
    x = tap("stem", activation(x))
    total, done = sum(stage.repeats for stage in config.stages), 0
    for i, blocks in enumerate(_blocks(config)):
        advanced = []
        for j, (stage, channels, _, stride) in enumerate(blocks):
            y, moved = _block(
                unit, stage, params["stages"][i][j], stats["stages"][i][j], x, stride, tap, f"stages.{i}.{j}"
            )
            advanced.append(moved)
            if stride == 1 and channels == stage.channels:
                drop = config.drop_path * done / total
                if drop and key is not None:
                    keep = jax.random.bernoulli(jax.random.fold_in(key, done), 1 - drop, (len(y), 1, 1, 1))
                    y = y * (keep / (1 - drop)).astype(y.dtype)
                y = x + y
            x, done = tap(f"stages.{i}.{j}", y), done + 1
        new["stages"].append(advanced)
    x, new["last"] = unit(params["last"], stats["last"], x=x)
    last_key = None if key is None else jax.random.fold_in(key, total)
    head = functools.partial(classifier.apply, activation=config.activation, dropout=config.dropout, key=last_key)
    return head(params["head"], tap("last", activation(x))), new


def _block(
    unit: Callable, stage: Stage, params: dict, stats: dict, x: Array, stride: int, tap: Tap, where: str
) -> tuple[Array, dict]:
    """One block without its residual add, and the new statistics."""
    new = {}
    activation = ACTIVATIONS[stage.activation]
    for name in ("expand", "depthwise"):
        if name in params:
            spatial = name == "depthwise" or stage.block == "fused"
            x, new[name] = unit(params[name], stats[name], x=x, stride=stride if spatial else 1)
            x = tap(f"{where}.{name}", activation(x)) if "project" in params else activation(x)
    if stage.squeeze:
        squeeze = stage.squeeze
        x = squeeze_excitation.apply(params["squeeze"], x, activation=squeeze.activation, gate=squeeze.gate)
    if "project" in params:
        x, new["project"] = unit(params["project"], stats["project"], x=x)
    return x, new


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """`cross_entropy_sums` of the labels; see `registry`.

    Args:
      batch: images [B, H, W, C] floats, targets [B] integers, weights [B] floats.
    """
    logits, stats = apply(params, stats, config, batch["images"], train=train, key=key if train else None)
    return cross_entropy_sums(logits, batch["targets"], batch["weights"]), stats
