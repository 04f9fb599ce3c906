"""What the bfloat16 TPU kernels share: two heads side by side, products in parts, gates and scores.

What is square in the 64 rows of a chunk fills half of the 128 lanes, so two heads share an array, [64, 2 x 64]: half the
vector work, and the products of both in one pass of the matrix unit. Of HV heads in a block, head p of the first half is
paired with head p + HV / 2. All pairs go in step, stage by stage: products stay in the order they are written in, and so those
of one pair fill the latencies of the others'.

bfloat16 matrices [rows, lanes] are held as 32-bit pairs of rows, [rows / 2, lanes], which is what the registers hold:
then parts are put together, masked and stored as they are. (Of bfloat16 arrays Mosaic makes half-filled tiles in between.)
On v5e and v5p two rows come into one word by way of VMEM; there what is computed stays float32, which products round (`operand`).
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 64  # of keys and values in a chunk; with R = 3 the last 16 are zeros
LANES = 2 * ROWS
LOWEST_GATE = -1000.0  # exp of it is 0 in every float type, and sums of it stay finite
F32, BF16 = jnp.float32, jnp.bfloat16


def tpu_info() -> Any:
    """What is known of the TPU that is compiled for; None in interpret mode on another platform."""
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return None


def compiled() -> bool:
    """False in interpret mode."""
    return tpu_info() is not None


def small_array() -> bool:
    """Whether a TPU with arrays of 128 x 128 is compiled for: v5e or v5p. There two rows come into one word by way of VMEM, by
    two stores and a load.
    """
    return compiled() and tpu_info().chip_version in (pltpu.ChipVersion.TPU_V5E, pltpu.ChipVersion.TPU_V5P)


def iota(shape, axis):
    """Index along the axis, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def rows_of(*x):
    """Arrays one above the other."""
    return jnp.concatenate(x, axis=0)


def lanes_of(*x):
    """Arrays side by side."""
    return jnp.concatenate(x, axis=1)


def bits(x):
    """bfloat16 of float32 [rows, lanes] as int32 pairs of rows."""
    return pltpu.bitcast(x.astype(BF16), jnp.int32)


def operand(x):
    """What a product takes of float32 or `bits`: `bits`, or float32 that `dot` rounds where `small_array`."""
    if small_array():
        return x if x.dtype == F32 else floats(x)
    return bits(x) if x.dtype == F32 else x


def operands(*lead, rows, lanes):
    """(shape, dtype) of arrays of `operand`s [*lead, rows, lanes]."""
    return ((*lead, rows, lanes), F32) if small_array() else ((*lead, rows // 2, lanes), jnp.int32)


def floats(x):
    """float32 of `bits` or float32."""
    return x if x.dtype == F32 else pltpu.bitcast(x, BF16).astype(F32)


def word(low, high):
    """Two arrays of float32 as one of words, rounded."""
    if compiled():
        return pltpu.pack_elementwise([low, high], packed_dtype=BF16).astype(jnp.int32)
    low, high = (jax.lax.bitcast_convert_type(x.astype(BF16), jnp.uint16).astype(jnp.uint32) for x in (low, high))
    return jax.lax.bitcast_convert_type(low | high << 16, jnp.int32)


def low_or_high(words, high):
    """float32 of one half of words."""
    return jax.lax.bitcast_convert_type(words & -0x10000 if high else words << 16, F32)


def packed(x):
    """An `operand` or float32 in half its bytes, [rows / 2, lanes]: `bits`, or words of rows i and i + rows / 2."""
    if not small_array():
        return operand(x)
    rows = x.shape[0] // 2
    return word(x[:rows], x[rows:])


def unpacked(words):
    """The `operand` of what was `packed`."""
    return rows_of(*(low_or_high(words, high) for high in range(2))) if small_array() else words


def halves(x):
    """Two arrays of 8 bits that sum to x in 16 bits; cutting bits costs less than rounding and reading back."""
    head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), F32)
    return head, x - head


def split(x):
    """The `halves` of x for products."""
    return tuple(map(operand, halves(x)))


def dot(x, y, axes=(1, 0)):
    """float32 product of two matrices, of bits or float32, rounded."""
    x, y = (z.astype(BF16) if z.dtype == F32 else pltpu.bitcast(z, BF16) for z in (x, y))
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=F32)


def transpose(x):
    """Transpose of an `operand` or of `bits`, as `operand`."""
    return operand(x).T if small_array() else bits(pltpu.bitcast(x, BF16).T)


def apart(x):
    """The same product, but tpu7x's compiler does not know it for one where it is added to others.

    Products that are added may be summed in the matrix unit. Which unit takes which, tpu7x's compiler decides for all that hang
    together by such sums, and of some it does not come to an end (its pass "MXU-assigner").
    """
    if compiled() and tpu_info().chip_version != pltpu.ChipVersion.TPU_7X:
        return x
    return jnp.where(pl.program_id(2) < 0, 0.0, 1.0) * x  # times 1, which the compiler does not know


def half_turn(x):
    """Lanes turned by half: what is left goes right."""
    return pltpu.roll(x, ROWS, 1)


def left(x):
    """Mask of the lanes of the left head of a pair."""
    return iota(x.shape, 1) < ROWS


def stacked(x):
    """The pair's two heads, one above the other, in an array [2 rows, LANES] that is 0 in the other head's lanes."""
    # No choice: of that v5e's compiler makes a masked product, which its profiler does not know.
    if x.dtype == F32:
        mask = left(x).astype(F32)
        return rows_of(x * mask, x * (1 - mask))
    mask = jnp.where(left(x), -1, 0)
    return rows_of(x & mask, x & ~mask)


