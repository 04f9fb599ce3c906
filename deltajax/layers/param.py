"""Parameters are plain pytrees; one abstract description yields shape, dtype, logical axes and initialiser."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

Initializer = Callable[[PRNGKeyArray, tuple[int, ...], Any], Array]  # (key, shape, dtype) -> array, as in jax.nn


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists.

    Attributes:
      shape: its shape.
      axes: a logical name per axis ("embed", "heads", "mlp", "vocab", "layers") or None; `training.mesh` maps names to mesh axes.
      init: initialiser `(key, shape, dtype) -> array`.
      weight_decay: whether the optimiser decays it (matrices yes; norms, biases and gates no).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    weight_decay: bool = True

    def __post_init__(self):
        """Check that every axis has a name or None."""
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec: shape {self.shape} and axes {self.axes} differ in length")


def is_spec(x: Any) -> bool:
    """Leaf test for `jax.tree.map` over a tree of specs."""
    return isinstance(x, ParamSpec)


def init_params(key: PRNGKeyArray, specs: Any, dtype: Any = jnp.float32) -> Any:
    """Arrays for a tree of specs; every leaf draws from its own key."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jax.tree.unflatten(treedef, [s.init(k, s.shape, dtype) for s, k in zip(leaves, keys, strict=False)])


def abstract_params(specs: Any, dtype: Any = jnp.float32) -> Any:
    """The same tree as `init_params`, as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=is_spec)


def count_params(specs: Any) -> int:
    """Number of scalars in a tree of specs."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def stack_specs(specs: Any, repeats: int) -> Any:
    """Specs of `repeats` identical layers stacked on a new leading "layers" axis, each layer drawn independently."""

    def stack(spec: ParamSpec) -> ParamSpec:
        def init(key, shape, dtype):
            draw = jax.vmap(lambda k: spec.init(k, shape[1:], dtype))
            return draw(jax.random.split(key, shape[0]))

        return ParamSpec((repeats, *spec.shape), ("layers", *spec.axes), init, spec.weight_decay)

    return jax.tree.map(stack, specs, is_leaf=is_spec)
