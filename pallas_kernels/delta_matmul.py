"""The matrix product of delta inference as a TPU kernel (Mosaic): y + d w, in which blocks of d without change are skipped.

What the paper asks hardware for (arXiv 2107.07305): a layer holds the running sum y of what it was given, and of a frame's
deltas d only those that are not zero cost anything. Here the unit is a block of d: its products are not made, and neither
it nor its block of w is read from HBM. Which blocks these are is found by one pass over d before the kernel, and reaches it
in scalar memory: per row of blocks their numbers, those that changed first. The grid walks over that list; past its end a
step names the block that is already there, so nothing is fetched, and does nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = (128, 128, 256)  # rows of d, columns of d, columns of w
SCALARS = 2**15  # blocks of d whose numbers fit into scalar memory


def delta_matmul(
    y: jax.Array, d: jax.Array, w: jax.Array, *, block: tuple[int, int, int] = BLOCK
) -> tuple[jax.Array, jax.Array]:
    """y + d w, and the share of d's blocks that were worked off.

    Args:
      y: [M, N], float32: what the deltas before summed up to.
      d: [M, K] in float32 or bfloat16: deltas.
      w: [K, N] of d's dtype.
      block: rows of d, columns of d, columns of w in a block: multiples of 8, 128 and 128 on a TPU.

    Returns:
      The sum [M, N] in float32, products in float32 (of bfloat16 numbers where d and w are), and the share in [0, 1].

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: d has more blocks than scalar memory holds; take larger ones.
    """
    if y.ndim != 2 or d.ndim != 2 or w.ndim != 2 or y.shape != (d.shape[0], w.shape[1]) or d.shape[1] != w.shape[0]:
        raise ValueError(f"y, d, w must be [M, N], [M, K], [K, N], got {y.shape}, {d.shape}, {w.shape}")
    if y.dtype != jnp.float32 or d.dtype != w.dtype or d.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"y must be float32, d and w both float32 or bfloat16, got {y.dtype}, {d.dtype}, {w.dtype}")
    (rows, columns), of_w = d.shape, w.shape[1]
    down, across, wide = (-(-n // size) for n, size in zip((rows, columns, of_w), block, strict=True))
    if down * across > SCALARS:
        raise NotImplementedError(
            f"{down} x {across} blocks of d are more than {SCALARS}; take larger blocks than {block}"
        )
    y, d, w = (
        jnp.pad(x, [(0, count * size - n) for count, size, n in zip(counts, sizes, x.shape, strict=True)])
        for x, counts, sizes in (
            (y, (down, wide), (block[0], block[2])),
            (d, (down, across), block[:2]),
            (w, (across, wide), block[1:]),
        )
    )
    changed = jnp.any(d.reshape(down, block[0], across, block[1]) != 0, axis=(1, 3))
    counts = jnp.sum(changed, axis=1, dtype=jnp.int32)
    first = jnp.argsort(~changed, axis=1, stable=True).astype(jnp.int32)
    # Past the end of a list the last of its blocks again: a block that is there already is not fetched.
    place = jnp.minimum(jnp.arange(across), jnp.maximum(counts[:, None] - 1, 0))
    listed = jnp.take_along_axis(first, place, axis=1)
    call = pl.pallas_call(
        functools.partial(_kernel, across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(down, wide, across),
            in_specs=[
                pl.BlockSpec((block[0], block[2]), lambda i, j, k, counts, listed: (i, j)),
                pl.BlockSpec((block[0], block[1]), lambda i, j, k, counts, listed: (i, listed[i, k])),
                pl.BlockSpec((block[1], block[2]), lambda i, j, k, counts, listed: (listed[i, k], j)),
            ],
            out_specs=pl.BlockSpec((block[0], block[2]), lambda i, j, k, counts, listed: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct(y.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="delta_matmul",
    )
    return call(counts, listed, y, d, w)[:rows, :of_w], jnp.mean(changed.astype(jnp.float32))


def _kernel(across, counts, listed, y, d, w, out):
    """One block of d times one of w, added to the block of the sum, which stays in VMEM over the innermost axis."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        out[...] = y[...]

    @pl.when(k < counts[pl.program_id(0)])
    def _():
        precision = jax.lax.Precision.HIGHEST if d.dtype == jnp.float32 else None
        out[...] += jnp.dot(d[...], w[...], precision=precision, preferred_element_type=jnp.float32)
