"""The chunked form in XLA: the WY representation inside a chunk, a linear recurrence between chunks.

A chunk has C tokens and N = C R rows (token-major), but only C queries. With D_ij the sum of the log gates after token j up
to token i, and S the state before the chunk, per value head (arXiv 2406.06484, section 3.2, with gates and R steps)::

    A = strict_tril(beta_i sum_c k_ic k_jc exp(D_ijc))             [N, N]
    U, W = (I + A)^-1 beta V, (I + A)^-1 beta (K exp(D_i,start))    [N, V], [N, K]
    V' = U - W S;   S <- exp(D_end,start) S + (K exp(D_end,j))^T V'
    O = (Q exp(D_i,start)) S + P V',   P_tj = sum_c q_tc k_jc exp(D_tjc) for the rows j of tokens up to t    [C, N]

Every exponent is a sum of gates, never a difference of cumulative sums: nothing overflows, nothing cancels, and
g = -inf (a document boundary) is an ordinary value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deltajax.ops.opaque import opaque
from pallas_kernels.manual_axes import vary_alike

ROWS = 32  # rows of a chunk: fewer make the matrix products small, more make scores and substitution dominate
SMALL_DIM = 16  # K and V up to which half of the rows are faster on a CPU, forward and backward
BLOCK_ROWS = 2048  # rows, over batch and heads, worked on together (measured on a CPU: they stay in its cache)
BLOCK_CHUNKS = 8  # chunks worked on together at most: their recurrence is unrolled
SUBCHUNK = 16  # tokens of a sub-chunk, where channel gates are applied pair by pair
LOWEST_GATE = -1000.0  # exp of it is 0 in every float type, and sums of it stay finite


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Chunked delta product; arguments as `IMPLEMENTATIONS` in `api` says.

    The backward keeps the inputs and the state before each block of chunks, and recomputes the rest.
    """
    q, k, v, beta, g, initial_state = opaque(q, k, v, beta, g, initial_state)
    batch, length, steps, heads, value_dim = v.shape
    rows = ROWS // 2 if max(k.shape[-1], value_dim) <= SMALL_DIM else ROWS
    tokens = min(_power_of_two_up_to(max(rows // steps, 1)), _power_of_two_up_to(2 * length - 1))
    chunks = -(-length // tokens)
    chunks_at_once = min(BLOCK_CHUNKS, max(1, BLOCK_ROWS // (tokens * steps * batch * heads)))
    blocks = -(-chunks // chunks_at_once)
    chunks = -(-chunks // blocks)
    dtype = initial_state.dtype
    precision = "default" if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else "highest"

    def split(x):
        """[B, T, ..] -> [blocks, B, chunks, tokens, ..], padded with tokens that change nothing."""
        x = jnp.pad(x, [(0, blocks * chunks * tokens - length if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(batch, blocks, chunks, tokens, *x.shape[2:]), 1, 0)

    def block(state, x):
        """X [B, chunks, tokens, .., H, ..] -> [chunks, B, H, tokens, ..]."""
        q, k, v, beta, g = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), 1, 0), x)
        q, k = (jnp.repeat(x, heads // x.shape[-2], axis=-2) for x in (scale * q, k))
        q, k, v, beta = (jnp.moveaxis(x, axis, 2) for x, axis in ((q, 3), (k, 4), (v, 4), (beta, 4)))
        g = None if g is None else jnp.moveaxis(g, 3, 2)
        state, o = _block(state, q, k, v, beta, g, precision)
        return state, jnp.moveaxis(o, (1, 0, 3), (0, 1, 2))

    x = (split(q), split(k), split(v), split(beta), None if g is None else split(g))
    state, o = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), initial_state, x)
    o = jnp.moveaxis(o, 0, 1).reshape(batch, -1, heads, value_dim)
    return o[:, :length].astype(v.dtype), state


def _block(state, q, k, v, beta, g, precision):
    """Some chunks: in parallel along the leading axis n, but for the recurrence of their states.

    q [n, B, H, C, K], k [.., C, R, K], v [.., C, R, V], beta [.., C, R], g [.., C], [.., C, K] or None.
    """
    *lead, tokens, steps, _ = v.shape
    if g is not None:
        g = jnp.maximum(g if g.ndim == q.ndim else g[..., None], LOWEST_GATE)
    from_start, to_end, total = _decays(g, lead, q.dtype, precision)

    def rows(x):
        return x.reshape(*lead, tokens * steps, -1)

    if g is not None and g.shape[-1] > 1:
        a, p = (_channel_gated_products(x, k, g, precision) for x in (k, q[..., None, :]))
    else:
        products_of_keys = _self_products if precision == "highest" else _products
        weights = _pair_decay(g, tokens, q.dtype, precision)
        a = _weigh(products_of_keys(rows(k)), weights)
        p = _weigh(_products(q, rows(k), precision), weights)
    beta = rows(beta[..., None])
    a = beta * a * np.tri(tokens * steps, k=-1, dtype=q.dtype)
    k_start, k_end = rows(k * from_start[..., None, :]), rows(k * to_end[..., None, :])
    arguments = vary_alike(state, a, p, q * from_start, k_start, k_end, rows(v), beta, total[..., None])
    return _recurrence(*arguments, precision)


# Gates: None, or [.., C, 1] (one per head), or [.., C, K] (one per key channel).


def _decays(g, lead, dtype, precision):
    """Exp of the sum of gates from the chunk's start through each token, after each token to the end, and in all."""
    if g is None:
        one = jnp.ones((*lead, 1, 1), dtype)
        return one, one, one[..., 0, :]
    sums = [jnp.matmul(mask, g, precision=precision) for mask in _prefix_and_suffix(g.shape[-2], dtype)]
    return *(jnp.exp(x) for x in sums), jnp.exp(g.sum(-2))


def _prefix_and_suffix(size, dtype):
    """Masks that sum the entries up to and including each one, and those after it."""
    return np.tri(size, dtype=dtype), np.tri(size, k=-1, dtype=dtype).T


def _pair_decay(g, tokens, dtype, precision):
    """exp(D_ij) for tokens j <= i, else 0, from one gate per head: [.., C, C]."""
    causal = np.tri(tokens, dtype=dtype)
    if g is None:
        return causal
    sums = jnp.matmul(causal, g * np.tri(tokens, k=-1, dtype=dtype), precision=precision)
    return jnp.where(causal > 0, jnp.exp(sums), 0)


def _weigh(products, weights):
    """Products of rows [.., C X, C R] times weights of tokens [.., C, C]."""
    tokens = weights.shape[-1]
    *lead, rows, columns = products.shape
    products = products.reshape(*lead, tokens, rows // tokens, tokens, columns // tokens)
    return (products * weights[..., :, None, :, None]).reshape(*lead, rows, columns)


def _products(x, y=None, precision="default"):
    return jnp.matmul(x, jnp.swapaxes(x if y is None else y, -1, -2), precision=precision)


@jax.custom_vjp
def _self_products(x):
    """x x^T [.., N, N] of x [.., N, K], rounded about as if summed exactly.

    With correlated keys and beta near 2 no error decays, and the rounding of these sums becomes the largest error of the
    whole chunked form. So each row is split at a grid fine enough for the products of the coarse parts to
    add up without rounding (Ozaki et al., 2012, doi 10.1007/s11075-011-9478-1); the fine parts only correct.
    """
    bits = (jnp.finfo(x.dtype).nmant + 1) // 2
    _, exponent = jnp.frexp(jnp.linalg.norm(x, axis=-1, keepdims=True))
    grid = jnp.exp2((exponent - bits).astype(x.dtype))
    coarse = jnp.round(x / grid) * grid
    fine = x - coarse
    correction = _products(fine, x - fine / 2, "highest")
    return _products(coarse, precision="highest") + (correction + jnp.swapaxes(correction, -1, -2))


def _self_products_backward(x, d):
    return (jnp.matmul(d + jnp.swapaxes(d, -1, -2), x, precision="highest"),)


_self_products.defvjp(lambda x: (_self_products(x), x), _self_products_backward)


def _channel_gated_products(x, k, g, precision):
    """sum_c x_ic k_jc exp(D_ijc) for tokens j <= i, else 0: x [.., C, X, K], k [.., C, R, K] -> [.., C X, C R].

    The decay stands inside the sum and does not factor over the whole chunk.

    Pairs in one sub-chunk are decayed directly. Between sub-chunks b < a the decay is split where a starts,
    exp(D_ij) = exp(D_i,start) exp(D_start,j): both exponents are <= 0.
    """
    *lead, tokens, per_token, dim = x.shape
    steps = k.shape[-2]
    size = min(SUBCHUNK, tokens)
    subs = tokens // size
    x, k = (y.reshape(*lead, subs, size, -1, dim) for y in (x, k))
    g = g.reshape(*lead, subs, size, dim)
    einsum = functools.partial(jnp.einsum, precision=precision)
    from_start, to_end, total = _decays(g, (*lead, subs), g.dtype, precision)
    x_from_start, k_to_end = x * from_start[..., None, :], k * to_end[..., None, :]

    i, s, j = np.ogrid[:size, :size, :size]
    after_j_up_to_i = ((j < s) & (s <= i)).astype(g.dtype)
    pair_decay = jnp.exp(einsum("isj,...sc->...ijc", after_j_up_to_i, g)) * np.tri(size, dtype=g.dtype)[..., None]
    same = einsum("...ixc,...ijc,...jrc->...ixjr", x, pair_decay, k)

    earlier = k_to_end[..., :0, :, :, :]
    scores = []
    for a in range(subs):
        before = einsum("...ixc,...bjrc->...ixbjr", x_from_start[..., a, :, :, :], earlier)
        before = before.reshape(*lead, size, per_token, a * size, steps)
        after = jnp.zeros((*lead, size, per_token, tokens - (a + 1) * size, steps), x.dtype)
        scores.append(jnp.concatenate([before, same[..., a, :, :, :, :], after], axis=-2))
        earlier = earlier * total[..., a, None, None, None, :]
        earlier = jnp.concatenate([earlier, k_to_end[..., a : a + 1, :, :, :]], axis=-4)
    return jnp.stack(scores, axis=-5).reshape(*lead, tokens * per_token, tokens * steps)


def _forward_substitution(a, b, precision):
    """(I + a)^-1 b for strictly lower triangular a [.., N, N] and b [.., N, M], block by block; and the blocks' inverses.

    Unlike power series in a it does not blow up on correlated keys, and it is several times as accurate as a product with
    the whole inverse, of which only small diagonal blocks are formed.
    """
    matmul = functools.partial(jnp.matmul, precision=precision)
    inverses = _invert_diagonal_blocks(a)
    size = inverses.shape[-1]
    x = b[..., :0, :]
    for n in range(inverses.shape[-3]):
        here = slice(n * size, (n + 1) * size)
        rest = b[..., here, :] - matmul(a[..., here, : n * size], x) if n else b[..., here, :]
        x = jnp.concatenate([x, matmul(inverses[..., n, :, :], rest)], axis=-2)
    return x, inverses


def _backward_substitution(a, inverses, b, precision):
    """(I + a)^-T b, with the inverses from `_forward_substitution`."""
    matmul = functools.partial(jnp.matmul, precision=precision)
    count, size = inverses.shape[-3:-1]
    x = b[..., :0, :]
    for n in reversed(range(count)):
        here, below = slice(n * size, (n + 1) * size), slice((n + 1) * size, None)
        rest = b[..., here, :] - matmul(_transpose(a[..., below, here]), x) if n < count - 1 else b[..., here, :]
        x = jnp.concatenate([matmul(_transpose(inverses[..., n, :, :]), rest), x], axis=-2)
    return x


def _transpose(x):
    return jnp.swapaxes(x, -1, -2)


def _invert_diagonal_blocks(a):
    """(I + a)^-1 of the diagonal blocks (of 8 rows or less, if N is a power of two), row by row: [.., N / size, size, size]."""
    size = a.shape[-1]
    while size % 2 == 0 and size > 8:
        size //= 2
    blocks = jnp.stack([a[..., n : n + size, n : n + size] for n in range(0, a.shape[-1], size)], axis=-3)
    inverse = jnp.zeros_like(blocks[..., :0, :])
    for n in range(size):
        row = np.eye(size, dtype=a.dtype)[n] - jnp.sum(blocks[..., n, :n, None] * inverse, axis=-2)
        inverse = jnp.concatenate([inverse, row[..., None, :]], axis=-2)
    return inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _recurrence(state, a, p, q_start, k_start, k_end, v, beta, total, precision):
    """From what each chunk is by itself to (last state, O), by the recurrence of the states; names as at the top of the file."""
    return _recurrence_forward(state, a, p, q_start, k_start, k_end, v, beta, total, precision)[0]


def _recurrence_forward(state, a, p, q_start, k_start, k_end, v, beta, total, precision):
    matmul = functools.partial(jnp.matmul, precision=precision)
    solution, inverses = _forward_substitution(a, beta * jnp.concatenate([v, k_start], axis=-1), precision)
    u, w = solution[..., : v.shape[-1]], solution[..., v.shape[-1] :]

    def body(state, x):
        u, w, k_end, total = x
        v_new = u - matmul(w, state)
        return total * state + matmul(_transpose(k_end), v_new), (state, v_new)

    following, (states, v_new) = jax.lax.scan(body, state, (u, w, k_end, total), unroll=True)
    o = matmul(q_start, states) + matmul(p, v_new)
    return (following, o), (a, inverses, p, q_start, k_start, k_end, v, beta, total, w, states, v_new)


def _recurrence_backward(precision, residuals, cotangents):
    """Only what is recurrent, the cotangent of the states, is scanned; the rest follows for all chunks at once.

    W enters V' = U - W S, so with dX = (I + A)^-T dV' its cotangent solves to -dX S^T: one solve serves U and W.
    """
    a, inverses, p, q_start, k_start, k_end, v, beta, total, w, states, v_new = residuals
    matmul = functools.partial(jnp.matmul, precision=precision)
    dfollowing, do = cotangents

    def body(dfollowing, x):
        w, k_end, total, dv_new, dstate = x
        dv_new = dv_new + matmul(k_end, dfollowing)
        return dstate + total * dfollowing - matmul(_transpose(w), dv_new), (dfollowing, dv_new)

    from_outputs = matmul(_transpose(p), do), matmul(_transpose(q_start), do)
    dstate, (dfollowing, dv_new) = jax.lax.scan(
        body, dfollowing, (w, k_end, total, *from_outputs), reverse=True, unroll=True
    )
    dx = _backward_substitution(a, inverses, dv_new, precision)
    dx_states = matmul(dx, _transpose(states))
    dbeta = jnp.sum(dx * v, axis=-1, keepdims=True) - jnp.sum(dx_states * k_start, axis=-1, keepdims=True)
    dtotal = jnp.sum(states * dfollowing, axis=-1, keepdims=True)
    if total.shape[-2] == 1:
        dtotal = jnp.sum(dtotal, axis=-2, keepdims=True)
    da = -matmul(dx, _transpose(v_new)) * np.tri(a.shape[-1], k=-1, dtype=a.dtype)
    dp, dq_start = matmul(do, _transpose(v_new)), matmul(do, _transpose(states))
    dk_end = matmul(v_new, _transpose(dfollowing))
    return dstate, da, dp, dq_start, -beta * dx_states, dk_end, beta * dx, dbeta, dtotal


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _power_of_two_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)
