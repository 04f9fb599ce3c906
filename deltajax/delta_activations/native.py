"""Streaming by the C++ kernel (`pallas_kernels/delta_convolution.cc`): a graph as the numbers that it reads, and the call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from deltajax.delta_activations.graph import Graph, Node, Params, Sizes, head
from pallas_kernels import delta_convolution, processors

LARGEST = 2**15  # rows or columns: a pixel's place is one number of 32 bits


def unserved(graph: Graph, params: Params, sizes: Sizes) -> str | None:
    """Why the kernel does not compute this graph here; none if it does."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, and this is {jax.default_backend()}"
    for node in graph.nodes:
        if max(sizes[node.name][:2]) > LARGEST:
            return f"it takes at most {LARGEST} rows and columns (node {node.name})"
        own = params["maps"][node.name]
        if node.activation not in delta_convolution.ACTIVATIONS:
            return f"it has no activation {node.activation!r} (node {node.name})"
        if node.groups > 1 and "shortcut" in own:
            return f"it has no grouped convolutions with a projection (node {node.name})"
    try:
        delta_convolution.register()
    except NotImplementedError as error:
        return str(error)
    return None


class Runner:
    """A graph for frames of one size.

    Attributes:
      memory: bytes that a state holds for the kernel to work in.
    """

    def __init__(self, graph: Graph, sizes: Sizes, params: Params):
        """`params`: any of this graph, of which `unserved` has nothing to say."""
        self.graph, self.sizes, self.margins = graph, sizes, graph.margins()
        self.memory = delta_convolution.memory(self._program(params)[0])

    def prepare(self, params: Params) -> dict[str, Any]:
        """What `advance` takes of the parameters.

        Raises:
          ValueError: the kernel does not compute with them; the message says why.
        """
        reason = unserved(self.graph, params, self.sizes)
        if reason is not None:
            raise ValueError(f"the native kernel does not serve these parameters: {reason}")
        program, parameters = self._program(params)
        own = {"program": program, "parameters": parameters, "head": params["head"]}
        return jax.tree.map(jnp.array, own)

    def advance(
        self,
        maps: dict[str, Array],
        memory: UInt8[Array, "N"],
        started: Array,
        given: dict,
        frame: Float[Array, "H W C"],
    ) -> tuple[Float[Array, "classes"], dict[str, Array], Array, Int[Array, "nodes"]]:
        """One frame: logits, the maps with their margins, the memory, numbers of pixels computed."""
        names = [node.name for node in self.graph.nodes]
        after, memory, means, counts = delta_convolution.step(
            [maps[name] for name in names],
            memory,
            frame,
            started,
            given["program"],
            given["parameters"],
            self.graph.nodes[-1].channels,
        )
        return head(given, means[None, None, None])[0], dict(zip(names, after, strict=True)), memory, counts

    def _program(self, params: Params) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "P"]]:
        """(nodes, parameters) as `run` and `parse` in the C++ file read them."""
        numbers: list[int] = [processors.count()]
        arrays: list[np.ndarray] = []
        length = 0
        index = {node.name: i for i, node in enumerate(self.graph.nodes)}

        def put(array: np.ndarray | None) -> int:
            nonlocal length
            if array is None:
                return -1
            arrays.append(np.pad(array.reshape(-1), (0, -array.size % 16)))
            length += arrays[-1].size // 16
            return length - arrays[-1].size // 16

        for node in self.graph.nodes:
            height, width, channels = self.sizes[node.name]
            own = {name: np.asarray(value, np.float32) for name, value in params["maps"][node.name].items()}
            kinds, activations = delta_convolution.KINDS, delta_convolution.ACTIVATIONS
            numbers += [kinds.index(node.kind), height, width, channels, *self.margins[node.name]]
            numbers += [activations.index(node.activation), node.groups]
            weights: list[np.ndarray | None] = [None] * len(node.sources)
            bias = None
            if node.kind == "conv":
                weights[0], bias = delta_convolution.pack(own["kernel"], own["bias"], node.groups)
            if len(weights) > 1 and "shortcut" in own:
                weights[1], _ = delta_convolution.pack(own["shortcut"], own["bias"])
            steps, apart = _steps(node, own, (height, width, channels))
            numbers += [put(bias), put(steps), apart, len(node.sources)]
            for packed, (source, window) in zip(weights, node.sources, strict=True):
                numbers += [index[source], window.size, window.stride, window.padding[0], put(packed)]
        return np.array(numbers, np.int32), np.concatenate(arrays) if arrays else np.zeros(1, np.float32)


def _steps(node: Node, own: dict, size: tuple[int, int, int]) -> tuple[np.ndarray | None, int]:
    """Steps of one pixel or of all, and how far they are apart (0: one for all); of an input those of a row."""
    if not node.quantized:
        return None, 0
    steps = own["step"]
    if node.kind == "input":
        rows = np.broadcast_to(steps, size if steps.ndim == 3 else size[1:]).reshape(-1)
        return rows, size[1] * size[2] if steps.ndim == 3 else 0
    return np.broadcast_to(steps, size if steps.ndim == 3 else size[2:]).reshape(-1), size[2] if steps.ndim == 3 else 0
