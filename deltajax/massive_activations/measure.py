"""Activation statistics of any apply function that tags its residual stream (see `ops.taps`), Flax modules included.

    def apply(params, x):                                                     # a function of yours; x: [B, T, 8]
        for p in params:
            x = tag(x + jnp.tanh(x @ p), "residual")
        return x

    rows = measurer(apply)(params, x)                                         # rows["ratio"]: [blocks]

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            return tag(x + nn.Dense(8)(x), "residual")

    module = nn.Sequential([LinenBlock(), LinenBlock()])
    rows = measurer(module.apply)(module.init(key, x), x)

    class NnxBlock(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return tag(x + self.dense(x), "residual")

    graph, state = nnx.split(nnx.Sequential(NnxBlock(rngs), NnxBlock(rngs)))
    rows = measurer(lambda state, x: nnx.merge(graph, state)(x))(state, x)

In a train step of your own, `ops.activation_statistics.with_statistics` gives them beside the function's result.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array

from deltajax.ops.activation_statistics import summarise, with_statistics


def measurer(f: Callable, mask: Callable[..., Array | None] | None = None) -> Callable[..., dict[str, np.ndarray]]:
    """Return `f`, compiled, with the statistics of each block over the batch as its result: `summarise`, [layers] each.

    Args:
      mask: f's arguments -> which positions count [B, T]; padding must not. None: all positions count.

    Raises (when the result is called):
      ValueError: nothing is tagged "residual".
    """
    run = jax.jit(lambda *args: with_statistics(f, mask=mask)(*args)[1])
    return lambda *args: summarise(jax.device_get(run(*args)))
