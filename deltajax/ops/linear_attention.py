"""Linear attention: the state sums k v^T, with or without decay. What the delta rule is compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deltajax.ops.opaque import opaque, zero_state
from deltajax.ops.segments import segment_starts

CHUNK = 64  # tokens whose scores are formed at once
LOWEST_GATE = -1000.0  # exp of it is 0 in every float type, and sums of it stay finite


def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Per token and head, with state S [K, V]: `S <- exp(g) S + k v^T; o = scale S^T q`, in chunks.

    With D_ij the sum of the log gates after token j up to token i, and S the state before the chunk::

        O = (Q exp(D_i,start)) S + (Q K^T * exp(D_ij)) V;   S <- exp(D_end,start) S + (K exp(D_end,j))^T V

    Every exponent is a sum of gates, as in `ops.delta_rule.chunked`.

    Args:
      g: log decay <= 0 per head; -inf erases the state. None: no decay.
      scale: multiplies q; default K ** -0.5.
      initial_state: default zeros.
      segment_ids: packed documents: the state resets where the id changes.

    Returns:
      (o, final_state): o in v's dtype, the state in float32 (float64 for float64 inputs).

    References:
      Linear attention: arXiv 2006.16236, without its feature map, which is the caller's; chunks and decay: GLA, arXiv 2312.06635.
    """
    batch, length, heads, key_dim = q.shape
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(q, k, v))
    scale = key_dim**-0.5 if scale is None else scale
    if segment_ids is not None:
        g = jnp.zeros((batch, length, heads), dtype) if g is None else g
        g = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, g)
    if initial_state is None:
        initial_state = zero_state((batch, heads, key_dim, v.shape[-1]), dtype)
    if q.size == 0 or v.size == 0:
        return jnp.zeros_like(v), initial_state.astype(dtype)
    q, k, v, g, initial_state = opaque(q, k, v, g, initial_state)
    size = min(CHUNK, length)
    chunks = -(-length // size)

    def split(x):
        """[B, T, H, ..] -> [B, H, chunks, tokens, ..], padded with tokens that change nothing."""
        x = jnp.pad(x.astype(dtype), [(0, chunks * size - length if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 3, 1)

    matmul = functools.partial(jnp.matmul, precision="highest" if v.dtype != jnp.bfloat16 else "default")
    q, k, values = split(q) * scale, split(k), split(v)
    from_start, to_end, total, pairs = _decays(None if g is None else jnp.maximum(split(g), LOWEST_GATE), size, dtype)
    written = matmul(jnp.swapaxes(k * to_end, -1, -2), values)

    def after(state, x):
        written, total = x
        return total * state + written, state

    total = jnp.broadcast_to(total, (batch, heads, chunks, 1, 1))
    each_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (written, total))
    state, states = jax.lax.scan(after, initial_state.astype(dtype), each_chunk)
    o = matmul(q * from_start, jnp.moveaxis(states, 0, 2)) + matmul(matmul(q, jnp.swapaxes(k, -1, -2)) * pairs, values)
    o = jnp.moveaxis(o, 1, 3).reshape(batch, chunks * size, heads, -1)
    return o[:, :length].astype(v.dtype), state


def linear_attention_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    g: Float[Array, "B H"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `linear_attention`, for decoding: returns (o, new state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is not None:
        state = jnp.exp(g.astype(state.dtype))[..., None, None] * state
    state = state + k[..., :, None].astype(state.dtype) * v[..., None, :].astype(state.dtype)
    o = jnp.einsum("bhkv,bhk->bhv", state, scale * q.astype(state.dtype), precision="highest")
    return o.astype(v.dtype), state


def _decays(g: Array | None, size: int, dtype) -> tuple[Array, Array, Array, Array]:
    """From the chunk's start to each token, from each token to its end, in all, and between pairs: 0 for later tokens."""
    causal = np.tri(size, dtype=dtype)
    if g is None:
        one = jnp.ones((1, 1), dtype)
        return one, one, one, jnp.asarray(causal)
    sums = functools.partial(jnp.einsum, precision="highest")
    from_start = jnp.exp(sums("ij,...j->...i", causal, g))[..., None]
    to_end = jnp.exp(sums("ij,...j->...i", np.tri(size, k=-1, dtype=dtype).T, g))[..., None]
    between = sums("is,...s,sj->...ij", causal, g, np.tri(size, k=-1, dtype=dtype))
    pairs = jnp.where(causal > 0, jnp.exp(between), 0)
    return from_start, to_end, jnp.exp(jnp.sum(g, axis=-1))[..., None, None], pairs
