"""The compression task's model: what comes back has passed through the output at the last token."""

import jax
import numpy as np
import pytest

from deltajax import data
from deltajax.data import mad
from deltajax.layers import attention, delta
from deltajax.models import autoencoder, lm

MIXERS = {"sees_itself": attention.Config(2, 4, window=1), "delta": delta.deltanet(1, 8, conv_width=0)}


def make(name):
    backbone = lm.Config(vocab_size=17, d_model=8, pattern=(name,), mixers=MIXERS, mlp_dim=8)
    config = autoencoder.Config(backbone, max_length=12)
    return config, autoencoder.init(jax.random.key(0), config)


@pytest.fixture(scope="module")
def batch():
    dataset = data.load(mad.Config(task="compression", seq_len=10, batch_size=4))
    return next(dataset.train_iterator())


def test_nothing_but_the_last_output_reaches_the_decoder(batch):
    config, params = make("sees_itself")  # the last token, the same everywhere, knows only itself
    logits = autoencoder.apply(params, config, batch)
    assert logits.shape == (4, 10, 17)
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-6)
    assert np.ptp(logits, axis=1).max() > 0.1  # positions are told apart
    config, params = make("delta")
    assert np.ptp(autoencoder.apply(params, config, batch), axis=0).max() > 1e-3


def test_sums_by_position_add_up(batch):
    config, params = make("delta")
    sums, stats = autoencoder.loss_sums(params, {}, config, batch, key=None, train=False)
    by_position = autoencoder.position_sums(params, {}, config, batch)
    assert stats == {}
    assert by_position["weight"].tolist() == [4.0] * 9 + [0.0]
    for name, x in sums.items():
        np.testing.assert_allclose(by_position[name].sum(), x, rtol=1e-5)


def test_a_sequence_that_is_too_long(batch):
    config, params = make("delta")
    longer = {name: np.pad(x, [(0, 0), (0, 3)]) for name, x in batch.items()}
    with pytest.raises(ValueError, match="at most max_length = 12 tokens, got 13"):
        autoencoder.apply(params, config, longer)
