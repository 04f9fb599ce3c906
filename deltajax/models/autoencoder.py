"""A sequence squeezed through one vector: MAD's compression task (arXiv 2403.17844, appendix B.6).

A backbone reads the sequence; from its output at the last token and a learned vector per position, a SwiGLU decoder gives back
every token. So whatever is recalled has passed through that one output.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.errors import check_integers, check_types
from deltajax.layers import linear, mlp
from deltajax.layers.norm import rms_norm, rms_norm_spec
from deltajax.layers.param import ParamSpec, init_params
from deltajax.models import lm
from deltajax.models.losses import cross_entropies, cross_entropy_sums


@dataclasses.dataclass(frozen=True)
class Config:
    """An autoencoder of token sequences.

    Attributes:
      backbone: what reads the sequence; its output projection is not used.
      max_length: longest sequence that can be given back.
    """

    backbone: lm.Config
    max_length: int

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_integers(self, 1, "max_length")

    @property
    def vocab_size(self) -> int:
        """The backbone's."""
        return self.backbone.vocab_size


def param_specs(config: Config) -> dict:
    """{"backbone", "positions" [max_length, D], "mlp", "norm", "head" [D, vocab]}."""
    d_model = config.backbone.d_model
    return {
        "backbone": lm.param_specs(dataclasses.replace(config.backbone, tie_embeddings=True)),
        "positions": ParamSpec((config.max_length, d_model), (None, "embed"), jax.nn.initializers.normal(1.0)),
        "mlp": mlp.param_specs(d_model, config.backbone.hidden_dim),
        "norm": rms_norm_spec(d_model, "embed"),
        "head": linear.spec(d_model, config.vocab_size, "embed", "vocab"),
    }


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters in float32, drawn from `param_specs`."""
    return init_params(key, param_specs(config))


def init_stats(config: Config) -> dict:
    """There are no running statistics."""
    return {}


def apply(params: dict, config: Config, batch: Mapping[str, Array]) -> Float[Array, "B T vocab"]:
    """Logits of every token of `batch["sequence"]` [B, T], in float32, from the last output of the backbone."""
    sequence = batch["sequence"]
    length = sequence.shape[1]
    if length > config.max_length:
        raise ValueError(f"sequence must have at most max_length = {config.max_length} tokens, got {length}")
    hidden, _ = lm.hidden(params["backbone"], config.backbone, sequence, segment_ids=batch["segment_ids"])
    x = hidden[:, -1:] + params["positions"][:length].astype(hidden.dtype)
    x = rms_norm(x + mlp.apply(params["mlp"], x), params["norm"], config.backbone.norm_eps)
    return jnp.matmul(x, params["head"].astype(x.dtype), preferred_element_type=jnp.float32)


def loss_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array], *, key: PRNGKeyArray | None, train: bool
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """`cross_entropy_sums` of the targets; see `registry`.

    Args:
      batch: sequence, targets, segment_ids [B, T] integers; weights [B, T] floats.
    """
    logits = apply(params, config, batch)
    return cross_entropy_sums(logits, batch["targets"], batch["weights"]), stats


def position_sums(
    params: dict, stats: dict, config: Config, batch: Mapping[str, Array]
) -> dict[str, Float[Array, "T"]]:
    """What `loss_sums` sums over the batch, for each position by itself."""
    values = cross_entropies(apply(params, config, batch), batch["targets"], batch["weights"])
    return {name: jnp.sum(x, axis=0) for name, x in values.items()}
