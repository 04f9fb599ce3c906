"""What the GPU kernels with channel gates need of each block by itself, and its cotangents.

Gates stand inside the products of keys: the decay of a pair of tokens is split where the two largest aligned blocks of tokens
that part them meet. So there are six levels, blocks of 1, 2, 4 .. 32 tokens: at each a token is in the first or the second
block of a pair, and its keys and queries are decayed by exp(E), E the gates from there to where the blocks meet. Every exponent
is a sum of gates, and at most 0; sums are products of a 0/1 mask with the gates in parts. In the product of all rows with all
others are then those of all pairs of blocks, and the rest is masked. Rows of one token do not decay against each other.

Shapes and names are those of `gpu_common` and `gpu_channel`; H key heads for q and k, HV heads for what gates have touched.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_blocks import put_inverse
from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
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

LEVELS = 6  # of 64 tokens


class Pairs:
    """0/1 masks [64, 64] over the tokens of a chunk, for one of its blocks of rows, the `step`-th of `steps`.

    They are made anew at each use, from a number that the compiler does not know: kept across a loop, they fill registers.
    """

    def __init__(self, steps, step):
        self.steps, self.step = steps, step

    def indices(self, turn):
        """The block's first row in the chunk and, of each entry, row and column."""
        hidden = unknown_zero(turn)
        return self.step * ROWS + hidden, *(x + hidden for x in row_and_column())

    def tokens(self, first, row):
        return (first + row) // self.steps if self.steps > 1 else row

    def to_meeting(self, level, of_rows):
        """Gates (across) between a row's or a query's token and where its block and the block's neighbour meet."""
        first, i, s = self.indices(level)
        token = self.tokens(first, i) if of_rows else i
        size = jnp.int32(1) << level
        side = (
            2 * (token & size) - size
        )  # > 0 in the second of two blocks: gates up to the token's; else those after it
        return ((s ^ token) < size) & (side * (2 * (token - s) + 1) > 0)

    def met(self, level, of_rows):
        """Pairs of rows, or of queries and rows, whose tokens this level parts, the later down."""
        first, i, j = self.indices(level)
        later, earlier = self.tokens(first, i) if of_rows else i, self.tokens(first, j)
        size = jnp.int32(1) << level
        return ((later ^ earlier) < 2 * size) & ((later & size) > (earlier & size))

    def alike(self):
        """Pairs of rows of one token, the later down."""
        first, i, j = self.indices(self.step)
        return (self.tokens(first, i) == self.tokens(first, j)) & (i > j)

    def own(self):
        """Queries (down) and the rows of their token."""
        first, i, j = self.indices(self.step)
        return i == self.tokens(first, j)

    def from_start(self):
        """Gates (across) between the block's start and a row; a token's comes before its first row."""
        first, i, s = self.indices(self.step)
        return (first <= s * self.steps) & (s * self.steps <= first + i)

    def to_end(self):
        """Gates (across) after a row up to the block's end."""
        first, i, s = self.indices(self.step)
        return (first + i < s * self.steps) & (s * self.steps < first + ROWS)

    def of_block(self):
        """Gates (down) of the block."""
        first, s, _ = self.indices(self.step)
        return (first <= s * self.steps) & (s * self.steps < first + ROWS)

    def last(self):
        """The last row."""
        return self.indices(self.step)[1] == ROWS - 1

    def up_to(self):
        """Gates (across) up to a token."""
        _, i, s = self.indices(self.step)
        return s <= i


def put_mask(ref, mask):
    ref[...] = jnp.where(mask, 1.0, 0.0).astype(bf16)
    plgpu.commit_smem()


def decay(mask, gates):
    """exp of sums of gates in parts, [64, 64]."""
    return jnp.exp(products((mask, gates.at[0]), (mask, gates.at[1])))


