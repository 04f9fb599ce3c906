"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

import jax
from jaxtyping import Array, Float

from deltajax.layers.linear import spec


def param_specs(d_model: int, mlp_dim: int, out_scale: float = 1.0) -> dict:
    """gate, up [D, F] and down [F, D]."""
    return {
        "gate": spec(d_model, mlp_dim, "embed", "mlp"),
        "up": spec(d_model, mlp_dim, "embed", "mlp"),
        "down": spec(mlp_dim, d_model, "mlp", "embed", scale=out_scale),
    }


def apply(params: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """(silu(x gate) * (x up)) down."""
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down
