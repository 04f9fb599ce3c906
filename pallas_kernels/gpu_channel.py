"""The GPU path with channel gates, which stand inside the products of keys: `gpu_channel_scores` forms these.

With D_ijc the sum of channel c's gates after row j up to row i, per value head (Kimi Delta Attention; names as in `gpu`)::

    A_ij = beta_i sum_c k_ic k_jc exp(D_ijc),   P_tj = sum_c q_tc k_jc exp(D_tjc)
    V' = (I + A)^-1 beta (V - K_start S),   S <- diag(exp(D_end,start)) S + K_end^T V',   O = scale (Q_start S + P V')

where K_start = K exp(D_i,start), K_end = K exp(D_end,j). Shapes and the other names are those of `gpu_common`; here every
array but q and k has the HV heads.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_blocks import put_inverse
from pallas_kernels.gpu_channel_scores import scores, scores_backward
from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
    bf16,
    call,
    f32,
    gradient_of_beta,
    load,
    parts_of,
    per_key_head,
    products,
    row_and_column,
    rows_of,
    square,
    transposed,
    unknown_zero,
    writer,
)
from pallas_kernels.gpu_scan import scan


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def delta_product(q, k, v, beta, g, state, scale, blocks):
    """(o, last state) from whole chunks.

    q [B, T, H, K], k [B, T R, H, K], v [B, T R, HV, V], beta [B, S, HV, 64] and g [B, T, HV, K] in float32, state [B, HV, K, V].
    """
    return _forward(False, q, k, v, beta, g, state, scale, blocks)[0]


def _weights(*kinds):
    return jnp.stack(jnp.broadcast_arrays(*kinds), axis=-2)


def _run_forward(*arguments):
    return _forward(True, *arguments)


def _forward(keep, q, k, v, beta, g, state, scale, blocks):
    a, p, q_start, k_start, k_end, totals = scores(q, k, g)
    inverses = _inverses(a, beta)
    weights = _weights(beta, -beta, jnp.ones_like(beta), jnp.ones_like(beta))
    cut = {**blocks.of_scan(), "k_out": k_end, "totals": totals, "keep": keep}
    out = scan(k_start, v, inverses, weights, state, **cut, q=q_start, p=p, scale=scale)
    residuals = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "inverses": inverses, "a": a, "p": p, "q_start": q_start}
    residuals |= {
        "k_start": k_start,
        "k_end": k_end,
        "totals": totals,
        "v_new": out.get("y"),
        "states": out.get("states"),
    }
    return (out["o"], out["last"]), residuals


def _run_backward(scale, blocks, residuals, cotangents):
    x = SimpleNamespace(**residuals)
    do, dlast = cotangents
    dq_start, dp, dv_new, dstarts = _outputs_backward(x.q_start, x.p, x.v_new, x.states, do, scale)
    one = jnp.ones_like(x.beta)
    cut = {**blocks.of_scan(), "k_out": x.k_start, "totals": x.totals}
    out = scan(x.k_end, dv_new, x.inverses, _weights(one, one, -x.beta, one), dlast, **cut, extra=dstarts)
    dk_start, dk_end, dv, da, dbeta, dtotals = _rows_backward(
        x.k_start, x.v, x.v_new, out["y"], x.states, out["states"], x.a, x.beta
    )
    dq, dk, dg = scores_backward(x.q, x.k, x.g, da, dp, dq_start, dk_start, dk_end, x.totals * dtotals)
    return per_key_head(x.q, dq), per_key_head(x.k, dk), dv, dbeta, dg, out["last"]


delta_product.defvjp(_run_forward, _run_backward)


def _inverses(a, beta):
    batch, blocks, heads, _ = beta.shape

    def body(cta, inputs, outputs, *work):
        b, block, h = cta
        i, j = row_and_column()
        exact = jnp.where(i > j, along_rows(load(inputs[1].at[b, block, h])) * load(inputs[0].at[b, block, h]), 0.0)
        put_inverse(exact, outputs[0].at[b, block, h], *work)

    shape = (batch, blocks, heads, ROWS, 2 * ROWS)
    grid = {"batch": batch, "block": blocks, "head": heads}
    return call(body, "channel_inverses", (a, beta), [(shape, bf16)], grid, [square(2), square(2), square()])[0]


def _outputs_backward(q_start, p, v_new, states, do, scale):
    """Cotangents of q_start, p, v_new and of the states that chunks start from [B, C, HV, K, V]."""
    batch, blocks, heads, key_dim, value_dim = states.shape
    chunks = q_start.shape[1] // ROWS
    steps = blocks // chunks

    def body(cta, inputs, outputs, q, p, v, do, stage, first, later, of_state):
        b, chunk, h = cta
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(chunk), h], q, first)
        plgpu.copy_gmem_to_smem(inputs[4].at[b, rows_of(chunk), h], do, first)

        def fetch(r):
            block = chunk * steps + r
            plgpu.copy_gmem_to_smem(inputs[1].at[b, block, h], p, later)
            plgpu.copy_gmem_to_smem(inputs[2].at[b, rows_of(block), h], v, later)

        def fetch_state(part):
            plgpu.copy_gmem_to_smem(inputs[3].at[b, chunk * steps, h, rows_of(part)], v, of_state)

        fetch(0)
        write = writer(stage.at[0], stage.at[1])
        plgpu.barrier_wait(first)
        for r in range(steps):
            block = chunk * steps + r
            plgpu.barrier_wait(later)
            t, j = row_and_column()
            dp = jnp.where(ROWS * r + j < (t + 1) * steps, scale * products((do, transposed(v))), 0.0)
            write(dp, outputs[1].at[b, block, h])
            for part in range(value_dim // ROWS):
                here = rows_of(part)
                dv = scale * products((transposed(p), do.at[:, here]))
                write(dv, outputs[2].at[b, rows_of(block), h, here])
            plgpu.commit_smem()  # all warps have left p and v
            if r + 1 < steps:
                fetch(r + 1)
        fetch_state(0)  # rows of the state where those of v were
        for part in range(key_dim // ROWS):
            here = rows_of(part)
            plgpu.barrier_wait(of_state)
            write(scale * products((do, transposed(v))), outputs[0].at[b, rows_of(chunk), h, here])
            plgpu.commit_smem()
            if part + 1 < key_dim // ROWS:
                fetch_state(part + 1)
            for column in range(value_dim // ROWS):
                there = rows_of(column)
                dstate = scale * products((transposed(q.at[:, here]), do.at[:, there]))
                write(dstate, outputs[3].at[b, chunk, h, here, there])
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "channel_outputs_backward",
        (q_start, p, v_new, states, do),
        [
            (q_start.shape, bf16),
            (p.shape, bf16),
            (v_new.shape, bf16),
            ((batch, chunks, heads, key_dim, value_dim), bf16),
        ],
        {"batch": batch, "chunk": chunks, "head": heads},
        [
            plgpu.SMEM((ROWS, key_dim), bf16),
            square(),
            plgpu.SMEM((ROWS, value_dim), bf16),
            plgpu.SMEM((ROWS, value_dim), bf16),
            square(2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def _rows_backward(k_start, v, v_new, dsolved, states, dstates, a, beta):
    """Cotangents of k_start, k_end, v, a (plus its transpose, in parts), beta and totals, as `gpu_backward.rows_backward`."""
    batch, blocks, heads, key_dim, value_dim = states.shape

    def body(cta, inputs, outputs, *scratch):
        *arrays, stage, first, later = scratch
        k, v, v_new, dsolved, dstate = (x.at[0] for x in arrays)
        b, block, h = cta
        for ref, smem in zip(inputs[:4], (k, v, v_new, dsolved), strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, rows_of(block), h], smem, first)

        def fetch(part):
            plgpu.copy_gmem_to_smem(inputs[4].at[b, block, h, rows_of(part)], v, later)
            plgpu.copy_gmem_to_smem(inputs[5].at[b, block, h, rows_of(part)], dstate, later)

        write = writer(stage.at[0], stage.at[1])
        plgpu.barrier_wait(first)
        i, j = row_and_column()
        beta = along_rows(load(inputs[7].at[b, block, h]))
        da = jnp.where(i > j, -products((dsolved, transposed(v_new))), 0.0)
        dbeta = jnp.sum(da * load(inputs[6].at[b, block, h]), axis=1)
        dlog_beta = jnp.zeros(ROWS, f32)
        of_columns = jax.lax.broadcast_in_dim(load(inputs[7].at[b, block, h]), (ROWS, ROWS), (1,))
        other = jnp.where(i < j, -of_columns * products((v_new, transposed(dsolved))), 0.0)
        for part, x in enumerate(parts_of(beta * da + other)):
            write(x, outputs[3].at[b, block, h, part])
        for part in range(value_dim // ROWS):
            here = rows_of(part)
            dx = dsolved[:, here].astype(f32)
            dbeta += jnp.sum(dx * v[:, here].astype(f32), axis=1)
            dlog_beta += jnp.sum(dx * v_new[:, here].astype(f32), axis=1)
            write(beta * dx, outputs[2].at[b, rows_of(block), h, here])
        plgpu.commit_smem()  # all warps have left v
        fetch(0)

        def one_part(part, dbeta):
            here = rows_of(part)
            plgpu.barrier_wait(later)
            k, v, v_new, dsolved, dstate = (x.at[unknown_zero(part)] for x in arrays)
            to_state, to_end = products((dsolved, transposed(v))), products((v_new, transposed(dstate)))
            dbeta -= jnp.sum(k[:, here].astype(f32) * to_state, axis=1)
            totals = jnp.sum(v[...].astype(f32) * dstate[...].astype(f32), axis=1)
            outputs[5][b, block, h, here] = totals
            plgpu.commit_smem()  # all warps have left the states

            @pl.when(part + 1 < key_dim // ROWS)
            def _():
                fetch(part + 1)

            write(-beta * to_state, outputs[0].at[b, rows_of(block), h, here])
            write(to_end, outputs[1].at[b, rows_of(block), h, here])
            return dbeta

        dbeta = jax.lax.fori_loop(jnp.int32(0), jnp.int32(key_dim // ROWS), one_part, dbeta)
        outputs[4][b, block, h] = gradient_of_beta(load(inputs[7].at[b, block, h]), dlog_beta, dbeta)
        plgpu.wait_smem_to_gmem(0)

    return call(
        body,
        "channel_rows_backward",
        (k_start, v, v_new, dsolved, states, dstates, a, beta),
        [
            (k_start.shape, bf16),
            (k_start.shape, bf16),
            (v.shape, bf16),
            ((batch, blocks, heads, 2, ROWS, ROWS), bf16),
            (beta.shape, f32),
            ((batch, blocks, heads, key_dim), f32),
        ],
        {"batch": batch, "block": blocks, "head": heads},
        [
            plgpu.SMEM((1, ROWS, key_dim), bf16),
            *(plgpu.SMEM((1, ROWS, value_dim), bf16) for _ in range(4)),
            square(2),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
