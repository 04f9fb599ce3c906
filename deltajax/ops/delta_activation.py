"""Delta activations: quantised activations and their changes from frame to frame (arXiv 2107.07305).

O_t = round(Z_t / q) q and D_t = O_t - O_(t-1). Training passes O on and penalises D; delta inference passes D on, which the
next linear map accumulates. Both give the same numbers: a running sum of D is O, whatever q is, so nothing drifts.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

StepGradient = Literal["raise", "lsq"]
STEP_GRADIENTS: tuple[StepGradient, ...] = ("raise", "lsq")


def quantize(z: Float[Array, "..."], step: Float[Array, "..."], step_gradient: StepGradient = "raise") -> Array:
    """round(z / q) q with q = |step|, halves to even; gradients by straight-through rules.

    dz = dO. The gradient of q is dO times
    - "raise": -round(z / q). The paper's code: the sign of the true one is turned, so that a penalty on |D| always raises q.
    - "lsq": round(z / q) - z / q, the derivative with the rounding passed straight through (arXiv 1902.08153).

    Args:
      z: activations. bfloat16 is rounded in float32.
      step: not zero; broadcasts against z: [] per layer, [C] per channel, [H, W, C] per neuron.
      step_gradient: which of the two.

    Returns:
      O, with the shape and dtype of z.

    Raises:
      ValueError: step_gradient is unknown, or step does not broadcast to the shape of z.
    """
    if step_gradient not in STEP_GRADIENTS:
        raise ValueError(f"step_gradient must be one of {', '.join(STEP_GRADIENTS)}, got {step_gradient!r}")
    wide = jnp.promote_types(z.dtype, jnp.float32)
    try:
        q = jnp.broadcast_to(jnp.abs(step.astype(wide)), z.shape)
    except ValueError:
        raise ValueError(f"step of shape {step.shape} does not broadcast to activations of shape {z.shape}") from None
    return _quantize(z.astype(wide), q, step_gradient).astype(z.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantize(z: Array, q: Array, step_gradient: StepGradient) -> Array:
    return jnp.round(z / q) * q


def _quantize_forward(z, q, step_gradient):
    return _quantize(z, q, step_gradient), (z, q)


def _quantize_backward(step_gradient, saved, cotangent):
    z, q = saved
    level = jnp.round(z / q)
    return cotangent, cotangent * (-level if step_gradient == "raise" else level - z / q)


_quantize.defvjp(_quantize_forward, _quantize_backward)


def differences(o: Float[Array, "B T *D"], previous: Float[Array, "B *D"] | None = None) -> Array:
    """D_t = O_t - O_(t-1): [B, T, ...] after the frame `previous`, [B, T - 1, ...] without it (the first frame is excluded)."""
    if previous is not None:
        o = jnp.concatenate([previous[:, None].astype(o.dtype), o], axis=1)
    new, old = o[:, 1:], o[:, :-1]
    # The product in O may be fused into the subtraction and is then not rounded: of equal numbers something would be left.
    return jnp.where(new == old, 0, new - old)


def sparsity_loss(d: Float[Array, "B T *D"], fan_out: float) -> Float[Array, ""]:
    """fan_out * mean |D|: the paper's penalty of one layer, to be multiplied by a rate.

    fan_out: multiply-accumulates that one activation feeds, so that a penalty is worth the operations that it saves.
    """
    return fan_out * jnp.mean(jnp.abs(d.astype(jnp.float32)))


def tile_sparsity_loss(d: Float[Array, "B T H W C"], fan_out: float, tile: int) -> Float[Array, ""]:
    """fan_out times a smooth count of the tiles that changed, in [0, fan_out).

    r / (r + s), mean over tiles of tile x tile pixels and all channels: r is the root of the mean of D^2 in a tile, s the mean
    of r over the tiles that changed, taken as a constant. So a tile that changed little is pushed to stay as it is, one that
    changed much, and has to be computed anyway, is let be, and making all changes smaller gains nothing: what the streaming
    runner pays for is whether a tile changed. `sparsity_loss` is content with zeros wherever they stand. Edge tiles are
    filled up with zeros. The gradient at a tile without change is zero.
    """
    if d.ndim != 5 or tile < 1:
        raise ValueError(f"tiles of {tile} pixels need D of shape [B, T, H, W, C], got {d.shape}")
    batch, time, height, width, channels = d.shape
    rows, columns = -(-height // tile), -(-width // tile)
    padding = ((0, 0), (0, 0), (0, rows * tile - height), (0, columns * tile - width), (0, 0))
    tiles = jnp.pad(d.astype(jnp.float32), padding).reshape(batch, time, rows, tile, columns, tile, channels)
    square = jnp.mean(tiles * tiles, axis=(3, 5, 6))
    changed = square > 0
    size = jnp.where(changed, jnp.sqrt(jnp.where(changed, square, 1)), 0)
    mean = jax.lax.stop_gradient(jnp.sum(size) / jnp.maximum(jnp.sum(changed), 1))
    return fan_out * jnp.mean(jnp.where(changed, size / (size + mean), 0))


def nonzeros(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Share of the elements that are not zero, in [0, 1]."""
    return jnp.mean((x != 0).astype(jnp.float32))


def changed_tiles(d: Float[Array, "B T H W C"], tile: int) -> Float[Array, ""]:
    """Share of the tiles of tile x tile pixels in which any channel of any pixel is not zero, in [0, 1]."""
    changed = jnp.any(d != 0, axis=-1)
    height, width = changed.shape[2:]
    rows, columns = -(-height // tile), -(-width // tile)
    padding = ((0, 0), (0, 0), (0, rows * tile - height), (0, columns * tile - width))
    tiles = jnp.pad(changed, padding).reshape(*changed.shape[:2], rows, tile, columns, tile)
    return jnp.mean(jnp.any(tiles, axis=(3, 5)).astype(jnp.float32))


def operation_sparsity(active: dict[str, float], fan_out: dict[str, float], size: dict[str, int]) -> float:
    """1 - sum(nonzeros * fan_out) / sum(n * fan_out): the share of multiply-accumulates that zeros make superfluous.

    Args:
      active: per layer, the share of its activations that are not zero: of O (spatial) or of D (temporal).
      fan_out: per layer, multiply-accumulates that one activation feeds.
      size: per layer, its number n of activations in a frame.
    """
    total = math.fsum(size[name] * fan_out[name] for name in active)
    if not total:
        raise ValueError("operation sparsity needs a layer that feeds multiply-accumulates; got none")
    return 1 - math.fsum(active[name] * size[name] * fan_out[name] for name in active) / total
