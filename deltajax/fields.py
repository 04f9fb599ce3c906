"""Metadata for the fields of configs: `dataclasses.field(default=True, metadata=CHANGEABLE)`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

# A run may continue from its checkpoint with another value of such a field.
# In a model: the parameters keep their shapes and their meaning. In data: a position in the examples keeps its meaning.
CHANGEABLE: Mapping[str, Any] = {"changeable": True}


def fixed_leaves(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every field below `path` that is not changeable, neither itself nor as part of another."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from fixed_leaves(value, f"{path}.{key}")
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            if field.init and "changeable" not in field.metadata:
                yield from fixed_leaves(getattr(config, field.name), f"{path}.{field.name}")
    else:
        yield path, config
