"""NNX and Linen modules give the numbers of the functions, forward, with state and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.interop import linen as dj_linen
from deltajax.interop import nnx as dj_nnx
from deltajax.layers import attention, delta, linear_attention, mixer
from deltajax.models import lm

MIXERS = {
    "deltanet": delta.deltanet(2, 4),
    "gated_deltanet": delta.gated_deltanet(2, 4),
    "deltaproduct": delta.deltaproduct(2, 4),
    "gated_deltaproduct": delta.gated_deltaproduct(2, 4),
    "kda": delta.kda(2, 4),
    "gated_linear_attention": linear_attention.gated_linear_attention(2, 4, value_head_dim=6),
    "attention": attention.Config(2, 4, window=3),
}
X = jax.random.normal(jax.random.key(0), (2, 6, 8))
IDS = jnp.asarray([[0, 0, 1, 1, 1, 1]] * 2)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name):
    config = MIXERS[name]
    functions = mixer.module_of(config)
    layer = dj_nnx.Mixer(config, 8, rngs=nnx.Rngs(3))
    params = functions.init(nnx.Rngs(3).params(), config, 8)
    expected, _ = functions.apply(params, config, X, segment_ids=IDS)
    np.testing.assert_array_equal(layer(X, segment_ids=IDS), expected)
    module = dj_linen.Mixer(config)
    assert jax.tree.structure(module.init(jax.random.key(0), X)["params"]["weights"]) == jax.tree.structure(params)
    np.testing.assert_array_equal(module.apply({"params": {"weights": params}}, X, segment_ids=IDS), expected)
    state = layer.init_state(2, 6)
    expected, expected_state = functions.apply(params, config, X, state=state)
    for y, new_state in (layer(X, state=state), module.apply({"params": {"weights": params}}, X, state=state)):
        np.testing.assert_array_equal(y, expected)
        jax.tree.map(np.testing.assert_array_equal, new_state, expected_state)


def test_language_model_with_gradients():
    config = lm.Config(
        vocab_size=11, d_model=8, pattern=("a", "b"), mixers={"a": MIXERS["kda"], "b": MIXERS["attention"]}
    )
    tokens = jnp.arange(12).reshape(2, 6) % 11
    model = dj_nnx.LanguageModel(config, rngs=nnx.Rngs(0))
    params = lm.init(nnx.Rngs(0).params(), config)

    def loss(params):
        return jnp.mean(lm.apply(params, config, tokens, segment_ids=IDS)[0] ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    nnx_value, nnx_gradients = nnx.value_and_grad(lambda m: jnp.mean(m(tokens, segment_ids=IDS) ** 2))(model)
    module = dj_linen.LanguageModel(config)
    linen_value, linen_gradients = jax.value_and_grad(
        lambda v: jnp.mean(module.apply(v, tokens, segment_ids=IDS) ** 2)
    )({"params": {"weights": params}})
    assert value == nnx_value == linen_value
    for other in (nnx_gradients, linen_gradients):
        for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    logits, _ = model(tokens, state=model.init_state(2, 6))
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-5)
