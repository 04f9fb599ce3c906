"""GPT-NeoX: the architecture of the Pythia models (arXiv 2304.01373), which the massive-activations paper studied.

Attention and feed-forward layer read the same residual stream, x + attention(norm(x)) + mlp(norm'(x)), a quarter of each head is
rotated, norms and products have biases, embeddings are not tied. `pythia("410m")` gives a published size.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import attention, linear
from deltajax.layers.norm import layer_norm, layer_norm_specs
from deltajax.layers.param import ParamSpec, count_params, init_params, stack_specs
from deltajax.models.losses import cross_entropies, cross_entropy_sums
from deltajax.ops.over_mesh import lay_out
from deltajax.ops.taps import tag


@dataclasses.dataclass(frozen=True)
class Config:
    """A GPT-NeoX model.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream, a multiple of num_heads.
      num_layers: blocks.
      num_heads: heads of attention.
      mlp_dim: hidden width of the feed-forward layers; None: 4 d_model.
      rotary_fraction: part of each head that is rotated.
      rotary_base: base of the rotary frequencies.
      parallel_residual: attention and feed-forward layer side by side; else one after the other.
      norm_eps: of the layer norms.
      sink, gated: of the attention, against massive activations; see `layers.attention.Config`.
      dtype: of the activations and of the products' inputs.
      scan_layers: compile a block once (lax.scan); same parameters and numbers either way.
      remat: whether the backward recomputes the blocks.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    mlp_dim: int | None = None
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    parallel_residual: bool = True
    norm_eps: float = 1e-5
    sink: Literal["kv", "one"] | None = None
    gated: bool = False
    dtype: Literal["float32", "bfloat16"] = dataclasses.field(default="float32", metadata=CHANGEABLE)
    scan_layers: bool = dataclasses.field(default=True, metadata=CHANGEABLE)
    remat: bool = dataclasses.field(default=False, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "vocab_size", "d_model", "num_layers", "num_heads", "mlp_dim")
        check_number(self, "norm_eps", 0)
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads = {self.num_heads}, got {self.d_model}")
        _ = self.attention

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.mlp_dim or 4 * self.d_model

    @property
    def attention(self) -> attention.Config:
        """Of every block."""
        return attention.Config(
            self.num_heads,
            self.d_model // self.num_heads,
            rope_base=self.rotary_base,
            rope_fraction=self.rotary_fraction,
            bias=True,
            sink=self.sink,
            gated=self.gated,
        )


# Layers, width, heads, rows of the embedding.
PYTHIA = {
    "14m": (6, 128, 4, 50304),
    "31m": (6, 256, 8, 50304),
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}


def pythia(size: str, **changes: Any) -> Config:
    """Configuration of a Pythia model by the size in its name, "14m" to "12b", with fields changed at will.

    Raises:
      ValueError: no such size.
    """
    if size not in PYTHIA:
        nearest = difflib.get_close_matches(size, PYTHIA, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"size {size!r} is not known{hint} (known: {', '.join(PYTHIA)})")
    layers, width, heads, vocab = PYTHIA[size]
    return dataclasses.replace(Config(vocab, width, layers, heads), **changes)


def param_specs(config: Config) -> dict:
    """{"embed", "layers": leaves stacked over the blocks, "norm", "head"}, drawn as Pythia's were.

    Standard deviation sqrt(0.4 / d) everywhere but in the projections back into the residual stream: 2 / (layers sqrt(d)).
    """
    d, hidden = config.d_model, config.hidden_dim
    small = jax.nn.initializers.normal((0.4 / d) ** 0.5)
    attend = attention.param_specs(config.attention, d, out_scale=2 / config.num_layers)
    attend |= {name: dataclasses.replace(attend[name], init=small) for name in "qkv"}
    layer = {
        "attention_norm": layer_norm_specs(d, "embed"),
        "attention": attend,
        "mlp_norm": layer_norm_specs(d, "embed"),
        "up": ParamSpec((d, hidden), ("embed", "mlp"), small),
        "up_bias": linear.bias_spec(hidden, "mlp"),
        "down": linear.spec(hidden, d, "mlp", "embed", scale=2 / config.num_layers * (hidden / d) ** 0.5),
        "down_bias": linear.bias_spec(d, "embed"),
    }
    return {
        "embed": ParamSpec((config.vocab_size, d), ("vocab", "embed"), small),
        "layers": stack_specs(layer, config.num_layers),
        "norm": layer_norm_specs(d, "embed"),
        "head": ParamSpec((d, config.vocab_size), ("embed", "vocab"), small),
    }


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """There are no running statistics."""
    return {}


