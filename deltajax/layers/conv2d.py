"""Two-dimensional convolution over images [B, height, width, channels]."""

from typing import Literal

import jax
from jaxtyping import Array, Float

from deltajax.layers.param import ParamSpec

Padding = Literal["symmetric", "same"]


def spec(kernel: int, fan_in: int, fan_out: int, groups: int = 1) -> ParamSpec:
    """A [kernel, kernel, fan_in / groups, fan_out] array, normal of variance 2 / (fan out per group) (arXiv 1502.01852).

    The output channels are the "embed" axis; a depthwise kernel (groups = fan_in) is a bank of filters, not a map
    between channels, and names none.
    """
    scale = (2 * groups / (kernel * kernel * fan_out)) ** 0.5
    axes = (None, None, None, None if groups == fan_in and groups > 1 else "embed")
    return ParamSpec((kernel, kernel, fan_in // groups, fan_out), axes, jax.nn.initializers.normal(scale))


def apply(
    kernel: Float[Array, "K K C_in/groups C_out"],
    x: Float[Array, "B H W C_in"],
    *,
    stride: int = 1,
    padding: Padding = "symmetric",
) -> Float[Array, "B H/stride W/stride C_out"]:
    """Cross-correlation without bias; the number of groups follows from the shapes.

    Args:
      kernel: cast to the dtype of x.
      x: images.
      stride: of both axes; output sizes are rounded up.
      padding: "symmetric" puts (K - 1) / 2 zeros on every side (PyTorch's habit), "same" as few as needed, the odd one
        at the end (TensorFlow's). They differ only where stride > 1.
    """
    margin = ((kernel.shape[0] - 1) // 2,) * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME" if padding == "same" else (margin, margin),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )
