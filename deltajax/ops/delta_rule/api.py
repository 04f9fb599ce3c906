"""Public entry points: check the arguments, turn document boundaries into gates, choose an implementation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int

from deltajax.ops.delta_rule import chunked, reference, sequence_parallel
from deltajax.ops.opaque import zero_state
from deltajax.ops.segments import segment_starts
from pallas_kernels import cpu, gpu, platform, tpu
from pallas_kernels.manual_axes import vary_alike

# name -> f(q, k, v, beta, g, initial_state, *, scale) on checked arrays: k, v, beta with an R axis, g None or in
# [-inf, 0], initial_state present in the accumulation dtype. An implementation that cannot serve the shapes or the
# platform raises NotImplementedError with the reason.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.delta_product,
    "chunked": chunked.delta_product,
    "native_cpu": cpu.delta_product,
    "pallas_tpu": tpu.delta_product,
    "pallas_gpu": gpu.delta_product,
}

# Tried in order when the caller names none.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": ("native_cpu", "chunked"),
    "gpu": ("chunked",),
    "tpu": ("pallas_tpu", "chunked"),
}


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
    sequence_axis: str | None = None,
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
      segment_ids: packed documents: the state resets wherever the id differs from the previous token's. What is finite
        in one document does not touch another; an inf or nan goes on to the documents after it.
      implementation: a name in `IMPLEMENTATIONS`, or several to try in order; default: the best of the ambient mesh's platform,
        else of JAX's default backend. Who exports or lowers for another platform, or differentiates twice, names "chunked".
        All but "reference" and "chunked" are kernels: under jit, without `shard_map`, XLA gathers arrays spread over
        devices for them. Why one that was tried first cannot serve is logged (level info).
      sequence_axis: inside `shard_map`, the mesh axis over which the tokens are spread: every device holds its T of them, in
        order. What the devices exchange does not depend on T (`sequence_parallel`). initial_state and the
        returned state are those of the whole sequence, the same on every device.

    Returns:
      (o, final_state): o in v's dtype, the state after the last token in float32 (float64 for float64 inputs).
      Both are differentiable in every array argument except segment_ids, in reverse mode; "reference" in forward mode too.

    Raises:
      ValueError: shapes or types disagree, or an unknown implementation.
      NotImplementedError: no implementation asked for can serve; the message lists each one's reason.

    References:
      DeltaNet: arXiv 2406.06484, section 3; DeltaProduct: arXiv 2502.10297, eq. 5; Gated DeltaNet: 2412.06464.
    """
    arrays = _checked("", q, k, v, beta, g, segment_ids, initial_state=initial_state)
    return _dispatch(*arrays, scale=scale, implementation=implementation, sequence_axis=sequence_axis)


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
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """(Gated) delta rule: `delta_product` with one step per token, so k, v and beta have no R axis.

    `S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = scale S^T q`. Arguments, results, errors and references
    are those of `delta_product`.
    """
    q, k, v, beta, *rest = _checked("R", q, k, v, beta, g, segment_ids, initial_state=initial_state)
    arrays = (q, k[:, :, None], v[:, :, None], beta[:, :, None], *rest)
    return _dispatch(*arrays, scale=scale, implementation=implementation, sequence_axis=sequence_axis)


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
    if state is None:
        raise ValueError("state must be [B, HV, K, V], got None; zeros before the first token")
    q, k, v, beta, g, _, state = _checked("T", q, k, v, beta, g, None, state=state)
    state = state.astype(_state_dtype(q, k, v, beta, g, state))
    o, state = reference.step(state, q, k, v, beta, g, _scale(scale, q))
    return o.astype(v.dtype), state


