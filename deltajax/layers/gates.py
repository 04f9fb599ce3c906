"""Forget gates of recurrent mixers: a log decay per head, or per head and key channel."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltajax.layers import linear
from deltajax.layers.param import ParamSpec


def log_decay_specs(d_model: int, heads: int, channels: int | None = None) -> dict[str, ParamSpec]:
    """Parameters of `log_decay`; channels: K for a gate per key channel, whose projection has rank K (KDA)."""
    if channels is None:
        specs = {"g": linear.spec(d_model, heads, "embed", None)}
    else:
        specs = {
            "g_down": linear.spec(d_model, channels, "embed", None),
            "g_up": linear.spec(channels, heads * channels, None, "heads"),
        }
    specs["a_log"] = ParamSpec((heads,), (None,), _init_a_log, weight_decay=False)
    specs["dt_bias"] = ParamSpec((heads, channels or 1), (None, None), _init_dt_bias, weight_decay=False)
    return specs


def log_decay(params: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T H"] | Float[Array, "B T H K"]:
    """g = -exp(A) softplus(x W + dt), in float32; which gate follows from the parameters."""
    raw = x
    for name in ("g",) if "g" in params else ("g_down", "g_up"):
        raw = raw @ params[name].astype(x.dtype)
    dt_bias = params["dt_bias"].astype(jnp.float32)
    raw = raw.astype(jnp.float32).reshape(*x.shape[:2], *dt_bias.shape) + dt_bias
    g = -jnp.exp(params["a_log"].astype(jnp.float32))[:, None] * jax.nn.softplus(raw)
    return g[..., 0] if "g" in params else g


def _init_a_log(key, shape, dtype):
    """Log of a decay rate uniform in [1, 16] (Mamba-2, arXiv 2405.21060)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _init_dt_bias(key, shape, dtype):
    """Inverse softplus of a step log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))
