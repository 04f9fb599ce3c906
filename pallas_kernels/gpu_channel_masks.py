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


def masks(steps: int, dtype) -> list[jax.Array]:
    """0/1 masks over the tokens of a chunk, of gates and of pairs, each [steps * MASKS, 2, 64, 64]; [MASKS, 1, 64, 64] with
    steps = 1, where rows and queries are alike.

    For each block of a chunk MASKS times: which gates (across) are summed for a row, and for a query (down); and which pairs are
    then meant, of rows, and of queries and rows. The first are of gates from the block's start up to a row, and from the chunk's
    up to a query, and of pairs of one token; the next of gates after a row up to the block's end, and of no pairs; then come, by
    level, those of gates from a token to where blocks meet, and of the pairs that this parts, either way round. A token's gate
    comes before its first row.
    """
    s = np.arange(ROWS)
    query = s[:, None]
    found = np.zeros((2, steps, MASKS, 2, ROWS, ROWS), np.bool)
    for step in range(steps):
        row, first = step * ROWS + s, s * steps
        tokens, column = (row[:, None] // steps, query), row // steps
        found[0, step, 0] = (row[0] <= first) & (first <= row[:, None]), s <= query
        found[1, step, 0] = [token == column for token in tokens]
        found[0, step, 1, 0] = (row[:, None] < first) & (first <= row[-1])
        for level in range(LEVELS):
            for kind, token in enumerate(tokens):
                gates = np.where(token >> level & 1, s <= token, s > token) & (s >> level == token >> level)
                found[:, step, TO_MEETING + level, kind] = gates, (token ^ column) >> level == 1
    kinds = min(steps, 2)
    return [jnp.asarray(x[:, :, :kinds].reshape(-1, kinds, ROWS, ROWS), dtype) for x in found]


class Masks:
    """Of one kind, one after the other through shared memory; with two slots the next arrives while one is read."""

    def __init__(self, source, count, ref, arrived):
        """source(n): the n-th of `count` in global memory; ref [slots, 1 or 2, 64, 64]; a barrier for each slot."""
        self.source, self.count, self.ref, self.arrived = source, count, ref, arrived
        for n in range(ref.shape[0]):
            self._fetch(jnp.int32(n))

    @staticmethod
    def scratch(slots, steps, dtype):
        return [square(slots, min(steps, 2), dtype=dtype), plgpu.Barrier(num_barriers=slots)]

    def _slot(self, n):
        return jax.lax.rem(n, jnp.int32(self.ref.shape[0]))

    def _fetch(self, n):
        slot = self._slot(n)
        plgpu.copy_gmem_to_smem(self.source(n), self.ref.at[slot], self.arrived.at[slot])

    def wait(self, n):
        """That of rows and that of queries."""
        slot = self._slot(n)
        plgpu.barrier_wait(self.arrived.at[slot])
        return self.ref.at[slot, 0], self.ref.at[slot, self.ref.shape[1] - 1]

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
