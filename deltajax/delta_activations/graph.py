"""A convolutional network for inference as a list of maps, each computed from windows of earlier maps.

Batch norms are folded, biases and delta activations are part of the map that they end. One `compute` per node serves whole
frames and gathered tiles, so that the streaming runner and dense inference do the same arithmetic.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deltajax.layers import classifier
from deltajax.layers.activation import ACTIVATIONS
from deltajax.ops.delta_activation import quantize

Params = dict[str, Any]
Sizes = dict[str, tuple[int, int, int]]  # height, width, channels of every map
Padding = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows, before and after the columns
NO_PADDING: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class Window:
    """Which pixels of a source one pixel of a map reads: `size` x `size`, at steps of `stride`.

    Attributes:
      size: rows and columns, >= 1.
      stride: of both axes, >= 1.
      padding: zeros before and after each axis of the source, >= 0.
    """

    size: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self):
        """Check the ranges."""
        if min(self.size, self.stride) < 1 or min(self.padding) < 0:
            raise ValueError(f"a window needs size and stride >= 1 and padding >= 0, got {self}")

    def outputs(self, length: int) -> int:
        """Pixels of the map along an axis of `length` source pixels."""
        before, after = self.padding
        return (length + before + after - self.size) // self.stride + 1

    def extent(self, outputs: int) -> int:
        """Source pixels that `outputs` neighbouring pixels of the map read."""
        return (outputs - 1) * self.stride + self.size


@dataclasses.dataclass(frozen=True)
class Node:
    """One map: a linear or pooling operation on the first source, an addition, an activation, a delta activation.

    Attributes:
      name: of the map, and of its parameters.
      kind: "input" (the frame), "conv" (kernel, bias), "max_pool" (of maps that are not negative), "add" or "concat".
      channels: of the map.
      sources: names of the maps read and their windows: one of a "max_pool", one or two of a "conv", whose second source is
        added to it, as it is or through the 1 x 1 convolution "shortcut" (kernel) where the parameters have one. What is
        added or concatenated is read by the window of one pixel.
      activation: of `layers.activation`, or none.
      quantized: whether a delta activation ("step") ends the map. Without it the map holds plain values.
      groups: of the convolution.
    """

    name: str
    kind: Literal["input", "conv", "max_pool", "add", "concat"]
    channels: int
    sources: tuple[tuple[str, Window], ...] = ()
    activation: str | None = None
    quantized: bool = True
    groups: int = 1

    def compute(self, params: dict[str, Array], inputs: list[Array], paddings: list[Padding]) -> Array:
        """The map [N, h, w, channels] from sources [N, h', w', C]; `paddings`: of each source, to be read by its window.

        Whole maps are read with their window's padding, gathered tiles with none; negative paddings crop.
        """
        windows = [window for _, window in self.sources]
        if self.kind == "conv":
            y = _convolve(inputs[0], params["kernel"], windows[0].stride, paddings[0], self.groups) + params["bias"]
            if len(inputs) > 1 and "shortcut" in params:
                y = y + _convolve(inputs[1], params["shortcut"], windows[1].stride, paddings[1])
            elif len(inputs) > 1:
                y = y + _pad(inputs[1], paddings[1], 0)
        elif self.kind == "max_pool":
            size, stride = windows[0].size, windows[0].stride
            y = _pad(inputs[0], paddings[0], -jnp.inf)
            y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), "VALID")
        elif self.kind == "concat":
            y = jnp.concatenate([_pad(x, padding, 0) for x, padding in zip(inputs, paddings, strict=True)], axis=-1)
        else:
            terms = [_pad(x, padding, 0) for x, padding in zip(inputs, paddings, strict=True)]
            y = sum(terms[1:], terms[0])
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        return quantize(y, params["step"]) if self.quantized else y


def _pad(x: Array, padding: Padding, value: float) -> Array:
    if padding == ((0, 0), (0, 0)):
        return x
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0), *((*sides, 0) for sides in padding), (0, 0, 0)])


def _convolve(x: Array, kernel: Array, stride: int, padding: Padding, groups: int = 1) -> Array:
    rows, columns = ((min(before, 0), min(after, 0)) for before, after in padding)
    return jax.lax.conv_general_dilated(
        _pad(x, (rows, columns), 0),
        kernel,
        (stride, stride),
        [(max(before, 0), max(after, 0)) for before, after in padding],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network: nodes in an order in which every source comes before its readers; the last feeds the head.

    Parameters are {"maps": {node: {"kernel", "bias", "shortcut", "step"}}, "head": of `layers.classifier`}.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self):
        """Check the order, the kinds, what each reads, and what max-pooling needs."""
        seen: dict[str, Node] = {}
        for node in self.nodes:
            most = {"input": 0, "conv": 2, "max_pool": 1}.get(node.kind, len(node.sources))
            single = node.sources if node.kind in ("add", "concat") else ()
            if len(node.sources) > most or any(window != Window() for _, window in single):
                raise ValueError(f"node {node.name}: {node.kind} cannot read {node.sources}")
            for source, window in node.sources:
                if source not in seen:
                    raise ValueError(f"node {node.name} reads {source!r}; maps before it: {', '.join(seen) or 'none'}")
                if (
                    node.kind == "max_pool"
                    and window.padding != (0, 0)
                    and seen[source].activation not in ("relu", "relu6")
                ):
                    raise ValueError(f"node {node.name} max-pools {source!r} with margins: it must end in a relu")
            if node.name in seen or (node.kind == "input") != (not node.sources):
                raise ValueError(f"node {node.name}: name used twice, or an input with sources, or no input without")
            seen[node.name] = node
        if not self.nodes or [n.kind for n in self.nodes].count("input") != 1 or self.nodes[0].kind != "input":
            raise ValueError("a graph must begin with its one input")

    def sizes(self, height: int, width: int) -> Sizes:
        """(height, width, channels) of every map, for frames of this size."""
        sizes: Sizes = {}
        for node in self.nodes:
            if node.kind == "input":
                sizes[node.name] = (height, width, node.channels)
                continue
            found = {
                (window.outputs(sizes[source][0]), window.outputs(sizes[source][1])) for source, window in node.sources
            }
            if len(found) != 1 or min(min(size) for size in found) < 1:
                raise ValueError(f"frames of {height} x {width} do not fit: node {node.name} would be of size {found}")
            sizes[node.name] = (*found.pop(), node.channels)
        return sizes

    def margins(self) -> dict[str, tuple[int, int]]:
        """Zeros before and after each axis that the readers of a map need."""
        margins = {node.name: (0, 0) for node in self.nodes}
        for node in self.nodes:
            for name, window in node.sources:
                margins[name] = (max(margins[name][0], window.padding[0]), max(margins[name][1], window.padding[1]))
        return margins

    def check(self, params: Params, sizes: Sizes) -> None:
        """Raise ValueError for parameters that are missing, of another shape than the graph's, or steps that are not > 0."""
        channels = {name: size[-1] for name, size in sizes.items()}
        for node in self.nodes:
            own, reads = params["maps"].get(node.name, {}), [channels[name] for name, _ in node.sources]
            size, kinds = sizes[node.name], {"max_pool": reads[:1], "add": sorted(set(reads)), "concat": [sum(reads)]}
            if kinds.get(node.kind, [node.channels]) != [node.channels]:
                raise ValueError(f"node {node.name}: a {node.kind} of maps of {reads} channels has not {node.channels}")
            wanted: dict[str, list[tuple[int, ...]]] = {"step": [(), size[-1:], size]} if node.quantized else {}
            if node.kind == "conv":
                if node.groups < 1 or reads[0] % node.groups or node.channels % node.groups:
                    raise ValueError(
                        f"node {node.name}: {node.groups} groups of {reads[0]} and {node.channels} channels"
                    )
                side = node.sources[0][1].size
                wanted["kernel"] = [(side, side, reads[0] // node.groups, node.channels)]
                wanted["bias"] = [(node.channels,)]
            if len(reads) == 2 and node.kind == "conv":
                window = node.sources[1][1]
                if "shortcut" in own:
                    wanted["shortcut"] = [(1, 1, reads[1], node.channels)]
                if window.size != 1 or ("shortcut" not in own and (window != Window() or reads[1] != node.channels)):
                    raise ValueError(
                        f"node {node.name}: {node.sources[1]} of {reads[1]} channels cannot be added to it"
                    )
            for name, shapes in wanted.items():
                if name not in own or np.shape(own[name]) not in shapes:
                    found = np.shape(own[name]) if name in own else "none"
                    raise ValueError(
                        f"{name} of {node.name} must have shape {' or '.join(map(str, shapes))}, got {found}"
                    )
            if node.quantized:
                step = np.asarray(own["step"]).astype(np.float32)
                if not (np.isfinite(step) & (step >= np.finfo(np.float32).tiny)).all():  # XLA takes less for zero
                    raise ValueError(f"steps of {node.name} must be > 0 and finite, got {step.min()} to {step.max()}")
        weights = params["head"]["hidden" if "hidden" in params["head"] else "weight"]
        if np.ndim(weights) != 2 or np.shape(weights)[0] != self.nodes[-1].channels:
            raise ValueError(
                f"weights of the head must have shape ({self.nodes[-1].channels}, ...), got {np.shape(weights)}"
            )

    def operations(self, params: Params, height: int, width: int) -> dict[str, float]:
        """Multiply-accumulates that each map feeds in all, margins included; over its size: its fan-out."""
        sizes = self.sizes(height, width)
        fed = dict.fromkeys(sizes, 0.0)
        for node in self.nodes:
            rows, columns, _ = sizes[node.name]
            names = ("kernel", "shortcut") if node.kind == "conv" else ()
            for name, (source, _) in zip(names, node.sources, strict=False):
                if name in params["maps"][node.name]:
                    fed[source] += rows * columns * math.prod(params["maps"][node.name][name].shape)
        last = self.nodes[-1].name
        head = params["head"]
        fed[last] += math.prod((head["hidden"] if "hidden" in head else head["weight"]).shape)
        return fed


def inside(value: Array, size: tuple[int, ...], margins: tuple[int, int]) -> Array:
    """A map [size] without its margins."""
    return value[margins[0] : margins[0] + size[0], margins[0] : margins[0] + size[1]]


def maps(graph: Graph, params: Params, frames: Float[Array, "B H W C"]) -> dict[str, Array]:
    """All maps [B, h, w, c] of frames that are independent of each other."""
    values: dict[str, Array] = {}
    for node in graph.nodes:
        inputs = [values[source] for source, _ in node.sources] or [frames]
        paddings = [(window.padding, window.padding) for _, window in node.sources] or [NO_PADDING]
        values[node.name] = node.compute(params["maps"][node.name], inputs, paddings)
    return values


def head(params: Params, x: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
    """Logits of the last map."""
    # Alone, so that the mean is summed in one order wherever the map comes from.
    return classifier.apply(params["head"], jax.lax.optimization_barrier(x))


def apply(graph: Graph, params: Params, frames: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
    """Dense inference, frame by frame: what the streaming runner must equal."""
    return head(params, maps(graph, params, frames)[graph.nodes[-1].name])
