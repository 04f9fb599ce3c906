"""The forward's GPU kernels: inverses of all blocks, the scan over blocks (the backward's too), outputs of all chunks."""

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
    load,
    parts_of,
    products,
    put_parts,
    put_prefix_mask,
    row_and_column,
    rows_of,
    square,
    transposed,
    unknown_zero,
)


def inverses(k, rows):
    """(I + A)^-1 of every block, in parts side by side: [B, S, HV, 64, 128].

    A_ij = beta_i (k_i . k_j) exp(gates after j up to i) for j < i.

    By doubling the inverted diagonal blocks: with X those of one size, the next X is X - X A X in the corners below the
    diagonal, which is substitution. Its errors in bfloat16 are then squared by one Newton step with an accurate residual.

    k [B, T R, H, K]; rows [B, S, HV, 1 or 2, 64]: beta and, where there are any, gates.
    """
    batch, blocks, heads, kinds, _ = rows.shape
    group = heads // k.shape[2]

    def body(cta, inputs, outputs, k, rows, mask, a, x, y, barrier):
        b, block, h = cta
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(block), h // group], k, barrier)
        plgpu.copy_gmem_to_smem(inputs[1].at[b, block, h], rows, barrier)
        put_prefix_mask(mask)
        plgpu.barrier_wait(barrier)
        put_inverse(_a(k, rows, mask, y), outputs[0].at[b, block, h], a, x, y)

    return call(
        body,
        "inverses",
        (k, rows),
        [((batch, blocks, heads, ROWS, 2 * ROWS), bf16)],
        {"batch": batch, "block": blocks, "head": heads},
        [
            plgpu.SMEM((ROWS, k.shape[3]), bf16),
            plgpu.SMEM((kinds, ROWS), f32),
            square(),
            *(square(2) for _ in range(3)),
            plgpu.Barrier(num_arrivals=2),
        ],
    )[0]


def put_inverse(exact, target, a, x, y):
    """(I + A)^-1 to `target` [64, 128] in global memory, from A = `exact` and shared memory to work in."""
    put_parts(a, exact)
    i, j = row_and_column()
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where((i ^ j) == 1, exact, 0.0)
    size = 2
    while size < ROWS:
        x[0] = inverse.astype(bf16)
        plgpu.commit_smem()
        y[0] = products((x.at[0], a.at[0])).astype(bf16)
        plgpu.commit_smem()
        corner = ((i ^ j) < 2 * size) & ((i & size) > (j & size))
        inverse -= jnp.where(corner, products((y.at[0], x.at[0])), 0.0)
        size *= 2
    put_parts(x, inverse)
    plgpu.commit_smem()
    product = products((a.at[0], x.at[0]), (a.at[0], x.at[1]), (a.at[1], x.at[0]))
    y[0] = (jnp.where(i == j, 1.0, 0.0) - inverse - product).astype(bf16)
    plgpu.commit_smem()
    inverse += products((x.at[0], y.at[0]))
    put_parts(x, inverse)
    plgpu.commit_smem()
    for part in range(2):
        plgpu.copy_smem_to_gmem(x.at[part], target.at[:, rows_of(part)])
    plgpu.wait_smem_to_gmem(0)


def _a(k, rows, mask, parts):
    """A [64, 64] from references to keys and to the rows (beta, gates) of a block."""
    a = along_rows(rows[0]) * products((k, transposed(k)))
    if rows.shape[0] > 1:
        a *= decays_between(rows.at[1], lambda s, j: s > j, mask, parts)
    i, j = row_and_column()
    return jnp.where(i > j, a, 0.0)


