"""What the GPU kernels need of each block by itself: inverses and scores, of all blocks at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
    bf16,
    call,
    decays_between,
    f32,
    products,
    put_parts,
    put_prefix_mask,
    row_and_column,
    rows_of,
    square,
    transposed,
)


def inverses_and_scores(q, k, rows, tokens):
    """Of every block (I + A)^-1, in parts side by side: [B, S, HV, 64, 128], and P without the scale: [B, S, HV, 64, 64].

    A_ij = beta_i (k_i . k_j) exp(gates after j up to i) for j < i. P_tj = (q_t . k_j) exp(gates after j up to t) for the rows
    j of tokens up to t, one of the 64 of the block's chunk.

    q [B, T, H, K], k [B, T R, H, K]; rows [B, S, HV, 1 or 2, 64]: beta and, where there are any, gates; tokens
    [B, C, HV, 1 or 2, 64]: the decay from the chunk's start through each token and gates.
    """
    batch, blocks, heads, kinds, _ = rows.shape
    steps = blocks // tokens.shape[1]
    group = heads // k.shape[2]

    def body(cta, inputs, outputs, q, k, rows, tokens, mask, a, x, barrier):
        b, block, h = cta
        plgpu.copy_gmem_to_smem(inputs[0].at[b, rows_of(block // steps), h // group], q, barrier)
        plgpu.copy_gmem_to_smem(inputs[1].at[b, rows_of(block), h // group], k, barrier)
        plgpu.copy_gmem_to_smem(inputs[2].at[b, block, h], rows, barrier)
        plgpu.copy_gmem_to_smem(inputs[3].at[b, block // steps, h], tokens, barrier)
        put_prefix_mask(mask)
        plgpu.barrier_wait(barrier)
        i, j = row_and_column()
        decays: Any = 1.0
        decays_of_tokens: Any = 1.0
        first = ROWS * jax.lax.rem(block, jnp.int32(steps))  # row of the chunk
        if kinds > 1:
            decays = decays_between(rows.at[1], lambda s, j: s > j, mask, a)
            decays_of_tokens = decays
        if kinds > 1 and steps > 1:
            decays_of_tokens = decays_between(tokens.at[1], lambda s, j: s * steps > first + j, mask, a)
        p = jnp.where(first + j < (i + 1) * steps, products((q, transposed(k))) * decays_of_tokens, 0.0)
        mask[...] = p.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mask, outputs[1].at[b, block, h])
        exact = jnp.where(i > j, along_rows(rows[0]) * products((k, transposed(k))) * decays, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put_inverse(exact, outputs[0].at[b, block, h], a, x, mask)

    return call(
        body,
        "inverses_and_scores",
        (q, k, rows, tokens),
        [((batch, blocks, heads, ROWS, 2 * ROWS), bf16), ((batch, blocks, heads, ROWS, ROWS), bf16)],
        {"batch": batch, "block": blocks, "head": heads},
        [
            plgpu.SMEM((ROWS, k.shape[3]), bf16),
            plgpu.SMEM((ROWS, k.shape[3]), bf16),
            plgpu.SMEM((kinds, ROWS), f32),
            plgpu.SMEM((kinds, ROWS), f32),
            square(),
            square(2),
            square(2),
            plgpu.Barrier(num_arrivals=4),
        ],
    )


def put_inverse(exact, target, a, x, y):
    """(I + A)^-1 to `target` [64, 128] in global memory, from A = `exact` and shared memory to work in.

    By doubling the inverted diagonal blocks: with X those of one size, the next X is X - X A X in the corners below the
    diagonal, which is substitution. Its errors in bfloat16 are then squared by each of two Newton steps with an accurate
    residual: after one, keys alike with beta = 2 still err by 2e-3, which the state keeps.
    """
    put_parts(a, exact)
    i, j = row_and_column()
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where((i ^ j) == 1, exact, 0.0)
    size = 2
    while size < ROWS:
        x[0] = inverse.astype(bf16)
        plgpu.commit_smem()
        y[...] = products((x.at[0], a.at[0])).astype(bf16)
        plgpu.commit_smem()
        corner = ((i ^ j) < 2 * size) & ((i & size) > (j & size))
        inverse -= jnp.where(corner, products((y, x.at[0])), 0.0)
        size *= 2
    for _ in range(2):
        put_parts(x, inverse)
        plgpu.commit_smem()
        product = products((a.at[0], x.at[0]), (a.at[0], x.at[1]), (a.at[1], x.at[0]))
        y[...] = (jnp.where(i == j, 1.0, 0.0) - inverse - product).astype(bf16)
        plgpu.commit_smem()
        inverse += products((x.at[0], y))
    put_parts(x, inverse)
    plgpu.commit_smem()
    for part in range(2):
        plgpu.copy_smem_to_gmem(x.at[part], target.at[:, rows_of(part)])
    plgpu.wait_smem_to_gmem(0)
