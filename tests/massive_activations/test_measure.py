"""The examples of `measure`, as a user would copy them: a plain function, a Linen and an NNX module."""

import re
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltajax.massive_activations import measure
from deltajax.ops.taps import tag


def test_the_docstring_s_examples():
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 5, 8))
    found = []

    def measurer(f):
        return lambda params, x: found.append((f(params, x), measure.measurer(f)(params, x)))

    names = {"jnp": jnp, "nn": nn, "nnx": nnx, "tag": tag, "measurer": measurer, "key": key, "x": x}
    names |= {"params": jax.random.normal(key, (2, 8, 8)), "rngs": nnx.Rngs(0)}
    lines = measure.__doc__.splitlines()
    exec(textwrap.dedent("\n".join(line for line in lines if re.match(r" {4}|$", line))), names)
    assert len(found) == 3
    for y, rows in found:
        assert rows["ratio"].shape == (2,)
        np.testing.assert_allclose(rows["top1"][1], np.abs(y).max((1, 2)).mean(), rtol=1e-5)
        medians = np.sort(np.abs(y).reshape(2, -1), -1)[:, 19]
        np.testing.assert_allclose(rows["ratio"][1], np.abs(y).max((1, 2)).mean() / medians.mean(), rtol=1e-5)
