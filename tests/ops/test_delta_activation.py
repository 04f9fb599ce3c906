"""Delta activations: values, gradients, penalties and metrics against loops; delta inference against quantised inference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.layers import delta_activation as layer
from deltajax.ops import delta_activation as ops

SHAPE = (2, 5, 6, 7, 3)


def draw(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("steps", ["channel", "layer", "neuron"])
def test_gradients(steps):
    """dz passes; the step's gradient is summed over what shares it, with the sign of each rule."""
    z, w = draw(), draw(seed=1)
    config = layer.Config(steps=steps, init_step=0.3)
    step = layer.init(jax.random.key(0), config, SHAPE[2:])["step"]
    step = step * np.where(np.arange(step.size).reshape(step.shape) % 2, -1, 1)  # |step| counts
    q = np.broadcast_to(np.abs(step), z.shape)
    level = np.round(z / q)
    axes = tuple(range(z.ndim - step.ndim))
    for rule, local in (("raise", -level), ("lsq", level - z / q)):
        value, pull = jax.vjp(lambda z, s, rule=rule: ops.quantize(z, s, rule), z, step)
        np.testing.assert_allclose(value, level * q, rtol=1e-6)
        dz, dstep = pull(w)
        np.testing.assert_array_equal(dz, w)
        np.testing.assert_allclose(dstep, (w * local).sum(axes) * np.sign(step), rtol=1e-4, atol=1e-4)


def test_the_penalty_raises_steps():
    """By the paper's rule, whatever the activations do."""
    step = jnp.full(3, 0.2)
    gradient = jax.grad(lambda s: ops.sparsity_loss(ops.differences(ops.quantize(draw(), s)), 9.0))(step)
    assert (gradient < 0).all()


def test_lsq_gradient_is_the_derivative_where_rounding_is_passed_through():
    z, step, eps = draw(), np.float32(0.25), 1e-3
    level, rest = np.round(z / step), None
    want = (level * (step + eps) - level * (step - eps)) / (2 * eps) - z / step
    rest = jax.grad(lambda s: jnp.sum(ops.quantize(z, s, "lsq")))(step)
    np.testing.assert_allclose(rest, want.sum(), rtol=1e-3, atol=1e-2)


def test_outputs_and_state():
    z = draw()
    config = layer.Config(init_step=0.4)
    params = layer.init(jax.random.key(0), config, SHAPE[2:])
    o, none = layer.apply(params, config, z)
    delta, _ = layer.apply(params, config, z, output="delta")
    only, _ = layer.apply(params, config, z, output="delta_only")
    assert none is None and only.shape[1] == SHAPE[1] - 1
    np.testing.assert_allclose(np.cumsum(delta, axis=1), o, atol=1e-5)
    np.testing.assert_array_equal(delta[:, 1:], only)
    state = layer.init_state(2, SHAPE[2:])
    first, state = layer.apply(params, config, z[:, :2], output="delta", state=state)
    second, state = layer.apply(params, config, z[:, 2:], output="delta_only", state=state)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), delta)
    reset, _ = layer.apply(params, config, z[:, 2:3], output="delta", state=layer.init_state(2, SHAPE[2:]))
    np.testing.assert_array_equal(reset[:, 0], o[:, 2])


def test_equal_levels_have_no_difference_when_compiled():
    """Steps whose multiples are rounded; the compiler may fuse the product into the subtraction."""
    z, step = draw((2, 12, 16)), jnp.full(16, 0.1)
    level = np.round(z / np.asarray(step))
    share = jax.jit(lambda z, step: ops.nonzeros(ops.differences(ops.quantize(z, step))))(z, step)
    assert float(share) == pytest.approx(np.mean(np.diff(level, axis=1) != 0))


