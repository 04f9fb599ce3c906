"""Drawing text from a language model: prefill, then one token at a time with carried state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deltajax.data import Tokenizer
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


def sample(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, "B"]:
    """One token per row: top-k, then top-p of what is left (arXiv 1904.09751, section 3.1), then temperature's softmax.

    Temperature is applied first, so top-p counts the probabilities that are drawn from; 0 is the limit: the largest.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    descending = jnp.sort(logits, axis=-1, descending=True)
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits < descending[:, k - 1 : k], -jnp.inf, logits)
        descending = descending.at[:, k:].set(-jnp.inf)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits < jnp.take_along_axis(descending, last, axis=-1), -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


def continue_text(
    params: Any, model: Any, tokenizer: Tokenizer, prompt: bytes, key: PRNGKeyArray, sampling: Sampling
) -> bytes:
    """The prompt (may be empty) and its continuation, up to where the model begins another document."""
    tokens = generate(params, model, jnp.asarray(tokenizer.encode(prompt))[None], key, sampling)
    drawn = np.asarray(tokens)[0].tolist()
    end = drawn.index(tokenizer.bos) if tokenizer.bos in drawn else len(drawn)
    return prompt + tokenizer.decode(drawn[:end])
