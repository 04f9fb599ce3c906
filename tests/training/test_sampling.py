"""Drawing tokens: exactly the tokens that the settings allow, with the probabilities that they ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.training.config import Sampling
from deltajax.training.sampling import INVALID, sample


def frequencies(logits, draws=4000, **settings):
    """How often each token is drawn."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    tokens = np.asarray(sample(rows, jax.random.key(0), Sampling(**settings)))
    return np.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("logits", "settings", "allowed"),
    [
        ([1.0] * 5, {"top_k": 1, "top_p": 1.0}, {0}),
        ([1.0] * 5, {"top_k": 3, "top_p": 1.0}, {0, 1, 2}),
        ([0.0, 2.0, 1.0, 1.0], {"top_k": 2, "top_p": 1.0}, {1, 2}),
        ([1.0] * 4, {"top_p": 0.5}, {0, 1}),
        ([1.0] * 4, {"top_p": 0.51}, {0, 1, 2}),
        ([0.0, 5.0, 0.0], {"top_p": 1e-50}, {1}),
        ([0.0, 0.001, 0.0], {"temperature": 1e-38, "top_p": 1.0}, {1}),
        ([0.0, 0.001, 0.0], {"temperature": 1e-300, "top_p": 1.0}, {1}),
        ([3e38, 0.0, 3e38], {"temperature": 0.5, "top_p": 1.0}, {0, 2}),
        ([-np.inf, 0.0, -np.inf], {"top_p": 1.0}, {1}),
        ([0.0, 1.0], {"top_k": 50, "top_p": 1.0}, {0, 1}),
        ([1.0, 1.0], {"temperature": 0.0}, {0}),
    ],
)
def test_what_may_be_drawn(logits, settings, allowed):
    assert set(np.flatnonzero(frequencies(logits, **settings))) == allowed


def test_probabilities_after_both_limits():
    """Top-p counts what top-k leaves, after temperature."""
    logits, temperature = np.array([2.0, 1.0, 0.5, 0.0, -1.0]), 0.7
    expected = np.exp(logits / temperature) * [1, 1, 1, 0, 0]
    expected /= expected.sum()
    kept = expected * (np.cumsum(expected) - expected < 0.8)
    actual = frequencies(logits, temperature=temperature, top_k=3, top_p=0.8, draws=40_000)
    np.testing.assert_allclose(actual, kept / kept.sum(), atol=0.01)


def test_top_k_of_bfloat16_is_exact():
    rows = jnp.full((500, 7), 1.0, jnp.bfloat16)
    assert set(np.asarray(sample(rows, jax.random.key(1), Sampling(top_k=2, top_p=1.0)))) == {0, 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(bad, temperature):
    rows = jnp.array([[0.0, bad, 1.0], [-np.inf] * 3, [0.0, 9.0, 1.0]])
    tokens = np.asarray(sample(rows, jax.random.key(0), Sampling(temperature=temperature, top_k=1)))
    assert tokens.tolist() == [INVALID, INVALID, 1]
