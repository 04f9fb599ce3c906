"""The backward's GPU kernels beside the scan in reverse: what comes before it, of the outputs, and after it, of the rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
    bf16,
    call,
    decays_between,
    f32,
    products,
    put_prefix_mask,
    row_and_column,
    rows_of,
    square,
    transposed,
    unknown_zero,
    writer,
)


def outputs_backward(q, k, v_new, states, tokens, do, *, scale):
    """The cotangents of `outputs`, whose arguments these are, with do [B, T, HV, V].

    Returns dq [B, T, HV, K], dk [B, T R, HV, K], dv_new [B, T R, HV, V], those of the states that chunks start from
    [B, C, HV, K, V], all in bfloat16; in float32 that of tokens[:, :, :, 0] [B, C, HV, 64], and the sums of dP * P over
    rows [B, C, HV, 64] and over tokens [B, S, HV, 64], from which the gates' cotangent follows: so without the rows of a query's
    own token.
    """
    batch, chunks, heads, kinds, _ = tokens.shape
    blocks, _, key_dim, value_dim = states.shape[1:]
    steps = blocks // chunks
    group = heads // q.shape[2]
    parts_of_keys = key_dim // ROWS

    def body(cta, inputs, outputs, *scratch):
        *arrays, tokens, mask, first, later, of_state = scratch
        q, k, v, do, *_ = (x.at[0] for x in arrays)
        b, chunk, h = cta
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group], q, first)
        plgpu.copy_gmem_to_smem(inputs[4].at[b, chunk, h], tokens, first)
        plgpu.copy_gmem_to_smem(inputs[5].at[b, rows_of(chunk), h], do, first)

        def fetch(r):
            block = chunk * steps + r
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group], k, later)
            plgpu.copy_gmem_to_smem(inputs[2].at[b, rows_of(block), h], v, later)

        def fetch_state(part):
            plgpu.copy_gmem_to_smem(inputs[3].at[b, chunk * steps, h, rows_of(part)], v, of_state)

        fetch(0)
        put_prefix_mask(mask)
        plgpu.barrier_wait(first)

        def one_block(r, sums):
            over_rows, *dq = sums
            block = chunk * steps + r
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(later)
            q, k, v, do, parts, stage = (x.at[unknown_zero(r)] for x in arrays)
            write = writer(stage)
            t, j = row_and_column()
            decayed = scale
            if kinds > 1:
                decayed *= decays_between(tokens.at[1], lambda s, j: s * steps > ROWS * r + j, mask, parts)
            decayed = jnp.where(ROWS * r + j < (t + 1) * steps, decayed, 0.0)
            p, dscores = parts.at[0], parts.at[1]
            p[...] = (decayed * products((q, transposed(k)))).astype(bf16)
            dp = products((do, transposed(v)))
            dscores[...] = (decayed * dp).astype(bf16)
            of_gates = dp * p[...].astype(f32)  # from there, as registers are scarce
            if kinds > 1:  # no gate stands between a query and its token's rows
                of_gates = jnp.where(ROWS * r + j < t * steps, of_gates, 0.0)
            over_rows += jnp.sum(of_gates, axis=1)
            outputs[6][b, block, h] = jnp.sum(of_gates, axis=0)
            plgpu.commit_smem()

            @pl.loop(jnp.int32(0), jnp.int32(value_dim // ROWS))
            def _(part):
                here = rows_of(part)
                write(products((transposed(p), do.at[:, here])), outputs[2].at[b, rows_of(block), h, here])

            @pl.loop(jnp.int32(0), jnp.int32(parts_of_keys))
            def _(part):
                here = rows_of(part)
                write(products((transposed(dscores), q.at[:, here])), outputs[1].at[b, rows_of(block), h, here])

            for part in range(parts_of_keys):
                dq[part] += products((dscores, k.at[:, rows_of(part)]))
            plgpu.commit_smem()  # all warps have left k and v

            @pl.when(r + 1 < steps)
            def _():
                fetch(r + 1)

            return [over_rows, *dq]

        sums = [jnp.zeros(ROWS, f32), *[jnp.zeros((ROWS, ROWS), f32)] * parts_of_keys]
        over_rows, *dq = jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), one_block, sums)
        fetch_state(0)  # rows of the state where those of v were
        outputs[5][b, chunk, h] = over_rows
        for part in range(parts_of_keys):
            k[:, rows_of(part)] = dq[part].astype(bf16)

        def one_part(part, dfrom_start):
            here = rows_of(part)
            plgpu.barrier_wait(of_state)
            q, k, v, do, parts, stage = (x.at[unknown_zero(part)] for x in arrays)
            write = writer(stage)
            do_state = scale * products((do, transposed(v)))
            queries = q[:, here].astype(f32)
            weight = along_rows(tokens[0])
            write(k[:, here].astype(f32) + weight * do_state, outputs[0].at[b, rows_of(chunk), h, here])
            parts[0] = (scale * weight * queries).astype(bf16)
            plgpu.commit_smem()

            @pl.when(part + 1 < parts_of_keys)
            def _():
                fetch_state(part + 1)

            @pl.loop(jnp.int32(0), jnp.int32(value_dim // ROWS))
            def _(column):
                there = rows_of(column)
                write(products((transposed(parts.at[0]), do.at[:, there])), outputs[3].at[b, chunk, h, here, there])

            return dfrom_start + jnp.sum(queries * do_state, axis=1)

        dfrom_start = jax.lax.fori_loop(jnp.int32(0), jnp.int32(parts_of_keys), one_part, jnp.zeros(ROWS, f32))
        outputs[4][b, chunk, h] = dfrom_start
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "outputs_backward",
        (q, k, v_new, states, tokens, do),
        [
            ((batch, chunks * ROWS, heads, key_dim), bf16),
            ((batch, blocks * ROWS, heads, key_dim), bf16),
            ((batch, blocks * ROWS, heads, value_dim), bf16),
            ((batch, chunks, heads, key_dim, value_dim), bf16),
            ((batch, chunks, heads, ROWS), f32),
            ((batch, chunks, heads, ROWS), f32),
            ((batch, blocks, heads, ROWS), f32),
        ],
        {"batch": batch, "chunk": chunks, "head": heads},
        [
            plgpu.SMEM((1, ROWS, key_dim), bf16),
            plgpu.SMEM((1, ROWS, key_dim), bf16),
            *(plgpu.SMEM((1, ROWS, value_dim), bf16) for _ in range(2)),
            square(1, 2),
            square(1),
            plgpu.SMEM((kinds, ROWS), f32),
            square(),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def rows_backward(k, v, v_new, dsolved, states, dstates, rows, weights, steps):
    """The rest of the cotangents of a block, from the two scans.

    With `scan`'s own names: k, x = v, y = v_new and states (before each block) of the scan forwards; of the scan in reverse
    y = dsolved, the cotangent of w_in x + w_state (K S), and states = dstates (after each block). rows as `inverses` takes them,
    weights those of the scan forwards.

    Returns dk [B, T R, HV, K] and dv [B, T R, HV, V] in bfloat16, and [B, S, HV, 8, 64] in float32: the cotangents of w_in,
    w_state, w_out, total (to be summed) and of beta in A, dA * A summed over columns
    and over rows (pairs of a token's rows left out), and dsolved * v_new summed over V.
    """
    batch, blocks, heads, kinds, _ = rows.shape
    key_dim, value_dim = states.shape[3:]
    group = heads // k.shape[2]

    def body(cta, inputs, outputs, *scratch):
        *arrays, rows, weights, mask, parts, first, later = scratch
        k, v, v_new, dsolved, dstate = (x.at[0] for x in arrays)
        b, block, h = cta
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(block), h // group], k, first)
        for ref, smem in zip(inputs[1:4], (v, v_new, dsolved), strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, rows_of(block), h], smem, first)
        plgpu.copy_gmem_to_smem(inputs[6].at[b, block, h], rows, first)
        plgpu.copy_gmem_to_smem(inputs[7].at[b, block, h], weights, first)

        def fetch(part):
            plgpu.copy_gmem_to_smem(inputs[4].at[b, block, h, rows_of(part)], v, later)
            plgpu.copy_gmem_to_smem(inputs[5].at[b, block, h, rows_of(part)], dstate, later)

        put_prefix_mask(mask)
        plgpu.barrier_wait(first)
        i, j = row_and_column()
        decays = decays_between(rows.at[1], lambda s, j: s > j, mask, parts) if kinds > 1 else 1.0
        da = jnp.where(i > j, -decays * products((dsolved, transposed(v_new))), 0.0)
        of_beta = da * products((k, transposed(k)))
        outputs[2][b, block, h, 4] = jnp.sum(of_beta, axis=1)
        beta = along_rows(rows[0])
        of_gates = beta * of_beta
        if kinds > 1 and steps > 1:  # no gate stands between the rows of a token
            before = jax.lax.rem(block * ROWS, jnp.int32(steps))
            of_gates = jnp.where((before + i) // steps > (before + j) // steps, of_gates, 0.0)
        outputs[2][b, block, h, 5] = jnp.sum(of_gates, axis=1)
        outputs[2][b, block, h, 6] = jnp.sum(of_gates, axis=0)
        parts[0] = (beta * da).astype(bf16)
        write = writer(mask, parts.at[1])
        of_inputs: Any = 0.0
        of_log_beta: Any = 0.0
        for part in range(value_dim // ROWS):
            here = rows_of(part)
            dx = dsolved[:, here].astype(f32)
            of_inputs += jnp.sum(dx * v[:, here].astype(f32), axis=1)
            of_log_beta += jnp.sum(dx * v_new[:, here].astype(f32), axis=1)
            write(along_rows(weights[0]) * dx, outputs[1].at[b, rows_of(block), h, here])
        outputs[2][b, block, h, 7] = of_log_beta
        plgpu.commit_smem()  # all warps have left v
        fetch(0)
        write = writer(mask)

        def one_part(part, sums):
            here = rows_of(part)
            plgpu.barrier_wait(later)
            k, v, v_new, dsolved, dstate = (x.at[unknown_zero(part)] for x in arrays)
            to_state, to_end = products((dsolved, transposed(v))), products((v_new, transposed(dstate)))
            keys = k[:, here].astype(f32)
            of_part = keys * to_state, keys * to_end, v[...].astype(f32) * dstate[...].astype(f32)
            sums = [total + jnp.sum(x, axis=1) for total, x in zip(sums, of_part, strict=True)]
            plgpu.commit_smem()  # all warps have left the states

            @pl.when(part + 1 < key_dim // ROWS)
            def _():
                fetch(part + 1)

            dk = along_rows(weights[1]) * to_state + along_rows(weights[2]) * to_end
            dk += products((parts.at[0], k.at[:, here]), (transposed(parts.at[0]), k.at[:, here]))
            write(dk, outputs[0].at[b, rows_of(block), h, here])
            return sums

        sums = [jnp.zeros_like(of_inputs)] * 3
        sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(key_dim // ROWS), one_part, sums)
        for kind, vector in enumerate([of_inputs, *sums]):
            outputs[2][b, block, h, kind] = vector
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "rows_backward",
        (k, v, v_new, dsolved, states, dstates, rows, weights),
        [
            ((batch, blocks * ROWS, heads, key_dim), bf16),
            ((batch, blocks * ROWS, heads, value_dim), bf16),
            ((batch, blocks, heads, 8, ROWS), f32),
        ],
        {"batch": batch, "block": blocks, "head": heads},
        [
            plgpu.SMEM((1, ROWS, key_dim), bf16),
            *(plgpu.SMEM((1, ROWS, value_dim), bf16) for _ in range(4)),
            plgpu.SMEM((kinds, ROWS), f32),
            plgpu.SMEM((4, ROWS), f32),
            square(),
            square(2),
            plgpu.Barrier(num_arrivals=6),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
