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


def near(changed: Bool[Array, "h w"], tile: tuple[int, int]) -> Bool[Array, "N"]:
    """Tiles (row by row) with a changed pixel, and those that touch them."""
    down, across = grid(changed.shape[0], changed.shape[1], tile)
    return readers(tiles(changed, tile).reshape(down, across), Window(3, 1, (1, 1))).reshape(-1)


def origins(
    index: Int[Array, "G"], height: int, width: int, tile: tuple[int, int]
) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """First row and column of tiles; a tile that would leave the map is moved back into it."""
    _, columns = grid(height, width, tile)
    top = jnp.minimum(index // columns * tile[0], height - tile[0])
    left = jnp.minimum(index % columns * tile[1], width - tile[1])
    return top, left


def assemble(by_tile: Bool[Array, "N rows columns"], height: int, width: int) -> Bool[Array, "h w"]:
    """A map of pixels from its tiles: where tiles overlap, what is true in one of them."""
    _, rows, columns = by_tile.shape
    down, across = grid(height, width, (rows, columns))
    whole = by_tile.reshape(down, across, rows, columns).transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
    for axis, (length, size) in enumerate(((height, rows), (width, columns))):
        excess = whole.shape[axis] - length
        if excess:  # the last tiles were moved back by it
            padding = [(0, 0), (0, 0)]
            padding[axis] = (0, length - (whole.shape[axis] - size))
            first = jnp.pad(jax.lax.slice_in_dim(whole, 0, whole.shape[axis] - size, axis=axis), padding)
            padding[axis] = (length - size, 0)
            last = jnp.pad(jax.lax.slice_in_dim(whole, whole.shape[axis] - size, None, axis=axis), padding)
            whole = first | last
    return whole
