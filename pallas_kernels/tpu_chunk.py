"""One chunk of H value heads, in step: what the general TPU kernels (`tpu.py`) compute, as functions of arrays.

q and k are those of the key heads. Names and formulas are those of `tpu.py`.
"""

import functools

import jax
import jax.numpy as jnp


def advance(state, q, k, v, rows, gates, *, inverse, scale):
    """(following state, o [H, C, V]) from state [H, K, V], q [., C, K], k [., N, K], v [H, N, V], rows [H, 1 or 2, N],
    gates None or [H, C, K].
    """
    tokens, dtype = q.shape[1], inverse.dtype
    one, two = (1, 2) if dtype == jnp.bfloat16 else (None, None)  # parts: what stays in the state is kept to 16 bits
    qk = jnp.concatenate([q, k], axis=1)
    scores, beta, from_start, to_end, total = score(qk, k, rows, gates, scale, dtype)
    p, a = scores[:, :tokens], scores[:, tokens:]
    qk, k = _per_value_head(qk, v), _per_value_head(k, v)
    per_channel = gates is not None
    if per_channel and one:
        decayed = from_start * qk
        head, rest = _exact(decayed[:, tokens:])
        read = _mm(two, one, jnp.concatenate([decayed[:, :tokens], head], axis=1), state)
        of_keys = read[:, tokens:] + _mm(one, one, rest, state)
    else:
        read = _mm(two, one, from_start * qk, state) if per_channel else from_start * _mm(two, one, qk, state)
        of_keys = read[:, tokens:]
    v_new = _solve(a, inverse, beta * (v - of_keys))
    o = scale * read[:, :tokens] + _mm(one, one, p, v_new)
    if per_channel and one:
        head, rest = _exact(to_end * k)
        written = _tn(two, two, head, v_new) + _tn(one, one, rest, v_new)
    else:
        written = _tn(two, two, to_end * k, v_new) if per_channel else _tn(two, two, k, to_end * v_new)
    return total * state + written, o


