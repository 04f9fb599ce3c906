"""deltajax: models that compute with differences, as pure functions in JAX.

The names below are the public entry points. They are imported on first use, so that the command
lines can handle signals before JAX is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltajax.ops.delta_rule.api import delta_product, delta_product_step, delta_rule

__version__ = "0.1.0"
__all__ = ["__version__", "delta_product", "delta_product_step", "delta_rule"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("deltajax.ops"), name)


def __dir__() -> list[str]:
    """Include the public names that are not imported yet."""
    return sorted(set(globals()) | set(__all__))