def scan(k, x, inverses, weights, state, *, columns, stages, late_stages, reverse, extra=None, k_out=None, totals=None):
    """The recurrence over blocks, forwards or in reverse, for some columns of the state in each CTA.

    Per block, with S the state in float32 and w_in, w_state, w_out the weights of its rows::

        y = (I + A)^-1 (w_in x + w_state (K S)),    in reverse (I + A)^-T
        S <- total S + K_out^T (w_out y)            in reverse plus extra[chunk], after a chunk's first block

    k [B, T R, H, K], x [B, T R, HV, V], inverses as `inverses` gives them, weights [B, S, HV, 4, 64]: w_in,
    w_state, w_out and total; state [B, HV, K, V] in float32, extra [B, C, HV, K, V]. With channel gates k_out as k, and totals
    [B, S, HV, K] in place of total; else K_out is K. What a block needs last, extra and k_out, has late_stages places: as many as
    the rest, or one, and then it is fetched when its block begins.

    Returns y [B, T R, HV, V], the states before each block (in reverse: after it) [B, S, HV, K, V], both in bfloat16, and
    the last state.
    """
    batch, blocks, heads = weights.shape[:3]
    key_dim, value_dim = state.shape[2:]
    group = heads // k.shape[2]
    steps = blocks // extra.shape[1] if reverse else 1
    stages = min(stages, blocks)
    late_stages = min(late_stages, stages)
    channels = totals is not None
    late = reverse + channels if late_stages < stages else 0  # copies with a barrier of their own
    inputs = (k, x, inverses, weights, state) + (extra,) * reverse + (k_out, totals) * channels

    def body(cta, inputs, outputs, k, x, inverses, weights, parts, stored, work, y, arrived, *optional):
        b, h, v = cta
        extra: Any = optional[0] if reverse else None
        k_out, totals = optional[reverse : reverse + 2] if channels else (k, extra)
        where = pl.ds(v * columns, columns)

        def put_beside(ref, x):
            ref[:, pl.ds(0, columns)], ref[:, pl.ds(columns, columns)] = parts_of(x)

        def folded(*pairs):
            """Products with parts that stand beside each other, which one wgmma takes at once."""
            both = products(*pairs)
            return both[:, :columns] + both[:, columns:]

        def block_of(n):
            return blocks - 1 - n if reverse else n

        def fetch(n):
            block, slot = block_of(n), jax.lax.rem(n, jnp.int32(stages))
            barrier = arrived.at[slot]
            plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(block), h // group], k.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h, where], x.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs[2].at[b, block, h], inverses.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs[3].at[b, block, h], weights.at[slot], barrier)
            if channels:
                plgpu.copy_gmem_to_smem(inputs[-1].at[b, block, h], totals.at[slot], barrier)
            if not late:
                fetch_late(block, slot, barrier)

        def fetch_late(block, slot, barrier):
            if reverse:
                plgpu.copy_gmem_to_smem(inputs[5].at[b, block // steps, h, :, where], extra.at[slot], barrier)
            if channels:
                plgpu.copy_gmem_to_smem(inputs[-2].at[b, rows_of(block), h // group], k_out.at[slot], barrier)

        for n in range(stages - 1):
            fetch(jnp.int32(n))

        def one_block(n, state):
            block, slot = block_of(n), jax.lax.rem(n, jnp.int32(stages))
            late_slot = unknown_zero() if late else slot
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put_beside(parts, state)
            stored[...] = state.astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stored, outputs[1].at[b, block, h, :, where])

            @pl.when(n + stages - 1 < blocks)  # the slot of the block before: all warps have left it
            def _():
                fetch(n + stages - 1)

            if late:
                fetch_late(block, late_slot, optional[-1])
            plgpu.barrier_wait(arrived.at[slot])
            keys, inverse = k.at[slot], inverses.at[slot]
            w_in, w_state, w_out = (along_rows(weights[slot, kind], columns) for kind in range(3))
            of_state = folded((keys, parts))
            put_beside(work, w_in * x[slot].astype(f32) + w_state * of_state)
            plgpu.commit_smem()
            head, rest = (inverse.at[:, rows_of(part)] for part in range(2))
            if reverse:
                head, rest = transposed(head), transposed(rest)
            solution = folded((head, work), (rest, work))
            y[...] = solution.astype(bf16)
            put_beside(work, w_out * solution)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y, outputs[0].at[b, rows_of(block), h, where])
            total = along_rows(totals[slot], columns) if channels else weights[slot, 3, 0]
            if late:
                plgpu.barrier_wait(optional[-1])
            state = total * state + folded((transposed(k_out.at[late_slot if channels else slot]), work))
            if reverse:
                state += jnp.where(jax.lax.rem(block, jnp.int32(steps)) == 0, 1.0, 0.0) * extra[late_slot].astype(f32)
            return state

        outputs[2][b, h, :, where] = jax.lax.fori_loop(
            jnp.int32(0), jnp.int32(blocks), one_block, load(inputs[4].at[b, h, :, where])
        )
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "backward_scan" if reverse else "scan",
        inputs,
        [(x.shape, bf16), ((batch, blocks, heads, key_dim, value_dim), bf16), (state.shape, f32)],
        {"batch": batch, "head": heads, "columns": value_dim // columns},
        [
            plgpu.SMEM((stages, ROWS, key_dim), bf16),
            plgpu.SMEM((stages, ROWS, columns), bf16),
            plgpu.SMEM((stages, ROWS, 2 * ROWS), bf16),
            plgpu.SMEM((stages, 4, ROWS), f32),
            plgpu.SMEM((key_dim, 2 * columns), bf16),
            plgpu.SMEM((key_dim, columns), bf16),
            plgpu.SMEM((ROWS, 2 * columns), bf16),
            plgpu.SMEM((ROWS, columns), bf16),
            plgpu.Barrier(num_arrivals=4 + channels + (0 if late else reverse + channels), num_barriers=stages),
            *[plgpu.SMEM((late_stages, key_dim, columns), bf16)] * reverse,
            *[plgpu.SMEM((late_stages, ROWS, key_dim), bf16), plgpu.SMEM((stages, key_dim), f32)] * channels,
            *([plgpu.Barrier(num_arrivals=late)] if late else []),
        ],
    )


def outputs(q, k, v_new, states, tokens, *, scale, columns):
    """O = scale (from_start Q S + sum over a chunk's blocks of (Q K^T decays) V'), [B, T, HV, V] in bfloat16.

    q [B, T, H, K], k [B, T R, H, K], v_new and states as `scan` gives them, tokens [B, C, HV, 1 or 2, 64]: the decay from the
    chunk's start through each token and, where there are any, gates.
    """
    batch, chunks, heads, kinds, _ = tokens.shape
    key_dim, value_dim = states.shape[3:]
    steps = states.shape[1] // chunks
    group = heads // q.shape[2]

    def body(cta, inputs, outputs, q, k, v, state, tokens, mask, parts, first, later):
        b, chunk, h, column = cta
        where = pl.ds(column * columns, columns)
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h // group], q, first)
        plgpu.copy_gmem_to_smem(inputs[3].at[b, chunk * steps, h, :, where], state, first)
        plgpu.copy_gmem_to_smem(inputs[4].at[b, chunk, h], tokens, first)

        def fetch(r):
            block = chunk * steps + r
            plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group], k, later)
            plgpu.copy_gmem_to_smem(inputs[2].at[b, rows_of(block), h, where], v, later)

        fetch(0)
        put_prefix_mask(mask)
        plgpu.barrier_wait(first)
        o = along_rows(tokens[0], columns) * products((q, state))
        for r in range(steps):
            plgpu.barrier_wait(later)
            parts[0] = _p(q, k, tokens, mask, parts, r, steps).astype(bf16)
            plgpu.commit_smem()
            o += products((parts.at[0], v))
            if r + 1 < steps:
                plgpu.commit_smem()  # all warps have left k and v
                fetch(r + 1)
        v[...] = (scale * o).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v, outputs[0].at[b, rows_of(chunk), h, where])
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "outputs",
        (q, k, v_new, states, tokens),
        [((batch, chunks * ROWS, heads, value_dim), bf16)],
        {"batch": batch, "chunk": chunks, "head": heads, "columns": value_dim // columns},
        [
            plgpu.SMEM((ROWS, key_dim), bf16),
            plgpu.SMEM((ROWS, key_dim), bf16),
            plgpu.SMEM((ROWS, columns), bf16),
            plgpu.SMEM((key_dim, columns), bf16),
            plgpu.SMEM((kinds, ROWS), f32),
            square(),
            square(2),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
        ],
    )[0]


def _p(q, k, tokens, mask, parts, r, steps):
    """P of a chunk's tokens and its block r, without the scale: row j is of token (64 r + j) // R."""
    t, j = row_and_column()
    p = products((q, transposed(k)))
    if tokens.shape[0] > 1:
        p *= decays_between(tokens.at[1], lambda s, j: s * steps > ROWS * r + j, mask, parts)
    return jnp.where(ROWS * r + j < (t + 1) * steps, p, 0.0)