def score(qk, k, rows, gates, scale, dtype):
    """Products of C queries and N keys (or of the keys alone) with keys, weighed and masked: P above A, [H, C + N, N].

    Then, per row: beta [H, N, 1]; the decays from the chunk's start [H, C + N, 1], to its end [H, N, 1], and in all
    [H, 1, 1]; with channel gates [.., K] instead, and [H, K, 1] in all.
    """
    if gates is not None:
        return _channel_scores(_per_value_head(qk, rows), _per_value_head(k, rows), rows, gates, scale, dtype)
    n = k.shape[1]
    tokens = qk.shape[1] - n
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    token, row = (jax.lax.broadcasted_iota(jnp.int32, (tokens, n), axis) for axis in (0, 1))
    beta = _column(rows[:, :1], i == j)
    masks = [(i > j, i >= j, beta)]  # keys that it sees, gates that it meets from the chunk's start, weight
    if tokens:
        seen = row < (token + 1) * (n // tokens)
        masks.insert(0, (seen, seen, scale))
    one, sum_parts = (1, 2) if dtype == jnp.bfloat16 else (None, 3)
    products = _per_value_head(_score_products(one, qk, k), rows)
    products = [products[:, :tokens], products[:, tokens:]] if tokens else [products]
    from_start = to_end = total = jnp.ones((1, 1, 1), jnp.float32)
    if rows.shape[1] == 2:
        g = rows[:, 1:]
        later = jnp.where(i > j, _column(g, i == j), 0)  # gate of row i if it comes after row j
        decays = [jnp.exp(_masked_sums(sum_parts, met, later)) for _, met, _ in masks]
        products = [x * decay for x, decay in zip(products, decays, strict=True)]
        from_start = jnp.concatenate([jnp.exp(_row_sums(met, g)) for _, met, _ in masks], axis=1)
        to_end = jnp.exp(_row_sums(j > i, g))
        total = jnp.exp(jnp.sum(g, axis=2, keepdims=True))
    scores = [jnp.where(sees, weight * x, 0) for (sees, _, weight), x in zip(masks, products, strict=True)]
    return jnp.concatenate(scores, axis=1), beta, from_start, to_end, total


def _channel_scores(qk, k, rows, gates, scale, dtype):
    """`_scores` with gates [H, C, K]: the decay stands inside the product over channels, and differs for every pair.

    Two tokens are told apart at one size of aligned blocks: it is the largest for which they lie in neighbours, an even
    block and the odd one after it. Their decay is split between these two: exp(gates after j in its block) times
    exp(gates of i's block up to i). Both exponents are <= 0 whatever the gates, and log2(C) + 1 products
    give all pairs: those of neighbours at each size, and those of rows of one token, which do not decay.
    """
    n, tokens = k.shape[1], gates.shape[1]
    steps, queries = n // tokens, qk.shape[1] - n
    one, sum_parts = (1, 2) if dtype == jnp.bfloat16 else (None, 3)

    def token_of(rows, axis, shape):  # the first `queries` rows are one a token, the others `steps`
        i = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        of_key = ((i - rows).astype(jnp.float32) + 0.5) * (1 / steps)
        return jnp.where(i < rows, i, of_key.astype(jnp.int32))

    def decays(mask):  # of each row, over the gates of the tokens that the mask(token of row, token) takes
        shape = (queries + n, tokens)
        mask = mask(token_of(queries, 0, shape), jax.lax.broadcasted_iota(jnp.int32, shape, 1))
        return jnp.exp(_masked_sums(sum_parts, mask, gates))

    i, j = token_of(queries, 0, (queries + n, n)), token_of(0, 1, (queries + n, n))
    products = jnp.where(i == j, _score_products(one, qk, k), 0)
    size = 1
    while size < tokens:
        within = functools.partial(_within_neighbours, size=size)
        decay = decays(within)
        pairs = _decayed_products(one, decay * qk, decay[:, queries:] * k)
        products = jnp.where(((i ^ j) < 2 * size) & ((i & size) > (j & size)), pairs, products)
        size *= 2
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (queries + n, n), axis) for axis in (0, 1))
    diagonal = row[:n] == column[:n]
    beta = _column(rows[:, :1], diagonal)
    weight = beta if not queries else jnp.concatenate([jnp.full((beta.shape[0], queries, 1), scale), beta], axis=1)
    scores = jnp.where((row < queries) | (row - queries > column), weight * products, 0)
    total = jnp.exp(jnp.sum(gates, axis=1, keepdims=True))
    lanes = [jax.lax.broadcasted_iota(jnp.int32, (total.shape[2],) * 2, axis) for axis in (0, 1)]
    return (
        scores,
        beta,
        decays(lambda token, s: s <= token),
        decays(lambda token, s: s > token)[:, queries:],
        _column(total, lanes[0] == lanes[1]),
    )


def _decayed_products(one, qk, k):
    """`_score_products`; of the keys' rows (the last of qk, which are k) in bfloat16 too to 16 bits."""
    if one is None:
        return _score_products(one, qk, k)
    queries = qk.shape[1] - k.shape[1]
    head, rest = _exact(k)
    of_keys = _in_parts(one, head, head, (1, 1)) + (_nt(one, one, head, rest) + _nt(one, one, rest, head))
    return jnp.concatenate([_nt(one, one, qk[:, :queries], k), of_keys], axis=1) if queries else of_keys


def _exact(x):
    """(head, rest) of x, the first exact in bfloat16 and a constant: x has its gradient through the rest.

    Keys are exact in bfloat16, decayed ones are not, and where nothing in the state fades the error stays.
    """
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF8000)) + jnp.uint32(0x8000)
    head = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    head = jax.lax.stop_gradient(head)
    return head, x - head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_products(parts, x, y):
    """x y^T of rows; in float32 rounded about as if summed exactly.

    With correlated keys and beta near 2 no error decays, and the rounding of K K^T would be the largest of all. So rows are
    split at grids (`_on_grids`): in the products of all but the last parts nothing is rounded, and the six passes are as many
    as `Precision.HIGHEST` takes.
    """
    if parts is not None:
        return _in_parts(parts, x, y, (1, 1))
    (x1, x2, x3), (y1, y2, y3) = _on_grids(x), _on_grids(y)
    product = functools.partial(_rounded_dot, axes=(1, 1))
    small = product(x1, y3) + product(x3, y1) + product(x2, y2)
    return product(x1, y1) + ((product(x1, y2) + product(x2, y1)) + small)


