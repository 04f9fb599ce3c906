"""The chunked delta product as TPU kernels (Mosaic): gates, scores, inverse, WY parts and the scan over chunks.

bfloat16 without gate or with one per head goes to `tpu_bfloat16`, where that serves the shapes; here is everything else. Three
kernels, each on the grid (batch, block of heads, chunk). "inverse" forms (I + A)^-1 of every chunk: it needs no state, so
no chunk waits for another. "forward" scans over the chunks with the state in VMEM, in float32. "backward" scans in reverse
with `jax.vjp` of the function of one chunk, from these inverses and from the states that the forward kernel wrote.

A chunk has C queries and N = C R rows of keys and values. Row s carries the gate of its token if it is the token's first
row, else 0, so that every decay is the exponential of a sum of gates over rows, and R > 1 needs no case of its own. With S
the state before the chunk, per head (arXiv 2406.06484, section 3.2; 2412.06464, section 3.3)::

    A = strict_tril(beta_i (k_i . k_j) D_ij)                            [N, N]
    V' = (I + A)^-1 beta (V - D_i,start K S)                            [N, V]
    O = scale (D_t,start Q S + P V'),   P_tj = (q_t . k_j) D_tj         [C, V]
    S <- D_end,start S + K^T (D_end,j V')                               [K, V]

The heads of a block go in step, as the leading axis of every array: their products then fill each other's latencies. Arrays
are read as the caller has them, [B, T, H, K], and turned in VMEM, where that costs next to nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_bfloat16, tpu_chunk
from pallas_kernels.manual_axes import results
from pallas_kernels.tpu_bfloat16_common import LOWEST_GATE, tpu_info

ROWS = 64  # rows of a chunk, at most
HEADS = 16  # value heads of a block
SPILLS = 11  # float32 arrays [heads, N, K + V] that the backward keeps in VMEM for want of registers, at most
MORE_SPILLS = 16  # in float32, and as many more with channel gates
SEMANTICS: tuple | None = ("parallel", "parallel", "arbitrary")  # of the grid


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Delta product; arguments as `IMPLEMENTATIONS` in `deltajax.ops.delta_rule.api` says.

    Raises:
      NotImplementedError: float64, or a block of heads that does not fit the VMEM of the TPU that is compiled for.
    """
    if initial_state.dtype != jnp.float32:
        raise NotImplementedError(f"the state must be float32, got {initial_state.dtype}")
    g = g if g is None else g.astype(jnp.float32)
    heads = v.shape[3]
    if heads > max(HEADS, 2 * q.shape[2]):
        q, k = (jnp.repeat(x, heads // x.shape[-2], axis=-2) for x in (q, k))
    scan = _bfloat16
    if not tpu_bfloat16.serves(q, k, v, g):
        scan = _general
        _check_vmem(q, v, g)
    constant = scale if isinstance(scale, int | float) else 1.0
    o, state = scan(q, k, v, beta, g, initial_state, constant)
    return (o if constant is scale else o * scale).astype(v.dtype), state


def _check_vmem(q, v, g) -> None:
    """Before any compilation: whether the largest kernel, the backward, fits.

    Raises:
      NotImplementedError: the sizes, what they need, and what there is.
    """
    if tpu_info() is None:
        return
    needed, limit = backward_vmem(q, v, g), _vmem_limit()
    if needed > limit:
        shape = f"{min(v.shape[3], HEADS)} heads of K = {q.shape[3]}, V = {v.shape[4]}, R = {v.shape[2]} in {q.dtype}"
        raise NotImplementedError(
            f"{shape} need about {needed >> 20} MiB of VMEM, over the {limit >> 20} MiB there are"
        )


def _vmem_limit() -> int:
    """Bytes of VMEM that a kernel may take: three quarters, XLA keeps arrays of its own there."""
    return 32 * 2**20 if tpu_info() is None else tpu_info().vmem_capacity_bytes * 3 // 4


def backward_vmem(q, v, g) -> int:
    """Bytes of VMEM that the general backward kernel takes, about: two buffers of each block, the states and what is spilled."""
    steps, heads, value_dim = v.shape[2:]
    block, tokens, dtype = min(heads, HEADS), _tokens(steps), _dtype(q)
    n, width = tokens * steps, dtype.itemsize
    keys, values, square = (-(-size // 128) * 128 for size in (q.shape[3], value_dim, n * _inverse_parts(dtype)))
    sequences = width * (
        tokens * (2 * keys + values) + n * (2 * keys + 2 * values + square)
    )  # q, dq, do; k, v and gradients
    per_channel = g is not None and g.ndim == 4
    if per_channel:
        sequences += tokens * 4 * 2 * keys
    spilled = 4 * n * (keys + values) * (SPILLS + MORE_SPILLS * ((dtype == jnp.float32) + per_channel))
    states = 4 * (-(-q.shape[3] // 8) * 8) * values
    # Of states those before the chunk; and once each, their gradient, that of the last and that of the first.
    return block * (2 * (sequences + states) + 3 * states + spilled)


def _bfloat16(q, k, v, beta, g, initial_state, scale):
    """What `tpu_bfloat16` serves."""
    return tpu_bfloat16.scan(q, *map(_by_row, (k, v, beta)), g, initial_state, scale)


def _by_row(x):
    """T and R merged: the same bytes."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _first_of_token(g, steps):
    """[B, T, HV] -> [B, T, R, HV]: a token's gate in its first row, else 0."""
    return jnp.stack([g] + [jnp.zeros_like(g)] * (steps - 1), axis=2)


def _dtype(*arrays):
    return jnp.dtype(jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32)


def _tokens(steps):
    """Of a chunk."""
    return max(8, 1 << (ROWS // steps).bit_length() - 1)


def _general(q, k, v, beta, g, initial_state, scale):
    """Any dtype, R, gate and size, by the kernels below."""
    batch, length, steps, heads = v.shape[:4]
    dtype = _dtype(q, k, v)
    tokens = _tokens(steps)
    chunks = -(-length // tokens)

    def per_chunk(x):
        """[B, T, R, HV] -> float32 [B, chunks, HV, 1, N], padded with zeros."""
        x = jnp.pad(x.astype(jnp.float32), [(0, chunks * tokens - length if axis == 1 else 0) for axis in range(4)])
        return jnp.moveaxis(x.reshape(batch, chunks, 1, tokens * steps, heads), 4, 2)

    per_channel = g is not None and g.ndim == q.ndim
    per_row = [beta] if g is None or per_channel else [beta, _first_of_token(jnp.maximum(g, LOWEST_GATE), steps)]
    rows = jnp.concatenate([per_chunk(x) for x in per_row], axis=-2)
    sequences = (x.astype(dtype) for x in (q, _by_row(k), _by_row(v)))
    return _scan(*sequences, rows, g if per_channel else None, initial_state, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(q, k, v, rows, gates, state, scale):
    """q [B, T, H, K], k [B, T R, H, K], v [B, T R, HV, V], rows (beta, scalar gates) [B, chunks, HV, 1 or 2, N], gates None or
    [B, T, HV, K], state [B, HV, K, V].
    """
    sequences = _sequences(q, k, v, rows, gates)
    return _forward(sequences, _inverses(sequences), state, scale, keep_states=False)[:2]


def _scan_forward(q, k, v, rows, gates, state, scale):
    sequences = _sequences(q, k, v, rows, gates)
    inverses = _inverses(sequences)
    o, last, states = _forward(sequences, inverses, state, scale, keep_states=True)
    return (o, last), (q, k, v, rows, gates, inverses, states)


def _scan_backward(scale, residuals, cotangents):
    *sequences, inverses, states = residuals
    sequences = _sequences(*sequences)
    *gradients, dstate = _backward(scale, sequences, inverses, states, *cotangents)
    return *gradients, *[None] * ("gates" not in sequences), dstate


def _sequences(q, k, v, rows, gates):
    return {"q": q, "k": k, "v": v, "rows": rows} | ({} if gates is None else {"gates": gates})


_scan.defvjp(_scan_forward, _scan_backward)


def _call(kernel, name, inputs, outputs, *, state=False, reverse=False):
    """`pallas_call` over (batch, blocks of heads, chunks), forwards or in reverse.

    inputs: layout -> array, with "q", "k", "v" and "rows" as in `_scan` among them; outputs: (layout, shape, dtype) each. The
    kernel is given load(ref) -> float32, store(ref, x), which turn blocks of tokens to heads first and back, the refs of the
    inputs by layout, those of the outputs, and with `state` a float32 scratch of a block's states.
    """
    q, k, v, rows = (inputs[name] for name in ("q", "k", "v", "rows"))
    length, key_heads, key_dim = q.shape[1:]
    heads, value_dim = v.shape[2:]
    batch, chunks, _, row_kinds, n = rows.shape
    tokens = n * length // k.shape[1]
    value_block = min(heads, HEADS)
    key_block = min(key_heads, value_block * key_heads // heads)

    def chunk(c):
        return chunks - 1 - c if reverse else c

    def sequence(size, heads, dim):
        return pl.BlockSpec((None, size, heads, dim), lambda b, h, c: (b, chunk(c), h, 0))

    def per_chunk(*size):
        return pl.BlockSpec((None, None, value_block, *size), lambda b, h, c: (b, chunk(c), h, 0, 0))

    layouts = {
        "q": sequence(tokens, key_block, key_dim),
        "k": sequence(n, key_block, key_dim),
        "v": sequence(n, value_block, value_dim),
        "o": sequence(tokens, value_block, value_dim),
        "gates": sequence(tokens, value_block, key_dim),
        "rows": per_chunk(row_kinds, n),
        "inverses": per_chunk(n, n * _inverse_parts(k.dtype)),
        "states": per_chunk(key_dim, value_dim),
        "state": pl.BlockSpec((None, value_block, key_dim, value_dim), lambda b, h, c: (b, h, 0, 0)),
    }

    def load(ref):
        x = ref[...].astype(jnp.float32)
        if length % tokens:  # what is read behind the last token is anything
            there = (length - chunk(pl.program_id(2)) * tokens) * (x.shape[0] // tokens)
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < there, x, 0)
        return jnp.swapaxes(x, 0, 1)

    def store(ref, x):
        ref[...] = jnp.swapaxes(x.astype(ref.dtype), 0, 1)

    def body(*refs):
        kernel(load, store, dict(zip(inputs, refs, strict=False)), *refs[len(inputs) :])

    return pl.pallas_call(
        body,
        grid=(batch, -(-heads // value_block), chunks),
        in_specs=[layouts[layout] for layout in inputs],
        out_specs=[layouts[layout] for layout, *_ in outputs],
        out_shape=results(inputs.values(), [x[1:] for x in outputs]),
        scratch_shapes=[pltpu.VMEM((value_block, key_dim, value_dim), jnp.float32)] * state,
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=_vmem_limit()),
        name=f"delta_product_{name}",
    )(*inputs.values())


def _inverses(sequences):
    """(I + A)^-1 of every chunk, as the sum of its parts: [B, chunks, HV, N, parts N]."""
    dtype, rows = sequences["k"].dtype, sequences["rows"]

    def kernel(load, store, refs, out):
        keys = load(refs["k"])
        a, *_ = tpu_chunk.score(keys, keys, refs["rows"][...], _gates(load, refs), 1.0, dtype)
        out[...] = jnp.concatenate(tpu_chunk.invert(a, dtype), axis=2).astype(out.dtype)

    *lead, _, n = rows.shape
    return _call(kernel, "inverse", sequences, [("inverses", (*lead, n, n * _inverse_parts(dtype)), dtype)])[0]


def _gates(load, refs):
    return jnp.maximum(load(refs["gates"]), LOWEST_GATE) if "gates" in refs else None


def _inverse_parts(dtype):
    return 2 if dtype == jnp.bfloat16 else 1


def _forward(sequences, inverses, state, scale, keep_states):
    """(o, last state, states before each chunk if asked for)."""
    q, v = sequences["q"], sequences["v"]
    batch, chunks, heads = inverses.shape[:3]
    outputs = [("o", (*q.shape[:2], *v.shape[2:]), v.dtype), ("state", state.shape, jnp.float32)]
    if keep_states:
        outputs.append(("states", (batch, chunks, heads, *state.shape[2:]), jnp.float32))

    def kernel(load, store, refs, o, last, *rest):
        *states, state = rest

        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = refs["state"][...]

        for ref in states:
            ref[...] = state[...]
        arguments = (*(load(refs[name]) for name in "qkv"), refs["rows"][...], _gates(load, refs))
        state[...], out = tpu_chunk.advance(state[...], *arguments, inverse=refs["inverses"][...], scale=scale)
        store(o, out)

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            last[...] = state[...]

    inputs = {**sequences, "inverses": inverses, "state": state}
    return _call(kernel, "forward", inputs, outputs, state=True)


def _backward(scale, sequences, inverses, states, do, dlast):
    """Gradients of the sequences and of the state."""
    chunks = inverses.shape[1]
    shapes = [(layout, x.shape, x.dtype) for layout, x in (*sequences.items(), ("state", dlast))]

    def kernel(load, store, refs, *outputs):
        *gradients, dfirst, dstate = outputs

        @pl.when(pl.program_id(2) == 0)
        def _():
            dstate[...] = refs["state"][...]

        arguments = (*(load(refs[name]) for name in "qkv"), refs["rows"][...], _gates(load, refs))
        chunk = functools.partial(tpu_chunk.advance, inverse=refs["inverses"][...], scale=scale)
        _, pull = jax.vjp(chunk, refs["states"][...], *arguments)
        dstate[...], *found = pull((dstate[...], load(refs["o"])))
        for name, ref, gradient in zip(sequences, gradients, found, strict=False):
            if name == "rows":
                ref[...] = gradient
            else:
                store(ref, gradient)

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            dfirst[...] = dstate[...]

    inputs = {**sequences, "inverses": inverses, "states": states, "o": do, "state": dlast}
    return _call(kernel, "backward", inputs, shapes, state=True, reverse=True)
