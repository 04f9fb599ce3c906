"""Softmax attention with rotary positions: causal, full or within a sliding window, grouped key-value heads.

Three switches against massive activations, which serve attention as a place to put weight that it does not need: `sink` "kv"
(a learned key and value per head, arXiv 2402.17762), `sink` "one" (softmax with 1 added to its denominator) and `gated`
(arXiv 2505.06708).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.layers import linear
from deltajax.layers.norm import rms_norm, rms_norm_spec
from deltajax.layers.param import ParamSpec, init_params
from deltajax.ops.activation_statistics import first_token_share
from deltajax.ops.over_mesh import over_mesh, spread_over, tokens_before
from deltajax.ops.segments import number_segments, segment_starts
from deltajax.ops.taps import tag
from deltajax.rounding import floor_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Softmax attention.

    Attributes:
      num_heads: query heads.
      head_dim: dimensions of a head, even.
      num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
      window: tokens a query sees, itself included; None: all before it.
      rope_base: base of the rotary frequencies (arXiv 2104.09864).
      rope_fraction: part of each head's dimensions that is rotated, from the first; makes an even number of them.
      bias: on all four projections.
      qk_norm: RMSNorm on each head's queries and keys.
      norm_eps: of these norms.
      sink: what every query may attend to besides tokens: "kv", a learned key and value per key-value head, which stand where the
        document begins; "one", a key and a value of zeros, which adds 1 to the softmax' denominator; None.
      gated: multiply each head's output by sigmoid(x W).
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    window: int | None = None
    rope_base: float = 10000.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope_fraction: float = 1.0
    bias: bool = False
    sink: Literal["kv", "one"] | None = None
    gated: bool = False

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "num_heads", "head_dim", "num_kv_heads", "window")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even and >= 2, got {self.head_dim}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        check_number(self, "rope_base", 1)
        check_number(self, "norm_eps", 0)
        check_number(self, "rope_fraction", 0, 1)
        if self.rotary_dims < 2 or self.rotary_dims % 2:
            raise ValueError(f"rope_fraction of head_dim must be even and >= 2, got {self.rotary_dims}")

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head that are rotated."""
        return floor_of(self.rope_fraction, self.head_dim)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads


def param_specs(config: Config, d_model: int, out_scale: float = 1.0) -> dict:
    """q [D, H K], k, v [D, HK K], o [H K, D], their biases, the norms' scales, sink_k, sink_v [HK, K], gate [D, H K]."""
    q_dim, kv_dim = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    specs = {
        "q": linear.spec(d_model, q_dim, "embed", "heads"),
        "k": linear.spec(d_model, kv_dim, "embed", "heads"),
        "v": linear.spec(d_model, kv_dim, "embed", "heads"),
        "o": linear.spec(q_dim, d_model, "heads", "embed", scale=out_scale),
    }
    if config.qk_norm:
        specs |= {"q_norm": rms_norm_spec(config.head_dim), "k_norm": rms_norm_spec(config.head_dim)}
    if config.bias:
        widths = {"q": (q_dim, "heads"), "k": (kv_dim, "heads"), "v": (kv_dim, "heads"), "o": (d_model, "embed")}
        specs |= {f"{name}_bias": linear.bias_spec(width, axis) for name, (width, axis) in widths.items()}
    if config.sink == "kv":
        shape, axes = (config.kv_heads, config.head_dim), (None, None)
        specs["sink_k"] = ParamSpec(shape, axes, jax.nn.initializers.normal(0.02), weight_decay=False)
        specs["sink_v"] = ParamSpec(shape, axes, jax.nn.initializers.zeros, weight_decay=False)
    if config.gated:
        specs["gate"] = linear.spec(d_model, q_dim, "embed", "heads")
    return specs


def init(key: PRNGKeyArray, config: Config, d_model: int) -> dict:
    """Parameters drawn from `param_specs`."""
    return init_params(key, param_specs(config, d_model))


def init_state(config: Config, d_model: int, batch: int, max_length: int, dtype: Any = jnp.float32) -> dict:
    """An empty cache of keys and values.

    With a window a ring of `window` tokens; else max_length tokens: the output of any token after these is NaN.
    """
    slots = max_length if config.window is None else config.window
    cache = jnp.zeros((batch, slots, config.kv_heads, config.head_dim), dtype)
    # A slot that holds no token yet has position -1.
    return {"k": cache, "v": cache, "positions": jnp.full((slots,), -1, jnp.int32), "length": jnp.zeros((), jnp.int32)}