def num_params(config: Config) -> int:
    """Number of parameters; nothing is allocated."""
    return count_params(param_specs(config))


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """`cross_entropy_sums` of the targets; see `registry`.

    Args:
      batch: tokens, targets, segment_ids [B, T] integers; weights [B, T] floats.
    """
    logits, _ = apply(params, config, batch["tokens"], segment_ids=batch["segment_ids"])
    return cross_entropy_sums(logits, batch["targets"], batch["weights"]), stats


def position_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array]
) -> dict[str, Float[Array, "T"]]:
    """What `loss_sums` sums over the batch, for each position by itself."""
    logits, _ = apply(params, config, batch["tokens"], segment_ids=batch["segment_ids"])
    values = cross_entropies(logits, batch["targets"], batch["weights"])
    return {name: jnp.sum(x, axis=0) for name, x in values.items()}


def init_state(config: Config, batch: int, max_length: int) -> dict:
    """Caches of keys and values before the first token, for up to max_length tokens in all."""
    state = attention.init_state(config.attention, config.d_model, batch, max_length, config.dtype)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), state)


def apply(
    params: dict,
    config: Config,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict | None = None,
) -> tuple[Float[Array, "B T vocab"], dict | None]:
    """Logits for the token after each one, in float32; with a state, the tokens continue it and it is returned advanced.

    Args:
      params: from `init`, or `interop.gpt_neox.load`.
      config: static under jit.
      tokens: in [0, vocab_size).
      segment_ids: packed documents; each is processed as if it stood alone. Excludes a state.
      state: from `init_state` or an earlier call. T tokens at once (prefill) or one (decoding).
    """
    x, state = hidden(params, config, tokens, segment_ids=segment_ids, state=state)
    return jnp.matmul(x, params["head"].astype(x.dtype), preferred_element_type=jnp.float32), state


def hidden(
    params: dict,
    config: Config,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict | None = None,
) -> tuple[Float[Array, "B T D"], dict | None]:
    """The normalised residual stream that the output projection reads; arguments as in `apply`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(f"segment_ids must have the shape of tokens, {tokens.shape}, got {segment_ids.shape}")
    x = params["embed"].astype(config.dtype)[lay_out(tokens, "BT")]
    run: Callable = functools.partial(_block, config, segment_ids)
    if config.remat:
        run = jax.checkpoint(run, prevent_cse=not config.scan_layers)
    # As many steps unrolled as there are blocks is the plain loop.
    unroll = 1 if config.scan_layers else config.num_layers
    x, state = jax.lax.scan(run, x, (params["layers"], state), unroll=unroll)
    return layer_norm(x, params["norm"], config.norm_eps), state


def _block(config: Config, segment_ids: Array | None, x: Array, layer: tuple) -> tuple:
    """One block; its output is tagged "residual" (see `ops.taps`)."""
    params, state = layer
    x = lay_out(x, "BT.")
    y, state = attention.apply(
        params["attention"],
        config.attention,
        layer_norm(x, params["attention_norm"], config.norm_eps),
        segment_ids=segment_ids,
        state=state,
    )
    before = x if config.parallel_residual else x + y
    h = layer_norm(before, params["mlp_norm"], config.norm_eps)
    h = jax.nn.gelu(h @ params["up"].astype(x.dtype) + params["up_bias"].astype(x.dtype), approximate=False)
    z = h @ params["down"].astype(x.dtype) + params["down_bias"].astype(x.dtype)
    return tag(x + y + z, "residual"), state
