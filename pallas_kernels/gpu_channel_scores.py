"""What the GPU kernels with channel gates need of each block by itself, and its cotangents.

Gates stand inside the products of keys: the decay of a pair of tokens is split where the two largest aligned blocks of tokens
that part them meet. So there are six levels, blocks of 1, 2, 4 .. 32 tokens: at each a token is in the first or the second
block of a pair, and its keys and queries are decayed by exp(E), E the gates from there to where the blocks meet. Every exponent
is a sum of gates, and at most 0; sums are products of a 0/1 mask with the gates. In the product of all rows with all others are
then those of all pairs of blocks, and the rest is masked. Rows of one token do not decay against each other.

Shapes and names are those of `gpu_common` and `gpu_channel`; H key heads for q and k, HV heads for what gates have touched.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_common import (
    ROWS,
    bf16,
    call,
    f32,
    load,
    products,
    put_parts,
    row_and_column,
    rows_of,
    square,
    transposed,
    unknown_zero,
    writer,
)

f16 = jnp.float16  # 11 bits, of what is decayed and the gates, not of cotangents, which may have any size
LEVELS = 6  # of 64 tokens
TO_MEETING = 2  # the first of the levels' masks
MASKS = TO_MEETING + LEVELS
LOG2_E = float(np.log2(np.e))


def masks(steps: int) -> np.ndarray:
    """Which gates of a chunk (across) are summed for each row of its blocks and each of its queries (down).

    [steps, MASKS, 2, 64, 64], of rows and of queries; [.., 1, 64, 64] where these are alike, with steps = 1. The first are the
    gates from the block's start up to a row, and from the chunk's up to a query; then those after a row up to the block's end
    (nothing for queries); then, by level, those from a token to where blocks meet. A token's gate comes before its first row.
    """
    s = np.arange(ROWS)
    query = s[:, None]
    found = np.zeros((steps, MASKS, 2, ROWS, ROWS), np.bool)
    for step in range(steps):
        row, first = step * ROWS + query, s * steps
        found[step, 0] = (row[0] <= first) & (first <= row), s <= query
        found[step, 1, 0] = (row < first) & (first <= row[-1])
        for level in range(LEVELS):
            for kind, token in enumerate((row // steps, query)):
                gates = np.where(token >> level & 1, s <= token, s > token)
                found[step, TO_MEETING + level, kind] = gates & (s >> level == token >> level)
    return found[:, :, :1] if steps == 1 else found


class Pairs:
    """Pairs of rows, and of queries (down) and rows, by what parts their tokens: [64, 64], in the `step`-th block of `steps`.

    Made anew at each use, from indices that the compiler does not know: kept across a loop, they fill registers.
    """

    def __init__(self, steps, step):
        self.steps, self.step = steps, step

    def tokens(self, turn):
        """Of each entry its query, its row's token and its column's."""
        hidden = unknown_zero(turn)
        i, j = (x + hidden for x in row_and_column())
        if self.steps == 1:
            return i, i, j
        return i, (self.step * ROWS + i) // self.steps, (self.step * ROWS + j) // self.steps

    def of_rows(self, level):
        """Which are parted at this level, either way round."""
        _, later, earlier = self.tokens(level)
        return (later ^ earlier) >> level == 1

    def of_queries(self, level):
        later, _, earlier = self.tokens(level)
        return (later ^ earlier) >> level == 1

    def of_one_token(self):
        query, row, column = self.tokens(self.step)
        return row == column, query == column

    def seen(self):
        """Which rows are of tokens up to the query's."""
        query, _, column = self.tokens(self.step)
        return column <= query


def decay(mask, *gates):
    """exp of sums of gates, [64, 64]; gates times log2 e, with the mask's dtype, their parts added."""
    return jnp.exp2(products(*((mask, part) for part in gates)))


