"""Mixers and the language model as Flax Linen modules: thin shells around the pure functions, same parameters, same numbers.

The whole functional tree is one Linen parameter named "weights", so `variables["params"]["weights"]` is what
`deltajax.layers` and `deltajax.models.lm` take.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from deltajax.layers import mixer
from deltajax.models import lm


class Mixer(nn.Module):
    """Any mixer of `deltajax.layers`; its width is that of its input."""

    config: mixer.Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None, state: Any = None
    ) -> Any:
        """y, or (y, new state) if a state is given."""
        functions = mixer.module_of(self.config)
        params = self.param("weights", functions.init, self.config, x.shape[-1])
        y, new_state = functions.apply(params, self.config, x, segment_ids=segment_ids, state=state)
        return y if state is None else (y, new_state)

    def init_state(self, d_model: int, batch: int, max_length: int, dtype: Any = "float32") -> Any:
        """The state before the first token."""
        return mixer.module_of(self.config).init_state(self.config, d_model, batch, max_length, dtype)


class LanguageModel(nn.Module):
    """`deltajax.models.lm`."""

    config: lm.Config

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None, state: Any = None
    ) -> Any:
        """Logits [B, T, vocab], or (logits, new state) if a state is given."""
        params = self.param("weights", lm.init, self.config)
        logits, new_state = lm.apply(params, self.config, tokens, segment_ids=segment_ids, state=state)
        return logits if state is None else (logits, new_state)

    def init_state(self, batch: int, max_length: int) -> Any:
        """The state before the first token."""
        return lm.init_state(self.config, batch, max_length)
