"""Operands that are constants inside a jitted function: docs/design/xla_cpu_constant_operand.md."""

import functools
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


NAMES = {"delta": ("q", "k", "v", "beta", "state"), "sums": ("q", "k", "v", "state")}
CASES = [
    *((rule, constant, False, "forward") for rule, names in NAMES.items() for constant in names),
    *((rule, constant, True, "forward") for rule in NAMES for constant in ("k", "g")),
    *((rule, constant, True, way) for rule in NAMES for constant in ("k", "v") for way in ("grad", "vmap")),
]


@functools.cache
def program(rule, way):
    """A function of (arrays that vary, arrays that are constants): outputs, gradients, or outputs of two scales."""

    def run(given, constants):
        if way == "grad":
            return jax.grad(lambda x: sum(jnp.sum(y) for y in outputs(rule, {**x, **constants})))(given)
        if way == "vmap":
            scaled = jax.vmap(lambda s: outputs(rule, {**jax.tree.map(lambda x: s * x, given), **constants}))
            return scaled(jnp.ones(2))
        return outputs(rule, {**given, **constants})

    return run


@pytest.mark.parametrize(("rule", "constant", "gated", "way"), CASES)
def test_one_chunk_followed_by_a_norm(rule, constant, gated, way):
    """A constant inside the jitted function gives what the same array gives as an argument."""
    run = program(rule, way)
    given = {name: ARRAYS[name] for name in {*NAMES[rule], *("g" * gated)} - {constant, "state"}}
    value = -0.3 if constant == "g" else 0.3

    def made():
        return {constant: jnp.full(ARRAYS[constant].shape, value)}

    expected = jax.jit(run)(given, made())
    for _ in range(2 if way == "forward" else 1):  # wrong values differed from one compilation to the next
        actual = jax.jit(lambda given: run(given, made()))(given)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), actual, expected)


def test_the_report_runs(capsys):
    """The reproducer for JAX is a program that works; where the compiler is right, every line says 0."""
    runpy.run_path(str(Path(__file__).parents[2] / "docs/design/xla_cpu_constant_operand.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("jax ") and len(lines) == 6
    assert all(line.endswith(" 0.0e+00") for line in lines[2:5])
