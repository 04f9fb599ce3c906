"""Drawing text from a language model: prefill, then one token at a time with carried state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.data import Tokenizer
from deltajax.errors import RunError
from deltajax.models import registry
from deltajax.training.config import Sampling


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def generate(
    params: Any, model: Any, prompt: Int[Array, "B T"], key: PRNGKeyArray, sampling: Sampling
) -> Int[Array, "B max_tokens"]:
    """`sampling.max_tokens` tokens that follow the prompt (T >= 1, so that there is something to condition on)."""
    batch, length = prompt.shape
    functions = registry.module_of(model)
    state: Any = functions.init_state(model, batch, length + sampling.max_tokens)
    logits, prefilled = functions.apply(params, model, prompt, state=state)
    first = sample(logits[:, -1], jax.random.fold_in(key, 0), sampling)

    def step(carry, i):
        token, state = carry
        logits, state = functions.apply(params, model, token[:, None], state=state)
        token = sample(logits[:, 0], jax.random.fold_in(key, i), sampling)
        return (token, state), token

    _, rest = jax.lax.scan(step, (first, prefilled), jnp.arange(1, sampling.max_tokens))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


INVALID = -1  # in place of a token, where the logits are not numbers
_COLDEST = 1e-30  # temperatures below it overflow float32, and differ from 0 only where logits are equal


def sample(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, "B"]:
    """Draw one token per row: temperature, then top-k, then top-p (arXiv 1904.09751, section 3.1).

    Exactly k tokens pass top-k. Of these the smallest set passes top-p whose probability, after
    temperature, is at least p. Of equal logits those of lower ids pass first. Temperature 0 takes the
    largest logit.

    Args:
      logits: -inf excludes a token.

    Returns:
      Token ids; `INVALID` in rows with NaN, +inf or nothing but -inf.
    """
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    if sampling.temperature < _COLDEST:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        scaled = (logits - largest) / sampling.temperature
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        rank = jnp.arange(logits.shape[-1])
        allowed = jnp.broadcast_to(rank < (sampling.top_k or logits.shape[-1]), logits.shape)
        if sampling.top_p < 1:
            ordered = jnp.take_along_axis(scaled, order, axis=-1)
            probabilities = jax.nn.softmax(jnp.where(allowed, ordered, -jnp.inf), axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            allowed &= (before < sampling.top_p) | (rank == 0)
        allowed = jnp.put_along_axis(allowed, order, allowed, axis=-1, inplace=False)
        tokens = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf), axis=-1)
    return jnp.where(jnp.isfinite(largest[:, 0]), tokens, INVALID)


def continue_text(
    params: Any, model: Any, tokenizer: Tokenizer, prompt: bytes, key: PRNGKeyArray, sampling: Sampling
) -> bytes:
    """Return the prompt (may be empty) and its continuation, up to where the model begins another document.

    Raises:
      RunError: the model's logits are not numbers.
    """
    context = tokenizer.encode(prompt)
    drawn = np.asarray(generate(params, model, jnp.asarray(context)[None], key, sampling))[0].tolist()
    if INVALID in drawn:
        raise RunError(f"the model's logits are not numbers after {drawn.index(INVALID)} drawn tokens")
    end = drawn.index(tokenizer.bos) if tokenizer.bos in drawn else len(drawn)
    return prompt + tokenizer.decode(drawn[:end], context=context)
