"""Chunked linear attention, forward and gradients, against one token after the other in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.ops.linear_attention import CHUNK, linear_attention, linear_attention_step


def inputs(length, gated, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, length, 3, 4), dtype) for key in keys[:3])
    g = -jax.random.exponential(keys[3], (2, length, 3), dtype) if gated else None
    return q, k, v[..., :3], g, jax.random.normal(keys[4], (2, 3, 4, 3), dtype)


def one_by_one(q, k, v, g, state, segment_ids=None):
    outputs = []
    for t in range(q.shape[1]):
        if segment_ids is not None and t and segment_ids[0, t] != segment_ids[0, t - 1]:
            state = jnp.zeros_like(state)
        o, state = linear_attention_step(state, q[:, t], k[:, t], v[:, t], None if g is None else g[:, t])
        outputs.append(o)
    return jnp.stack(outputs, axis=1), state


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, CHUNK + 7])
def test_against_the_recurrence(length, gated):
    with jax.enable_x64(True):
        arguments = inputs(length, gated)
        cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), one_by_one(*arguments))

        def chunked(q, k, v, g, state):
            return linear_attention(q, k, v, g, initial_state=state)

        results = [jax.jit(functools.partial(jax.vjp, f))(*arguments) for f in (chunked, one_by_one)]
        (ours, ours_vjp), (theirs, theirs_vjp) = results
        for x, y in zip(
            jax.tree.leaves((ours, ours_vjp(cotangents))),
            jax.tree.leaves((theirs, theirs_vjp(cotangents))),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_documents_stand_alone(gated):
    with jax.enable_x64(True):
        q, k, v, g, state = inputs(CHUNK + 30, gated)
        ids = jnp.asarray(np.repeat([3, 3, 1, 3], [20, 30, CHUNK - 30, 10])[None].repeat(2, 0))
        o, last = linear_attention(q, k, v, g, initial_state=state, segment_ids=ids)
        expected, expected_last = one_by_one(q, k, v, g, state, ids)
        np.testing.assert_allclose(o, expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(last, expected_last, rtol=1e-9, atol=1e-10)


def test_strong_decay_stays_finite():
    q, k, v, _, state = inputs(2 * CHUNK, False, jnp.float32)
    g = jnp.full((2, 2 * CHUNK, 3), -80.0).at[:, 5].set(-jnp.inf)

    def loss(g):
        o, s = linear_attention(q, k, v, g, initial_state=state)
        return jnp.sum(o) + jnp.sum(s)

    value, grad = jax.value_and_grad(loss)(g)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_no_tokens():
    """An empty piece of prefill leaves the state as it is."""
    state = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    q, v = jnp.zeros((2, 0, 3, 4)), jnp.zeros((2, 0, 3, 5))
    o, last = linear_attention(q, q, v, initial_state=state)
    assert o.shape == (2, 0, 3, 5)
    np.testing.assert_array_equal(last, state)
    assert linear_attention(q, q, v)[1].shape == (2, 3, 4, 5)
