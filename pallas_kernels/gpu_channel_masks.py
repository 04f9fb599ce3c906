"""Which gates and which pairs of tokens belong together, for the GPU kernels with channel gates.

The decay of a pair of tokens is split where the two largest aligned blocks of tokens that part them meet. So there are six
levels, blocks of 1, 2, 4 .. 32 tokens: at each a token is in the first or the second block of a pair, and decays by the gates
from there to where the blocks meet. Every exponent is a sum of gates, and at most 0; sums are products of a 0/1 mask with the
gates. Names are those of `gpu_common`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_common import ROWS, products, square

LEVELS = 6  # of 64 tokens
TO_MEETING = 2  # the first of the levels' masks
MASKS = TO_MEETING + LEVELS
LOG2_E = float(np.log2(np.e))


def masks(steps: int) -> np.ndarray:
    """0/1 masks over the tokens of a chunk, [steps * MASKS, 4, 64, 64]; [MASKS, 2, 64, 64] with steps = 1.

    For each block of a chunk MASKS times: which gates (across) are summed for rows (down), and for queries; and which pairs are
    then meant, of rows, and of queries and rows. Rows and queries are alike with steps = 1. The first are of gates from the
    block's start up to a row, and from the chunk's up to a query, and of pairs of one token; the next of gates after a row up to
    the block's end; then come, by level, those of gates from a token to where blocks meet, and of the pairs that this parts,
    either way round. A token's gate comes before its first row.
    """
    s = np.arange(ROWS)
    query = s[:, None]
    found = np.zeros((steps, MASKS, 2, 2, ROWS, ROWS), np.bool)
    for step in range(steps):
        row, first = step * ROWS + s, s * steps
        tokens, column = (row[:, None] // steps, query), row // steps
        found[step, 0, 0] = (row[0] <= first) & (first <= row[:, None]), s <= query
        found[step, 0, 1] = [token == column for token in tokens]
        found[step, 1, 0, 0] = (row[:, None] < first) & (first <= row[-1])
        for level in range(LEVELS):
            for kind, token in enumerate(tokens):
                gates = np.where(token >> level & 1, s <= token, s > token) & (s >> level == token >> level)
                found[step, TO_MEETING + level, :, kind] = gates, (token ^ column) >> level == 1
    return found[:, :, :, : min(steps, 2)].reshape(steps * MASKS, -1, ROWS, ROWS)


class Masks:
    """Those of a CTA one after the other, through shared memory: with steps = 1 the next is fetched while one is read."""

    def __init__(self, steps, source, count, ref, arrived):
        """source(n): the n-th of `count` in global memory; ref [slots, 2 or 4, 64, 64]."""
        self.steps, self.source, self.count, self.ref, self.arrived = steps, source, count, ref, arrived
        for n in range(ref.shape[0]):
            self._fetch(jnp.int32(n))

    @staticmethod
    def scratch(steps, dtype):
        slots = 2 if steps == 1 else 1
        return [square(slots, 2 * min(steps, 2), dtype=dtype), plgpu.Barrier(num_barriers=slots)]

    def _fetch(self, n):
        slot = jax.lax.rem(n, jnp.int32(self.ref.shape[0]))
        plgpu.copy_gmem_to_smem(self.source(n), self.ref.at[slot], self.arrived.at[slot])

    def wait(self, n):
        """(gates, pairs) of the n-th, each of rows and of queries."""
        slot = jax.lax.rem(n, jnp.int32(self.ref.shape[0]))
        plgpu.barrier_wait(self.arrived.at[slot])
        indices = ((0, 0), (1, 1)) if self.steps == 1 else ((0, 1), (2, 3))
        return [[self.ref.at[slot, index] for index in of_kind] for of_kind in indices]

    def leave(self, n):
        """All warps have read the n-th."""
        plgpu.commit_smem()
        later = n + self.ref.shape[0]

        @pl.when(later < self.count)
        def _():
            self._fetch(later)


def decay(mask, *gates):
    """exp of sums of gates, [64, 64]; gates times log2 e, with the mask's dtype, their parts added."""
    return jnp.exp2(products(*((mask, part) for part in gates)))
