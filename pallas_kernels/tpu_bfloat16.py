"""The chunked delta product in bfloat16 for no gate or one gate per head, as two TPU kernels with gradients by hand.

One kernel scans over the chunks with the state in VMEM, in float32, and one scans in reverse; gates, scores, inverses and WY
parts are formed inside. A chunk has 64 rows of keys and values and 64 / R queries (with R = 3: 48 and 16), so that queries are
not padded for R > 1. Heads stand side by side in pairs (`tpu_bfloat16_common`).
"""

import functools

import jax

from pallas_kernels.tpu_bfloat16_backward import backward
from pallas_kernels.tpu_bfloat16_call import HEADS
from pallas_kernels.tpu_bfloat16_forward import forward


def serves(q, k, v, g) -> bool:
    """Whether `scan` can: bfloat16; R up to 4; K and V multiples of 64; HV of 4, 8, 12 or multiples of 16; a block's states
    of at most 1 MiB (16 heads of 128 x 128): 16 of 256 x 256 compile for minutes.
    """
    steps, heads, value_dim = v.shape[2:]
    block = min(heads, HEADS)
    return (
        q.dtype == k.dtype == v.dtype == "bfloat16"
        and (g is None or g.ndim == 3)
        and steps <= 4
        and 4 * block * q.shape[-1] * value_dim <= 2**20
        and heads % block == block % 4 == q.shape[-1] % 64 == value_dim % 64 == 0
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def scan(q, k, v, beta, g, state, scale):
    """(o [B, T, HV, V], last state) of bfloat16 q [B, T, H, K], k [B, T R, H, K], v [B, T R, HV, V]; beta [B, T R, HV];
    g [B, T, HV] or None, at most 0; state [B, HV, K, V] float32; scale a number.
    """
    return tuple(forward(q, k, v, beta, g, state, scale, keep=False))


def _scan_forward(q, k, v, beta, g, state, scale):
    o, last, *kept = forward(q, k, v, beta, g, state, scale, keep=True)
    return (o, last), (q, k, beta, g, kept)


def _scan_backward(scale, residuals, cotangents):
    q, k, beta, g, kept = residuals
    do, dlast = cotangents
    dq, dk, dv, dbeta, *dg, dstate = backward(q, k, beta, g, kept, do, dlast, scale)
    return dq, dk, dv, dbeta, dg[0] if dg else None, dstate


scan.defvjp(_scan_forward, _scan_backward)
