"""The linear attention layer against the form of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import linear_attention
from deltajax.layers.norm import rms_norm


def test_elu_is_the_papers_with_its_denominator():
    """arXiv 2006.16236, eq. 12: the denominator, a positive number per token and head, cancels in the norm of the output."""
    config = linear_attention.Config(2, 4, 3, feature_map="elu", conv_width=0)
    params = linear_attention.init(jax.random.key(0), config, 8)
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    y, _ = linear_attention.apply(params, config, x)

    q, k, v = ((x @ params[name]).reshape(2, 9, 2, -1) for name in "qkv")
    q, k, v = jnp.where(q > 0, q + 1, jnp.exp(q)), jnp.where(k > 0, k + 1, jnp.exp(k)), jax.nn.silu(v)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * np.tri(9)
    o = jnp.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v)
    expected = rms_norm(o, params["norm"], config.norm_eps).reshape(2, 9, -1) @ params["o"]
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


def test_unknown_feature_map():
    with pytest.raises(ValueError, match="feature_map must be one of unit, elu, got 'relu'"):
        linear_attention.Config(1, 4, feature_map="relu")
