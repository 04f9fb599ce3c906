"""Operands that are constants inside a jitted function: docs/design/xla_cpu_constant_operand.md."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.ops import delta_rule, linear_attention

KEYS = jax.random.split(jax.random.key(0), 6)
ARRAYS = {name: 0.3 * jax.random.normal(key, (8, 16, 2, 32)) for name, key in zip("qkv", KEYS, strict=False)}
ARRAYS["beta"] = jax.random.uniform(KEYS[3], (8, 16, 2))
ARRAYS["g"] = -jax.random.exponential(KEYS[4], (8, 16, 2))
ARRAYS["state"] = jax.random.normal(KEYS[5], (8, 2, 32, 32))


def outputs(rule, arrays):
    """Sums of squares, as a norm after the operation takes them."""
    q, k, v, beta, g, state = (arrays.get(name) for name in ("q", "k", "v", "beta", "g", "state"))
    if rule == "delta":
        o, last = delta_rule(q, k, v, beta, g, initial_state=state, implementation="chunked")
    else:
        o, last = linear_attention(q, k, v, g, initial_state=state)
    return jnp.sum(o**2, axis=-1), jnp.sum(last**2, axis=-1)


CASES = [
    (rule, constant, gated, way)
    for rule in ("delta", "sums")
    for constant in ("q", "k", "v", "beta", "g", "state", "none")
    for gated, way in ((False, "forward"), (True, "forward"), (True, "grad"), (False, "vmap"))
    if not (constant == "g" and not gated) and not (rule == "sums" and constant == "beta")
]


@pytest.mark.parametrize(("rule", "constant", "gated", "way"), CASES)
def test_one_chunk_followed_by_a_norm(rule, constant, gated, way):
    """A constant inside the jitted function gives what the same array gives as an argument."""
    names = {"q", "k", "v", "beta"} | ({"g"} if gated else set())
    given = {name: ARRAYS[name] for name in names - {constant}}
    value = {"g": -0.3}.get(constant, 0.3)

    def run(given, made):
        if way == "grad":
            return jax.grad(lambda x: sum(jnp.sum(y) for y in outputs(rule, {**x, **made})))(given)
        if way == "vmap":
            return jax.vmap(lambda s: outputs(rule, {**jax.tree.map(lambda x: s * x, given), **made}))(jnp.ones(2))
        return outputs(rule, {**given, **made})

    def constants():
        return {} if constant == "none" else {constant: jnp.full(ARRAYS[constant].shape, value)}

    expected = jax.jit(run)(given, constants() | ({} if constant != "none" else {"state": jnp.zeros((8, 2, 32, 32))}))
    for _ in range(2 if way == "forward" else 1):  # wrong values differed from one compilation to the next
        actual = jax.jit(lambda given: run(given, constants()))(given)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), actual, expected)


def test_the_report_runs(capsys):
    """The reproducer for JAX is a program that works; where the compiler is right, every line says 0."""
    runpy.run_path(str(Path(__file__).parents[2] / "docs/design/xla_cpu_constant_operand.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("jax ") and len(lines) == 6
    assert all(line.endswith(" 0.0e+00") for line in lines[2:5])
