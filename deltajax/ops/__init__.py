"""Mathematics on arrays: no parameters, no configs, no I/O."""

from deltajax.ops.delta_rule import IMPLEMENTATIONS, delta_product, delta_product_step, delta_rule

__all__ = ["IMPLEMENTATIONS", "delta_product", "delta_product_step", "delta_rule"]
