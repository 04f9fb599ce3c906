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
    """What `cross_entropy_sums` sums."""
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = jnp.argmax(logits, axis=-1) == targets
    return {"loss": losses * weights, "accuracy": right * weights, "weight": weights}