def scores(q, k, g):
    """Of every block A / beta [B, S, HV, 64, 64] in float32 and P, without the scale, in bfloat16; q_start [B, T, HV, K], k_start
    and k_end [B, T R, HV, K] in bfloat16; totals [B, S, HV, K] in float32. What A holds on and above its diagonal is not meant.

    q [B, T, H, K], k [B, T R, H, K], g [B, T, HV, K].
    """
    batch, length, heads, key_dim = g.shape
    blocks, steps = k.shape[1] // ROWS, k.shape[1] // length
    group = heads // k.shape[2]
    parts = key_dim // ROWS
    of_gates = jnp.asarray(masks(steps), f16)
    kinds = of_gates.shape[2]

    def body(cta, inputs, outputs, q, k, gates, mask, x, y, stage, arrived):
        b, block, h = cta
        chunk, step = block // steps, jax.lax.rem(block, jnp.int32(steps))
        pairs, write = Pairs(steps, step), writer(stage)

        def fetch(n):
            slot = jax.lax.rem(n, jnp.int32(2))
            plgpu.copy_gmem_to_smem(inputs[3].at[step, n], mask.at[slot], arrived.at[slot])

        def decayed(ref, part, slot, kind=0):
            return ref[part] * decay(mask.at[slot, kind], gates.at[part]).astype(f16)

        fetch(jnp.int32(0))
        fetch(jnp.int32(1))

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            here = rows_of(part)
            q[part] = load(inputs[0].at[b, rows_of(chunk), h // group, here]).astype(f16)
            k[part] = load(inputs[1].at[b, rows_of(block), h // group, here]).astype(f16)
            g = load(inputs[2].at[b, rows_of(chunk), h, here])
            gates[part] = (LOG2_E * g).astype(f16)
            if steps > 1:
                first = next(row_and_column()) * steps - step * ROWS  # the first row of each gate's token
                g = jnp.where((first >= 0) & (first < ROWS), g, 0.0)
            outputs[5][b, block, h, here] = jnp.exp2(LOG2_E * jnp.sum(g, axis=0))

        plgpu.commit_smem()
        plgpu.barrier_wait(arrived.at[0])

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            write(decayed(k, part, 0), outputs[3].at[b, rows_of(block), h, rows_of(part)])

            @pl.when(step == 0)
            def _():
                write(decayed(q, part, 0, kinds - 1), outputs[2].at[b, rows_of(chunk), h, rows_of(part)])

        plgpu.commit_smem()  # all warps have left the mask
        fetch(jnp.int32(2))
        plgpu.barrier_wait(arrived.at[1])

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            write(decayed(k, part, 1), outputs[4].at[b, rows_of(block), h, rows_of(part)])

        plgpu.commit_smem()
        fetch(jnp.int32(3))
        of_keys, of_queries = pairs.of_one_token()
        every = range(parts)
        a = jnp.zeros((ROWS, ROWS), f32)
        if steps > 1:
            a = jnp.where(of_keys, products(*((k.at[part], transposed(k.at[part])) for part in every)), 0.0)
        p = jnp.where(of_queries, products(*((q.at[part], transposed(k.at[part])) for part in every)), 0.0)

        def one_level(level, found):
            slot = jax.lax.rem(level, jnp.int32(2))
            plgpu.barrier_wait(arrived.at[slot])

            def accumulate(of_keys, of_queries):
                for part in every:
                    decays = decay(mask.at[slot, 0], gates.at[part]).astype(f16)
                    x[...] = k[part] * decays
                    y[...] = q[part] * decays if steps == 1 else decayed(q, part, slot, 1)
                    plgpu.commit_smem()
                    plgpu.wgmma(of_keys, x, transposed(x))
                    plgpu.wgmma(of_queries, y, transposed(x))
                return of_keys[...], of_queries[...]

            a, p = pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, ROWS), f32)] * 2)
            plgpu.commit_smem()

            @pl.when(level + 2 < LEVELS)
            def _():
                fetch(TO_MEETING + level + 2)

            return found[0] + jnp.where(pairs.of_rows(level), a, 0.0), found[1] + jnp.where(
                pairs.of_queries(level), p, 0.0
            )

        a, p = jax.lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), one_level, (a, p))
        write(jnp.where(pairs.seen(), p, 0.0), outputs[1].at[b, block, h])
        outputs[0][b, block, h] = a
        plgpu.wait_smem_to_gmem(0)

    of_block = (batch, blocks, heads, ROWS, ROWS)
    rows = (batch, blocks * ROWS, heads, key_dim)
    return call(
        body,
        "channel_scores",
        (q, k, g, of_gates),
        [
            (of_block, f32),
            (of_block, bf16),
            (g.shape, bf16),
            (rows, bf16),
            (rows, bf16),
            ((batch, blocks, heads, key_dim), f32),
        ],
        {"batch": batch, "block": blocks, "head": heads},
        [
            *(square(parts, dtype=f16) for _ in range(3)),
            square(2, kinds, dtype=f16),
            *(square(dtype=f16) for _ in range(2)),
            square(),
            plgpu.Barrier(num_barriers=2),
        ],
    )


