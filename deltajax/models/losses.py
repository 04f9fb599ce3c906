"""What models report of a batch: sums that can be added over microbatches and devices before they are divided."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy_sums(
    logits: Float[Array, "*batch classes"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the batch, in float32, of weight times: cross entropy ("loss", nats), being right ("accuracy"), 1 ("weight")."""
    return {name: jnp.sum(x) for name, x in cross_entropies(logits, targets, weights).items()}


def cross_entropies(
    logits: Float[Array, "*batch classes"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> dict[str, Float[Array, "*batch"]]:
    """Return what `cross_entropy_sums` sums.

    Places of weight 0 contribute nothing, neither value nor gradient, whatever their logits and
    targets are (such as a target of -100, or logits that are not finite). A target outside
    [0, classes) whose weight is not 0 makes the loss NaN.
    """
    weights = weights.astype(jnp.float32)
    counted = weights != 0
    # Selected before the loss, so that whatever an uncounted place holds has no gradient either.
    logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0)
    labels = jnp.where(counted, targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    losses = jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, jnp.nan)
    right = jnp.argmax(logits, axis=-1) == labels
    return {"loss": jnp.where(counted, losses * weights, 0), "accuracy": right * weights, "weight": weights}
