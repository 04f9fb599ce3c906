"""The inverse of a chunk in the bfloat16 TPU kernels: (I + M)^-1 of pairs of heads, by substitution and by doubling of blocks."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_bfloat16_common import (
    F32,
    LANES,
    ROWS,
    dot,
    halves,
    iota,
    lanes_of,
    operand,
    rows_of,
    split,
)

BASE = 8  # rows of the diagonal blocks that are inverted by substitution: a tile of float32


def _block_diagonal(x, size):
    """`operand` of a [LANES, LANES] matrix with the blocks of float32 x [size, LANES] on its diagonal."""
    copies = max(1, 16 // size)  # a tile of bfloat16 has 16 rows
    x = operand(rows_of(*[x] * copies))
    block = iota(x.shape, 1) // size - iota(x.shape, 0) // (
        size // 2 if x.dtype == jnp.int32 else size
    )  # less which copy
    return rows_of(*(jnp.where(block == i, x, 0) for i in range(0, LANES // size, copies)))


def _product(x, y):
    """Products of blocks side by side, [size, LANES], from two parts of each: (big + small) big + big small."""
    (big, small), size = halves(x), x.shape[0]
    left, right = rows_of(big, small), rows_of(big, jnp.zeros_like(big))
    found = dot(lanes_of(operand(left), operand(right)), rows_of(*(_block_diagonal(part, size) for part in halves(y))))
    return found[:size] + found[size:]


def spread_columns():
    """Bits of [2 LANES, (BASE - 1) LANES]: column j of each diagonal block over the lanes of the block, from two parts."""
    pair, lane = np.indices((LANES // 2, LANES), np.int32)

    def ones(j):
        low, high = (np.where(2 * pair + i == lane // BASE * BASE + j, 0x3F80, 0) for i in range(2))
        return (low | high << 16).astype(np.int32)

    one = np.concatenate([*map(ones, range(BASE - 1))], axis=1)
    return np.concatenate([one, one])


def inverses(ms, spread):
    """(I + M)^-1 for an even number of arrays M [64, 2 x 64] of strictly lower triangles: a generator that returns them, and
    yields wherever what follows must wait for what came before.

    Diagonal blocks of 8 by substitution, then blocks of twice the size from those of a size, all of it to 16 bits: with 8 it
    errs by 5e-2 at beta 2 and cosine .95.
    """
    xs = yield from _substituted(ms, spread)
    size = BASE
    while size < ROWS:
        xs = yield from _doubled(xs, ms, size)
        size *= 2
    return xs


def _diagonal_blocks(m, size, below=0):
    """Blocks of m [64, 2 x 64] side by side in `size` rows: those `below` blocks under each (1 + `below`)th on the diagonal."""
    lane = iota((size, LANES), 1) % ROWS
    step = 1 + below
    blocks = {b: m[(b + below) * size : (b + below + 1) * size] for b in range(0, ROWS // size, step)}
    x = jnp.where(lane // size == 0, blocks.pop(0), 0) if below else blocks.pop(0)
    for b, block in blocks.items():
        x = jnp.where(lane // size == b, block, x)
    return x


def _substituted(ms, spread):
    """Inverses of the diagonal blocks of 8 of I + M, side by side: [8, 2 x 64] each."""
    columns = dot(lanes_of(*split(rows_of(*(_diagonal_blocks(m, BASE) for m in ms)))), spread)
    xs = [(iota((BASE, LANES), 0) == iota((BASE, LANES), 1) % BASE).astype(F32)] * len(ms)
    yield
    for j in range(BASE - 1):
        c = columns[:, j * LANES : (j + 1) * LANES]
        xs = [x - c[p * BASE : (p + 1) * BASE] * x[j : j + 1] for p, x in enumerate(xs)]
    yield
    return xs


def _doubled(xs, ms, size):
    """Inverses of diagonal blocks of 2 `size` rows, side by side, from those of `size` rows.

    Of blocks [[X, 0], [Z, Y]] the inverse is [[X', 0], [-Y' Z X', Y']], for all blocks of a size at once. Of two arrays, what
    concerns the left upper blocks X of one takes the lanes of X, of the other the lanes of Y.
    """
    half, even = len(ms) // 2, (iota((size, LANES), 1) & size) == 0
    z = [_diagonal_blocks(m, size, below=1) for m in ms]
    z = [z[p] + pltpu.roll(z[p + half], size, 1) for p in range(half)]
    two = [(xs[p], xs[p + half]) for p in range(half)]
    upper = [jnp.where(even, x, pltpu.roll(y, size, 1)) for x, y in two]
    lower = [jnp.where(even, pltpu.roll(x, LANES - size, 1), y) for x, y in two]
    products = [_product(x, y) for x, y in zip(z, upper, strict=True)]
    yield
    corners = [_product(x, y) for x, y in zip(lower, products, strict=True)]
    yield
    corners = corners + [pltpu.roll(x, LANES - size, 1) for x in corners]
    # Times the mask, as in `Gates._decays`.
    return [rows_of(x * even.astype(F32), jnp.where(even, -y, x)) for x, y in zip(xs, corners, strict=True)]
