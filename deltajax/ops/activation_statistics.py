"""Statistics of activations that show massive ones (arXiv 2402.17762, 2508.03616), cheap enough to stand in a training step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deltajax.ops import taps

QUERIES = 16  # positions at which attention on first tokens is measured
_BITS = 31  # of the magnitude of a float32


def padding_mask(batch: Mapping[str, Array]) -> Bool[Array, "B T"] | None:
    """Return which positions of a batch are tokens: `segment_ids` > 0; None if the batch has no such ids."""
    return batch["segment_ids"] > 0 if "segment_ids" in batch else None


def activation_statistics(
    x: Float[Array, "B ... D"], sequences: int | None = None, mask: Bool[Array, "B ..."] | None = None
) -> dict[str, Array]:
    """Compute statistics of each sequence over its positions and channels.

    Args:
      x: a residual stream, or any activations with channels last; at least 3 values per sequence.
      sequences: how many of the batch to look at, from the first; None: all.
      mask: which positions count, x's shape without channels; None: all. Padding must not count.

    Returns:
      Arrays [B]. top1, top2, top3: the largest magnitudes; position, channel: of top1 (position counts
      all axes between the first and the last as one); median: of the magnitudes; kurtosis: fourth moment
      over squared second (about the mean; 3 for a normal distribution). A sequence of which nothing
      counts has NaN, and -1 for position and channel; one of fewer than 3 values has NaN for the rest.
    """
    x = x[:sequences].astype(jnp.float32)
    flat = x.reshape(x.shape[0], -1)
    magnitude = jnp.abs(flat)
    counted: Any = None
    if mask is not None:
        mask = mask[:sequences]
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of activations without channels, {x.shape[:-1]}, got {mask.shape}"
            )
        counted = jnp.broadcast_to(mask[..., None], x.shape).reshape(flat.shape)
    ranked = magnitude if counted is None else jnp.where(counted, magnitude, -1)
    # Without the barrier XLA merges the slices below with top_k's own and sorts everything: 70 times the time on a CPU.
    top, where = jax.lax.optimization_barrier(jax.lax.top_k(ranked, 3))
    size: Any = None if counted is None else jnp.sum(counted, -1)

    def mean(y: Array) -> Array:
        return jnp.mean(y, -1) if counted is None else jnp.sum(jnp.where(counted, y, 0), -1) / jnp.maximum(size, 1)

    centred = flat - mean(flat)[:, None]
    second, fourth = (mean(centred**n) for n in (2, 4))
    result = {
        "top1": top[:, 0],
        "top2": top[:, 1],
        "top3": top[:, 2],
        "position": where[:, 0] // x.shape[-1],
        "channel": where[:, 0] % x.shape[-1],
        "median": median(magnitude) if counted is None else median(jnp.where(counted, magnitude, jnp.inf), size),
        "kurtosis": fourth / jnp.maximum(second**2, jnp.finfo(jnp.float32).tiny),
    }
    if counted is None:
        return result
    blank = {name: -1 if name in ("position", "channel") else jnp.nan for name in result}
    needed = {"top2": 2, "top3": 3}
    return {name: jnp.where(size >= needed.get(name, 1), y, blank[name]) for name, y in result.items()}


def with_statistics(
    f: Callable, sequences: int | None = None, mask: Callable[..., Array | None] | None = None
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Return a function of (f's result, statistics of what f tags "residual": [blocks, B] each).

    The statistics are those of `activation_statistics`. Where f tags "first_token_share" too ([B], or
    [B, Q] of Q queries spaced evenly, as our attention does), its mean is beside them; NaN for blocks
    without attention.

    Args:
      f: see `taps.capture`; any function of arrays, a Flax module's among them, whose blocks tag their outputs.
      sequences: as in `activation_statistics`.
      mask: f's arguments -> which positions count [B, T], such as `padding_mask`; None: all do.

    Raises (when the result is called):
      ValueError: nothing is tagged "residual".
    """

    def call(*args):
        tags = taps.tags(f, *args)
        if "residual" not in tags:
            raise ValueError('nothing to probe: the model tags no block\'s output "residual" (see deltajax.ops.taps)')
        attentive = [tags[:i].count("residual") for i, tag in enumerate(tags) if tag == "first_token_share"]
        counted = None if mask is None else mask(*args)
        # Nobody differentiates statistics: without this their tangents are traced into a training step.
        probes: dict[str, taps.Probe] = {
            "residual": lambda x: activation_statistics(jax.lax.stop_gradient(x), sequences, counted)
        }
        if attentive:
            probes["first_token_share"] = lambda share: _mean_share(jax.lax.stop_gradient(share), counted)[:sequences]
        result, seen = taps.capture(f, probes)(*args)
        statistics = dict(seen["residual"])
        if attentive:
            share = seen["first_token_share"]
            blank = jnp.full((tags.count("residual"), share.shape[1]), jnp.nan)
            statistics["first_token_share"] = blank.at[jnp.array(attentive)].set(share)
        return result, statistics

    return call


