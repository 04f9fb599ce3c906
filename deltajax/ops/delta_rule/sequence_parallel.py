"""The delta product over tokens that are spread over devices, on top of any implementation for one device.

A device's tokens map the state before them to the state after them, S -> M S + N, and their outputs are O + Q' S. One call of
the local implementation gives all four exactly: its values are extended by K columns of zeros whose initial state is the
identity. The columns with values then yield O and N, the others Q' (the queries as the incoming state is read by
them) and the transition M, for the recurrence never mixes columns.

Between devices, (M, N) pairs are combined by an associative scan of neighbours at distance 1, 2, 4, ... (Hillis and Steele,
doi 10.1145/7902.7903). Per batch row and head a device sends (ceil(log2 P) - 1)(K K + K V) + 2 K V floats forward and as
many backward, whatever T is. The backward scans the transposed pairs in the other direction, which needs no gradient of M
or Q'; the rest of it is the local implementation's own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.ops.manual_axes import from_neighbour
from pallas_kernels.manual_axes import vary_alike

_einsum = functools.partial(jnp.einsum, precision="highest")
_matmul = functools.partial(jnp.matmul, precision="highest")


def delta_product(q, k, v, beta, g, initial_state, *, scale: float, local: Callable, axis: str):
    """Inside shard_map: outputs of this device's tokens, and the state after the last token of the last device.

    Args:
      q, k, v, beta, g: as `IMPLEMENTATIONS` in `api` says, this device's tokens.
      initial_state: before the first token of the first device, the same on all, in the accumulation dtype.
      scale: multiplies q.
      local: an implementation of `api.IMPLEMENTATIONS`.
      axis: the mesh axis over which the tokens are spread, in order.

    Raises:
      NotImplementedError: `local` cannot serve.
    """
    index, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    # On every device but the first the initial state is nobody's: zeros that vary over the axis as all the rest does.
    *arguments, initial_state, _ = vary_alike(q, k, v, beta, g, jnp.where(index == 0, initial_state, 0), index)
    constant = scale if isinstance(scale, int | float) else 1.0
    o, state = _local_tokens(*arguments, initial_state, local, constant, axis)
    state = jax.lax.psum(jnp.where(index == devices - 1, state, 0), axis)
    return o if constant is scale else (o * scale).astype(o.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _local_tokens(q, k, v, beta, g, initial_state, local, scale, axis):
    """Outputs of this device's tokens and the state after them; `initial_state` is zeros on all devices but the first."""
    return _forward(q, k, v, beta, g, initial_state, local, scale, axis)[0]


def _forward(q, k, v, beta, g, initial_state, local, scale, axis):
    value_dim, key_dim = v.shape[-1], q.shape[-1]
    extended = jnp.concatenate([v, jnp.zeros_like(v, shape=(*v.shape[:-1], key_dim))], axis=-1)
    identity = jnp.eye(key_dim, value_dim + key_dim, k=value_dim, dtype=initial_state.dtype)
    start, _ = vary_alike(jnp.broadcast_to(identity, (*initial_state.shape[:2], *identity.shape)), initial_state)
    outputs, pair = local(q, k, extended, beta, g, start, scale=scale)
    o, reads = outputs[..., :value_dim], outputs[..., value_dim:]
    change, transition = pair[..., :value_dim], pair[..., value_dim:]

    first = jax.lax.axis_index(axis) == 0
    state = _scan_pairs(jnp.where(first, 0, transition), change + _matmul(transition, initial_state), axis)
    before = initial_state + from_neighbour(state, axis)
    o = o.astype(before.dtype) + _einsum("bthk,bhkv->bthv", reads.astype(before.dtype), before)
    return (o.astype(v.dtype), state), (q, k, v, beta, g, before, transition, reads)


def _backward(local, scale, axis, residuals, cotangents):
    *inputs, before, transition, reads = residuals
    do, dstate = cotangents
    transition = jnp.swapaxes(transition, -1, -2)
    dread = _einsum("bthk,bthv->bhkv", reads.astype(before.dtype), do.astype(before.dtype))
    last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    dbefore = _scan_pairs(jnp.where(last, 0, transition), dread + _matmul(transition, dstate), axis, reverse=True)
    dstate = dstate + from_neighbour(dbefore, axis, reverse=True)
    _, pull = jax.vjp(lambda *x: local(*x, scale=scale), *inputs, before)
    *dinputs, dbefore = pull((do, dstate))
    return *dinputs, dbefore


_local_tokens.defvjp(_forward, _backward)


def _scan_pairs(
    transition: Float[Array, "B H K K"], change: Float[Array, "B H K V"], axis: str, reverse: bool = False
) -> Float[Array, "B H K V"]:
    """What x becomes by x -> transition x + change on every device up to this one, from x = 0; reverse: from the last on.

    The first device's transition must be 0: the zeros that `ppermute` gives where nobody sends are then right everywhere.
    """
    split = change.shape[-1]
    pair = jnp.concatenate([change, transition], axis=-1)
    distance, devices = 1, jax.lax.axis_size(axis)
    while distance < devices:
        sent = pair if 2 * distance < devices else pair[..., :split]  # nobody reads the last transitions
        change, transition = pair[..., :split], pair[..., split:]
        pair = _matmul(transition, from_neighbour(sent, axis, distance, reverse))
        pair = pair.at[..., :split].add(change)
        distance *= 2
    return pair[..., :split]
