"""The delta product on a CPU by a kernel in C++ (`delta_product.cc`), token by token: float32 and float64, any shape.

Differentiated once, in reverse mode. The backward keeps the inputs and the state before every `STEPS` steps.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import manual_axes, native

STEPS = 64  # of a chunk of the backward; with fewer, fresh memory for their states costs more than caches save
_SOURCE = "delta_product.cc"
_TARGETS = tuple(
    f"deltajax_delta_product_{way}_{dtype}" for way in ("forward", "backward") for dtype in ("float32", "float64")
)


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Arguments as `IMPLEMENTATIONS` in `deltajax.ops.delta_rule.api` says.

    Raises:
      NotImplementedError: the kernel cannot be compiled here.
    """
    register()
    dtype = initial_state.dtype
    q, k, values, beta = (x.astype(dtype) for x in (q, k, v, beta))
    q = (scale * q).astype(dtype)
    if g is None:
        g = jnp.zeros((*v.shape[:2], v.shape[3], 0), dtype)
    g = (g if g.ndim == 4 else g[..., None]).astype(dtype)
    o, state = _scan(*manual_axes.vary_alike(q, k, values, beta, g, initial_state))
    return o.astype(v.dtype), state


def register() -> ctypes.CDLL:
    """Make the kernel known to XLA, as a program needs that another process compiled; the library.

    Raises:
      NotImplementedError: the kernel cannot be compiled here.
    """
    return native.register(_SOURCE, _TARGETS)


@jax.custom_vjp
def _scan(q, k, v, beta, g, initial_state):
    """(o, state); all of one dtype, q scaled, g [B, T, HV, G] with G = 0 (no gate), 1 or K."""
    o, state, _ = _forward(q, k, v, beta, jnp.exp(g), initial_state, keep=False)
    return o, state


def _scan_and_keep(q, k, v, beta, g, initial_state):
    decay = jnp.exp(g)
    o, state, states = _forward(q, k, v, beta, decay, initial_state, keep=True)
    kept = decay if decay.size else None  # an array of no numbers out of a shard_map crashes the compiler of jax 0.11.2
    return (o, state), (q, k, v, beta, kept, states)


def _scan_back(residuals, cotangents):
    q, k, v, beta, decay, states = residuals
    batch, length, steps, heads, key_dim = k.shape
    value_heads, value_dim = v.shape[3:]
    if decay is None:
        _, decay = manual_axes.vary_alike(q, jnp.zeros((batch, length, value_heads, 0), q.dtype))
    shapes = [
        (batch, length, value_heads, key_dim),
        (batch, length, steps, value_heads, key_dim),
        v.shape,
        beta.shape,
        decay.shape,
        (batch, value_heads, key_dim, value_dim),
    ]
    arrays = (q, k, v, beta, decay, states, *cotangents)
    dq, dk, dv, dbeta, dg, dinitial = _call("backward", shapes, *arrays, chunk=_tokens(steps))

    def by_key_head(x):
        return jnp.sum(x.reshape(*x.shape[:-2], heads, value_heads // heads, key_dim), axis=-2)

    return by_key_head(dq), by_key_head(dk), dv, dbeta, dg, dinitial


_scan.defvjp(_scan_and_keep, _scan_back)


def _forward(q, k, v, beta, decay, initial_state, *, keep: bool):
    batch, length, steps, heads, value_dim = v.shape
    key_dim, chunk = k.shape[-1], _tokens(steps)
    chunks = -(-length // chunk) if keep else 0
    shapes = [
        (batch, length, heads, value_dim),
        (batch, heads, key_dim, value_dim),
        (batch, heads, chunks, key_dim, value_dim),
    ]
    return _call("forward", shapes, q, k, v, beta, decay, initial_state, chunk=chunk)


def _call(way, shapes, *arrays, **attributes):
    dtype = arrays[0].dtype
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    call = jax.ffi.ffi_call(f"deltajax_delta_product_{way}_{dtype}", results, vmap_method="broadcast_all")
    call = jax.custom_jvp(functools.partial(call, **attributes))
    call.defjvp(_refuse)
    return [manual_axes.vary_alike(x, arrays[0])[0] for x in call(*arrays)]


def _refuse(primals, tangents):
    raise NotImplementedError('"native_cpu" is differentiated once; implementation="chunked" as often as one likes')


def _tokens(steps: int) -> int:
    """Of a chunk."""
    return max(1, STEPS // steps)
