"""Statistics of activations that show massive ones (arXiv 2402.17762, 2508.03616), cheap enough to stand in a training step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from deltajax.ops import taps

_BITS = 31  # of the magnitude of a float32


def activation_statistics(x: Float[Array, "B ... D"], sequences: int | None = None) -> dict[str, Array]:
    """Per sequence, over its positions and channels.

    Args:
      x: a residual stream, or any activations with channels last; at least 3 values per sequence.
      sequences: how many of the batch to look at, from the first; None: all.

    Returns:
      Arrays [B]. top1, top2, top3: the largest magnitudes; position, channel: where top1 stands (position counts all axes between
      the first and the last as one); median: of the magnitudes; kurtosis: fourth moment over squared second (about the mean;
      3 for a normal distribution).
    """
    x = x[:sequences].astype(jnp.float32)
    flat = x.reshape(x.shape[0], -1)
    magnitude = jnp.abs(flat)
    # Without the barrier XLA merges the slices below with top_k's own and sorts everything: 70 times the time on a CPU.
    top, where = jax.lax.optimization_barrier(jax.lax.top_k(magnitude, 3))
    centred = flat - jnp.mean(flat, -1, keepdims=True)
    second, fourth = (jnp.mean(centred**n, -1) for n in (2, 4))
    return {
        "top1": top[:, 0],
        "top2": top[:, 1],
        "top3": top[:, 2],
        "position": where[:, 0] // x.shape[-1],
        "channel": where[:, 0] % x.shape[-1],
        "median": median(magnitude),
        "kurtosis": fourth / jnp.maximum(second**2, jnp.finfo(jnp.float32).tiny),
    }


def with_statistics(f: Callable, sequences: int | None = None) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """`f`, returning (its result, statistics of what it tags "residual": `activation_statistics`, [blocks, B] each).

    Where it tags "first_token_share" [B] too, as our attention does, that stands beside them; NaN for blocks without attention.

    Args:
      f: see `taps.capture`; any function of arrays, a Flax module's among them, whose blocks tag their outputs.
      sequences: as in `activation_statistics`.

    Raises (when the result is called):
      ValueError: nothing is tagged "residual".
    """

    def call(*args):
        tags = taps.tags(f, *args)
        if "residual" not in tags:
            raise ValueError('nothing to probe: the model tags no block\'s output "residual" (see deltajax.ops.taps)')
        attentive = [tags[:i].count("residual") for i, tag in enumerate(tags) if tag == "first_token_share"]
        # Nobody differentiates statistics: without this their tangents are traced into a training step.
        probes: dict[str, taps.Probe] = {
            "residual": lambda x: activation_statistics(jax.lax.stop_gradient(x), sequences)
        }
        if attentive:
            probes["first_token_share"] = lambda share: jax.lax.stop_gradient(share)[:sequences]
        result, seen = taps.capture(f, probes)(*args)
        statistics = dict(seen["residual"])
        if attentive:
            share = seen["first_token_share"]
            blank = jnp.full((tags.count("residual"), share.shape[1]), jnp.nan)
            statistics["first_token_share"] = blank.at[jnp.array(attentive)].set(share)
        return result, statistics

    return call


def median(x: Float[Array, "... N"]) -> Float[Array, "..."]:
    """Exact median over the last axis of float32 values >= 0; of an even number of them the lower of the middle two.

    Non-negative floats are ordered as their bits are, so the bits are found one by one, each by counting what lies below: 31
    passes of vector instructions instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    rank = (x.shape[-1] - 1) // 2

    def next_bit(i, found):
        tried = found | (jnp.int32(1) << (_BITS - 1 - i))
        below = jnp.sum((bits < tried[..., None]).astype(jnp.int32), -1)
        return jnp.where(below <= rank, tried, found)

    found = jax.lax.fori_loop(0, _BITS, next_bit, jnp.zeros(x.shape[:-1], jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def first_token_share(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    visible: Bool[Array, "B T S"],
    first: Bool[Array, "B S"],
    sink: Float[Array, "G K"] | None = None,
    queries: int = 16,
) -> Float[Array, "B"]:
    """Attention that goes to the first tokens of documents, mean over heads and over `queries` positions spread evenly.

    Args:
      q, k: queries and keys as they enter the softmax, scale K^-1/2; H is a multiple of G.
      visible: which keys a query sees; broadcastable over B.
      first: which keys are first tokens.
      sink: a key that every query sees besides (its share is not counted).
      queries: sampled positions; their number bounds the cost.
    """
    every = max(1, q.shape[1] // queries)
    start = every // 2
    q, visible = q[:, start::every], visible[:, start::every]
    batch, count, heads, dim = q.shape
    q = q.reshape(batch, count, k.shape[2], heads // k.shape[2], dim).astype(jnp.float32)
    scores = jnp.einsum("btgnk,bsgk->bgnts", q, k.astype(jnp.float32)) * dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if sink is not None:
        extra = jnp.einsum("btgnk,gk->bgnt", q, sink.astype(jnp.float32)) * dim**-0.5
        scores = jnp.concatenate([scores, extra[..., None]], -1)
        first = jnp.concatenate([first, jnp.zeros_like(first[:, :1])], -1)
    share = jnp.sum(jax.nn.softmax(scores, -1) * first[:, None, None, None], -1)
    return jnp.mean(share, (1, 2, 3))


def summarise(statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Over sequences, the last axis: means of what `activation_statistics` returns, and `ratio`.

    ratio = mean of top1 / mean of median (arXiv 2508.03616); position and channel are those of the largest top1.
    """
    host = {name: np.asarray(x) for name, x in statistics.items()}
    largest = host["top1"].argmax(-1)[..., None]
    result = {}
    for name, x in host.items():
        whole = name in ("position", "channel")
        result[name] = np.take_along_axis(x, largest, -1)[..., 0] if whole else x.mean(-1, dtype=np.float64)
    result["ratio"] = result["top1"] / np.maximum(result["median"], np.finfo(np.float32).tiny)
    return result