def scores_backward(q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals):
    """Cotangents of q [B, T, HV, K] and k [B, T R, HV, K] in bfloat16 and of g [B, T, HV, K] in float32.

    From those of the scores in bfloat16, [B, S, HV, 64, 64]: da that of A / beta plus its transpose, dp with zeros where P has
    them; from those of q_start, k_start and k_end, and of the logarithm of totals [B, S, HV, K] in float32.
    """
    batch, length, heads, key_dim = g.shape
    blocks, steps = k.shape[1] // ROWS, k.shape[1] // length
    group = heads // k.shape[2]
    of_gates = jnp.asarray(masks(steps), bf16)
    kinds = of_gates.shape[2]

    def body(cta, inputs, outputs, q, k, da, dp, gates, mask, work, keys, queries, first, later, arrived):
        b, chunk, h, part = cta
        here = rows_of(part)
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group, here], q, first)

        def fetch(step):
            block = chunk * steps + step
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group, here], k, later)
            plgpu.copy_gmem_to_smem(inputs[3].at[b, block, h], da, later)
            plgpu.copy_gmem_to_smem(inputs[4].at[b, block, h], dp, later)

        def fetch_mask(n):
            step, slot = n // MASKS, jax.lax.rem(n, jnp.int32(2))
            plgpu.copy_gmem_to_smem(inputs[9].at[step, n - step * MASKS], mask.at[slot], arrived.at[slot])

        def decays(mask):
            return decay(mask, gates.at[0], gates.at[1])

        def to_gates(mask, of_exponents):
            put_parts(work, of_exponents)
            plgpu.commit_smem()
            return products((transposed(mask), work.at[0]), (transposed(mask), work.at[1]))

        fetch(jnp.int32(0))
        fetch_mask(jnp.int32(0))
        fetch_mask(jnp.int32(1))
        put_parts(gates, LOG2_E * load(inputs[2].at[b, rows_of(chunk), h, here]))
        i, j = row_and_column()
        keys[...] = jnp.where(j <= i, 1.0, 0.0).astype(bf16)
        plgpu.commit_smem()
        plgpu.barrier_wait(first)
        dq = load(inputs[5].at[b, rows_of(chunk), h, here]).astype(f32) * decays(keys)
        dg = to_gates(keys, dq * q[...].astype(f32))

        def one_block(step, sums):
            dq, dg = sums
            pairs, block = Pairs(steps, step), chunk * steps + step
            plgpu.barrier_wait(later)

            def leave(n):
                plgpu.commit_smem()  # all warps have left the mask

                @pl.when(n + 2 < steps * MASKS)
                def _():
                    fetch_mask(n + 2)

            dk = jnp.zeros((ROWS, ROWS), f32)
            for kind in range(TO_MEETING):
                plgpu.barrier_wait(arrived.at[kind])
                dpart = load(inputs[6 + kind].at[b, rows_of(block), h, here]).astype(f32) * decays(mask.at[kind, 0])
                dk += dpart
                of_exponents = dpart * k[...].astype(f32)
                if kind == 0:  # the last row's exponent is the total's
                    dlog_total = load(inputs[8].at[b, block, h, here])
                    of_total = jax.lax.broadcast_in_dim(dlog_total, (ROWS, ROWS), (1,))
                    of_exponents += jnp.where(next(row_and_column()) == ROWS - 1, of_total, 0.0)
                dg += to_gates(mask.at[kind, 0], of_exponents)
                leave(step * MASKS + kind)

            def put_parted(of_rows, of_queries):
                work[0] = jnp.where(of_rows, da[...], 0.0).astype(bf16)
                work[1] = jnp.where(of_queries, dp[...], 0.0).astype(bf16)
                plgpu.commit_smem()

            put_parted(*pairs.of_one_token())
            dk += products((work.at[0], k), (transposed(work.at[1]), q))
            dq += products((work.at[1], k))

            def one_level(level, sums):
                dq, dk, dg = sums
                slot = jax.lax.rem(level, jnp.int32(2))
                plgpu.barrier_wait(arrived.at[slot])
                of_keys = decays(mask.at[slot, 0])
                of_queries = of_keys if steps == 1 else decays(mask.at[slot, 1])
                keys[...] = (of_keys * k[...].astype(f32)).astype(bf16)
                queries[...] = (of_queries * q[...].astype(f32)).astype(bf16)
                put_parted(pairs.of_rows(level), pairs.of_queries(level))
                dqueries = of_queries * products((work.at[1], keys))
                dkeys = of_keys * products((work.at[0], keys), (transposed(work.at[1]), queries))
                dq += dqueries
                dk += dkeys
                of_exponents, of_query_exponents = dkeys * k[...].astype(f32), dqueries * q[...].astype(f32)
                if steps == 1:
                    dg += to_gates(mask.at[slot, 0], of_exponents + of_query_exponents)
                else:
                    dg += to_gates(mask.at[slot, 0], of_exponents)
                    dg += to_gates(mask.at[slot, 1], of_query_exponents)
                leave(step * MASKS + TO_MEETING + level)
                return dq, dk, dg

            dq, dk, dg = jax.lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), one_level, (dq, dk, dg))

            @pl.when(step + 1 < steps)
            def _():
                fetch(step + 1)

            writer(queries)(dk, outputs[1].at[b, rows_of(block), h, here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return dq, dg

        dq, dg = jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), one_block, (dq, dg))
        writer(queries)(dq, outputs[0].at[b, rows_of(chunk), h, here])
        outputs[2][b, rows_of(chunk), h, here] = dg
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "channel_scores_backward",
        (q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals, of_gates),
        [(g.shape, bf16), ((batch, blocks * ROWS, heads, key_dim), bf16), (g.shape, f32)],
        {"batch": batch, "chunk": length // ROWS, "head": heads, "part": key_dim // ROWS},
        [
            *(square() for _ in range(4)),
            square(2),
            square(2, kinds),
            square(2),
            *(square() for _ in range(2)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_barriers=2),
        ],
    )