def _on_grids(x):
    """Three arrays that sum to x [.., K] to 2^-26 of each row's largest entry, the first two exact in bfloat16.

    They are multiples of 2^-7 and 2^-16 of the power of two below that entry, and the rest (Ozaki et al., 2012, doi
    10.1007/s11075-011-9478-1).
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-20)
    power = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    below = jax.lax.bitcast_convert_type(power, jnp.float32)
    inverse = jax.lax.bitcast_convert_type(jnp.uint32(254 << 23) - power, jnp.float32)
    parts = []
    for bits in (7, 16):
        parts.append(jnp.round(x * (inverse * 2**bits)) * (below * 2**-bits))
        x = x - parts[-1]
    return [*parts, x]


_score_products.defvjp(
    lambda parts, x, y: (_score_products(parts, x, y), (x, y)),
    lambda parts, xy, d: (_in_parts(parts, d, xy[1]), _in_parts(parts, d, xy[0], (0, 0))),
)


def _within_neighbours(token, s, size):
    """Whether `s` is in the block of `token`, up to it in an odd block and after it in an even one."""
    odd = (token & size) > 0
    return ((token ^ s) < size) & ((odd & (s <= token)) | (~odd & (s > token)))


def _per_value_head(x, per_value_head):
    """What key heads hold, repeated for each of their value heads."""
    group = per_value_head.shape[0] // x.shape[0]
    return x if group == 1 else jnp.stack([x[h // group] for h in range(per_value_head.shape[0])])


def _column(row, diagonal):
    """[H, 1, N] -> [H, N, 1]."""
    return _row_sums(diagonal, row)


def _row_sums(mask, row):
    """Sums of the entries [H, 1, N] that each row of the mask [M, N] has: [H, M, 1]."""
    return jnp.sum(jnp.where(mask, row, 0), axis=2, keepdims=True)


def invert(a, dtype):
    """Arrays, of `dtype` by then, whose sum is (I + a)^-1, a strictly lower triangular: by doubling diagonal blocks.

    Of blocks L = [[X, 0], [Z, Y]] the inverse is [[X', 0], [-Y' Z X', Y']]: exact substitution in matrix products; all blocks
    of a size are done at once by masks. In bfloat16 the errors (5e-2 with key cosine .95 and beta 2) are then squared by one
    Newton step with an accurate residual.
    """
    one = 1 if dtype == jnp.bfloat16 else None
    n = a.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    identity = (i == j).astype(jnp.float32)
    inverse = identity - jnp.where(((i ^ j) == 1) & (i > j), a, 0)
    size = 2
    while size < n:
        below = jnp.where(((i ^ j) < 2 * size) & ((i & size) > (j & size)), a, 0)
        inverse = inverse - _in_parts(one, _in_parts(one, inverse, below), inverse)
        size *= 2
    if dtype == jnp.float32:
        return [inverse]
    residual = (
        identity - inverse - sum(_in_parts(p, part, inverse) for p, part in zip((2, 1), _split(a, 2), strict=True))
    )
    return _split(inverse + _in_parts(one, inverse, residual), 2)


@jax.custom_vjp
def _solve(a, inverse, b):
    """(I + a)^-1 b from the parts of the inverse, side by side; in float32 with a step of refinement by a."""
    return _apply(a, inverse, b, (1, 0))


def _apply(a, inverse, b, axes):
    if inverse.dtype == jnp.float32:
        x = _dot(inverse, b, axes)
        return x + _dot(inverse, b - x - _dot(a, x, axes), axes)
    n = a.shape[1]
    b, fine = _split(b, 2)
    if axes == (1, 0):
        return _rounded_dot(inverse, jnp.concatenate([b, b], axis=1)) + _rounded_dot(inverse[:, :, :n], fine)
    first, second = inverse[:, :, :n], inverse[:, :, n:]
    return sum(_rounded_dot(x, y, axes) for x, y in ((first, b), (second, b), (first, fine)))


def _solve_forward(a, inverse, b):
    x = _solve(a, inverse, b)
    return x, (a, inverse, x)


def _solve_backward(residuals, dx):
    a, inverse, x = residuals
    db = _apply(a, inverse, dx, (0, 0))
    # For beta's gradient rows of this are summed, weighed by products of keys: what is left is far smaller than the terms.
    return -_in_parts(2 if inverse.dtype == jnp.bfloat16 else None, db, x, (1, 1)), jnp.zeros_like(inverse), db


_solve.defvjp(_solve_forward, _solve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked_sums(parts, mask, x):
    """mask [M, N] of 0 and 1 times x [H, N, P] in 8 bits for each part."""
    return _in_parts(parts, mask.astype(jnp.float32), x)


def _masked_sums_forward(parts, mask, x):
    return _masked_sums(parts, mask, x), mask


def _masked_sums_backward(parts, mask, d):
    return None, _in_parts(parts, mask.astype(jnp.float32), d, (0, 0))


_masked_sums.defvjp(_masked_sums_forward, _masked_sums_backward)


# Products x y, x y^T and x^T y, summed in float32; each is the others' derivative. `parts` None: in float32. Else x is rounded
# to bfloat16 and y, or the cotangent where it meets x, is the sum of so many bfloat16 arrays, each of which costs a pass.


def _dot(x, y, axes=(1, 0), rounded=False):
    """Products of matrices, or of one per head [H, ., .]; head by head, as Mosaic does it anyway."""
    if x.ndim == 3 or y.ndim == 3:
        heads = (x if x.ndim == 3 else y).shape[0]
        pairs = ((x[h] if x.ndim == 3 else x, y[h] if y.ndim == 3 else y) for h in range(heads))
        return jnp.stack([_dot(*pair, axes, rounded) for pair in pairs])
    if rounded and axes == (0, 0):  # turned in float32: packed pairs of rows are slow to turn
        x, axes = x.astype(jnp.float32).T, (1, 0)
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    if not rounded:
        return float32_product(x, y, dimensions)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def float32_product(x, y, dimensions):
    """`dot_general` of float32: on a TPU six passes of bfloat16 parts, which `benchmarks/tpu_accuracy.py` puts in its place."""
    return jax.lax.dot_general(
        x, y, dimensions, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


_rounded_dot = functools.partial(_dot, rounded=True)


def _split(x, parts):
    """Arrays whose roundings to bfloat16 sum to x, in 8 bits each; cutting bits costs less than rounding and reading back."""
    split = []
    for _ in range(parts - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        head = jax.lax.bitcast_convert_type(bits, jnp.float32)
        split.append(head)
        x = x - head
    return [*split, x]


def _in_parts(parts, x, y, axes=(1, 0)):
    if parts is None:
        return _dot(x, y, axes)
    return sum(_rounded_dot(x, part, axes) for part in _split(y, parts))


def _product(axes, toward_x, toward_y):
    """f(parts of y, parts of the cotangent toward y, x, y); toward_x(x, y, d), toward_y(parts, x, y, d)."""

    def product(parts, d_parts, x, y):
        return _in_parts(parts, x, y, axes)

    def forward(parts, d_parts, x, y):
        return product(parts, d_parts, x, y), (x, y)

    def backward(parts, d_parts, residuals, d):
        x, y = residuals
        one = None if parts is None else 1
        return toward_x(one, x, y, d), toward_y(d_parts, x, y, d)

    product = jax.custom_vjp(product, nondiff_argnums=(0, 1))
    product.defvjp(forward, backward)
    return product


_mm = _product((1, 0), lambda p, x, y, d: _in_parts(p, d, y, (1, 1)), lambda p, x, y, d: _in_parts(p, x, d, (0, 0)))
_nt = _product((1, 1), lambda p, x, y, d: _in_parts(p, d, y, (1, 0)), lambda p, x, y, d: _in_parts(p, d, x, (0, 0)))
_tn = _product((0, 0), lambda p, x, y, d: _in_parts(p, y, d, (1, 1)), lambda p, x, y, d: _in_parts(p, x, d, (1, 0)))
