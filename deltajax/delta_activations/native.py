"""A graph as the numbers that the C++ kernel for delta inference reads (`pallas_kernels/delta_convolution.cc`)."""

from collections.abc import Mapping

import jax
import numpy as np

from deltajax.delta_activations.graph import Graph, Node, Params
from pallas_kernels import delta_convolution

LARGEST = 2**15  # rows or columns: a pixel's place is one number of 32 bits


def unserved(graph: Graph, params: Params, sizes: Mapping[str, tuple]) -> str | None:
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
        if any(value.dtype != np.float32 for value in own.values()):
            return f"it computes float32 only (node {node.name})"
    try:
        delta_convolution.register()
    except NotImplementedError as error:
        return str(error)
    return None


def program(graph: Graph, params: Params, sizes: Mapping[str, tuple], margins: Mapping[str, tuple]) -> tuple:
    """(nodes, parameters) as `parse` in the C++ file reads them: int64 [..] and float32 [..]."""
    numbers: list[int] = []
    arrays: list[np.ndarray] = []
    length = 0
    index = {node.name: i for i, node in enumerate(graph.nodes)}

    def put(array: np.ndarray | None) -> int:
        nonlocal length
        if array is None:
            return -1
        arrays.append(np.pad(array.reshape(-1), (0, -array.size % 16)))
        length += arrays[-1].size
        return length - arrays[-1].size

    for node in graph.nodes:
        height, width, channels = sizes[node.name]
        own = {name: np.asarray(value) for name, value in params["maps"][node.name].items()}
        kinds, activations = delta_convolution.KINDS, delta_convolution.ACTIVATIONS
        numbers += [kinds.index(node.kind), height, width, channels, *margins[node.name]]
        numbers += [activations.index(node.activation), node.groups]
        bias = delta_convolution.pack_bias(own["bias"], node.groups) if node.kind == "conv" else None
        steps, apart = _steps(node, own, (height, width, channels))
        numbers += [put(bias), put(steps), apart, len(node.sources)]
        kernels = [own["kernel"], own.get("shortcut")] if node.kind == "conv" else [None] * len(node.sources)
        for kernel, (source, window) in zip(kernels, node.sources, strict=False):
            packed = None if kernel is None else delta_convolution.pack_kernel(kernel, node.groups)
            numbers += [index[source], window.size, window.stride, window.padding[0], put(packed)]
    return np.array(numbers, np.int64), np.concatenate(arrays) if arrays else np.zeros(1, np.float32)


def _steps(node: Node, own: dict, size: tuple[int, int, int]) -> tuple[np.ndarray | None, int]:
    """Steps of one pixel or of all, and how far they are apart (0: one for all); of an input those of a row."""
    if not node.quantized:
        return None, 0
    steps = np.abs(own["step"])
    if node.kind == "input":
        rows = np.broadcast_to(steps, size if steps.ndim == 3 else size[1:]).reshape(-1)
        return rows, size[1] * size[2] if steps.ndim == 3 else 0
    return np.broadcast_to(steps, size if steps.ndim == 3 else size[2:]).reshape(-1), size[2] if steps.ndim == 3 else 0
