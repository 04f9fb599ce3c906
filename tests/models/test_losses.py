"""Masked places reach neither the loss nor its gradient, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.models.losses import cross_entropies, cross_entropy_sums

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5))
TARGETS = jnp.array([[0, 1, 2], [3, 4, 0]])
WEIGHTS = jnp.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])


@pytest.mark.parametrize("target", [-100, -1, 5, 2**31 - 1])
@pytest.mark.parametrize("logit", [0.0, np.nan, np.inf, -np.inf])
def test_masked_places_do_not_count(target, logit):
    masked = WEIGHTS == 0
    targets = jnp.where(masked, target, TARGETS)
    logits = jnp.where(masked[..., None], logit, LOGITS)

    def loss(logits, targets):
        return cross_entropy_sums(logits, targets, WEIGHTS)["loss"]

    expected, gradient = jax.value_and_grad(loss)(LOGITS, TARGETS)
    value, actual = jax.value_and_grad(loss)(logits, targets)
    assert value == expected and np.isfinite(expected)
    np.testing.assert_array_equal(actual, gradient)
    sums = cross_entropy_sums(logits, targets, WEIGHTS)
    for name, x in cross_entropy_sums(LOGITS, TARGETS, WEIGHTS).items():
        assert sums[name] == x


@pytest.mark.parametrize("target", [-1, 5])
def test_a_counted_target_outside_the_classes_is_nan(target):
    """Not the loss of another class."""
    losses = cross_entropies(LOGITS, TARGETS.at[0, 0].set(target), WEIGHTS)["loss"]
    assert np.isnan(losses[0, 0]) and np.isfinite(losses).sum() == losses.size - 1
