"""Mixers and the language model as Flax NNX modules: thin shells around the pure functions, same parameters, same numbers.

layer = nnx.Mixer(delta.gated_deltanet(num_heads=4, head_dim=64), d_model=256, rngs=flax.nnx.Rngs(0))
y = layer(x)                                  # [B, T, 256], in any NNX model, under nnx.jit and nnx.grad
y, state = layer(x, state=layer.init_state(batch=2, max_length=100))
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from deltajax.layers import mixer
from deltajax.models import lm


class Mixer(nnx.Module):
    """Any mixer of `deltajax.layers`; `params` holds the tree of the functional form with an nnx.Param at each leaf."""

    def __init__(self, config: mixer.Config, d_model: int, *, rngs: nnx.Rngs):
        """Draw the parameters from `rngs.params()`."""
        self.config, self.d_model = config, d_model
        self.params = nnx.data(_as_variables(mixer.module_of(config).init(rngs.params(), config, d_model)))

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None, state: Any = None
    ) -> Any:
        """y, or (y, new state) if a state is given."""
        apply = mixer.module_of(self.config).apply
        y, new_state = apply(_as_arrays(self.params), self.config, x, segment_ids=segment_ids, state=state)
        return y if state is None else (y, new_state)

    def init_state(self, batch: int, max_length: int, dtype: Any = "float32") -> Any:
        """The state before the first token."""
        return mixer.module_of(self.config).init_state(self.config, self.d_model, batch, max_length, dtype)


class LanguageModel(nnx.Module):
    """`deltajax.models.lm`."""

    def __init__(self, config: lm.Config, *, rngs: nnx.Rngs):
        """Draw the parameters from `rngs.params()`."""
        self.config = config
        self.params = nnx.data(_as_variables(lm.init(rngs.params(), config)))

    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None, state: Any = None
    ) -> Any:
        """Logits [B, T, vocab], or (logits, new state) if a state is given."""
        logits, new_state = lm.apply(_as_arrays(self.params), self.config, tokens, segment_ids=segment_ids, state=state)
        return logits if state is None else (logits, new_state)

    def init_state(self, batch: int, max_length: int) -> Any:
        """The state before the first token."""
        return lm.init_state(self.config, batch, max_length)


def _as_variables(params: Any) -> Any:
    return jax.tree.map(nnx.Param, params)


def _as_arrays(variables: Any) -> Any:
    return jax.tree.map(lambda v: v[...], variables, is_leaf=lambda v: isinstance(v, nnx.Variable))
