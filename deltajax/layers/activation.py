"""Activations by name, for configs."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array

Name = Literal["relu", "relu6", "silu", "hard_swish", "sigmoid", "hard_sigmoid"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
}
