"""What the GPU kernels with channel gates need of each block by itself, and its cotangents.

Gates stand inside the products of keys, which are therefore split by levels (`gpu_channel_masks`). At each the keys and queries
of all tokens are decayed to where their block and its neighbour meet; in the product of all rows with all others are then those
of all pairs of blocks, and the rest is masked. Rows of one token do not decay against each other.

Shapes and names are those of `gpu_common` and `gpu_channel`; H key heads for q and k, HV heads for what gates have touched.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_channel_masks import LOG2_E, MASKS, TO_MEETING, Masks, decay, masks
from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
    bf16,
    call,
    f32,
    load,
    products,
    put_parts,
    put_prefix_mask,
    row_and_column,
    rows_of,
    square,
    transposed,
    unknown_zero,
    writer,
)

f16 = jnp.float16  # 11 bits, of what is decayed and the gates, not of cotangents, which may have any size
SMALLEST = 2.0**-126  # whose inverse float32 has, too
EXPONENT, INVERSE = 0x7F800000, 254 << 23  # of a power of two: its bits, and what minus these is those of its inverse


def scores(q, k, g):
    """Of every block A / beta [B, S, HV, 64, 64] in float32 and P, without the scale, in bfloat16; q_start [B, T, HV, K], k_start
    and k_end [B, T R, HV, K] in bfloat16; totals [B, S, HV, K] in float32. What A holds on and above its diagonal is not meant.

    q [B, T, H, K], k [B, T R, H, K], g [B, T, HV, K].
    """
    batch, length, heads, key_dim = g.shape
    blocks, steps = k.shape[1] // ROWS, k.shape[1] // length
    group, parts = heads // k.shape[2], key_dim // ROWS

    def body(cta, inputs, outputs, q, k, gates, x, y, stage, sizes, *of_masks):
        b, block, h = cta
        chunk, step = block // steps, jax.lax.rem(block, jnp.int32(steps))
        queries, rows, write, every = rows_of(chunk), rows_of(block), writer(stage), range(parts)
        sums_of = Masks(lambda n: inputs[3].at[step * MASKS + n], MASKS, *of_masks[:2])
        pairs = Masks(lambda n: inputs[4].at[step * MASKS + n], MASKS, *of_masks[2:])

        def put_scaled(ref, source, rows):
            """As float16, each row divided by the power of two that brings its largest entry to 1 .. 2; these come back."""
            found = [load(source.at[b, rows, h // group, rows_of(part)]).astype(f32) for part in every]
            largest = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, found)), axis=1)
            largest = jnp.minimum(jnp.maximum(largest, SMALLEST), 1 / SMALLEST)
            bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & EXPONENT
            inverse = along_rows(jax.lax.bitcast_convert_type(INVERSE - bits, f32))
            for part in every:
                ref[part] = (found[part] * inverse).astype(f16)
            return jax.lax.bitcast_convert_type(bits, f32)

        def decayed(ref, part, mask, sizes):  # float16 would make nothing of exp(-20)
            return ref[part].astype(f32) * (along_rows(sizes) * decay(mask, gates.at[part]))

        of_q, of_k = put_scaled(q, inputs[0], queries), put_scaled(k, inputs[1], rows)
        sizes[...] = of_k

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            here = rows_of(part)
            g = load(inputs[2].at[b, queries, h, here])
            gates[part] = (LOG2_E * g).astype(f16)
            if steps > 1:
                first = next(row_and_column()) * steps - step * ROWS  # the first row of each gate's token
                g = jnp.where((first >= 0) & (first < ROWS), g, 0.0)
            outputs[5][b, block, h, here] = jnp.exp2(LOG2_E * jnp.sum(g, axis=0))

        plgpu.commit_smem()
        of_rows, of_queries = sums_of.wait(jnp.int32(0))

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            write(decayed(k, part, of_rows, of_k), outputs[3].at[b, rows, h, rows_of(part)])

            @pl.when(step == 0)
            def _():
                write(decayed(q, part, of_queries, of_q), outputs[2].at[b, queries, h, rows_of(part)])

        a, p = (products(*((ref.at[part], transposed(k.at[part])) for part in every)) for ref in (k, q))
        a, p = (x * met[...].astype(f32) for x, met in zip((a, p), pairs.wait(jnp.int32(0)), strict=True))
        sums_of.leave(jnp.int32(0))
        pairs.leave(jnp.int32(0))
        of_rows = sums_of.wait(jnp.int32(1))[0]

        @pl.loop(jnp.int32(0), jnp.int32(parts))
        def _(part):
            write(decayed(k, part, of_rows, of_k), outputs[4].at[b, rows, h, rows_of(part)])

        sums_of.leave(jnp.int32(1))
        pairs.wait(jnp.int32(1))  # none
        pairs.leave(jnp.int32(1))

        def one_level(n, found):
            of_rows, of_queries = sums_of.wait(n)

            def accumulate(of_keys, of_scores):
                for part in every:  # `decay` waits for the products of the part before, which read x and y
                    decays = decay(of_rows, gates.at[part]).astype(f16)
                    x[...] = k[part] * decays
                    y[...] = q[part] * decays if steps == 1 else q[part] * decay(of_queries, gates.at[part]).astype(f16)
                    plgpu.commit_smem()
                    plgpu.wgmma(of_keys, x, transposed(x))
                    plgpu.wgmma(of_scores, y, transposed(x))
                return of_keys[...], of_scores[...]

            new = pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, ROWS), f32)] * 2)
            sums_of.leave(n)
            met = pairs.wait(n)
            found = [total + one * mask[...].astype(f32) for total, one, mask in zip(found, new, met, strict=True)]
            pairs.leave(n)
            return found

        a, p = jax.lax.fori_loop(jnp.int32(TO_MEETING), jnp.int32(MASKS), one_level, [a, p])
        t, j = row_and_column()
        of_columns = jax.lax.broadcast_in_dim(sizes[...], (ROWS, ROWS), (1,))
        p *= along_rows(of_q) * of_columns
        write(jnp.where(step * ROWS + j < (t + 1) * steps, p, 0.0), outputs[1].at[b, block, h])
        outputs[0][b, block, h] = along_rows(of_k) * of_columns * a
        plgpu.wait_smem_to_gmem(0)

    of_block = (batch, blocks, heads, ROWS, ROWS)
    rows = (batch, blocks * ROWS, heads, key_dim)
    return call(
        body,
        "channel_scores",
        (q, k, g, *masks(steps, f16)),
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
            *(square(dtype=f16) for _ in range(2)),
            square(),
            plgpu.SMEM((ROWS,), f32),
            *Masks.scratch(2 if steps == 1 else 1, steps, f16),
            *Masks.scratch(1, steps, f16),
        ],
    )


def scores_backward(q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals):
    """Cotangents of q [B, T, HV, K] and k [B, T R, HV, K] in bfloat16 and of g [B, T, HV, K] in float32.

    From those of the scores in bfloat16: da [B, S, HV, 2, 64, 64], of A / beta plus its transpose, in parts, and dp
    [B, S, HV, 64, 64] with zeros where P has them; from those of q_start, k_start and k_end, and of the logarithm of totals
    [B, S, HV, K] in float32.
    """
    batch, length, heads, key_dim = g.shape
    blocks, steps = k.shape[1] // ROWS, k.shape[1] // length
    group, parts = heads // k.shape[2], key_dim // ROWS

    def body(cta, inputs, outputs, *scratch):
        *arrays, first, later, sums, sums_arrived, met, met_arrived = scratch
        q, k, dp, da, gates, keys, queries, *_ = (x.at[0] for x in arrays)
        b, chunk, of_head = cta
        h, part = of_head // parts, jax.lax.rem(of_head, jnp.int32(parts))
        here = rows_of(part)
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group, here], q, first)

        def fetch(step):
            block = chunk * steps + step
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group, here], k, later)
            plgpu.copy_gmem_to_smem(inputs[3].at[b, block, h], da, later)
            plgpu.copy_gmem_to_smem(inputs[4].at[b, block, h], dp, later)

        fetch(jnp.int32(0))
        sums_of = Masks(lambda n: inputs[9].at[n], steps * MASKS, sums, sums_arrived)
        pairs = Masks(lambda n: inputs[10].at[n], steps * MASKS, met, met_arrived)
        put_parts(gates, LOG2_E * load(inputs[2].at[b, rows_of(chunk), h, here]))

        def decays(mask, gates):
            return decay(mask, gates.at[0], gates.at[1])

        def to_gates(mask, of_exponents, ref):
            ref[...] = of_exponents.astype(bf16)
            plgpu.commit_smem()
            return products((transposed(mask), ref))

        put_prefix_mask(queries)
        plgpu.commit_smem()
        plgpu.barrier_wait(first)
        dq = load(inputs[5].at[b, rows_of(chunk), h, here]).astype(f32) * decays(queries, gates)
        dg = to_gates(queries, dq * q[...].astype(f32), keys)

        def one_block(step, sums):
            dq, dg = sums
            block, begin = chunk * steps + step, step * MASKS
            plgpu.barrier_wait(later)
            q, k, dp, da, gates, keys, queries, work = (x.at[unknown_zero(step)] for x in arrays)
            dk = jnp.zeros((ROWS, ROWS), f32)
            for kind in range(TO_MEETING):
                n = begin + kind
                of_rows = sums_of.wait(n)[0]
                met_of_rows, met_of_queries = pairs.wait(n)
                if kind == 0:
                    work[0] = dp[...] * met_of_queries[...]
                    plgpu.commit_smem()
                    dq += products((work.at[0], k))
                    dk += products((transposed(work.at[0]), q))
                    work[0], work[1] = (da[part] * met_of_rows[...] for part in range(2))
                    plgpu.commit_smem()
                    dk += products((work.at[0], k), (work.at[1], k))
                pairs.leave(n)
                dpart = load(inputs[6 + kind].at[b, rows_of(block), h, here]).astype(f32) * decays(of_rows, gates)
                dk += dpart
                of_exponents = dpart * k[...].astype(f32)
                if kind == 0:  # the last row's exponent is the total's
                    dlog_total = load(inputs[8].at[b, block, h, here])
                    of_total = jax.lax.broadcast_in_dim(dlog_total, (ROWS, ROWS), (1,))
                    of_exponents += jnp.where(next(row_and_column()) == ROWS - 1, of_total, 0.0)
                dg += to_gates(of_rows, of_exponents, keys)
                sums_of.leave(n)

            def one_level(n, sums):
                dq, dk, dg = sums
                q, k, dp, da, gates, keys, queries, work = (x.at[unknown_zero(n)] for x in arrays)
                of_rows, of_queries = sums_of.wait(n)
                met_of_rows, met_of_queries = pairs.wait(n)
                work[0] = dp[...] * met_of_queries[...]
                decays_of_rows = decays(of_rows, gates)
                keys[...] = k[...] * decays_of_rows.astype(bf16)
                decays_of_queries = decays_of_rows if steps == 1 else decays(of_queries, gates)
                queries[...] = q[...] * decays_of_queries.astype(bf16)
                plgpu.commit_smem()
                dqueries = products((work.at[0], keys))
                dq += decays_of_queries * dqueries
                of_query_exponents = dqueries.astype(bf16) * queries[...]
                dkeys = products((transposed(work.at[0]), queries))
                work[0], work[1] = (da[part] * met_of_rows[...] for part in range(2))
                pairs.leave(n)
                dkeys += products((work.at[0], keys), (work.at[1], keys))
                dk += decays_of_rows * dkeys
                of_exponents = dkeys.astype(bf16) * keys[...]
                if steps == 1:
                    dg += to_gates(of_rows, of_exponents + of_query_exponents, keys)
                else:
                    dg += to_gates(of_rows, of_exponents, keys)
                    dg += to_gates(of_queries, of_query_exponents, keys)
                sums_of.leave(n)
                return dq, dk, dg

            dq, dk, dg = jax.lax.fori_loop(begin + TO_MEETING, begin + MASKS, one_level, (dq, dk, dg))

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
        (q, k, g, da, dp, dq_start, dk_start, dk_end, dlog_totals, *masks(steps, bf16)),
        [(g.shape, bf16), ((batch, blocks * ROWS, heads, key_dim), bf16), (g.shape, f32)],
        {"batch": batch, "chunk": length // ROWS, "head_and_part": heads * parts},
        [
            *(square(1) for _ in range(3)),
            square(1, 2),
            square(1, 2),
            *(square(1) for _ in range(2)),
            square(1, 2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3),
            *Masks.scratch(2 if steps == 1 else 1, steps, bf16),
            *Masks.scratch(1, steps, bf16),
        ],
    )
