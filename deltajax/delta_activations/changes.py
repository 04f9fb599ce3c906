"""Which pixels and tiles of a map have to be computed anew, from which pixels of its sources changed."""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deltajax.delta_activations.graph import Window


def readers(changed: Bool[Array, "H W"], window: Window) -> Bool[Array, "h w"]:
    """Pixels of a map of which a window holds a changed pixel."""
    before, after = window.padding
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (before, after)
        padded = jnp.pad(changed, padding)
        outputs = window.outputs(changed.shape[axis])
        last = (outputs - 1) * window.stride + 1
        shifts = [jax.lax.slice_in_dim(padded, k, k + last, window.stride, axis) for k in range(window.size)]
        changed = functools.reduce(operator.or_, shifts)
    return changed


def grid(height: int, width: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover a map; the last ones of an axis may overlap their neighbours."""
    return -(-height // tile[0]), -(-width // tile[1])


def tiles(dirty: Bool[Array, "h w"], tile: tuple[int, int]) -> Bool[Array, "N"]:
    """Tiles (row by row) with a pixel that has to be computed."""
    rows, columns = grid(dirty.shape[0], dirty.shape[1], tile)
    padding = ((0, rows * tile[0] - dirty.shape[0]), (0, columns * tile[1] - dirty.shape[1]))
    padded = jnp.pad(dirty, padding).reshape(rows, tile[0], columns, tile[1])
    return jnp.any(jnp.any(padded, axis=1), axis=2).reshape(-1)


def origins(
    index: Int[Array, "G"], height: int, width: int, tile: tuple[int, int]
) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """First row and column of tiles; a tile that would leave the map is moved back into it."""
    _, columns = grid(height, width, tile)
    top = jnp.minimum(index // columns * tile[0], height - tile[0])
    left = jnp.minimum(index % columns * tile[1], width - tile[1])
    return top, left
