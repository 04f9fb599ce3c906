"""Inputs of the delta product, and any implementation against the recurrence in float64. Needs x64 enabled."""

import jax
import jax.numpy as jnp
import numpy as np

from deltajax.ops import delta_product

NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def draw(seed, b, t, r, h, hv, key_dim, value_dim, gate=None, beta=None, cosine=0.0, dtype="float32"):
    """Unit keys with the given cosine between them; arguments by name, in `dtype`."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    # Split the dimensions so that the common part is orthogonal to the rest and the cosine is exact on average.
    k = np.sqrt(cosine) * unit(b, 1, 1, h, key_dim) + np.sqrt(1 - cosine) * unit(b, t, r, h, key_dim)
    arguments = {
        "q": unit(b, t, h, key_dim),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(b, t, r, hv, value_dim)),
        "beta": rng.uniform(0, 2, (b, t, r, hv)) if beta is None else np.full((b, t, r, hv), beta),
        "initial_state": rng.normal(size=(b, hv, key_dim, value_dim)),
    }
    if gate is not None:
        shape = (b, t, hv, key_dim) if gate == "channel" else (b, t, hv)
        arguments["g"] = -np.exp(rng.normal(size=shape) * 2 - 3)
        if gate == "strong":  # long memory broken by near-complete erasure: cumulative sums would cancel
            arguments["g"] = np.where(rng.uniform(size=shape) < 0.05, -50.0, -1e-3)
    return {name: jnp.asarray(x, dtype) for name, x in arguments.items()}


def evaluate(arguments, implementation, segment_ids=None, scale=None):
    """(outputs, gradients) of a random projection of both outputs, as float64 arrays by name."""

    def loss(arguments, weights):
        o, state = delta_product(
            *(arguments.get(name) for name in NAMES[:5]),
            initial_state=arguments["initial_state"],
            segment_ids=segment_ids,
            scale=scale,
            implementation=implementation,
        )
        total = sum(jnp.sum(w * x.astype(jnp.float64)) for w, x in zip(weights, (o, state), strict=True))
        return total, {"o": o, "final_state": state}

    b, t, _, hv, value_dim = arguments["v"].shape
    rng = np.random.default_rng(99)
    weights = (
        jnp.asarray(rng.normal(size=(b, t, hv, value_dim))),
        jnp.asarray(rng.normal(size=arguments["initial_state"].shape)),
    )
    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arguments, weights)
    return outputs, gradients


def relative_rms(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.sqrt(np.sum((actual - expected) ** 2) / max(np.sum(expected**2), 1e-300))


def compare(arguments, implementation, output_tolerance, gradient_tolerance, **keywords):
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
    expected = evaluate(exact, "reference", **keywords)
    actual = evaluate(arguments, implementation, **keywords)
    for group, tolerance in zip((0, 1), (output_tolerance, gradient_tolerance), strict=True):
        for name, x in expected[group].items():
            assert np.all(np.isfinite(np.asarray(actual[group][name], np.float64))), name
            assert relative_rms(actual[group][name], x) < tolerance, (name, relative_rms(actual[group][name], x))