def test_delta_inference_equals_quantised_inference():
    """Two dense layers on deltas only, in two calls: the linear maps accumulate, biases belong to the sums."""
    rng = np.random.default_rng(3)
    weights = [rng.standard_normal((6, 8)), rng.standard_normal((8, 4))]
    biases = [rng.standard_normal(8), rng.standard_normal(4)]
    z = draw((2, 9, 6))
    with jax.enable_x64(True):
        config = layer.Config(init_step=0.3)
        params = [{"step": jnp.full(n, 0.3)} for n in (6, 8, 4)]
        want, _ = layer.apply(params[0], config, jnp.asarray(z, jnp.float64))
        for w, b, p in zip(weights, biases, params[1:], strict=True):
            want, _ = layer.apply(p, config, jax.nn.relu(want @ w + b))
        states = [layer.init_state(2, (n,), jnp.float64) for n in (6, 8, 4)]
        parts = []
        for part in (z[:, :4], z[:, 4:]):
            d, states[0] = layer.apply(
                params[0], config, jnp.asarray(part, jnp.float64), output="delta", state=states[0]
            )
            for i, (w, b) in enumerate(zip(weights, biases, strict=True), 1):
                d, states[i] = layer.accumulate(params[i], config, d @ w, b, states[i])
            parts.append(d)
        np.testing.assert_allclose(np.cumsum(np.concatenate(parts, axis=1), axis=1), want, atol=1e-12)


def smooth_count(tiles):
    tiles = np.asarray(tiles)
    return np.mean(tiles / (tiles + tiles[tiles > 0].mean()))


def test_penalties_and_metrics_against_loops():
    d = np.round(draw() * 0.4)
    tile, tiles, changed = 4, [], 0
    for b, t, i, j in itertools.product(range(2), range(5), range(0, 6, tile), range(0, 7, tile)):
        block = d[b, t, i : i + tile, j : j + tile]
        tiles.append(np.sqrt((block**2).sum() / (tile * tile * 3)))
        changed += block.any()
    assert float(ops.tile_sparsity_loss(d, 7.0, tile)) == pytest.approx(7 * smooth_count(tiles), rel=1e-5)
    assert float(ops.changed_tiles(d, tile)) == pytest.approx(changed / len(tiles))
    assert float(ops.sparsity_loss(d, 7.0)) == pytest.approx(7 * np.abs(d).mean(), rel=1e-5)
    assert float(ops.tile_sparsity_loss(d * 1e-3, 7.0, tile)) == pytest.approx(7 * smooth_count(tiles), rel=1e-5)
    assert ops.tile_sparsity_loss(0 * d, 7.0, tile) == 0
    gradient = jax.grad(lambda d: ops.tile_sparsity_loss(d, 1.0, tile))(jnp.asarray(d).at[:, :, :4, :4].set(0))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[:, :, :4, :4].any()
    # What is left of a tile is pushed away harder than a part of one that changed much.
    d = jnp.zeros((1, 1, 4, 8, 1)).at[0, 0, :, :4].set(1.0).at[0, 0, 0, 4].set(0.1)
    gradient = jax.grad(lambda d: ops.tile_sparsity_loss(d, 1.0, 4))(d)[0, 0, 0, :, 0]
    assert gradient[4] > 10 * gradient[0] > 0


def test_operation_sparsity_is_the_share_of_products_with_a_zero():
    """Counted one by one, for dense layers of different widths."""
    rng = np.random.default_rng(0)
    layers = {"a": (rng.integers(-1, 2, 5), 3), "b": (rng.integers(-1, 2, 7), 11)}
    done = sum(1 for x, fan_out in layers.values() for value, _ in itertools.product(x, range(fan_out)) if value)
    every = sum(len(x) * fan_out for x, fan_out in layers.values())
    got = ops.operation_sparsity(
        {k: float(ops.nonzeros(x)) for k, (x, _) in layers.items()},
        {k: fan_out for k, (_, fan_out) in layers.items()},
        {k: len(x) for k, (x, _) in layers.items()},
    )
    assert got == pytest.approx(1 - done / every)


def test_errors():
    for value in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="init_step must be a number > 0"):
            layer.Config(init_step=value)
    with pytest.raises(ValueError, match="steps must be one of channel, layer, neuron"):
        layer.Config(steps="pixel")
    with pytest.raises(ValueError, match="does not broadcast"):
        ops.quantize(jnp.zeros((2, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match="step_gradient must be one of"):
        ops.quantize(jnp.zeros((2, 3)), jnp.ones(3), "none")
    with pytest.raises(ValueError, match="output must be one of"):
        layer.apply({"step": jnp.ones(3)}, layer.Config(), jnp.zeros((1, 2, 3)), output="all")
