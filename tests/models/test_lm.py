"""The language model: every mixer, decoding against the parallel pass, packing, layouts of the computation."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import attention, delta, linear_attention
from deltajax.models import lm

MIXERS = {
    "deltanet": delta.deltanet(2, 8),
    "gated_deltanet": delta.gated_deltanet(2, 8, num_value_heads=4, value_head_dim=6),
    "deltaproduct": delta.deltaproduct(2, 8, num_householder=3),
    "gated_deltaproduct": delta.gated_deltaproduct(1, 8, num_value_heads=2),
    "kda": delta.kda(2, 8),
    "gated_linear_attention": linear_attention.gated_linear_attention(2, 8, value_head_dim=6),
    "no_conv": delta.deltanet(2, 8, conv_width=0, beta_max=2.0),
    "attention": attention.Config(4, 8, num_kv_heads=2, qk_norm=True),
    "window": attention.Config(2, 8, window=5),
}


def make(pattern, **fields):
    return lm.Config(vocab_size=31, d_model=16, mlp_dim=24, pattern=pattern, mixers=MIXERS, **fields)


apply = jax.jit(lm.apply, static_argnames="config")


@functools.cache
def model(pattern):
    config = make(pattern)
    return config, lm.init(jax.random.key(0), config)


def tokens(batch, length):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 31)


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_equals_the_parallel_pass(name):
    """Prefill of an odd length, a second chunk, then token by token; the window is shorter than the prompt."""
    config, params = model((name,))
    t = tokens(2, 20)
    expected, none = apply(params, config, t)
    assert none is None
    state = lm.init_state(config, 2, 20)
    logits = []
    for start, stop in [(0, 7), (7, 10), *((i, i + 1) for i in range(10, 20))]:
        piece, state = apply(params, config, t[:, start:stop], state=state)
        logits.append(piece)
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens(shape):
    config, params = model(("kda", "deltaproduct", "attention", "window"))
    state = lm.init_state(config, shape[0], 5)
    logits, after = lm.apply(params, config, tokens(*shape), state=state)
    assert logits.shape == (*shape, 31)
    jax.tree.map(np.testing.assert_array_equal, state, after if shape[0] else state)


def test_beyond_the_length_of_the_state():
    """A window goes on; full attention, which cannot, gives NaN instead of wrong numbers."""
    for name, goes_on in (("window", True), ("attention", False)):
        config, params = model((name,))
        t = tokens(1, 9)
        expected, _ = apply(params, config, t)
        logits, state = apply(params, config, t[:, :3], state=lm.init_state(config, 1, 3))
        np.testing.assert_allclose(logits, expected[:, :3], rtol=1e-4, atol=2e-5)
        logits, _ = apply(params, config, t[:, 3:], state=state)
        if goes_on:
            np.testing.assert_allclose(logits, expected[:, 3:], rtol=1e-4, atol=2e-5)
        else:
            assert np.isnan(logits).all()


def test_configs_can_be_copied_and_not_changed():
    config = make(("kda",))
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert same == config and hash(same) == hash(config)
    with pytest.raises(TypeError):
        config.mixers["kda"] = MIXERS["deltanet"]


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_do_not_see_each_other(name):
    config, params = model((name,))
    t = tokens(1, 24)
    ids = jnp.asarray(np.repeat([3, 1, 3], [2, 13, 9]))[None]
    packed, _ = apply(params, config, t, segment_ids=ids)
    for start, stop in ((0, 2), (2, 15), (15, 24)):
        alone, _ = apply(params, config, t[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-4, atol=2e-5)


def test_window_sees_exactly_its_tokens():
    """One layer: changing a token changes the logits at its own and the next window - 1 positions, no others."""
    config, params = model(("window",))
    t = tokens(1, 16)
    changed = t.at[0, 4].set((t[0, 4] + 1) % 31)
    difference = jnp.abs(apply(params, config, t)[0] - apply(params, config, changed)[0]).max(-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(difference > 1e-6), np.arange(4, 9))


def test_causality():
    config, params = model(("gated_deltanet", "kda", "attention"))
    t = tokens(1, 16)
    changed = t.at[0, 9].set((t[0, 9] + 1) % 31)
    before, after = (apply(params, config, x)[0][0] for x in (t, changed))
    np.testing.assert_allclose(before[:9], after[:9], atol=1e-6)
    assert np.abs(before[9:] - after[9:]).max() > 1e-3


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots", "scan_layers": False}])
def test_layout_of_the_computation_changes_no_number(change):
    base, params = model(("no_conv", "window") * 2)

    @functools.cache
    def gradients(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(lm.apply(p, config, tokens(2, 9))[0] ** 2)))(params)

    both = gradients(base), gradients(make(base.pattern, **change))
    for x, y in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_stays_near_float32_with_finite_gradients(name):
    config, params = model((name,))
    t = tokens(2, 12)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(p, config):
        logits, _ = apply(p, config, t)
        return jnp.mean(jax.nn.logsumexp(logits, -1)), logits

    (_, expected), _ = loss(params, config)
    (_, logits), grads = loss(params, make((name,), dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.03)
    assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("aaa", [("a", 3)]),
        ("abababc", [("ab", 3), ("c", 1)]),
        ("dfdddfddd", [("dfdd", 2), ("d", 1)]),
        ("ab", [("a", 1), ("b", 1)]),
    ],
)
def test_layer_groups(pattern, groups):
    found = lm.layer_groups(tuple(pattern))
    assert found == [(tuple(unit), n) for unit, n in groups]
    assert "".join("".join(unit) * n for unit, n in found) == pattern


def test_stacked_layers_are_drawn_independently():
    _, params = model(("deltanet", "deltanet"))
    first, second = params["groups"][0]["0"]["mixer"]["q"]
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(()), "pattern must name at least one layer"),
        (lambda: make(("delta",)), "pattern names 'delta', which is not one of mixers: deltanet"),
        (lambda: make(("kda",), dtype="float16"), "dtype must be one of float32, bfloat16, got 'float16'"),
        (lambda: make(("kda",), remat="some"), "remat must be one of"),
        (lambda: lm.Config(31, 0, ("kda",), MIXERS), "d_model must be an integer >= 1, got 0"),
        (lambda: lm.Config(31, 8, ("x",), {"x": 3}), "mixers\\['x'\\] must be attention.Config, .* got 3"),
        (lambda: delta.deltanet(0, 8), "num_heads must be an integer >= 1, got 0"),
        (lambda: delta.deltanet(2, 8, num_value_heads=3), "num_value_heads must be a multiple of num_heads = 2, got 3"),
        (lambda: delta.deltanet(2, 8, beta_max=2.5), r"beta_max must be a number in \(0, 2\], got 2.5"),
        (lambda: delta.deltanet(2, 8, gate="vector"), "gate must be one of scalar, channel or none, got 'vector'"),
        (lambda: attention.Config(4, 7), "head_dim must be even"),
        (lambda: attention.Config(4, 8, num_kv_heads=3), "num_kv_heads must divide num_heads = 4, got 3"),
        (lambda: attention.Config(4, 8, window=0), "window must be an integer >= 1 or none, got 0"),
        (lambda: attention.Config(4, 8, rope_base=float("nan")), "rope_base must be a number > 1, got nan"),
        (lambda: delta.deltanet(2.0, 8), r"num_heads must be an integer, got 2\.0"),
        (lambda: delta.deltanet(2, 8, implementation="chunky"), "implementation must be none or one of .*got 'chunky'"),
        (lambda: make("kda"), "pattern must be a tuple .*, got 'kda'"),
    ],
)
def test_bad_configs_are_named(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kda", "attention"])
def test_state_and_segments_exclude_each_other(name):
    config, params = model((name,))
    with pytest.raises(ValueError, match="exclude each other"):
        lm.apply(params, config, tokens(1, 3), segment_ids=jnp.ones((1, 3), int), state=lm.init_state(config, 1, 3))


def test_bad_tokens_are_named():
    config, params = model(("kda",))
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\], got float32 \(1, 3\)"):
        lm.apply(params, config, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"segment_ids must have the shape of tokens, \(2, 3\), got \(1, 3\)"):
        lm.apply(params, config, tokens(2, 3), segment_ids=jnp.ones((1, 3), int))
