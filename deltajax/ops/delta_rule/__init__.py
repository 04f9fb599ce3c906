"""The (gated) delta rule and Householder products."""

from deltajax.ops.delta_rule.api import IMPLEMENTATIONS, delta_product, delta_product_step, delta_rule

__all__ = ["IMPLEMENTATIONS", "delta_product", "delta_product_step", "delta_rule"]
