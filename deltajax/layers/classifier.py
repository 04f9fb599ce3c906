"""From feature maps to logits: mean over the image, an optional hidden layer, dropout, a linear map."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.layers.activation import ACTIVATIONS
from deltajax.layers.param import ParamSpec


def param_specs(dim: int, hidden: int | None, num_classes: int) -> dict:
    """weight [in, classes] and bias [classes], and those of the hidden layer; uniform within 1 / sqrt(in)."""
    specs = {}
    if hidden is not None:
        specs["hidden"] = _weight(dim, hidden, "mlp")
        specs["hidden_bias"] = ParamSpec((hidden,), (None,), jax.nn.initializers.zeros, weight_decay=False)
    specs["weight"] = _weight(hidden or dim, num_classes, "vocab")
    specs["bias"] = ParamSpec((num_classes,), (None,), jax.nn.initializers.zeros, weight_decay=False)
    return specs


def apply(
    params: dict,
    x: Float[Array, "B H W C"],
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B classes"]:
    """Logits in float32.

    Args:
      params: of `param_specs`.
      x: feature maps.
      activation: of the hidden layer.
      dropout: probability that an input of the last map is zero; nothing is dropped without a key.
      key: of the dropout.
    """
    x = jnp.mean(x, (1, 2))
    if "hidden" in params:
        x = ACTIVATIONS[activation](x @ params["hidden"].astype(x.dtype) + params["hidden_bias"].astype(x.dtype))
    if dropout and key is not None:
        x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0)
    logits = jnp.matmul(x, params["weight"].astype(x.dtype), preferred_element_type=jnp.float32)
    return logits + params["bias"].astype(jnp.float32)


def _weight(fan_in: int, fan_out: int, axis: str) -> ParamSpec:
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return ParamSpec((fan_in, fan_out), ("embed", axis), init)