def inverses_and_scores(q, k, g, beta):
    """Of every block (I + A)^-1, in parts side by side [B, S, HV, 64, 128], A / beta in float32 and P [B, S, HV, 64, 64]; of
    queries and keys q_start [B, T, HV, K], k_start and k_end [B, T R, HV, K], and totals [B, S, HV, K] in float32.

    q [B, T, H, K], k [B, T R, H, K], g [B, T, HV, K], beta [B, S, HV, 64].
    """
    batch, length, heads, key_dim = g.shape
    blocks = beta.shape[1]
    steps = k.shape[1] // length
    group = heads // k.shape[2]
    parts_of_keys = key_dim // ROWS

    def body(cta, inputs, outputs, q, k, gates, work, x, y, barrier):
        b, block, h = cta
        chunk, step = block // steps, jax.lax.rem(block, jnp.int32(steps))
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group], q, barrier)
        plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group], k, barrier)
        pairs = Pairs(steps, step)

        @pl.loop(jnp.int32(0), jnp.int32(parts_of_keys))
        def _(part):
            here = rows_of(part)
            g = load(inputs[2].at[b, rows_of(chunk), h, here])
            put_parts(gates.at[part], g)
            outputs[6][b, block, h, here] = jnp.exp(jnp.sum(jnp.where(pairs.of_block(), g, 0.0), axis=0))

        plgpu.barrier_wait(barrier)
        of_rows, of_tokens = work.at[0], work.at[0 if steps == 1 else 1]

        def decayed(ref, part, mask):
            return ref[:, rows_of(part)].astype(f32) * decay(mask, gates.at[part])

        def all_decayed(mask, source, target, rows):
            put_mask(of_rows, mask)

            @pl.loop(jnp.int32(0), jnp.int32(parts_of_keys))
            def _(part):
                writer(y)(decayed(source, part, of_rows), target.at[b, rows, h, rows_of(part)])

        all_decayed(pairs.from_start(), k, outputs[4], rows_of(block))
        all_decayed(pairs.to_end(), k, outputs[5], rows_of(block))

        @pl.when(step == 0)
        def _():
            all_decayed(pairs.up_to(), q, outputs[3], rows_of(chunk))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        a = jnp.where(pairs.alike(), products((k, transposed(k))), 0.0)
        p = jnp.where(pairs.own(), products((q, transposed(k))), 0.0)

        def one_level(level, found):
            put_mask(of_rows, pairs.to_meeting(level, of_rows=True))
            if steps > 1:
                put_mask(of_tokens, pairs.to_meeting(level, of_rows=False))

            def one_part(part, sums):
                put_parts(x, decayed(k, part, of_rows))
                y[...] = decayed(q, part, of_tokens).astype(bf16)
                plgpu.commit_smem()
                x0, x1 = x.at[0], x.at[1]
                of_keys = products((x0, transposed(x0)), (x0, transposed(x1)), (x1, transposed(x0)))
                return sums[0] + of_keys, sums[1] + products((y, transposed(x0)))

            sums = jax.lax.fori_loop(
                jnp.int32(0), jnp.int32(parts_of_keys), one_part, (jnp.zeros((ROWS, ROWS), f32),) * 2
            )
            a, p = (jnp.where(pairs.met(level, of_rows), x, 0.0) for of_rows, x in zip((True, False), sums, strict=True))
            return [found[0] + a, found[1] + p]

        a, p = jax.lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), one_level, [a, p])
        y[...] = p.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y, outputs[2].at[b, block, h])
        outputs[1][b, block, h] = a
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put_inverse(along_rows(load(inputs[3].at[b, block, h])) * a, outputs[0].at[b, block, h], work, x, y)

    of_block = (batch, blocks, heads, ROWS)
    return call(
        body,
        "channel_inverses_and_scores",
        (q, k, g, beta),
        [
            ((*of_block, 2 * ROWS), bf16),
            ((*of_block, ROWS), f32),
            ((*of_block, ROWS), bf16),
            (g.shape, bf16),
            *[((batch, blocks * ROWS, heads, key_dim), bf16)] * 2,
            ((batch, blocks, heads, key_dim), f32),
        ],
        {"batch": batch, "block": blocks, "head": heads},
        [
            plgpu.SMEM((ROWS, key_dim), bf16),
            plgpu.SMEM((ROWS, key_dim), bf16),
            square(parts_of_keys, 2),
            square(2),
            square(2),
            square(),
            plgpu.Barrier(num_arrivals=2),
        ],
    )