def _mean_share(share: Array, counted: Array | None) -> Float[Array, "B"]:
    if share.ndim == 1:
        return share
    if counted is None:
        return jnp.mean(share, 1)
    queries = counted[:, _sampled(counted.shape[1], QUERIES)]
    return jnp.sum(jnp.where(queries, share, 0), 1) / jnp.sum(queries, 1)  # NaN where no query counts


def median(x: Float[Array, "... N"], count: Int[Array, "..."] | None = None) -> Float[Array, "..."]:
    """Return the exact median over the last axis of float32 values >= 0; of an even number the lower of the middle two.

    count: of how many values, the lowest ones; None: of all.

    Non-negative floats are ordered as their bits are, so the bits are found one by one, each by counting what lies below: 31
    passes of vector instructions instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    rank = (x.shape[-1] - 1) // 2 if count is None else (count - 1) // 2

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
    queries: int = QUERIES,
) -> Float[Array, "B Q"]:
    """Return how much attention goes to the first tokens of documents, mean over heads, of positions spaced evenly.

    Args:
      q, k: queries and keys as they enter the softmax, scale K^-1/2; H is a multiple of G.
      visible: which keys a query sees; broadcastable over B.
      first: which keys are first tokens.
      sink: a key that every query sees besides (its share is not counted).
      queries: about how many positions are sampled; their number bounds the cost.
    """
    sampled = _sampled(q.shape[1], queries)
    q, visible = q[:, sampled], visible[:, sampled]
    batch, count, heads, dim = q.shape
    q = q.reshape(batch, count, k.shape[2], heads // k.shape[2], dim).astype(jnp.float32)
    scores = jnp.einsum("btgnk,bsgk->bgnts", q, k.astype(jnp.float32)) * dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if sink is not None:
        extra = jnp.einsum("btgnk,gk->bgnt", q, sink.astype(jnp.float32)) * dim**-0.5
        scores = jnp.concatenate([scores, extra[..., None]], -1)
        first = jnp.concatenate([first, jnp.zeros_like(first[:, :1])], -1)
    share = jnp.sum(jax.nn.softmax(scores, -1) * first[:, None, None, None], -1)
    return jnp.mean(share, (1, 2))


def _sampled(length: int, queries: int) -> slice:
    every = max(1, length // queries)
    return slice(every // 2, None, every)


def summarise(statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Average statistics over sequences, the last axis, and add `ratio`.

    A sequence without any position that counts is left out. position and channel are those of the largest top1.
    ratio = mean of top1 / mean of median (arXiv 2508.03616).
    """
    host = {name: np.asarray(x) for name, x in statistics.items()}
    empty = (
        host.get("position", np.zeros(host["top1"].shape)) < 0
    )  # only padding; NaN of a sequence that counts stays visible
    largest = np.where(empty, -np.inf, host["top1"]).argmax(-1)[..., None]
    result = {}
    for name, x in host.items():
        whole = name in ("position", "channel")
        result[name] = np.take_along_axis(x, largest, -1)[..., 0] if whole else _mean(x, empty)
    result["ratio"] = result["top1"] / np.maximum(result["median"], np.finfo(np.float32).tiny)
    return result


def _mean(x: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Average over the last axis without some entries; NaN where nothing is left."""
    if not left_out.any():
        return x.mean(-1, dtype=np.float64)
    count = (~left_out).sum(-1)
    total = np.where(left_out, 0, x).sum(-1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
