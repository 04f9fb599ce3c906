"""Show that XLA's CPU compiler miscompiles a product with a constant operand: `python FILE`.

Prints the largest relative error of `sum(x @ c)` against the same program run operation by operation.
"""

import jax
import jax.numpy as jnp
import numpy as np


def error(f, x):
    """Return the largest relative error of the compiled function; infinity if it returns NaN."""
    expected = np.asarray(f(x), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        worst = np.max(np.abs(np.asarray(jax.jit(f)(x), np.float64) - expected)) / np.max(np.abs(expected))
    return worst if np.isfinite(worst) else np.inf


x = jax.random.normal(jax.random.key(0), (8, 2, 16, 32))
cases = {
    "constant on the right, then a sum": lambda x: jnp.sum(x @ jnp.full((8, 2, 32, 32), 0.3), -1),
    "the same behind a barrier": lambda x: jnp.sum(x @ jax.lax.optimization_barrier(jnp.full((8, 2, 32, 32), 0.3)), -1),
    "constant on the left, then a sum": lambda x: jnp.sum(jnp.full((8, 2, 16, 16), 0.3) @ x, -1),
    "constant on the right, no sum": lambda x: x @ jnp.full((8, 2, 32, 32), 0.3),
    "a constant [32, 32] on the right, then a sum": lambda x: jnp.sum(x @ jnp.full((32, 32), 0.3), -1),
}
print(f"jax {jax.__version__}, {jax.default_backend()}")
for name, f in cases.items():
    print(f"{name:45} {error(f, x):.1e}")
