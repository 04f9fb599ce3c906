"""Hide constants from XLA's CPU compiler, which miscompiles products with them.

jaxlib 0.12.0 returns wrong values, often NaN, for a batched product followed by a reduction if the
product's right operand is one number broadcast to the whole array. The page
docs/design/xla_cpu_constant_operand.md has a reproducer. Behind an optimization barrier a constant
is an array like any other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import platform


def opaque(*arrays: Any) -> Any:
    """Return the arrays (or None), unchanged in value, as the compiler's optimiser cannot see through them.

    On other platforms than CPUs nothing is done, so that producers still fuse with what reads them.
    """
    return jax.lax.optimization_barrier(arrays) if platform.ambient() == "cpu" else arrays


def zero_state(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the state before the first token, where none is given."""
    return jax.lax.optimization_barrier(jnp.zeros(shape, dtype))
