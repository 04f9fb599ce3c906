"""Delta inference on a CPU by a kernel in C++ (`delta_convolution.cc`): its parameters' layout, and the call."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native

KINDS = ("input", "conv", "max_pool", "add", "concat")
ACTIVATIONS = (None, "relu", "hard_swish", "hard_sigmoid", "relu6")
_SOURCE = "delta_convolution.cc"
_TARGET = "deltajax_delta_convolution"


def register() -> int:
    """Make the kernel known to XLA; the numbers in a vector of this machine.

    Raises:
      NotImplementedError: the kernel cannot be compiled here.
    """
    return native.register(_SOURCE, (_TARGET,)).deltajax_vector_bytes() // 4


def pack(kernel: np.ndarray, bias: np.ndarray, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [rows, columns, inputs of a group, channels] and a bias [channels] as the C++ kernel reads them.

    Channels of a group are filled up to whole vectors; weights stand by two vectors of channels, then taps. Where every
    channel is a group of its own with one input, vectors are of channels that follow each other.
    """
    rows, columns, inputs, channels = kernel.shape
    lanes = register()
    if groups == channels and inputs == 1 and groups > 1:
        return _padded(kernel.reshape(rows * columns, channels), lanes).reshape(-1), _padded(bias, lanes)
    by_group = np.moveaxis(kernel.reshape(rows * columns * inputs, groups, channels // groups), 1, 0)
    padded = _padded(by_group, lanes)
    blocks = [padded[:, :, i : i + 2 * lanes].reshape(groups, -1) for i in range(0, padded.shape[2], 2 * lanes)]
    return np.concatenate(blocks, axis=1).reshape(-1), _padded(bias.reshape(groups, -1), lanes).reshape(-1)


def memory(program: np.ndarray) -> int:
    """Bytes in which frames of a network are worked."""
    function = native.register(_SOURCE, (_TARGET,)).deltajax_delta_convolution_memory
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64)
    return function(program.ctypes.data, program.size)


def _padded(x: np.ndarray, lanes: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)])


def step(maps: list, memory, frame, started, program, parameters, channels: int) -> tuple:
    """One frame: (maps and memory, in place if they are donated; means of the last map; counts).

    Under vmap one after the other.

    Args:
      maps: of every node, [H + margins, W + margins, C] float32, of the frame before; zeros in the margins.
      memory: [`memory(program)`] uint8, anything.
      frame: [H, W, C] float32.
      started: [] bool; false: everything is computed, nothing compared.
      program, parameters: the network, int32 and float32, as `run` and `parse` in the C++ file say.
      channels: of the last map.
    """
    results = [jax.ShapeDtypeStruct((channels,), jnp.float32), jax.ShapeDtypeStruct((len(maps),), jnp.int32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (memory, *maps)]
    aliases = {4 + i: 2 + i for i in range(1 + len(maps))}
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases, vmap_method="sequential")
    means, counts, memory, *after = call(frame, started, program, parameters, memory, *maps)
    return after, memory, means, counts
