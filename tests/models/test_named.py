"""Paper configurations initialise abstractly with the parameter count of an independent formula."""

import functools
import math

import jax
import pytest

from deltajax.models import lm, named

# name -> (d_model, layers, width of the SwiGLU, parameters of the mixers' matrices per layer and d_model, in all layers)
FORMULA = {
    "transformer++-340m": (1024, 24, 2816, 24 * 4 * 1024),
    "transformer++-1.3b": (2048, 24, 5632, 24 * 4 * 2048),
    "deltanet-340m": (1024, 24, 2816, 24 * 4 * 1024),
    "deltanet-1.3b": (2048, 24, 5632, 24 * 4 * 2048),
    "deltanet-window-1.3b": (2048, 24, 5632, 24 * 4 * 2048),
    "deltanet-global-1.3b": (2048, 24, 5632, 24 * 4 * 2048),
    "gated-deltanet-1.3b": (2048, 21, 5632, 21 * (2 * 1536 + 3 * 3072)),
    "deltaproduct-213m": (768, 24, 2048, 24 * 8 * 512),
    "deltaproduct-805m": (1536, 24, 4096, 24 * 8 * 1024),
}


@pytest.mark.parametrize("name", sorted(named.NAMED))
def test_abstract_initialisation(name):
    config = named.get(name)
    shapes = jax.eval_shape(functools.partial(lm.init, config=config), jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == lm.num_params(config)


@pytest.mark.parametrize("name", FORMULA)
def test_parameter_count(name):
    """Matrices by hand; what is left (norms, convolutions, steps, gates) is below 1 %."""
    d, layers, mlp, mixers = FORMULA[name]
    expected = 32000 * d + layers * 3 * d * mlp + d * mixers
    count = lm.num_params(named.get(name))
    assert expected < count < 1.01 * expected
    size = name.rsplit("-", 1)[1]
    assert count == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.03)


def test_the_one_that_differs_from_its_name():
    assert round(lm.num_params(named.get("deltaproduct-340m")) / 1e6) == 392


def test_hybrids():
    assert named.get("deltanet-window-340m").pattern == ("delta", "window") * 12
    pattern = named.get("deltanet-global-1.3b").pattern
    assert [i for i, name in enumerate(pattern) if name == "global"] == [1, 12]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'deltanet-13b' is not known; did you mean 'deltanet-1\.3b'"):
        named.get("deltanet-13b")
