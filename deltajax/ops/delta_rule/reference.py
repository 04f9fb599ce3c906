"""The definition: one scan over tokens, differentiated by JAX. Every other implementation is tested against it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def step(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B R H K"],
    v: Float[Array, "B R HV V"],
    beta: Float[Array, "B R HV"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    scale: float,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """One token: decay the state once, apply R delta steps in order, read out once.

    `S <- exp(g) S`; for each of the R steps `S <- S + k (beta (v - S^T k))^T`; `o = scale S^T q`.
    All arithmetic is in the state's dtype.
    """
    group = state.shape[1] // q.shape[1]
    q = jnp.repeat(q.astype(state.dtype), group, axis=1)
    k = jnp.repeat(k.astype(state.dtype), group, axis=2)
    v, beta = v.astype(state.dtype), beta.astype(state.dtype)
    if g is not None:
        decay = jnp.exp(g.astype(state.dtype))
        state = state * (decay[..., None] if g.ndim == 3 else decay[..., None, None])
    einsum = functools.partial(jnp.einsum, precision="highest")
    for r in range(k.shape[1]):
        u = beta[:, r, :, None] * (v[:, r] - einsum("bhkv,bhk->bhv", state, k[:, r]))
        state = state + k[:, r, :, :, None] * u[:, :, None, :]
    return scale * einsum("bhkv,bhk->bhv", state, q), state


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Scan `step` over the tokens; shapes as in `api.delta_product`, `initial_state` in the dtype of the arithmetic."""

    def body(state, token):
        q, k, v, beta, g = token
        o, state = step(state, q, k, v, beta, g, scale)
        return state, o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, g))
    state, o = jax.lax.scan(body, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
