"""GPT-NeoX: Pythia's published sizes, and that packing, decoding and unrolling give the numbers of the plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models import gpt_neox

# Parameters outside of the embeddings, as the model cards print them.
PUBLISHED = {
    "14m": 1_189_888,
    "31m": 4_739_072,
    "70m": 18_915_328,
    "160m": 85_056_000,
    "410m": 302_311_424,
    "1b": 805_736_448,
    "1.4b": 1_208_602_624,
    "2.8b": 2_517_652_480,
    "6.9b": 6_444_163_072,
    "12b": 11_327_027_200,
}
VOCABULARY = {"6.9b": 50432, "12b": 50688}


def test_pythia_has_the_published_numbers_of_parameters():
    assert gpt_neox.PYTHIA.keys() == PUBLISHED.keys()
    for size, expected in PUBLISHED.items():
        config = gpt_neox.pythia(size)
        embeddings = 2 * VOCABULARY.get(size, 50304) * config.d_model
        assert gpt_neox.num_params(config) == expected + embeddings, size
    with pytest.raises(ValueError, match=r"size '160' is not known; did you mean '160m'\?"):
        gpt_neox.pythia("160")


@pytest.mark.parametrize(
    "changes", [{}, {"sink": "kv", "gated": True, "parallel_residual": False}], ids=["plain", "with cures"]
)
def test_packed_decoded_and_unrolled(changes):
    config = gpt_neox.Config(23, 16, 3, 2, **changes)
    params = jax.tree.map(lambda x: 3 * x, gpt_neox.init(jax.random.key(0), config))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 23)
    apply = jax.jit(gpt_neox.apply, static_argnums=1)
    expected, _ = apply(params, config, tokens)
    unrolled = dataclasses.replace(config, scan_layers=False, remat=True)
    np.testing.assert_allclose(apply(params, unrolled, tokens)[0], expected, rtol=1e-5, atol=1e-5)

    packed = jnp.concatenate([tokens[:, :4], tokens], axis=1)
    ids = jnp.broadcast_to(jnp.array([0] * 4 + [1] * 9), packed.shape)
    np.testing.assert_allclose(apply(params, config, packed, segment_ids=ids)[0][:, 4:], expected, rtol=1e-5, atol=1e-5)

    logits, state = apply(params, config, tokens[:, :7], state=gpt_neox.init_state(config, 2, 9))
    found = [logits]
    for t in (7, 8):
        logits, state = apply(params, config, tokens[:, t : t + 1], state=state)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-5, atol=1e-5)
