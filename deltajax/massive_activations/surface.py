"""|h| over token and channel, the picture by which massive activations became known (arXiv 2402.17762, figure 1)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deltajax.massive_activations.intervene import check_layers
from deltajax.ops import taps
from deltajax.ops.activation_statistics import padding_mask


def magnitudes(f: Callable, params: Any, batch: Any, layer: int | None = None) -> tuple[int, Float[np.ndarray, "T D"]]:
    """(block, |h| after it of the sequence that holds its largest value).

    Args:
      f: (params, batch) -> anything; tags its blocks' outputs "residual".
      batch: padding is NaN in the result, where the batch has `segment_ids` (see `padding_mask`).
      layer: from 0; None: the block with the largest top1 / median over the batch.

    Raises:
      ValueError: there is no such block.
    """

    def probe(x: Array, mask: Array | None) -> tuple[Array, Array]:
        size = jnp.abs(x.astype(jnp.float32)).reshape(len(x), -1, x.shape[-1])
        if mask is not None:
            size = jnp.where(mask.reshape(*size.shape[:2], 1), size, jnp.nan)
        top = jnp.nanmax(size, (1, 2))
        return jnp.nanmean(top) / jnp.nanmedian(size), size[jnp.nanargmax(top)]

    def run(params: Any, batch: Any) -> Any:
        mask = padding_mask(batch) if isinstance(batch, Mapping) else None
        return taps.capture(f, {"residual": lambda x: probe(x, mask)})(params, batch)[1]["residual"]

    ratios, sizes = jax.device_get(jax.jit(run)(params, batch))
    if layer is not None:
        check_layers([layer], len(ratios))
    chosen = int(np.argmax(ratios)) if layer is None else layer
    return chosen, sizes[chosen]
