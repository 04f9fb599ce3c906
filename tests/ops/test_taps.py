"""Values seen and replaced inside functions of every kind, with nothing else changed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import attention, delta
from deltajax.models import lm
from deltajax.ops import taps
from deltajax.ops.taps import capture, replace, tag

WEIGHTS = jax.random.normal(jax.random.key(0), (3, 4, 4))
X = jax.random.normal(jax.random.key(1), (2, 4))


def plain(weights, x):
    """What every form below computes: (sum of the last value, the three values)."""
    seen = []
    for w in weights:
        x = x + jax.nn.silu(x @ w)
        seen.append(x)
    return jnp.sum(x), jnp.stack(seen)


def block(x, w):
    return tag(x + jax.nn.silu(x @ w), "residual"), None


def loop(weights, x):
    for w in weights:
        x, _ = block(x, w)
    return jnp.sum(x)


def scan(weights, x):
    return jnp.sum(jax.lax.scan(block, x, weights)[0])


def remat(weights, x):
    return jnp.sum(jax.lax.scan(jax.checkpoint(block), x, weights)[0])


def jitted_scan_then_loop(weights, x):
    x, _ = jax.jit(lambda x: jax.lax.scan(block, x, weights[:2], unroll=2))(x)
    return jnp.sum(jax.jit(block)(x, weights[2])[0])


FORMS = [loop, scan, remat, jitted_scan_then_loop]


@pytest.mark.parametrize("f", FORMS)
def test_probes_see_every_value_and_change_none(f):
    value, seen = plain(WEIGHTS, X)
    captured = jax.jit(capture(f, {"residual": lambda x: {"x": x, "max": jnp.max(x)}}))
    got, found = captured(WEIGHTS, X)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(found["residual"]["x"], seen, rtol=1e-6)
    np.testing.assert_allclose(found["residual"]["max"], seen.max((1, 2)), rtol=1e-6)
    gradient, _ = jax.grad(captured, has_aux=True)(WEIGHTS, X)
    np.testing.assert_allclose(gradient, jax.grad(lambda w: plain(w, X)[0])(WEIGHTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", FORMS)
def test_values_are_replaced_at_their_place(f):
    """The second value is set to 1: what follows is computed from that."""
    changed = replace(f, {"residual": lambda x, place: jnp.where(place == 1, jnp.ones_like(x), x)})
    expected = jnp.sum(block(jnp.ones_like(X), WEIGHTS[2])[0])
    np.testing.assert_allclose(jax.jit(changed)(WEIGHTS, X), expected, rtol=1e-6)


def test_flax_modules():
    """Linen and NNX, scanned by their own transformations; the line in the module is JAX's own identity."""

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jax.ad_checkpoint.checkpoint_name(x + nn.Dense(4)(x), "residual"), None

    module = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = module.init(jax.random.key(0), X, None)

    class NnxBlock(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return jax.ad_checkpoint.checkpoint_name(x + self.dense(x), "residual")

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return NnxBlock(nnx.Rngs(key))

    graph, state = nnx.split(make(jax.random.split(jax.random.key(0), 3)))

    @nnx.jit
    def run(blocks, x):
        return nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)

    def apply_nnx(state, x):
        return run(nnx.merge(graph, state), x)

    for f, params in ((lambda v, x: module.apply(v, x, None)[0], variables), (apply_nnx, state)):
        y, seen = jax.jit(capture(f, {"residual": lambda x: x}))(params, X)
        np.testing.assert_allclose(y, f(params, X), rtol=1e-6)
        assert seen["residual"].shape == (3, 2, 4)
        np.testing.assert_array_equal(seen["residual"][-1], y)
        assert np.abs(np.diff(seen["residual"], axis=0)).max() > 0.1


@pytest.mark.parametrize("scan_layers", [True, False])
def test_language_model(scan_layers):
    """Groups of unequal units: places follow the order of the layers, and attention is found where it stands."""
    mixers = {"d": delta.deltanet(1, 4, conv_width=0, implementation="reference"), "a": attention.Config(2, 4)}
    config = lm.Config(11, 8, ("d", "a") * 2 + ("d",), mixers, mlp_dim=8, scan_layers=scan_layers)
    params = lm.init(jax.random.key(0), config)
    tokens = jnp.arange(12).reshape(2, 6) % 11

    def hidden(params):
        return lm.hidden(params, config, tokens)[0]

    plain, attentive = (["mixer_input", *seen, "mlp_input", "residual"] for seen in ([], ["first_token_share"]))
    assert taps.tags(hidden, params) == (plain + attentive) * 2 + plain
    captured = capture(hidden, {"residual": lambda x: x, "first_token_share": lambda x: x})
    (y, seen), expected = jax.jit(lambda params: (captured(params), hidden(params)))(params)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert seen["first_token_share"].shape == (2, 2, 6)
    last = seen["residual"][-1]
    normed = last / jnp.sqrt(jnp.mean(last**2, -1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(normed, y, rtol=1e-4, atol=1e-5)
    assert seen["residual"].shape == (5, 2, 6, 8)


def test_what_cannot_be_captured_is_named():
    with pytest.raises(ValueError, match="no value is tagged 'residul' in scan"):
        capture(scan, {"residul": jnp.max})(WEIGHTS, X)

    def unending(x):
        return jax.lax.while_loop(lambda x: jnp.all(x < 9), lambda x: tag(x + 1, "residual"), x)

    with pytest.raises(ValueError, match="a tagged value stands inside while; it may stand inside scan, jit and check"):
        capture(unending, {"residual": jnp.max})(X)


def test_a_tag_costs_nothing():
    """The compiled program is the one without tags."""

    def untagged(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (x + jax.nn.silu(x @ w), None), x, weights)[0])

    with_tags, without = (jax.jit(jax.grad(f)).lower(WEIGHTS, X).compile().cost_analysis() for f in (scan, untagged))
    assert with_tags["flops"] == without["flops"] > 0
    assert with_tags["bytes accessed"] == without["bytes accessed"]


def test_one_tag_on_values_of_different_widths():
    def f(x):
        return tag(tag(x, "residual")[:, :2], "residual")

    with pytest.raises(ValueError, match=r"probes of 'residual' gave results of different shapes.* differ in width"):
        capture(f, {"residual": lambda x: x})(jnp.ones((1, 3)))
    assert capture(f, {"residual": jnp.sum})(jnp.ones((1, 3)))[1]["residual"].tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"must have its shape \(1, 3\), got \(3,\)"):
        replace(f, {"residual": lambda x, place: x[0]})(jnp.ones((1, 3)))
