"""Mathematics on arrays: no parameters, no configs, no I/O."""

from deltajax.ops.delta_rule import IMPLEMENTATIONS, delta_product, delta_product_step, delta_rule
from deltajax.ops.linear_attention import linear_attention, linear_attention_step

__all__ = [
    "IMPLEMENTATIONS",
    "delta_product",
    "delta_product_step",
    "delta_rule",
    "linear_attention",
    "linear_attention_step",
]
