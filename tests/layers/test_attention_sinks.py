"""What stands beside tokens in attention, gates, biases and partial rotation, against the formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import attention

X = np.asarray(jax.random.normal(jax.random.key(0), (2, 7, 12)))


def expected(params, config):
    """Softmax attention, head by head."""
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    bias = {name: p.get(f"{name}_bias", 0) for name in "qkvo"}
    q, k, v = (np.moveaxis((X @ p[n] + bias[n]).reshape(2, 7, -1, config.head_dim), 2, 0) for n in "qkv")
    half = int(config.head_dim * config.rope_fraction) // 2
    angles = np.arange(7)[:, None] * config.rope_base ** (-np.arange(half) / half)

    def rotate(x):
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
        return np.concatenate([*turned, x[..., 2 * half :]], -1)

    group = config.num_heads // config.kv_heads
    outputs = []
    for head in range(config.num_heads):
        scores = rotate(q[head]) @ rotate(k[head // group]).swapaxes(1, 2) / np.sqrt(config.head_dim)
        weights = np.exp(np.where(np.tril(np.ones((7, 7), bool)), scores, -np.inf))
        total, extra = weights.sum(-1, keepdims=True), 0
        if config.sink == "one":
            total = total + 1
        if config.sink == "kv":
            mine = np.exp(rotate(q[head]) @ p["sink_k"][head // group] / np.sqrt(config.head_dim))[..., None]
            total, extra = total + mine, mine * p["sink_v"][head // group]
        outputs.append((weights @ v[head // group] + extra) / total)
    o = np.concatenate(outputs, -1)
    if config.gated:
        o = o / (1 + np.exp(-X @ p["gate"]))
    return o @ p["o"] + bias["o"]


@pytest.mark.parametrize(
    "config",
    [
        attention.Config(4, 8, num_kv_heads=2, sink="kv", gated=True),
        attention.Config(2, 8, sink="one", rope_fraction=0.25, bias=True),
    ],
    ids=["kv, gated", "one, biases, a quarter rotated"],
)
def test_forms(config):
    params = attention.init(jax.random.key(1), config, 12)
    keys = iter(jax.random.split(jax.random.key(2), len(params)))
    params = {name: w + 0.3 * jax.random.normal(next(keys), w.shape) for name, w in params.items()}
    y, _ = jax.jit(attention.apply, static_argnums=1)(params, config, jnp.asarray(X))
    np.testing.assert_allclose(y, expected(params, config), rtol=1e-4, atol=1e-5)
    state = attention.init_state(config, 12, 2, 7)
    first, state = attention.apply(params, config, jnp.asarray(X[:, :4]), state=state)
    rest, _ = attention.apply(params, config, jnp.asarray(X[:, 4:]), state=state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sink": "two"}, "sink must be one of kv, one or none, got 'two'"),
        ({"rope_fraction": 0.1}, "rope_fraction of head_dim must be even and >= 2, got 0"),
        ({"rope_fraction": 1.5}, r"rope_fraction must be a number in \(0, 1\], got 1.5"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        attention.Config(2, 8, **fields)
