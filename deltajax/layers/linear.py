"""The parameters of a linear map."""

import jax

from deltajax.layers.param import ParamSpec


def spec(fan_in: int, fan_out: int, in_axis: str | None, out_axis: str | None, scale: float = 1.0) -> ParamSpec:
    """A [fan_in, fan_out] matrix drawn from a normal of standard deviation scale / sqrt(fan_in)."""

    def init(key, shape, dtype):
        return scale * fan_in**-0.5 * jax.random.normal(key, shape, dtype)

    return ParamSpec((fan_in, fan_out), (in_axis, out_axis), init)


def bias_spec(dim: int, axis: str | None) -> ParamSpec:
    """A bias [dim] that starts at 0."""
    return ParamSpec((dim,), (axis,), jax.nn.initializers.zeros, weight_decay=False)
