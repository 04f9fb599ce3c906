"""Delta-rule mixers: DeltaNet, Gated DeltaNet, DeltaProduct, Gated DeltaProduct and KDA are one layer with switches."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import conv, gates, linear
from deltajax.layers.norm import l2_norm, rms_norm, rms_norm_spec
from deltajax.layers.param import init_params
from deltajax.ops import IMPLEMENTATIONS, delta_product, delta_product_step
from deltajax.ops.opaque import zero_state
from deltajax.ops.over_mesh import over_mesh, spread_over


@dataclasses.dataclass(frozen=True)
class Config:
    """A delta-rule mixer; `deltanet`, `gated_deltanet`, `deltaproduct`, `gated_deltaproduct`, `kda` set the papers' switches.

    Attributes:
      num_heads: H, heads of queries and keys.
      head_dim: K, their dimensions.
      num_value_heads: HV, a multiple of H; None: H.
      value_head_dim: V; None: K.
      num_householder: R, delta steps per token (arXiv 2502.10297).
      beta_max: upper end of the step sizes: 1, or 2 to allow negative eigenvalues (arXiv 2411.12537).
      gate: forget gate: None, one per value head ("scalar", arXiv 2412.06464) or one per key channel ("channel", KDA).
      output_gate: None, or the activation of a gate on the normalised output; "sigmoid" has the low rank of KDA.
      conv_width: taps of the short convolution on queries, keys and values; 0: none.
      norm_eps: of the output norm.
      implementation: of `ops.delta_product`; None: the platform's best.
    """

    num_heads: int
    head_dim: int
    num_value_heads: int | None = None
    value_head_dim: int | None = None
    num_householder: int = 1
    beta_max: float = 1.0
    gate: Literal["scalar", "channel"] | None = None
    output_gate: Literal["silu", "sigmoid"] | None = None
    conv_width: int = 4
    norm_eps: float = 1e-6
    implementation: str | None = dataclasses.field(default=None, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "num_heads", "head_dim", "num_value_heads", "value_head_dim", "num_householder")
        check_integers(self, 0, "conv_width")
        check_number(self, "beta_max", 0, 2)
        check_number(self, "norm_eps", 0)
        if self.num_value_heads is not None and self.num_value_heads % self.num_heads:
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads = {self.num_heads}, got {self.num_value_heads}"
            )
        if self.implementation is not None and self.implementation not in IMPLEMENTATIONS:
            known = ", ".join(sorted(IMPLEMENTATIONS))
            raise ValueError(f"implementation must be none or one of {known}, got {self.implementation!r}")

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_value_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return self.value_head_dim or self.head_dim

    @property
    def projected_dims(self) -> dict[str, int]:
        """Widths of the projections to queries, keys and values."""
        keys = self.num_heads * self.head_dim
        return {
            "q": keys,
            "k": self.num_householder * keys,
            "v": self.num_householder * self.value_heads * self.value_dim,
        }


deltanet = Config  # arXiv 2406.06484
gated_deltanet = functools.partial(Config, gate="scalar", output_gate="silu")  # arXiv 2412.06464
deltaproduct = functools.partial(Config, num_householder=2, beta_max=2.0)  # arXiv 2502.10297
gated_deltaproduct = functools.partial(deltaproduct, gate="scalar", output_gate="silu")  # the same, with forget gate
kda = functools.partial(Config, gate="channel", output_gate="sigmoid")  # Kimi Delta Attention, arXiv 2510.26692


def param_specs(config: Config, d_model: int, out_scale: float = 1.0) -> dict:
    """Projections [D, ...], convolutions, gates and norm; k and v hold their R sets side by side."""
    steps, value_heads, dims = config.num_householder, config.value_heads, config.projected_dims
    specs = {name: linear.spec(d_model, dim, "embed", "heads") for name, dim in dims.items()}
    if config.conv_width:
        specs |= {f"{name}_conv": conv.param_spec(config.conv_width, dim) for name, dim in dims.items()}
    specs["beta"] = linear.spec(d_model, steps * value_heads, "embed", None)
    if config.gate:
        channels = config.head_dim if config.gate == "channel" else None
        specs |= gates.log_decay_specs(d_model, value_heads, channels)
    out = value_heads * config.value_dim
    if config.output_gate == "silu":
        specs["out_gate"] = linear.spec(d_model, out, "embed", "heads")
    if config.output_gate == "sigmoid":
        specs["out_gate_down"] = linear.spec(d_model, config.value_dim, "embed", None)
        specs["out_gate_up"] = linear.spec(config.value_dim, out, None, "heads")
    specs["norm"] = rms_norm_spec(config.value_dim)
    specs["o"] = linear.spec(out, d_model, "heads", "embed", scale=out_scale)
    return specs


def init(key: PRNGKeyArray, config: Config, d_model: int) -> dict:
    """Parameters drawn from `param_specs`."""
    return init_params(key, param_specs(config, d_model))


def init_state(config: Config, d_model: int, batch: int, max_length: int, dtype: Any = jnp.float32) -> dict:
    """The state before the first token: its size does not depend on max_length."""
    state = {"s": zero_state((batch, config.value_heads, config.head_dim, config.value_dim), jnp.float32)}
    if config.conv_width:
        for name, dim in config.projected_dims.items():
            state[name] = jnp.zeros((batch, config.conv_width - 1, dim), dtype)
    return state


def apply(
    params: dict,
    config: Config,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict | None = None,
) -> tuple[Float[Array, "B T D"], dict | None]:
    """Project, convolve, mix by the (gated) delta product, normalise, gate and project back."""
    if state is not None and segment_ids is not None:
        raise ValueError("delta mixer: segment_ids and a state exclude each other")
    batch, length, _ = x.shape
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [B, T] = {(batch, length)}, got {segment_ids.shape}")
    weight = {name: p.astype(x.dtype) for name, p in params.items()}
    new_state = {}
    mixed = {}
    for name in "qkv":
        y = x @ weight[name]
        if config.conv_width:
            if state is None:
                y = _convolve(weight[f"{name}_conv"], y, segment_ids)
            else:
                y, new_state[name] = conv.apply(weight[f"{name}_conv"], y, state=state[name])
        mixed[name] = jax.nn.silu(y)
    steps, value_heads = config.num_householder, config.value_heads
    q = l2_norm(mixed["q"].reshape(batch, length, config.num_heads, config.head_dim))
    k = l2_norm(mixed["k"].reshape(batch, length, steps, config.num_heads, config.head_dim))
    v = mixed["v"].reshape(batch, length, steps, value_heads, config.value_dim)
    beta = config.beta_max * jax.nn.sigmoid((x @ weight["beta"]).astype(jnp.float32))
    beta = beta.reshape(batch, length, steps, value_heads)
    g = gates.log_decay(params, x) if config.gate else None
    if state is None:
        o = _mix(q, k, v, beta, g, segment_ids, config.implementation)
    elif length == 1:
        o, new_state["s"] = delta_product_step(
            state["s"], q[:, 0], k[:, 0], v[:, 0], beta[:, 0], None if g is None else g[:, 0]
        )
        o = o[:, None]
    else:
        o, new_state["s"] = delta_product(
            q, k, v, beta, g, initial_state=state["s"], implementation=config.implementation
        )
    o = rms_norm(o, params["norm"], config.norm_eps)
    if config.output_gate == "silu":
        o = o * jax.nn.silu(x @ weight["out_gate"]).reshape(o.shape)
    if config.output_gate == "sigmoid":
        o = o * jax.nn.sigmoid(x @ weight["out_gate_down"] @ weight["out_gate_up"]).reshape(o.shape)
    o = o.reshape(batch, length, value_heads * config.value_dim)
    return o @ weight["o"], None if state is None else new_state


def _convolve(weight: Array, x: Array, segment_ids: Array | None) -> Array:
    """The short convolution; where tokens are spread over devices, each asks its neighbour for the last inputs."""

    def convolve(weight, x, segment_ids, sequence_axis=None):
        return conv.apply(weight, x, segment_ids=segment_ids, sequence_axis=sequence_axis)[0]

    if spread_over("sequence") > 1:
        convolve = over_mesh(convolve, (".H", "BTH", "BT"), "BTH")
    return convolve(weight, x, segment_ids)


def _mix(q, k, v, beta, g, segment_ids, implementation):
    """Outputs of the delta product, each device with its sequences, tokens and heads."""

    def mix(q, k, v, beta, g, segment_ids, sequence_axis):
        o, _ = delta_product(
            q, k, v, beta, g, segment_ids=segment_ids, implementation=implementation, sequence_axis=sequence_axis
        )
        return o

    layouts = ("BTH.", "BT.H.", "BT.H.", "BT.H", "BTH" if g is None or g.ndim == 3 else "BTH.", "BT")
    return over_mesh(mix, layouts, "BTH.")(q, k, v, beta, g, segment_ids)
