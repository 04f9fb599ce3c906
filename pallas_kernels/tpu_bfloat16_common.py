"""What the bfloat16 TPU kernels share: two heads side by side, products in parts, gates and scores.

What is square in the 64 rows of a chunk fills half of the 128 lanes, so two heads share an array, [64, 2 x 64]: half the
vector work, and the products of both in one pass of the matrix unit. Of HV heads in a block, head p of the first half is
paired with head p + HV / 2. All pairs go in step, stage by stage: the compiler looks no further than neighbouring lines, and so
their products fill each other's latencies.

bfloat16 matrices [rows, lanes] are held as 32-bit pairs of rows, [rows / 2, lanes], which is what the registers hold:
then parts are put together, masked and stored as they are. (Of bfloat16 arrays Mosaic makes half-filled tiles in between.)
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 64  # of keys and values in a chunk; with R = 3 the last 16 are zeros
LANES = 2 * ROWS
F32, BF16 = jnp.float32, jnp.bfloat16


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


def floats(x):
    """float32 of `bits`."""
    return pltpu.bitcast(x, BF16).astype(F32)


def halves(x):
    """Two arrays of 8 bits that sum to x in 16 bits; cutting bits costs less than rounding and reading back."""
    head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), F32)
    return head, x - head


def split(x):
    """Bits of the `halves` of x."""
    return tuple(map(bits, halves(x)))


def split_in_memory(ref, h):
    """`split` of ref[h], float32 in VMEM, from even and odd rows loaded apart; the second part is cut, not rounded."""
    rows = ref.shape[1] // 2
    even, odd = (halves(ref[h, pl.ds(i, rows, stride=2), :]) for i in range(2))
    as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint32)
    words = (as_bits(low) >> 16 | as_bits(high) & jnp.uint32(0xFFFF0000) for low, high in zip(even, odd, strict=True))
    return tuple(jax.lax.bitcast_convert_type(x, jnp.int32) for x in words)


def dot(x, y, axes=(1, 0)):
    """float32 product of two matrices of bits."""
    x, y = pltpu.bitcast(x, BF16), pltpu.bitcast(y, BF16)
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=F32)


def transpose(x):
    """Bits of the transpose of a matrix of bits."""
    return bits(pltpu.bitcast(x, BF16).T)


def one():
    """1.0, which the compiler does not know to be it.

    Products that are added may be summed in the matrix unit. Which unit takes which, tpu7x's compiler decides for all that hang
    together by such sums, and of some it does not come to an end (its pass "MXU-assigner"); times this they do not hang together.
    """
    return jnp.where(pl.program_id(2) < 0, 0.0, 1.0)


def half_turn(x):
    """Lanes turned by half: what is left goes right."""
    return pltpu.roll(x, ROWS, 1)


def left(x):
    """Mask of the lanes of the left head of a pair."""
    return iota(x.shape, 1) < ROWS


def stacked(x):
    """Bits of the pair's two heads, one above the other, in an array [2 rows, LANES] that is 0 in the other head's lanes."""
    mask = jnp.where(
        left(x), -1, 0
    )  # no choice: of that v5e's compiler makes a masked product, which its profiler does not know
    return rows_of(x & mask, x & ~mask)


def either(x):
    """Of [2 rows, LANES], products of each of two heads with both, what is its own: [rows, LANES]; also of bits."""
    size = x.shape[0] // 2
    return jnp.where(iota((size, LANES), 1) < ROWS, x[:size], x[size:])


def padded(x):
    """Bits of [C, ..] with rows of zeros up to 64."""
    rows = ROWS // 2 - x.shape[0]
    return x if not rows else rows_of(x, jnp.zeros((rows, x.shape[1]), x.dtype))


def column(x, h):
    """Column h of [rows, heads] as [rows, 1]; 1 without gates."""
    return 1.0 if x is None else x[:, h : h + 1]


def run(stages, beside=None, parts=0):
    """Runs a generator to its end, with so many parts of another after each of its own."""
    for _ in stages:
        for _ in zip(range(parts), beside or (), strict=False):
            pass


# Gates and scores.


class Gates:
    """What depends on beta and gates alone, of all heads of a block; decays are None without gates.

    Per row and head: beta [64, nh], decays from the chunk's start and to its end; from the start per query [C, nh]; total
    [1, nh]. As rows of pairs: beta_rows, gate_rows [nh / 2, 2 x 64].
    """

    def __init__(self, beta, gates, tokens, steps):
        self.tokens, self.steps, self.half = tokens, steps, beta.shape[1] // 2
        self.beta, self.beta_rows = beta, self._by_pair(beta)
        self.from_start = self.to_end = self.from_start_q = self.total = None
        i, j = iota((ROWS, LANES), 0), iota((ROWS, LANES), 1) % ROWS
        last = iota((tokens, LANES), 0) * self.steps + self.steps - 1  # row of a token
        self.below, self.seen = i > j, last >= iota((tokens, LANES), 1) % ROWS
        meets = [i >= j] + [self.seen] * (self.steps > 1)  # gates up to a row, or a query
        self.meets = [x.astype(F32) for x in meets]
        if gates is None:
            return
        self.gate_rows = self._by_pair(gates)
        masks = bits(rows_of(*self.meets, (i < j).astype(F32)))
        decays = jnp.exp(dot(masks, rows_of(*split(gates))))
        self.from_start, self.to_end = decays[:ROWS], decays[-ROWS:]
        self.from_start_q = decays[ROWS : ROWS + tokens] if self.steps > 1 else self.from_start
        self.total = self.from_start[-1:]

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
            row = jnp.broadcast_to(self.gate_rows[p : p + 1], (ROWS, LANES))
            # Times the mask: of a choice v5e's compiler makes a masked product, which its profiler does not know.
            gates += [lanes_of(*split(mask * row[: mask.shape[0]])) for mask in self.meets]
        s, j = iota((LANES, LANES), 0), iota((LANES, LANES), 1)
        later = bits(((s // ROWS == j // ROWS) & (s > j)).astype(F32))
        decays = jnp.exp(dot(rows_of(*gates), rows_of(later, later)))
        size = decays.shape[0] // len(pairs)
        ends = range(size, decays.shape[0] + 1, size)
        return [(decays[end - size : end - size + ROWS], decays[end - self.tokens : end]) for end in ends]

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
