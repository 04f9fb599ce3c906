"""A state of zeros must not be folded into what reads it: see `deltajax.ops.zero_state`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.ops import delta_rule
from deltajax.ops.linear_attention import linear_attention


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", ["delta", "sums"])
def test_one_chunk_followed_by_a_norm(rule, gated):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (0.3 * jax.random.normal(key, (8, 16, 2, 32)) for key in keys[:3])
    beta = jax.random.uniform(keys[3], (8, 16, 2))
    g = -jax.random.exponential(keys[4], (8, 16, 2)) if gated else None

    def norms(q, k, v):
        o = delta_rule(q, k, v, beta, g)[0] if rule == "delta" else linear_attention(q, k, v, g)[0]
        return jnp.sum(o**2, axis=-1)

    with jax.disable_jit():
        expected = norms(q, k, v)
    for _ in range(2):  # what was read instead differed from one compilation to the next
        np.testing.assert_allclose(jax.jit(lambda *x: norms(*x))(q, k, v), expected, rtol=1e-4, atol=1e-6)