def scores_backward(q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals):
    """Cotangents of q [B, T, HV, K] and k [B, T R, HV, K] in bfloat16 and of g [B, T, HV, K] in float32.

    From those of A / beta and P (bfloat16, [B, S, HV, 64, 64], what is above the diagonal is not read), of q_start, k_start and
    k_end, and of the logarithm of totals [B, S, HV, K] in float32.
    """
    batch, length, heads, key_dim = g.shape
    blocks = da.shape[1]
    steps = k.shape[1] // length
    group = heads // k.shape[2]

    def body(
        cta,
        inputs,
        outputs,
        q,
        dq_start,
        k,
        dk_start,
        dk_end,
        da,
        dp,
        gates,
        work,
        of_a,
        of_p,
        keys,
        queries,
        *barriers,
    ):
        b, chunk, h, part = cta
        first, later = barriers
        here = rows_of(part)
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group, here], q, first)
        plgpu.copy_gmem_to_smem(inputs[5].at[b, rows_of(chunk), h, here], dq_start, first)

        def fetch(step):
            block = chunk * steps + step
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group, here], k, later)
            plgpu.copy_gmem_to_smem(inputs[3].at[b, block, h], da, later)
            plgpu.copy_gmem_to_smem(inputs[4].at[b, block, h], dp, later)
            plgpu.copy_gmem_to_smem(inputs[6].at[b, rows_of(block), h, here], dk_start, later)
            plgpu.copy_gmem_to_smem(inputs[7].at[b, rows_of(block), h, here], dk_end, later)

        fetch(jnp.int32(0))
        put_parts(gates, load(inputs[2].at[b, rows_of(chunk), h, here]))
        of_rows, of_tokens = work.at[0], work.at[0 if steps == 1 else 1]
        put_mask(of_rows, Pairs(steps, jnp.int32(0)).up_to())
        plgpu.barrier_wait(first)

        def to_gates(mask, of_exponents):
            put_parts(keys, of_exponents)
            plgpu.commit_smem()
            return products((transposed(mask), keys.at[0]), (transposed(mask), keys.at[1]))

        dq = dq_start[...].astype(f32) * decay(of_rows, gates)
        dg = to_gates(of_rows, dq * q[...].astype(f32))

        def one_block(step, sums):
            dq, dg = sums
            pairs, block = Pairs(steps, step), chunk * steps + step
            plgpu.barrier_wait(later)
            dlog_total = load(inputs[8].at[b, block, h, here])
            dk = jnp.zeros((ROWS, ROWS), f32)
            for of_end, cotangent, mask in ((False, dk_start, pairs.from_start()), (True, dk_end, pairs.to_end())):
                put_mask(of_rows, mask)
                dpart = cotangent[...].astype(f32) * decay(of_rows, gates)
                dk += dpart
                dexponent = dpart * k[...].astype(f32)
                if not of_end:  # the last row's exponent is the total's
                    dexponent += jnp.where(pairs.last(), jax.lax.broadcast_in_dim(dlog_total, (ROWS, ROWS), (1,)), 0.0)
                dg += to_gates(of_rows, dexponent)

            def put_met(in_a, in_p):
                of_a[...] = jnp.where(in_a, da[...], 0.0).astype(bf16)
                of_p[...] = jnp.where(in_p, dp[...], 0.0).astype(bf16)

            put_met(pairs.alike(), pairs.own())
            plgpu.commit_smem()
            dk += products((of_a, k), (transposed(of_a), k), (transposed(of_p), q))
            dq += products((of_p, k))

            def one_level(level, sums):
                dq, dk, dg = sums
                put_mask(of_rows, pairs.to_meeting(level, of_rows=True))
                if steps > 1:
                    put_mask(of_tokens, pairs.to_meeting(level, of_rows=False))
                of_keys = decay(of_rows, gates)
                of_queries = of_keys if steps == 1 else decay(of_tokens, gates)
                keys[0] = (of_keys * k[...].astype(f32)).astype(bf16)
                queries[...] = (of_queries * q[...].astype(f32)).astype(bf16)
                put_met(pairs.met(level, of_rows=True), pairs.met(level, of_rows=False))
                plgpu.commit_smem()
                dqueries = of_queries * products((of_p, keys.at[0]))
                pairs_of_keys = (of_a, keys.at[0]), (transposed(of_a), keys.at[0]), (transposed(of_p), queries)
                dkeys = of_keys * products(*pairs_of_keys)
                dq += dqueries
                dk += dkeys
                of_exponents, of_query_exponents = dkeys * k[...].astype(f32), dqueries * q[...].astype(f32)
                if steps == 1:
                    dg += to_gates(of_rows, of_exponents + of_query_exponents)
                else:
                    dg += to_gates(of_rows, of_exponents) + to_gates(of_tokens, of_query_exponents)
                return dq, dk, dg

            dq, dk, dg = jax.lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), one_level, (dq, dk, dg))
            plgpu.commit_smem()  # all warps have left what the next block is copied to

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
        (q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals),
        [(g.shape, bf16), ((batch, blocks * ROWS, heads, key_dim), bf16), (g.shape, f32)],
        {"batch": batch, "chunk": length // ROWS, "head": heads, "part": key_dim // ROWS},
        [
            *(square() for _ in range(7)),
            *(square(2) for _ in range(2)),
            *(square() for _ in range(2)),
            square(2),
            square(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=5),
        ],
    )