def _dispatch(q, k, v, beta, g, segment_ids, initial_state, *, scale, implementation, sequence_axis):
    """`delta_product` on checked arrays."""
    (batch, _, _, key_dim), (heads, value_dim) = q.shape, v.shape[3:]
    dtype = _state_dtype(q, k, v, beta, g, initial_state)
    if initial_state is None:
        initial_state = zero_state((batch, heads, key_dim, value_dim), dtype)
    if segment_ids is not None:
        g = _gate_with_resets(g, segment_starts(segment_ids, sequence_axis), beta, dtype)
    arguments = vary_alike(q, k, v, beta, g, initial_state.astype(dtype))
    candidates, reasons = _candidates(implementation), []
    if v.size == 0 or q.size == 0:
        return jnp.zeros_like(v[:, :, 0]), arguments[-1]
    for name in candidates:
        f = IMPLEMENTATIONS[name]
        if sequence_axis is not None:
            f = functools.partial(sequence_parallel.delta_product, local=f, axis=sequence_axis)
        try:
            found = f(*arguments, scale=_scale(scale, q))
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            logging.info('delta product by "%s"; %s', name, "; ".join(reasons))
        return found
    raise NotImplementedError("no implementation can serve this call; " + "; ".join(reasons))


def _scale(scale, q):
    if scale is None:
        return max(q.shape[-1], 1) ** -0.5
    if jnp.ndim(scale) or not jnp.issubdtype(jnp.result_type(scale), jnp.number):
        raise ValueError(f"scale must be one number, got {scale!r}")
    return scale


def _state_dtype(*arrays):
    return jnp.promote_types(jnp.float32, jnp.result_type(*(x.dtype for x in arrays if x is not None)))


def _gate_with_resets(g, starts, beta, dtype):
    """A reset is a log decay of -inf, so no implementation has to know about segments."""
    if g is None:
        g = jnp.zeros((*starts.shape, beta.shape[-1]), dtype)
    return jnp.where(starts.reshape(*starts.shape, *(1,) * (g.ndim - 2)), -jnp.inf, g)


def _candidates(implementation: str | Sequence[str] | None) -> Sequence[str]:
    if implementation is None:
        return DEFAULTS.get(platform.ambient(), DEFAULTS["gpu"])
    names = tuple(implementation) if isinstance(implementation, list | tuple) else (implementation,)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: {name!r} is not one of {', '.join(sorted(IMPLEMENTATIONS))}")
    if not names:
        raise ValueError("implementation: an empty sequence; name at least one or pass None")
    return names


_AXES = {
    "q": "B T H K", "k": "B T R H K", "v": "B T R HV V", "beta": "B T R HV", "g": "B T HV", "g per channel": "B T HV K",
    "state": "B HV K V", "initial_state": "B HV K V", "segment_ids": "B T",
}  # fmt: skip


def _checked(without, q, k, v, beta, g, segment_ids, **state):
    """The arguments as JAX arrays, in the order given; `without`: an axis (T or R) that the caller's arrays do not have.

    Raises:
      ValueError: names the argument, the shape or type it has, and what it must have.
    """
    sizes: dict[str, int] = {}
    arrays: list[Any] = []
    for name, x in dict(q=q, v=v, k=k, beta=beta, g=g, segment_ids=segment_ids, **state).items():
        if x is None and name in ("g", "segment_ids", "initial_state"):
            arrays.append(None)
            continue
        try:
            x = jnp.asarray(x)
        except TypeError as error:
            raise ValueError(f"{name} must be an array, got {type(x).__name__}") from error
        layout = _AXES["g per channel" if name == "g" and x.ndim == 4 - (without == "T") else name]
        axes = [axis for axis in layout.split() if axis != without]
        for axis, size in zip(axes, x.shape, strict=False):
            sizes.setdefault(axis, size)
        expected = tuple(sizes.get(axis, 0) for axis in axes)
        if x.shape != expected:
            agreeing = "" if x.ndim != len(axes) else f" = {expected} to agree with q and v"
            raise ValueError(f"{name} must be [{', '.join(axes)}]{agreeing}, got shape {x.shape}")
        kind, known = (jnp.integer, "integers") if name == "segment_ids" else (jnp.floating, "floating-point")
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{name} must be {known}, got {x.dtype}")
        arrays.append(x)
        if name == "v" and sizes.get("R", 1) < 1:
            raise ValueError(f"v must have R >= 1 steps per token, got shape {x.shape}")
        if name == "v" and (sizes["H"] < 1 or sizes["HV"] % sizes["H"]):
            raise ValueError(f"HV must be a multiple of H >= 1, got v with {sizes['HV']} heads and q with {sizes['H']}")
    q, v, k, *rest = arrays
    return q, k, v, *rest
