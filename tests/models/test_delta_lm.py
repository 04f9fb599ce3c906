"""Language models with delta activations: what is quantised, sparsity by an independent count, decoding, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import attention, delta, delta_activation
from deltajax.models import delta_lm, lm, registry
from deltajax.ops import taps

LM = lm.Config(
    vocab_size=31,
    d_model=16,
    pattern=("delta", "delta", "swa"),
    mixers={"delta": delta.deltanet(2, 8), "swa": attention.Config(2, 8, window=8)},
    mlp_dim=24,
)
CONFIG = delta_lm.Config(LM, delta_activation.Config(init_step=0.4), rate=1e-3)


@pytest.fixture(scope="module")
def params():
    return delta_lm.init(jax.random.key(0), CONFIG)


def batch():
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 31)
    ones = jnp.ones((2, 12))
    return {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "segment_ids": ones.astype(int), "weights": ones}


def test_operations_are_those_of_the_projections():
    """By hand: DeltaNet reads its input by q, k, v and beta, attention by q, k, v; SwiGLU by two matrices."""
    fed = delta_lm.operations(LM)
    shapes = jax.tree.map(lambda x: x.shape, lm.init(jax.random.key(0), LM))
    assert fed["mlp_input"] == 16 * 2 * 24
    delta_net, swa = 16 * (3 * 16 + 2), 16 * 3 * 16
    assert fed["mixer_input"] == pytest.approx((2 * delta_net + swa) / 3), shapes["groups"]


def test_sparsities_are_an_independent_count(params):
    """Activations taken from the quantised model layer by layer, zeros counted by hand."""
    sums, _ = delta_lm.loss_sums(params, {}, CONFIG, batch(), key=None, train=False)
    fed, done, every = delta_lm.operations(LM), 0.0, 0.0
    quantised = {
        place: lambda x, layer, place=place: delta_activation.apply(
            jax.tree.map(lambda leaf: leaf[layer], params["delta"][place]), CONFIG.delta, x
        )[0]
        for place in delta_lm.PLACES
    }
    run = taps.replace(lambda p, t, s: lm.apply(p, LM, t, segment_ids=s)[0], quantised)
    for place in delta_lm.PLACES:
        before = {k: v for k, v in quantised.items()}
        seen = taps.replace_and_capture(
            lambda p, t, s: lm.apply(p, LM, t, segment_ids=s)[0],
            {k: lambda x, i, f=f: ((y := f(x, i)), y) for k, f in before.items()},
        )(params["lm"], batch()["tokens"], batch()["segment_ids"])[1][place]
        d = np.diff(np.asarray(seen), axis=2)
        assert seen.shape == (3, 2, 12, 16) and 0 < np.mean(d == 0) < 1
        done += np.count_nonzero(d) * fed[place]
        every += d.size * fed[place]
        assert float(sums[f"sparsity/{place}"]) / 24 == pytest.approx(np.mean(d == 0), abs=1e-5)
    assert float(sums["temporal_sparsity"]) / 24 == pytest.approx(1 - done / every, abs=1e-5)
    want = run(params["lm"], batch()["tokens"], batch()["segment_ids"])
    np.testing.assert_allclose(delta_lm.apply(params, CONFIG, batch()["tokens"])[0], want, atol=1e-5)


def test_penalty_is_in_the_loss_of_training_only(params):
    train, _ = delta_lm.loss_sums(params, {}, CONFIG, batch(), key=None, train=True)
    evaluation, _ = delta_lm.loss_sums(params, {}, CONFIG, batch(), key=None, train=False)
    assert float(evaluation["loss"]) == pytest.approx(float(train["cross_entropy"]), rel=1e-6)
    assert float(train["loss"]) == pytest.approx(float(train["cross_entropy"] + 1e-3 * train["penalty"]), rel=1e-6)
    gradient = jax.grad(lambda p: delta_lm.loss_sums(p, {}, CONFIG, batch(), key=None, train=True)[0]["penalty"])(
        params
    )
    for place in delta_lm.PLACES:
        assert gradient["delta"][place]["step"].shape == (3, 16) and np.any(gradient["delta"][place]["step"] < 0)


def test_without_delta_activations_it_is_the_plain_model(params):
    plain = dataclasses.replace(CONFIG, delta=None)
    want, _ = lm.apply(params["lm"], LM, batch()["tokens"])
    np.testing.assert_array_equal(delta_lm.apply(params, plain, batch()["tokens"])[0], want)


def test_decoding_equals_the_whole(params):
    tokens = batch()["tokens"]
    whole, _ = delta_lm.apply(params, CONFIG, tokens)
    state = delta_lm.init_state(CONFIG, 2, 12)
    first, state = delta_lm.apply(params, CONFIG, tokens[:, :8], state=state)
    rest, _ = delta_lm.apply(params, CONFIG, tokens[:, 8:], state=state)
    # Rounding to levels may fall to the other side of a tie in few places.
    assert np.mean(np.abs(np.concatenate([first, rest], 1) - whole) > 1e-3) < 0.02


def test_errors():
    with pytest.raises(ValueError, match="rate must be a number >= 0"):
        delta_lm.Config(LM, rate=-1.0)
    with pytest.raises(ValueError, match="steps must be one of channel, layer"):
        delta_lm.Config(LM, delta_activation.Config(steps="neuron"))
    assert registry.module_of(CONFIG) is delta_lm
