"""From a trained network over frames to a graph for inference: batch norms folded, steps of delta activations attached."""

from typing import Any

import jax.numpy as jnp

from deltajax.delta_activations.graph import Graph, Node, Params, Window
from deltajax.layers import batch_norm
from deltajax.models import efficientnet, frames, resnet


def fold(params: dict, stats: dict, config: frames.Config) -> tuple[Graph, Params]:
    """The network of a `models.frames.Config` as (graph, parameters); without delta activations the maps hold plain values.

    Raises:
      ValueError: the network has squeeze and excitation, whose pooling makes every pixel depend on every other; another
        padding than "symmetric"; or a hidden layer of the head with another activation than relu, the graph's.
    """
    builder = _Builder(config, params.get("delta", {}))
    network, statistics = params["network"], stats["network"]
    if isinstance(config.network, resnet.Config):
        _resnet(builder, network, statistics, config.network)
    else:
        _inverted_residuals(builder, network, statistics, config.network)
    return Graph(tuple(builder.nodes)), {"maps": builder.params, "head": network["head"]}


class _Builder:
    """Collects nodes and their parameters."""

    def __init__(self, config: frames.Config, delta: dict):
        self.norm, self.delta = config.network.norm, delta
        self.nodes: list[Node] = []
        self.params: dict[str, dict[str, Any]] = {}
        self._add(Node("input", "input", config.network.in_channels), {}, "input")

    def conv(
        self,
        name: str,
        source: str,
        params: dict,
        stats: dict,
        stride: int,
        *,
        activation: str | None,
        place: str | None,
        residual: tuple[str, dict | None, dict | None] | None = None,
        shortcut_stride: int = 1,
    ) -> str:
        """A convolution with its norm; `residual`: what is added before the activation, through a projection or as it is."""
        kernel, bias = batch_norm.fold(params["norm"], stats["norm"], self.norm, params["conv"])
        width, _, per_group, channels = kernel.shape
        sources = [(source, Window(width, stride, ((width - 1) // 2,) * 2))]
        own = {"kernel": kernel}
        if residual is not None:
            other, projection, of_projection = residual
            sources.append((other, Window(1, shortcut_stride)))
            if projection is not None and of_projection is not None:
                own["shortcut"], more = batch_norm.fold(
                    projection["norm"], of_projection["norm"], self.norm, projection["conv"]
                )
                bias = bias + more
        groups = next(node for node in self.nodes if node.name == source).channels // per_group
        self._add(Node(name, "conv", channels, tuple(sources), activation, groups=groups), {**own, "bias": bias}, place)
        return name

    def max_pool(self, name: str, source: str, window: Window, place: str) -> str:
        """Pooling of a map."""
        channels = next(node for node in self.nodes if node.name == source).channels
        self._add(Node(name, "max_pool", channels, ((source, window),)), {}, place)
        return name

    def add(self, name: str, first: str, second: str, place: str) -> str:
        """The sum of two maps."""
        channels = next(node for node in self.nodes if node.name == first).channels
        self._add(Node(name, "add", channels, ((first, Window()), (second, Window()))), {}, place)
        return name

    def _add(self, node: Node, params: dict, place: str | None) -> None:
        quantized = place in self.delta
        if quantized:
            params = {**params, "step": jnp.abs(self.delta[place]["step"])}
        self.nodes.append(Node(**{**node.__dict__, "quantized": quantized}))
        self.params[node.name] = params


def _resnet(builder: _Builder, params: dict, stats: dict, config: resnet.Config) -> None:
    imagenet = config.stem == "imagenet"
    # Rounding to multiples of a channel's step does not change which value is the largest: in either order. Of neurons' steps
    # there are only as many as pooled pixels.
    before = "stem" if not imagenet or jnp.ndim(builder.delta.get("stem", {}).get("step", 0)) < 3 else None
    x = builder.conv(
        "stem.conv" if imagenet else "stem",
        "input",
        params["stem"],
        stats["stem"],
        2 if imagenet else 1,
        activation="relu",
        place=before,
    )
    if imagenet:
        x = builder.max_pool("stem", x, Window(3, 2, (1, 1)), "stem")
    for i, blocks in enumerate(params["stages"]):
        for j, block in enumerate(blocks):
            of_stats = stats["stages"][i][j]
            names = [name for name in block if name != "shortcut"]
            stride = 2 if i and not j else 1
            y = x
            for name in names:
                last = name == names[-1]
                where = f"stages.{i}.{j}" if last else f"stages.{i}.{j}.{name}"
                residual = (x, block.get("shortcut"), of_stats.get("shortcut")) if last else None
                y = builder.conv(
                    where,
                    y,
                    block[name],
                    of_stats[name],
                    stride if name == names[-2] else 1,
                    activation="relu",
                    place=where,
                    residual=residual,
                    shortcut_stride=stride,
                )
            x = y


def _inverted_residuals(builder: _Builder, params: dict, stats: dict, config: efficientnet.Config) -> None:
    if any(stage.squeeze for stage in config.stages):
        raise ValueError(
            "squeeze and excitation makes every pixel depend on the whole map, so nothing could be skipped; "
            "use stages with squeeze=None"
        )
    if config.padding != "symmetric":
        raise ValueError(f"padding must be symmetric for inference by tiles, got {config.padding!r}")
    if config.head_hidden is not None and config.activation != "relu":
        raise ValueError(f"activation must be relu for a head with a hidden layer, got {config.activation!r}")
    x = builder.conv("stem", "input", params["stem"], stats["stem"], 2, activation=config.activation, place="stem")
    for i, stage in enumerate(config.stages):
        for j, block in enumerate(params["stages"][i]):
            where, of_stats = f"stages.{i}.{j}", stats["stages"][i][j]
            stride = stage.stride if j == 0 else 1
            channels = next(node for node in builder.nodes if node.name == x).channels
            residual = (x, None, None) if stride == 1 and channels == stage.channels else None
            y = x
            names = [name for name in ("expand", "depthwise", "project") if name in block]
            for name in names:
                spatial = name == "depthwise" or (name == "expand" and stage.block == "fused")
                last = name == names[-1]
                # A fused block without projection has its activation before the residual add: two maps.
                alone = last and name != "project" and residual is not None
                y = builder.conv(
                    where if last and not alone else f"{where}.{name}",
                    y,
                    block[name],
                    of_stats[name],
                    stride if spatial else 1,
                    activation=None if name == "project" else stage.activation,
                    place=None if alone else where if last else f"{where}.{name}",
                    residual=residual if last and not alone else None,
                )
                if alone:
                    y = builder.add(where, y, x, where)
            x = y
    builder.conv("last", x, params["last"], stats["last"], 1, activation=config.activation, place="last")