def apply(
    params: dict,
    config: Config,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict | None = None,
) -> tuple[Float[Array, "B T D"], dict | None]:
    """Attend; with a state, to the tokens it holds as well, and return it with these tokens added.

    Without a state the share of attention on first tokens is tagged "first_token_share" [B, queries] (see `ops.taps`).
    """
    batch, length, _ = x.shape
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [B, T] = {(batch, length)}, got {segment_ids.shape}")

    def project(name, heads):
        return _linear(params, name, x).reshape(batch, length, heads, config.head_dim)

    q, k, v = project("q", config.num_heads), project("k", config.kv_heads), project("v", config.kv_heads)
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"], config.norm_eps)
        k = rms_norm(k, params["k_norm"], config.norm_eps)
    positions = jnp.arange(length, dtype=jnp.int32) + (0 if state is None else state["length"])
    documents = None if segment_ids is None else number_segments(segment_ids)
    angles = positions
    if config.sink == "kv" and documents is not None:
        # Else a sink's score would tell where in the row a document stands.
        angles = positions - jax.lax.cummax(jnp.where(segment_starts(documents), positions, 0), axis=1)
    q, k = (rotary(y, angles, config.rope_base, config.rotary_dims) for y in (q, k))
    sink = _sink(params, config, k.dtype)
    if state is None:
        _tag_first_token_share(q, k, config.window, documents, sink[0])
        attend: Callable = functools.partial(_attend_spread, config.window)
        if spread_over("sequence") > 1:
            attend = over_mesh(attend, ("BTH.", "BTH.", "BTH.", "BT", "H.", "H."), "BTH.")
        o = attend(q, k, v, documents, *sink)
    else:
        if segment_ids is not None:
            raise ValueError("attention: segment_ids and a state exclude each other")
        new_state = _append(state, k, v, positions)
        k = jnp.concatenate([state["k"].astype(k.dtype), k], axis=1)
        v = jnp.concatenate([state["v"].astype(v.dtype), v], axis=1)
        o = _attend(q, k, v, positions, jnp.concatenate([state["positions"], positions]), config.window, sink=sink)
        if config.window is None:
            o = jnp.where((positions < state["k"].shape[1])[:, None, None], o, jnp.nan)
    o = o.reshape(batch, length, config.num_heads * config.head_dim)
    if config.gated:
        o = o * jax.nn.sigmoid(x @ params["gate"].astype(x.dtype))
    return _linear(params, "o", o), None if state is None else new_state


def _linear(params: dict, name: str, x: Array) -> Array:
    y = x @ params[name].astype(x.dtype)
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(x.dtype)


def _sink(params: dict, config: Config, dtype: Any) -> tuple[Array | None, Array | None]:
    """Key and value [HK, K] that every query sees."""
    if config.sink is None:
        return None, None
    if config.sink == "one":
        zeros = jnp.zeros((config.kv_heads, config.head_dim), dtype)
        return zeros, zeros
    return params["sink_k"].astype(dtype), params["sink_v"].astype(dtype)


def _visible(positions, key_positions, window, documents=None, key_documents=None):
    """Which keys a query sees [1 or B, T, S]: at or before its position, in the window and in the same document."""
    distance = positions[:, None] - key_positions[None, :]
    visible = (distance >= 0) & (key_positions >= 0)[None, :]
    if window is not None:
        visible &= distance < window
    visible = visible[None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == key_documents[:, None, :])
    return visible


def _tag_first_token_share(q, k, window, documents, sink_k):
    """Of no use to the layer itself: compiled only where somebody looks at it (`ops.taps`)."""
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)
    first = jnp.zeros(q.shape[:2], bool) if documents is None else segment_starts(documents)
    first = first.at[:, :1].set(True)
    visible = _visible(positions, positions, window, documents, documents)
    tag(first_token_share(q, k, visible, first, sink_k), "first_token_share")


def _attend(q, k, v, positions, key_positions, window, documents=None, key_documents=None, sink=(None, None)):
    """Attention of queries to the keys that they see."""
    visible = _visible(positions, key_positions, window, documents, key_documents)
    if sink[0] is not None:
        k, v = (
            jnp.concatenate([y, jnp.broadcast_to(s, (y.shape[0], 1, *s.shape))], 1)
            for y, s in zip((k, v), sink, strict=True)
        )
        visible = jnp.pad(visible, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


def _attend_spread(window, q, k, v, documents, sink_k, sink_v, sequence_axis=None):
    """`_attend` of tokens to themselves, T of them or, with `sequence_axis`, T on each of its devices.

    Keys and values come from the devices before if the window ends there, else they are gathered from all.
    """
    length = q.shape[1]
    positions = key_positions = jnp.arange(length, dtype=jnp.int32)
    key_documents = documents
    if sequence_axis is not None:
        devices = jax.lax.axis_size(sequence_axis)
        positions = positions + jax.lax.axis_index(sequence_axis) * length
        everything = window is None or window > length * (devices - 1)

        def bring(x):
            if everything:
                return jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True)
            return jnp.concatenate([tokens_before(x, window - 1, sequence_axis), x], axis=1)

        key_positions = jnp.arange(devices * length, dtype=jnp.int32)
        if not everything:
            key_positions = positions[0] + jnp.arange(1 - window, length, dtype=jnp.int32)
        k, v, key_documents = jax.tree.map(bring, (k, v, documents))
    return _attend(q, k, v, positions, key_positions, window, documents, key_documents, (sink_k, sink_v))


def _append(state: dict, k: Array, v: Array, positions: Array) -> dict:
    """The last tokens, as many as there are slots, written where position modulo slots says."""
    slots = state["k"].shape[1]
    kept = slice(max(0, positions.shape[0] - slots), None)
    where = positions[kept] % slots
    return {
        "k": state["k"].at[:, where].set(k[:, kept].astype(state["k"].dtype)),
        "v": state["v"].at[:, where].set(v[:, kept].astype(state["v"].dtype)),
        "positions": state["positions"].at[where].set(positions[kept]),
        "length": state["length"] + positions.shape[0],
    }


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "T"] | Int[Array, "B T"], base: float, dims: int | None = None
) -> Float[Array, "B T H K"]:
    """Rotary position embedding (arXiv 2104.09864, eq. 15) of the first `dims` dimensions, pairing i with i + dims / 2."""
    dims = x.shape[-1] if dims is None else dims
    half = dims // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:dims].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return rotated if dims == x.shape[-1] else jnp.concatenate([rotated, x[..., dims:]], axis=-1)
