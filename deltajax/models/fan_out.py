"""How many multiply-accumulates each named activation of a network feeds, read from the network's own trace."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var
from jaxtyping import Array


def mark(name: str, x: Array) -> Array:
    """x, with a name that `operations` finds; a `tap` of the models."""
    return checkpoint_name(x, name)


def operations(function: Callable, *args: Any) -> dict[str, float]:
    """Multiply-accumulates of the convolutions and matrix products that read each marked activation.

    A product reads an activation if its first operand comes from it through operations that are not products (pooling, means,
    normalisation). Divided by the activation's size that is its fan-out; margins of convolutions count as operations.

    Args:
      function: calls `mark`; its products are not inside of loops or nested functions.
      args: arrays or jax.ShapeDtypeStructs; nothing is computed.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr

    def shape_of(x: Any) -> tuple[int, ...]:
        return x.aval.shape

    sources: dict[Var, frozenset[str]] = {}
    fed: dict[str, float] = {}
    for eqn in jaxpr.eqns:
        read = [sources.get(x, frozenset()) if isinstance(x, Var) else frozenset() for x in eqn.invars]
        found = frozenset().union(*read)
        kind = eqn.primitive.name
        if kind == "name":
            found = frozenset((eqn.params["name"],))
            fed.setdefault(eqn.params["name"], 0.0)
        elif kind in ("conv_general_dilated", "dot_general"):
            shape = shape_of(eqn.invars[1])
            if kind == "dot_general":
                contracted = math.prod(shape[axis] for axis in eqn.params["dimension_numbers"][0][1])
            else:
                contracted = math.prod(shape) // shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            for name in read[0]:
                fed[name] += math.prod(shape_of(eqn.outvars[0])) * contracted
            found = frozenset()
        for x in eqn.outvars:
            sources[x] = found
    return fed
