"""The chunked delta product as TPU kernels (Mosaic): gates, inverse, WY parts and the scan over chunks in one kernel.

The grid is (batch, value head, chunk); the state stays in VMEM, in float32, from chunk to chunk. A chunk has C queries and
N = C R rows of keys and values. Row s carries the gate of its token if it is the token's first row, else 0, so that every
decay is the exponential of a sum of gates over rows, and R > 1 needs no case of its own. The mathematics is that of
`deltajax.ops.delta_rule.chunked`; the backward kernel goes through the chunks in reverse with `jax.vjp` of the same
function of one chunk, from the states before each chunk that the forward kernel wrote.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 64  # rows of a chunk, at most
LOWEST_GATE = -1000.0  # exp of it is 0 in every float type, and sums of it stay finite
SPLIT = "bfloat16 pairs"
SEMANTICS: tuple | None = ("parallel", "parallel", "arbitrary")  # of the grid
HEADS = 8  # value heads of one step of the grid, at most: the compiler interleaves them, which hides latencies


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Delta product; arguments as `IMPLEMENTATIONS` in `deltajax.ops.delta_rule.api` says.

    Raises:
      NotImplementedError: float64, or channel gates.
    """
    if initial_state.dtype != jnp.float32:
        raise NotImplementedError(f"the state must be float32, got {initial_state.dtype}")
    if g is not None and g.ndim == q.ndim:
        raise NotImplementedError("channel gates (g of shape [B, T, HV, K]) have no TPU kernel yet")
    batch, length, steps, heads = v.shape[:4]
    tokens = max(8, 1 << (ROWS // steps).bit_length() - 1)
    chunks = -(-length // tokens)

    def head_major(x):
        """[B, T, (R,) heads, D] -> [B, heads, T' (R), D], padded with tokens that change nothing."""
        x = jnp.pad(x, [(0, chunks * tokens - length if axis == 1 else 0) for axis in range(x.ndim)])
        x = jnp.moveaxis(x, -2, 1)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def per_chunk(x):
        """[B, T, R, HV] -> float32 [B, HV, chunks, 1, N]."""
        return head_major(x[..., None].astype(jnp.float32)).reshape(batch, heads, chunks, 1, tokens * steps)

    rows = [per_chunk(beta)]
    if g is not None:
        g = jnp.maximum(g.astype(jnp.float32), LOWEST_GATE)
        rows.append(per_chunk(jnp.stack([g] + [jnp.zeros_like(g)] * (steps - 1), axis=2)))
    o, state = _scan(head_major(q), head_major(k), head_major(v), jnp.concatenate(rows, -2), initial_state, scale)
    return jnp.moveaxis(o, 1, 2)[:, :length], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scan(q, k, v, rows, state, scale):
    """q [B, H, T, K], k [B, H, T R, K], v [B, HV, T R, V], rows (beta, gates) [B, HV, chunks, 1 or 2, N], state [B, HV, K, V]."""
    return _forward(q, k, v, rows, state, scale, keep_states=False)[:2]


def _scan_forward(q, k, v, rows, state, scale):
    o, last, states = _forward(q, k, v, rows, state, scale, keep_states=True)
    return (o, last), (q, k, v, rows, states)


def _scan_backward(scale, residuals, cotangents):
    q, k, v, rows, states = residuals
    dq, dk, dv, drows, dstate = _backward(q, k, v, rows, states, cotangents[0], cotangents[1], scale)
    heads = k.shape[1]
    dq, dk = (x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2) for x in (dq, dk))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv, drows, dstate


_scan.defvjp(_scan_forward, _scan_backward)


def _specs(q, k, v, rows, chunk_of):
    """(grid, blocks by name); states [B, HV, chunks, K, V], state [B, HV, K, V]; `chunk_of` a step of the grid's last axis."""
    batch, heads, chunks, row_kinds, n = rows.shape
    group = heads // k.shape[1]
    at_once = max(m for m in range(1, HEADS + 1) if heads % m == 0 and (m % group == 0 or group % m == 0))
    key_heads = max(1, at_once // group)
    tokens, key_dim, value_dim = q.shape[2] // chunks, k.shape[3], v.shape[3]

    def of_value_head(*size):
        return pl.BlockSpec((None, at_once, *size), lambda b, h, c: (b, h, chunk_of(c), 0))

    def of_key_head(*size):
        return pl.BlockSpec(
            (None, key_heads, *size), lambda b, h, c: (b, h * at_once // group // key_heads, chunk_of(c), 0)
        )

    blocks = {
        "q": of_key_head(tokens, key_dim),
        "k": of_key_head(n, key_dim),
        "v": of_value_head(n, value_dim),
        "o": of_value_head(tokens, value_dim),
        "dq": of_value_head(tokens, key_dim),
        "dk": of_value_head(n, key_dim),
        "rows": pl.BlockSpec((None, at_once, None, row_kinds, n), lambda b, h, c: (b, h, chunk_of(c), 0, 0)),
        "states": pl.BlockSpec((None, at_once, None, key_dim, value_dim), lambda b, h, c: (b, h, chunk_of(c), 0, 0)),
        "state": pl.BlockSpec((None, at_once, key_dim, value_dim), lambda b, h, c: (b, h, 0, 0)),
    }
    return (batch, heads // at_once, chunks), blocks


def _call(kernel, specs, inputs, outputs, name):
    """`pallas_call` with a float32 state in VMEM; inputs (spec name, array), outputs (spec name, shape, dtype)."""
    grid, blocks = specs
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[blocks[spec] for spec, _ in inputs],
        out_specs=[blocks[spec] for spec, *_ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        scratch_shapes=[pltpu.VMEM(blocks["state"].block_shape[1:], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        name=name,
    )(*(x for _, x in inputs))


def _forward(q, k, v, rows, state, scale, keep_states):
    """(o, last state, states before each chunk if asked for)."""
    batch, heads, chunks = rows.shape[:3]
    outputs = [("o", (*v.shape[:2], q.shape[2], v.shape[3]), v.dtype), ("state", state.shape, jnp.float32)]
    if keep_states:
        outputs.append(("states", (batch, heads, chunks, *state.shape[2:]), jnp.float32))

    def kernel(q, k, v, rows, first, o, last, *rest):
        *states, state = rest

        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = first[...]

        for ref in states:
            ref[...] = state[...]
        following, out = _chunk(state[...], _per_value_head(q, v), _per_value_head(k, v), v[...], rows[...], scale)
        o[...] = out.astype(o.dtype)
        state[...] = following

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            last[...] = state[...]

    inputs = [("q", q), ("k", k), ("v", v), ("rows", rows), ("state", state)]
    return _call(kernel, _specs(q, k, v, rows, lambda c: c), inputs, outputs, "delta_product_forward")


def _backward(q, k, v, rows, states, do, dlast, scale):
    """(dq, dk per value head, dv, drows, dstate)."""
    batch, heads, chunks = rows.shape[:3]
    summed = jnp.float32 if heads > k.shape[1] else q.dtype  # over the value heads of a key head, by the caller
    outputs = [
        ("dq", (batch, heads, *q.shape[2:]), summed),
        ("dk", (batch, heads, *k.shape[2:]), summed),
        ("v", v.shape, v.dtype),
        ("rows", rows.shape, rows.dtype),
        ("state", dlast.shape, jnp.float32),
    ]

    def kernel(q, k, v, rows, states, do, dlast, dq, dk, dv, drows, dfirst, dstate):
        @pl.when(pl.program_id(2) == 0)
        def _():
            dstate[...] = dlast[...]

        arguments = (states[...], _per_value_head(q, v), _per_value_head(k, v), v[...], rows[...])
        _, pull = jax.vjp(functools.partial(_chunk, scale=scale), *arguments)
        dstate[...], *gradients = pull((dstate[...], do[...].astype(jnp.float32)))
        for ref, gradient in zip((dq, dk, dv, drows), gradients, strict=True):
            ref[...] = gradient.astype(ref.dtype)

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            dfirst[...] = dstate[...]

    inputs = [("q", q), ("k", k), ("v", v), ("rows", rows), ("states", states), ("o", do), ("state", dlast)]
    specs = _specs(q, k, v, rows, lambda c: chunks - 1 - c)
    return _call(kernel, specs, inputs, outputs, "delta_product_backward")


def _per_value_head(x, v):
    """What a block of key heads holds, repeated for each of the block's value heads."""
    group = v.shape[0] // x.shape[0]
    return x[...] if group == 1 else jnp.concatenate([x[h // group][None] for h in range(v.shape[0])])


# One chunk of several heads, in step: the products of different heads then fill each other's latencies.


def _chunk(state, q, k, v, rows, scale):
    """(following state, o [H, C, V]) from state [H, K, V], q [H, C, K], k [H, N, K], v [H, N, V], rows [H, 1 or 2, N]."""
    dtype = q.dtype.name
    fine = "float32" if dtype == "float32" else SPLIT  # where an error would stay in the state for all later chunks
    tokens, n = q.shape[1], k.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    token, row = (jax.lax.broadcasted_iota(jnp.int32, (tokens, n), axis) for axis in (0, 1))
    seen = row < (token + 1) * (n // tokens)  # by the query of each token

    beta = _column(rows[:, :1], i == j)
    a, p = _nt(dtype, k, k), scale * _nt(dtype, q, k)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q_from_start, k_from_start, k_to_end, total = q, k, k, jnp.ones((1, 1, 1), jnp.float32)
    if rows.shape[1] == 2:
        g = rows[:, 1:]
        later = jnp.where(i > j, _column(g, i == j), 0)  # gate of row i if it comes after row j
        decay = jnp.exp(_masked_sums(dtype, i >= j, later))
        a = a * decay
        p = p * (decay if n == tokens else jnp.exp(_masked_sums(dtype, seen, later)))
        sums = [jnp.sum(jnp.where(mask, g, 0), axis=2, keepdims=True) for mask in (seen, j <= i, j > i)]
        q_from_start, k_from_start, k_to_end = (x * jnp.exp(s) for x, s in zip((q, k, k), sums, strict=True))
        total = jnp.exp(jnp.sum(g, axis=2, keepdims=True))
    a = jnp.where(i > j, beta * a, 0)
    p = jnp.where(seen, p, 0)
    inverse = _inverse(jax.lax.stop_gradient(a), dtype)
    u, w = (_solve(fine, a, inverse, beta * x) for x in (v, k_from_start))
    v_new = u - _mm(fine, w, state)
    o = scale * _mm(dtype, q_from_start, state) + _mm(dtype, p, v_new)
    return total * state + _tn(fine, k_to_end, v_new), o


def _column(row, diagonal):
    """[H, 1, N] -> [H, N, 1]."""
    return jnp.sum(jnp.where(diagonal, row, 0), axis=2, keepdims=True)


def _inverse(a, dtype):
    """(I + a)^-1 for strictly lower triangular a, by doubling diagonal blocks: exact substitution in matrix products.

    Of blocks L = [[X, 0], [Z, Y]] the inverse is [[X', 0], [-Y' Z X', Y']]; all blocks of a size are done at once by masks.
    In bfloat16 the errors (5e-2 with key cosine .95 and beta 2) are squared by one Newton step with an accurate residual.
    """
    n = a.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    identity = (i == j).astype(jnp.float32)
    inverse = identity
    size = 1
    while size < n:
        below = jnp.where(((i ^ j) < 2 * size) & ((i & size) > (j & size)), a, 0)
        inverse = inverse - (below if size == 1 else _rounded_dot(dtype, _rounded_dot(dtype, inverse, below), inverse))
        size *= 2
    if dtype == "float32":
        return inverse
    residual = identity - inverse - _rounded_dot(SPLIT, a, inverse)
    return inverse + _rounded_dot(dtype, inverse, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(dtype, a, inverse, b):
    """(I + a)^-1 b; in float32 with a step of refinement, which makes it as accurate as forward substitution."""
    return _apply(dtype, a, inverse, b, (1, 0))


def _apply(dtype, a, inverse, b, axes):
    x = _rounded_dot(dtype, inverse, b, axes)
    if dtype != "float32":
        return x
    return x + _dot(inverse, b - x - _dot(a, x, axes), axes)


def _solve_forward(dtype, a, inverse, b):
    x = _solve(dtype, a, inverse, b)
    return x, (a, inverse, x)


def _solve_backward(dtype, residuals, dx):
    a, inverse, x = residuals
    db = _apply(dtype, a, inverse, dx, (0, 0))
    return -_rounded_dot(dtype, db, x, (1, 1)), jnp.zeros_like(inverse), db


_solve.defvjp(_solve_forward, _solve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked_sums(dtype, mask, x):
    """mask [M, N] of 0 and 1 times x [N, P]: to 24 bits for float32, to 16 for bfloat16."""
    return _dot_masked(dtype, mask, x, (1, 0))


def _dot_masked(dtype, mask, x, axes):
    mask = mask.astype(jnp.bfloat16)  # exact, so that x alone is split
    return sum(_dot(mask, part, axes) for part in _split(x, 3 if dtype == "float32" else 2))


def _masked_sums_forward(dtype, mask, x):
    return _masked_sums(dtype, mask, x), mask


def _masked_sums_backward(dtype, mask, d):
    return None, _dot_masked(dtype, mask, d, (0, 0))


_masked_sums.defvjp(_masked_sums_forward, _masked_sums_backward)


def _split(x, parts):
    """Bfloat16 arrays whose sum is x to 8 bits each."""
    split = []
    for _ in range(parts):
        split.append(x.astype(jnp.bfloat16))
        x = (x - split[-1]).astype(x.dtype)
    return split


# Products x y, x y^T and x^T y, summed in float32; each is the others' derivative. Operands are rounded to `dtype`: "float32",
# "bfloat16", or SPLIT, two bfloat16 each: 16 bits in three passes.


def _dot(x, y, axes=(1, 0)):
    """Products of matrices, or of one per head [H, ., .]; head by head, as Mosaic does it anyway."""
    if x.ndim == y.ndim == 2:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
    heads = max(x.shape[0] if x.ndim == 3 else 1, y.shape[0] if y.ndim == 3 else 1)
    return jnp.stack([_dot(x[h] if x.ndim == 3 else x, y[h] if y.ndim == 3 else y, axes) for h in range(heads)])


def _rounded_dot(dtype, x, y, axes=(1, 0)):
    if dtype == SPLIT:
        (x, x_fine), (y, y_fine) = _split(x, 2), _split(y, 2)
        return _dot(x, y, axes) + (_dot(x, y_fine, axes) + _dot(x_fine, y, axes))
    return _dot(x.astype(dtype), y.astype(dtype), axes)


def _product(axes, name_dx, name_dy):
    def rounded(dtype, x, y):
        return _rounded_dot(dtype, x, y, axes)

    def forward(dtype, x, y):
        return rounded(dtype, x, y), (x, y)

    def backward(dtype, residuals, d):
        x, y = residuals
        (f, left), (h, right) = ((globals()[name], order) for name, order in (name_dx, name_dy))
        operands = {"x": x, "y": y, "d": d}
        dx, dy = f(dtype, *(operands[o] for o in left)), h(dtype, *(operands[o] for o in right))
        return dx.astype(x.dtype), dy.astype(y.dtype)

    product = jax.custom_vjp(rounded, nondiff_argnums=(0,))
    product.defvjp(forward, backward)
    return product


_mm = _product((1, 0), ("_nt", "dy"), ("_tn", "xd"))
_nt = _product((1, 1), ("_mm", "dy"), ("_tn", "dx"))
_tn = _product((0, 0), ("_nt", "yd"), ("_mm", "xd"))
