"""Linear attention as a mixer: the layer of `layers.delta` with a plain sum in place of the delta rule, as its baseline."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.layers import conv, gates, linear
from deltajax.layers.norm import l2_norm, rms_norm, rms_norm_spec
from deltajax.layers.param import init_params
from deltajax.ops.linear_attention import linear_attention, linear_attention_step
from deltajax.ops.opaque import zero_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Linear attention: `S <- exp(g) S + k v^T; o = S^T q`, and a norm on o, in which the usual denominator cancels.

    Attributes:
      num_heads: H.
      head_dim: K, dimensions of queries and keys.
      value_head_dim: V; None: K.
      feature_map: of queries and keys: "unit", SiLU and L2 norm as in DeltaNet, or "elu", elu + 1 (arXiv 2006.16236, eq. 7).
      gate: forget gate: None (arXiv 2006.16236), or one per head ("scalar", as Mamba-2's, arXiv 2405.21060).
      output_gate: None, or "silu": a gate on the normalised output.
      conv_width: taps of the short convolution on queries, keys and values; 0: none.
      norm_eps: of the output norm.
    """

    num_heads: int
    head_dim: int
    value_head_dim: int | None = None
    feature_map: Literal["unit", "elu"] = "unit"
    gate: Literal["scalar"] | None = None
    output_gate: Literal["silu"] | None = None
    conv_width: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "num_heads", "head_dim", "value_head_dim")
        check_integers(self, 0, "conv_width")
        check_number(self, "norm_eps", 0)

    @property
    def value_dim(self) -> int:
        """V."""
        return self.value_head_dim or self.head_dim

    @property
    def projected_dims(self) -> dict[str, int]:
        """Widths of the projections to queries, keys and values."""
        keys = self.num_heads * self.head_dim
        return {"q": keys, "k": keys, "v": self.num_heads * self.value_dim}


gated_linear_attention = functools.partial(Config, gate="scalar", output_gate="silu")


def param_specs(config: Config, d_model: int, out_scale: float = 1.0) -> dict:
    """Projections [D, ...], convolutions, gates and norm."""
    dims = config.projected_dims
    specs = {name: linear.spec(d_model, dim, "embed", "heads") for name, dim in dims.items()}
    if config.conv_width:
        specs |= {f"{name}_conv": conv.param_spec(config.conv_width, dim) for name, dim in dims.items()}
    if config.gate:
        specs |= gates.log_decay_specs(d_model, config.num_heads)
    if config.output_gate:
        specs["out_gate"] = linear.spec(d_model, dims["v"], "embed", "heads")
    specs["norm"] = rms_norm_spec(config.value_dim)
    specs["o"] = linear.spec(dims["v"], d_model, "heads", "embed", scale=out_scale)
    return specs


def init(key: PRNGKeyArray, config: Config, d_model: int) -> dict:
    """Parameters drawn from `param_specs`."""
    return init_params(key, param_specs(config, d_model))


def init_state(config: Config, d_model: int, batch: int, max_length: int, dtype: Any = jnp.float32) -> dict:
    """The state before the first token: its size does not depend on max_length."""
    state = {"s": zero_state((batch, config.num_heads, config.head_dim, config.value_dim), jnp.float32)}
    if config.conv_width:
        for name, dim in config.projected_dims.items():
            state[name] = jnp.zeros((batch, config.conv_width - 1, dim), dtype)
    return state


def _features(x: Array, feature_map: str) -> Array:
    """What queries and keys are turned into before they meet."""
    return l2_norm(jax.nn.silu(x)) if feature_map == "unit" else jax.nn.elu(x) + 1


def apply(
    params: dict,
    config: Config,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict | None = None,
) -> tuple[Float[Array, "B T D"], dict | None]:
    """Project, convolve, sum and read out, normalise, gate and project back."""
    if state is not None and segment_ids is not None:
        raise ValueError("linear attention: segment_ids and a state exclude each other")
    batch, length, _ = x.shape
    weight = {name: p.astype(x.dtype) for name, p in params.items()}
    new_state, mixed = {}, {}
    for name in "qkv":
        y = x @ weight[name]
        if config.conv_width:
            before = None if state is None else state[name]
            y, new_state[name] = conv.apply(weight[f"{name}_conv"], y, segment_ids=segment_ids, state=before)
        mixed[name] = y.reshape(batch, length, config.num_heads, -1)
    q, k = (_features(mixed[name], config.feature_map) for name in "qk")
    v = jax.nn.silu(mixed["v"])
    g = gates.log_decay(params, x) if config.gate else None
    if state is not None and length == 1:
        now = (q[:, 0], k[:, 0], v[:, 0], None if g is None else g[:, 0])
        o, new_state["s"] = linear_attention_step(state["s"], *now)
        o = o[:, None]
    else:
        before = None if state is None else state["s"]
        o, new_state["s"] = linear_attention(q, k, v, g, initial_state=before, segment_ids=segment_ids)
    o = rms_norm(o, params["norm"], config.norm_eps)
    if config.output_gate:
        o = o * jax.nn.silu(x @ weight["out_gate"]).reshape(o.shape)
    return o.reshape(batch, length, -1) @ weight["o"], None if state is None else new_state
