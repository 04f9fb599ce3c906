"""|h| over token and channel, the picture by which massive activations became known (arXiv 2402.17762, figure 1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deltajax.ops import taps


def magnitudes(f: Callable, params: Any, batch: Any, layer: int | None = None) -> tuple[int, Float[np.ndarray, "T D"]]:
    """(block, |h| after it of the sequence that holds its largest value).

    Args:
      f: (params, batch) -> anything; tags its blocks' outputs "residual".
      layer: from 0; None: the block with the largest top1 / median over the batch.
    """

    def probe(x: Array) -> tuple[Array, Array]:
        size = jnp.abs(x.astype(jnp.float32)).reshape(len(x), -1, x.shape[-1])
        top = jnp.max(size, (1, 2))
        return jnp.mean(top) / jnp.median(size), size[jnp.argmax(top)]

    run = jax.jit(lambda params, batch: taps.capture(f, {"residual": probe})(params, batch)[1]["residual"])
    ratios, sizes = jax.device_get(run(params, batch))
    chosen = int(np.argmax(ratios)) if layer is None else layer
    return chosen, sizes[chosen]
