"""The state before the first token, where none is given."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def zero_state(shape: tuple[int, ...], dtype) -> Array:
    """Zeros that the compiler cannot see through.

    XLA's CPU compiler (jaxlib 0.12.0) fuses `sum(q @ state + ...)` with a state known to be one number everywhere into a kernel
    that reads memory of others: a single chunk followed by a norm gave NaN or noise. Behind the barrier the
    state is an array like any other.
    """
    return jax.lax.optimization_barrier(jnp.zeros(shape, dtype))