def either(x):
    """Of [2 rows, LANES], products of each of two heads with both, what is its own: [rows, LANES]; also of bits."""
    size = x.shape[0] // 2
    return jnp.where(iota((size, LANES), 1) < ROWS, x[:size], x[size:])


def padded(x):
    """[C, ..] with rows of zeros up to 64."""
    rows = (ROWS if x.dtype == F32 else ROWS // 2) - x.shape[0]
    return x if not rows else rows_of(x, jnp.zeros((rows, x.shape[1]), x.dtype))


def by_row(x, steps):
    """[C, lanes] of tokens as [64, lanes] of their rows."""
    if steps == 1:
        return x
    found = []
    for row in range(0, x.shape[0] * steps, 8):
        tile, rows = row // steps // 8 * 8, row + iota((8, x.shape[1]), 0)  # 8 rows lie in 8 tokens of one tile
        found.append(jnp.take_along_axis(x[tile : tile + 8], rows // steps - tile, axis=0))
    return padded(rows_of(*found))


def column(x, h):
    """Column h of [rows, heads] as [rows, 1]; 1 without gates."""
    return 1.0 if x is None else x[:, h : h + 1]


def spreadable(x):
    """What `spread_column` takes of float32 x [rows, heads]: to 16 bits, two parts side by side."""
    return x if small_array() else bits(lanes_of(*halves(x)))


def spread_column(x, h, heads, lanes):
    """Column h of `spreadable` over all lanes, [rows, lanes]; by the matrix unit, or where its array is small by the XLU."""
    if small_array():
        return jnp.broadcast_to(x[:, h : h + 1], (x.shape[0], lanes))
    row = 2 * iota((heads, lanes), 0)
    low, high = (jnp.where((row + i == h) | (row + i == heads + h), 0x3F80, 0) for i in range(2))  # 1.0 in bfloat16
    return dot(x, (low | high << 16).astype(jnp.int32))


def run(stages, beside=(), parts=()):
    """Runs a generator to its end, with so many parts of another after each of its own, the last number for all that follow."""
    for stage, _ in enumerate(stages):
        for _ in itertools.islice(beside, parts[min(stage, len(parts) - 1)] if parts else 0):
            pass


# Gates and scores.


class Gates:
    """What depends on beta and gates alone, of all heads of a block; decays are None without gates.

    Per row and head: beta [64, nh], decays from the chunk's start and to its end; from the start per query [C, nh]; total
    [1, nh]. Gates come per token, [C, nh]. As rows of pairs: beta_rows, gate_rows [nh / 2, 2 x 64].
    """

    def __init__(self, beta, gates, tokens, steps):
        self.tokens, self.steps, self.half = tokens, steps, beta.shape[1] // 2
        self.beta, self.beta_rows = beta, self._by_pair(beta)
        self.from_start = self.to_end = self.from_start_q = self.total = None
        i, j = iota((ROWS, LANES), 0), iota((ROWS, LANES), 1) % ROWS
        last = iota((tokens, LANES), 0) * self.steps + self.steps - 1  # row of a token
        self.below, self.seen = i > j, last >= iota((tokens, LANES), 1) % ROWS
        if gates is None:
            return
        first = iota((ROWS, 2 * self.half), 0) % steps == 0  # a token's gate is at its first row
        gates = jnp.where(first, by_row(gates, steps), 0)
        self.gate_rows = self._by_pair(gates)
        masks = operand(rows_of(self.seen.astype(F32), (i < j).astype(F32)))
        decays = jnp.exp(dot(masks, rows_of(*split(gates))))
        self.from_start_q, self.to_end = decays[:tokens], decays[tokens:]
        self.from_start, self.total = by_row(self.from_start_q, steps), decays[tokens - 1 : tokens]

    def _by_pair(self, x):
        """[64, nh] -> [nh / 2, 2 x 64]."""
        x = x.T
        return lanes_of(x[: self.half], x[self.half :])

    def _decays(self, pairs):
        """exp(sum of the gates after row j up to row i, or up to query t): [([64, 2 x 64], [C, 2 x 64]) of a pair]."""
        if self.total is None:
            return [(1.0, 1.0)] * len(pairs)
        gates = []
        for p in pairs:
            # Times the mask: of a choice v5e's compiler makes a masked product, which its profiler does not know.
            gates.append(lanes_of(*split(self.seen.astype(F32) * self.gate_rows[p : p + 1])))
        s, j = iota((LANES, LANES), 0), iota((LANES, LANES), 1)
        later = operand(((s // ROWS == j // ROWS) & (s > j)).astype(F32))
        decays = jnp.exp(dot(rows_of(*gates), rows_of(later, later)))
        found = [decays[i * self.tokens : (i + 1) * self.tokens] for i in range(len(pairs))]
        return [(by_row(x, self.steps), x) for x in found]

    def scores(self, pairs, q, k):
        """[(K K^T D, Q K^T D) of a pair], masked, and the decays D."""
        products = []
        for p in pairs:
            other = p + self.half
            products.append(either(dot(rows_of(k[p], q[p], k[other], q[other]), rows_of(k[p], k[other]), (1, 1))))
        decays = self._decays(pairs)
        return [
            (jnp.where(self.below, x[:ROWS] * dk, 0), jnp.where(self.seen, x[ROWS:] * dq, 0))
            for x, (dk, dq) in zip(products, decays, strict=True)
        ], decays
