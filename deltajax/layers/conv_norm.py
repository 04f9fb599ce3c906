"""Convolution, then batch norm: the unit that convolutional networks are made of."""

from jaxtyping import Array, Float

from deltajax.layers import batch_norm, conv2d


def param_specs(kernel: int, fan_in: int, fan_out: int, groups: int = 1) -> dict:
    """{"conv": kernel, "norm": {"scale", "bias"}}."""
    return {"conv": conv2d.spec(kernel, fan_in, fan_out, groups), "norm": batch_norm.param_specs(fan_out)}


def apply(
    params: dict,
    stats: dict,
    config: batch_norm.Config,
    x: Float[Array, "B H W C_in"],
    *,
    train: bool,
    stride: int = 1,
    padding: conv2d.Padding = "symmetric",
) -> tuple[Float[Array, "B H/stride W/stride C_out"], dict]:
    """The normalised convolution, before any activation, and the new statistics {"norm": ...}."""
    y = conv2d.apply(params["conv"], x, stride=stride, padding=padding)
    y, norm = batch_norm.apply(params["norm"], stats["norm"], config, y, train=train)
    return y, {"norm": norm}
