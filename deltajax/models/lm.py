"""A language model whose layers are data: a pattern of mixer names, each followed by a SwiGLU layer."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers import mixer as mixers_lib
from deltajax.layers import mlp
from deltajax.layers.norm import rms_norm, rms_norm_spec
from deltajax.layers.param import ParamSpec, count_params, init_params, stack_specs
from deltajax.models.losses import cross_entropies, cross_entropy_sums
from deltajax.ops.over_mesh import lay_out
from deltajax.ops.taps import tag


class FrozenMapping(Mapping):
    """A mapping that cannot be changed, and can therefore be hashed."""

    def __init__(self, items: Mapping):
        """Copy the items."""
        self._items = dict(items)

    def __getitem__(self, key):
        """The value of a key."""
        return self._items[key]

    def __iter__(self):
        """The keys, in the order given."""
        return iter(self._items)

    def __len__(self):
        """Number of items."""
        return len(self._items)

    def __hash__(self):
        """Hash of the items, whatever their order, as equality has it."""
        return hash(frozenset(self._items.items()))

    def __repr__(self):
        """The items as a dict's."""
        return repr(self._items)


@dataclasses.dataclass(frozen=True)
class Config:
    """A language model.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream.
      pattern: the mixer of each layer, by its name in `mixers`, e.g. ("delta", "delta", "swa") * 8.
      mixers: name -> config of a mixer.
      mlp_dim: hidden width of the SwiGLU layers; None: 8/3 d_model, rounded up to a multiple of 64.
      tie_embeddings: the output projection is the embedding, transposed.
      norm_eps: of the RMSNorms.
      dtype: of the activations and of the products' inputs.
      scan_layers: compile a run of equal layers once (lax.scan); same parameters and numbers either way.
      remat: what the backward recomputes: nothing, all of a layer ("full"), or all but its matrix products ("dots").
    """

    vocab_size: int
    d_model: int
    pattern: tuple[str, ...]
    mixers: Mapping[str, mixers_lib.Config]
    mlp_dim: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = dataclasses.field(default="float32", metadata=CHANGEABLE)
    scan_layers: bool = dataclasses.field(default=True, metadata=CHANGEABLE)
    remat: Literal["none", "full", "dots"] = dataclasses.field(default="none", metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges; make the mapping hashable, for the config is a static argument of jitted functions."""
        check_types(self)
        object.__setattr__(self, "mixers", FrozenMapping(self.mixers))
        check_integers(self, 1, "vocab_size", "d_model", "mlp_dim")
        check_number(self, "norm_eps", 0)
        if not self.pattern:
            raise ValueError("pattern must name at least one layer, got ()")
        for name in self.pattern:
            if name not in self.mixers:
                raise ValueError(f"pattern names {name!r}, which is not one of mixers: {', '.join(self.mixers)}")

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the SwiGLU layers."""
        return self.mlp_dim or 64 * math.ceil(self.d_model * 8 / 3 / 64)


def layer_groups(pattern: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """The pattern as runs of a repeated unit: from the left, the unit that covers most layers, the shortest of them.

    ("a", "b") * 3 + ("c",) gives [(("a", "b"), 3), (("c",), 1)].
    """
    groups = []
    while pattern:

        def covered(size, pattern=pattern):
            count = 1
            while pattern[count * size : (count + 1) * size] == pattern[:size]:
                count += 1
            return count * size if count > 1 or size == 1 else 0

        size = max(range(1, len(pattern) // 2 + 2), key=lambda n: (covered(n), -n))
        count = covered(size) // size
        groups.append((pattern[:size], count))
        pattern = pattern[size * count :]
    return groups


def param_specs(config: Config) -> dict:
    """{"embed", "groups": one {"0": layer, "1": ...} per run, leaves stacked over its repeats, "norm", "head"}.

    Projections back into the residual stream start smaller by sqrt(2 layers) (GPT-2).
    """
    out_scale = (2 * len(config.pattern)) ** -0.5

    def layer(name: str) -> dict:
        mixer = config.mixers[name]
        return {
            "mixer_norm": rms_norm_spec(config.d_model, "embed"),
            "mixer": mixers_lib.module_of(mixer).param_specs(mixer, config.d_model, out_scale),
            "mlp_norm": rms_norm_spec(config.d_model, "embed"),
            "mlp": mlp.param_specs(config.d_model, config.hidden_dim, out_scale),
        }

    specs: dict[str, Any] = {
        "embed": ParamSpec((config.vocab_size, config.d_model), ("vocab", "embed"), jax.nn.initializers.normal(0.02)),
        "groups": [
            stack_specs({str(i): layer(name) for i, name in enumerate(unit)}, repeats)
            for unit, repeats in layer_groups(config.pattern)
        ],
        "norm": rms_norm_spec(config.d_model, "embed"),
    }
    if not config.tie_embeddings:
        specs["head"] = ParamSpec(
            (config.d_model, config.vocab_size), ("embed", "vocab"), jax.nn.initializers.normal(0.02)
        )
    return specs


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """There are no running statistics."""
    return {}


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


def num_params(config: Config) -> int:
    """Number of parameters; nothing is allocated."""
    return count_params(param_specs(config))


def init_state(config: Config, batch: int, max_length: int) -> list:
    """State before the first token, for prefill and decoding of up to max_length tokens in all."""

    def layer(name: str, repeats: int) -> Any:
        mixer = config.mixers[name]
        state = mixers_lib.module_of(mixer).init_state(mixer, config.d_model, batch, max_length, config.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), state)

    return [{str(i): layer(name, n) for i, name in enumerate(unit)} for unit, n in layer_groups(config.pattern)]


def apply(
    params: dict,
    config: Config,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: list | None = None,
) -> tuple[Float[Array, "B T vocab"], list | None]:
    """Logits for the token after each one, in float32; with a state, the tokens continue it and it is returned advanced.

    Args:
      params: from `init`.
      config: static under jit.
      tokens: in [0, vocab_size).
      segment_ids: packed documents; each is processed as if it stood alone. Excludes a state.
      state: from `init_state` or an earlier call. T tokens at once (prefill) or one (decoding).
    """
    x, state = hidden(params, config, tokens, segment_ids=segment_ids, state=state)
    head = params["embed"].T if config.tie_embeddings else params["head"]
    return jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32), state


def hidden(
    params: dict,
    config: Config,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: list | None = None,
) -> tuple[Float[Array, "B T D"], list | None]:
    """The normalised residual stream that the output projection reads; arguments as in `apply`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(f"segment_ids must have the shape of tokens, {tokens.shape}, got {segment_ids.shape}")
    x = params["embed"].astype(config.dtype)[lay_out(tokens, "BT")]
    new_state: list = []
    for i, (unit, repeats) in enumerate(layer_groups(config.pattern)):
        run: Callable = functools.partial(_unit, config, unit, segment_ids)
        scanned = config.scan_layers and repeats > 1
        if config.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=dots if config.remat == "dots" else None, prevent_cse=not scanned)
        advanced: Any
        layers = (params["groups"][i], None if state is None else state[i])
        if scanned:
            x, advanced = jax.lax.scan(run, x, layers)
        else:
            each = []
            for n in range(repeats):
                x, one = run(x, jax.tree.map(lambda leaf, n=n: leaf[n], layers))
                each.append(one)
            advanced = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        new_state.append(advanced)
    return rms_norm(x, params["norm"], config.norm_eps), None if state is None else new_state


def _unit(config: Config, unit: tuple[str, ...], segment_ids: Array | None, x: Array, layers: tuple) -> tuple:
    """Pre-norm layers: x + mixer(norm(x)), then x + mlp(norm(x)).

    The sum is tagged "residual", what the two read "mixer_input" and "mlp_input" (see `ops.taps`).
    """
    params, state = layers
    x = lay_out(x, "BT.")
    new_state = {}
    for i, name in enumerate(unit):
        mixer, p = config.mixers[name], params[str(i)]
        y, new_state[str(i)] = mixers_lib.module_of(mixer).apply(
            p["mixer"],
            mixer,
            tag(rms_norm(x, p["mixer_norm"], config.norm_eps), "mixer_input"),
            segment_ids=segment_ids,
            state=None if state is None else state[str(i)],
        )
        x = x + y
        into_mlp = tag(rms_norm(x, p["mlp_norm"], config.norm_eps), "mlp_input")
        x = tag(x + mlp.apply(p["mlp"], into_mlp), "residual")
    return x, new_state
