"""Delta inference on a CPU by a kernel in C++ (`delta_convolution.cc`): its parameters' layout, and the call."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native

KINDS = ("input", "conv", "max_pool", "add", "concat")
ACTIVATIONS = (None, "relu", "hard_swish", "hard_sigmoid")
_SOURCE = "delta_convolution.cc"
_TARGET = "deltajax_delta_convolution"


def register() -> int:
    """Make the kernel known to XLA; the numbers in a vector of this machine.

    Raises:
      NotImplementedError: the kernel cannot be compiled here.
    """
    return native.register(_SOURCE, (_TARGET,)).deltajax_vector_bytes() // 4


def pack_kernel(kernel: np.ndarray, groups: int = 1) -> np.ndarray:
    """A kernel [rows, columns, inputs of a group, channels] as the C++ kernel reads it: two vectors of channels by taps."""
    rows, columns, inputs, channels = kernel.shape
    lanes = register()
    if groups == channels and inputs == 1 and groups > 1:
        return _padded(kernel.reshape(rows * columns, channels), lanes).reshape(-1)
    by_group = np.moveaxis(kernel.reshape(rows * columns * inputs, groups, channels // groups), 1, 0)
    padded = _padded(by_group, lanes)
    blocks = [padded[:, :, i : i + 2 * lanes].reshape(groups, -1) for i in range(0, padded.shape[2], 2 * lanes)]
    return np.concatenate(blocks, axis=1).reshape(-1)


def pack_bias(bias: np.ndarray, groups: int = 1) -> np.ndarray:
    """Of a convolution, [channels]; `groups`: as of `pack_kernel`."""
    return _padded(bias.reshape(1 if groups == bias.size else groups, -1), register()).reshape(-1)


def _padded(x: np.ndarray, lanes: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)])


def step(maps: list, frame, started, parameters, program: np.ndarray, channels: int) -> tuple:
    """One frame: (maps, in the memory of those given if they are donated; means of the last one; counts).

    Args:
      maps: of every node, [H + margins, W + margins, C] float32, of the frame before; zeros in the margins.
      frame: [H, W, C] float32.
      started: [] bool; false: everything is computed, nothing compared.
      parameters, program: the network, as `parse` in the C++ file says.
      channels: of the last map.
    """
    results = [jax.ShapeDtypeStruct((channels,), jnp.float32), jax.ShapeDtypeStruct((len(maps),), jnp.int32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in maps]
    aliases = {3 + i: 2 + i for i in range(len(maps))}
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases)
    means, counts, *after = call(frame, started, parameters, *maps, program=program)
    return after, means, counts
