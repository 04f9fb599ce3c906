"""Public entry points: check the arguments, turn document boundaries into gates, choose an implementation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltajax.ops.delta_rule import chunked, reference
from deltajax.ops.segments import segment_starts
from pallas_kernels import tpu

# name -> f(q, k, v, beta, g, initial_state, *, scale) on checked arrays: k, v, beta with an R axis, g None or in
# [-inf, 0], initial_state present in the accumulation dtype. An implementation that cannot serve the shapes or the
# platform raises NotImplementedError with the reason.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.delta_product,
    "chunked": chunked.delta_product,
    "pallas_tpu": tpu.delta_product,
}

# Tried in order when the caller names none.
DEFAULTS: dict[str, tuple[str, ...]] = {"cpu": ("chunked",), "gpu": ("chunked",), "tpu": ("chunked",)}


def delta_product(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T R H K"],
    v: Float[Array, "B T R HV V"],
    beta: Float[Array, "B T R HV"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Gated delta product: R delta-rule steps per token, i.e. a transition of R generalised Householder factors.

    Per token and value head, with state S [K, V]::

        S <- exp(g) S                                   (once per token; row-wise if g has a key axis)
        S <- S + k_j (beta_j (v_j - S^T k_j))^T         for j = 1..R, in order
        o  = scale * S^T q

    Args:
      q: queries. Value head h reads key head `h // (HV / H)`.
      k: keys; the caller normalises them (L2) where the model asks for it. R >= 1 is read from the shape.
      v: values; HV is a multiple of H.
      beta: step sizes, (0, 1) or (0, 2) in the papers; not checked.
      g: log decay <= 0 (-inf is allowed and erases the state), per head, or per head and key channel (KDA).
      scale: multiplies q; default K ** -0.5.
      initial_state: state before the first token; default zeros. It belongs to the first segment.
      segment_ids: packed documents: the state resets wherever the id differs from the previous token's.
      implementation: a name in `IMPLEMENTATIONS`, or several to try in order; default: the platform's best.

    Returns:
      (o, final_state): o in v's dtype, the state after the last token in float32 (float64 for float64 inputs).
      Both are differentiable in every array argument except segment_ids.

    Raises:
      ValueError: shapes disagree, or an unknown implementation.
      NotImplementedError: no implementation asked for can serve; the message lists each one's reason.

    References:
      DeltaNet: arXiv 2406.06484, section 3; DeltaProduct: arXiv 2502.10297, eq. 5; Gated DeltaNet: 2412.06464.
    """
    _check_shapes(q, k, v, beta, g, initial_state, segment_ids)
    batch, _, _, key_dim = q.shape
    heads, value_dim = v.shape[3:]
    dtype = _state_dtype(q, k, v, beta, g, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), dtype)
    if segment_ids is not None:
        g = _gate_with_resets(g, segment_ids, beta, dtype)
    arguments = (q, k, v, beta, g, initial_state.astype(dtype))
    reasons = []
    for name in _candidates(implementation):
        try:
            return IMPLEMENTATIONS[name](*arguments, scale=key_dim**-0.5 if scale is None else scale)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("no implementation can serve this call; " + "; ".join(reasons))


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "B T HV"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """(Gated) delta rule: `delta_product` with one step per token, so k, v and beta have no R axis.

    `S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = scale S^T q`. Arguments, results, errors and references
    are those of `delta_product`.
    """
    for name, x, ndim in (("k", k, 4), ("v", v, 4), ("beta", beta, 3)):
        if x.ndim != ndim:
            raise ValueError(f"delta_rule: {name} must have {ndim} axes, got shape {x.shape}")
    return delta_product(
        q, k[:, :, None], v[:, :, None], beta[:, :, None], g,
        scale=scale, initial_state=initial_state, segment_ids=segment_ids, implementation=implementation,
    )  # fmt: skip


def delta_product_step(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B R H K"],
    v: Float[Array, "B R HV V"],
    beta: Float[Array, "B R HV"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """One token of `delta_product`, for decoding: returns (o, new state). R = 1 is the delta rule."""
    one = slice(None), None
    _check_shapes(q[one], k[one], v[one], beta[one], None if g is None else g[one], state, None)
    state = state.astype(_state_dtype(q, k, v, beta, g, state))
    o, state = reference.step(state, q, k, v, beta, g, q.shape[-1] ** -0.5 if scale is None else scale)
    return o.astype(v.dtype), state


def _state_dtype(*arrays):
    return jnp.promote_types(jnp.float32, jnp.result_type(*(x.dtype for x in arrays if x is not None)))


def _gate_with_resets(g, segment_ids, beta, dtype):
    """A reset is a log decay of -inf, so no implementation has to know about segments."""
    starts = segment_starts(segment_ids)
    if g is None:
        g = jnp.zeros((*segment_ids.shape, beta.shape[-1]), dtype)
    return jnp.where(starts.reshape(*starts.shape, *(1,) * (g.ndim - 2)), -jnp.inf, g)


def _candidates(implementation: str | Sequence[str] | None) -> Sequence[str]:
    if implementation is None:
        return DEFAULTS.get(jax.default_backend(), DEFAULTS["gpu"])
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: {name!r} is not one of {', '.join(sorted(IMPLEMENTATIONS))}")
    if not names:
        raise ValueError("implementation: an empty sequence; name at least one or pass None")
    return names


def _check_shapes(q, k, v, beta, g, initial_state, segment_ids):
    """One line per disagreement: the argument, the shape it has, the shape it must have."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, H, K], got shape {q.shape}")
    if v.ndim != 5:
        raise ValueError(f"v must be [B, T, R, HV, V], got shape {v.shape}")
    batch, length, heads, key_dim = q.shape
    steps, value_heads, value_dim = v.shape[2:]
    if steps < 1:
        raise ValueError(f"v must be [B, T, R, HV, V] with R >= 1, got shape {v.shape}")
    if heads < 1 or value_heads % heads:
        raise ValueError(f"v has {value_heads} heads, which is not a multiple of q's {heads}")
    expected = {
        "k": (k, "[B, T, R, H, K]", (batch, length, steps, heads, key_dim)),
        "v": (v, "[B, T, R, HV, V]", (batch, length, steps, value_heads, value_dim)),
        "beta": (beta, "[B, T, R, HV]", (batch, length, steps, value_heads)),
        "initial_state": (initial_state, "[B, HV, K, V]", (batch, value_heads, key_dim, value_dim)),
        "segment_ids": (segment_ids, "[B, T]", (batch, length)),
    }
    if g is not None and g.ndim == 4:
        expected["g"] = (g, "[B, T, HV, K]", (batch, length, value_heads, key_dim))
    else:
        expected["g"] = (g, "[B, T, HV] or [B, T, HV, K]", (batch, length, value_heads))
    for name, (x, axes, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {axes} = {shape} to agree with q and v, got {x.shape}")
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("g", g), ("initial_state", initial_state)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be a floating-point array, got {x.dtype}")
