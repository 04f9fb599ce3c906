"""All mixers behind one interface: which functions run is decided by the type of the config.

A new mixer is a file with `Config`, `param_specs`, `init_state` and `apply`, and a line in `MIXERS`.
"""

from typing import Any

from deltajax.layers import attention, delta, linear_attention

MIXERS = {attention.Config: attention, delta.Config: delta, linear_attention.Config: linear_attention}

Config = attention.Config | delta.Config | linear_attention.Config


def module_of(config: Config) -> Any:
    """The module whose functions serve this config.

    Raises:
      ValueError: not a mixer's config.
    """
    if type(config) not in MIXERS:
        known = ", ".join(f"{c.__module__}.{c.__name__}" for c in MIXERS)
        raise ValueError(f"mixer config must be one of {known}, got {type(config).__name__}")
    return MIXERS[type(config)]
