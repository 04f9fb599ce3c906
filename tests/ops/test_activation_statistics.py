"""Statistics against numpy and scipy, and the share of attention against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from deltajax.ops.activation_statistics import (
    activation_statistics,
    first_token_share,
    median,
    padding_mask,
    summarise,
    with_statistics,
)
from deltajax.ops.taps import tag


def test_statistics_of_each_sequence():
    x = np.random.default_rng(0).standard_t(3, (3, 5, 4, 7)).astype(np.float32)
    x[1, 2, 3, 6] = -1000
    got = jax.device_get(jax.jit(activation_statistics, static_argnames="sequences")(x, sequences=2))
    for i in range(2):
        magnitudes = np.sort(np.abs(x[i]).ravel())
        np.testing.assert_array_equal([got[f"top{n}"][i] for n in (1, 2, 3)], magnitudes[:-4:-1])
        assert got["median"][i] == magnitudes[(len(magnitudes) - 1) // 2]
        assert got["kurtosis"][i] == pytest.approx(scipy.stats.kurtosis(x[i].ravel(), fisher=False), rel=1e-4)
    assert (got["position"][1], got["channel"][1]) == (2 * 4 + 3, 6)
    means = summarise(got)
    assert means["ratio"] == pytest.approx(np.mean(got["top1"]) / np.mean(got["median"]), rel=1e-6)
    assert (means["position"], means["channel"]) == (11, 6)


@pytest.mark.parametrize("pad", [1, 6])
def test_padding_does_not_count(pad):
    """Statistics of padded sequences are those of the sequences."""
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, (2, 5, 7)).astype(np.float32)
    padded = np.concatenate([x, np.full((2, pad, 7), 1e4, np.float32)], axis=1)
    mask = np.arange(5 + pad) < 5
    got = jax.device_get(activation_statistics(padded, mask=jnp.asarray(np.broadcast_to(mask, (2, 5 + pad)))))
    for name, expected in jax.device_get(activation_statistics(x)).items():
        compare = np.testing.assert_allclose if name == "kurtosis" else np.testing.assert_array_equal
        compare(got[name], expected, err_msg=name, **({"rtol": 1e-5} if name == "kurtosis" else {}))
    empty = activation_statistics(padded, mask=jnp.array([[False] * (5 + pad), mask.tolist()]))
    assert np.isnan(empty["top1"][0]) and empty["channel"][0] == -1
    means = summarise(jax.device_get(empty))
    assert means["top1"] == got["top1"][1] and means["channel"] == got["channel"][1]


def test_padding_in_a_function():
    """`with_statistics` takes the mask from the function's arguments; shares of padded queries are left out."""

    def f(batch):
        share = jnp.where(padding_mask(batch), 0.25, 100.0)
        tag(share[:, 8 // 16 :: 1], "first_token_share")
        return tag(batch["x"], "residual")

    ids = jnp.array([[1, 1, 2, 2, 0, 0, 0, 0]])
    batch = {"x": jnp.arange(24.0).reshape(1, 8, 3) * 3 % 17, "segment_ids": ids}
    _, got = with_statistics(f, mask=padding_mask)(batch)
    _, expected = with_statistics(lambda batch: tag(batch["x"][:, :4], "residual"))(batch)
    assert float(got["first_token_share"][0, 0]) == 0.25
    assert got["top1"] == expected["top1"] and got["median"] == expected["median"]
    for shape in ((2, 5), (1, 3), (3, 3), (2,)):
        with pytest.raises(ValueError, match="mask must have the shape of activations without channels"):
            activation_statistics(jnp.ones((2, 3, 4)), mask=jnp.ones(shape, bool))
    two = activation_statistics(jnp.ones((1, 3, 2)), mask=jnp.array([[True, False, False]]))
    assert two["top2"][0] == 1 and np.isnan(two["top3"][0])


def test_nothing_is_sorted():
    """A sort of all values would cost 70 times what a partial one does."""
    x = jax.ShapeDtypeStruct((2, 64, 32), jnp.float32)
    text = jax.jit(activation_statistics).lower(x).compile().as_text()
    assert " sort(" not in text and "TopK" in text


def test_a_function_without_blocks():
    with pytest.raises(ValueError, match='nothing to probe: the model tags no block\'s output "residual"'):
        with_statistics(jnp.sin)(jnp.ones(3))


@pytest.mark.parametrize("n", [1, 2, 9, 1000])
def test_median(n):
    x = np.abs(np.random.default_rng(n).normal(size=(4, n)).astype(np.float32))
    x[1] = 0
    x[2] = x[2, 0]
    x[3, : n // 2] = np.inf
    np.testing.assert_array_equal(jax.jit(median)(x), np.sort(x, -1)[:, (n - 1) // 2])


@pytest.mark.parametrize("with_sink", [False, True])
def test_first_token_share(with_sink):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 9, 4, 6))
    k = jax.random.normal(keys[1], (2, 9, 2, 6))
    sink = jax.random.normal(keys[2], (2, 6)) if with_sink else None
    documents = np.array([[0] * 9, [0] * 5 + [1] * 4])
    visible = np.tril(np.ones((9, 9), bool)) & (documents[:, :, None] == documents[:, None, :])
    first = np.zeros((2, 9), bool)
    first[:, 0] = first[1, 5] = True
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, axis=2)) / np.sqrt(6)
    scores = np.where(visible[:, None], scores, -np.inf)
    if sink is not None:
        extra = np.einsum("bthk,hk->bht", q, np.repeat(sink, 2, axis=0)) / np.sqrt(6)
        scores = np.concatenate([scores, extra[..., None]], -1)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = (weights[..., :9] * first[:, None, None]).sum(-1).mean(1)
    got = first_token_share(q, k, jnp.asarray(visible), jnp.asarray(first), sink, queries=9)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_sequence_that_diverged_is_not_left_out():
    """Only padding is: NaN of a sequence that counts is seen in the means."""
    x = np.ones((2, 3, 4), np.float32)
    x[1] = np.nan
    assert np.isnan(summarise(jax.device_get(activation_statistics(x)))["median"])
