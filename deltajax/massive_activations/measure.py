"""Activation statistics of any apply function that tags its residual stream (see `ops.taps`).

measure = measurer(lambda params, tokens: gpt_neox.apply(params, config, tokens)[0])
rows = measure(params, tokens)                                                            # rows["ratio"]: [layers]
"""

from collections.abc import Callable

import jax
import numpy as np

from deltajax.ops.activation_statistics import summarise, with_statistics


def measurer(f: Callable) -> Callable[..., dict[str, np.ndarray]]:
    """`f`, compiled, returning instead of its result the statistics of each block over the batch: `summarise`, [layers] each.

    Raises (when the result is called):
      ValueError: nothing is tagged "residual".
    """
    run = jax.jit(lambda *args: with_statistics(f)(*args)[1])
    return lambda *args: summarise(jax.device_get(run(*args)))
