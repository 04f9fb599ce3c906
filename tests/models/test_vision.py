"""Convolutional networks: sizes, outputs and statistics of timm's and torchvision's own, weight files, the tap."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltajax.interop import vision
from deltajax.layers import batch_norm
from deltajax.models import efficientnet, mobilenet, registry, resnet

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from vision_weights import images, weight  # noqa: E402

TENSORFLOW = {"padding": "same", "norm": batch_norm.Config(eps=1e-3)}
CONFIGS = {
    "resnet18": resnet.resnet18(),
    "resnet50": resnet.resnet50(),
    "tf_efficientnet_b4": efficientnet.b4(**TENSORFLOW),
    "efficientnet_b4": efficientnet.b4(),
    "tf_efficientnetv2_s": efficientnet.v2_s(**TENSORFLOW),
    "efficientnet_v2_s": efficientnet.v2_s(),
    "mobilenetv3_small_100": mobilenet.v3_small(),
    "mobilenet_v3_small": mobilenet.v3_small(norm=batch_norm.Config(momentum=0.01, eps=1e-3)),
    "mobilenetv2_100": mobilenet.v2(),
    "mobilenet_v2": mobilenet.v2(),
    "efficientnet_lite0": efficientnet.lite(0),
    "tf_efficientnet_lite0": efficientnet.lite(0, **TENSORFLOW),
}
SMALL = resnet.resnet_small(widths=(8, 16), blocks=(1, 1), in_channels=1, num_classes=4)


@functools.cache
def golden() -> dict:
    return json.loads((GOLDEN / "vision.json").read_text())


def tensors(name: str) -> dict[str, np.ndarray]:
    return {key: weight(key, tuple(shape)) for key, shape in golden()[name]["shapes"].items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_the_published_one(name):
    assert registry.module_of(CONFIGS[name]).num_params(CONFIGS[name]) == golden()[name]["parameters"]


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_the_original(name):
    """Weights in the original's names; evaluation, and for four of them training with what it moves."""
    config, expected = CONFIGS[name], golden()[name]
    params, stats = vision.from_tensors(tensors(name), config)
    x = images(expected["size"])
    apply = jax.jit(registry.module_of(config).apply, static_argnames=("config", "train"))
    logits, same = apply(params, stats, config, x)
    assert_close(logits[:, :8], expected["logits"])
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    if name not in ("resnet18", "efficientnet_v2_s", "mobilenetv3_small_100", "mobilenet_v3_small"):
        return
    trained, moved = apply(params, stats, config, x, train=True)
    assert_close(trained[:, :8], expected["training_logits"])
    names = vision.tensor_names(config, "torchvision" if "features.0.0.weight" in expected["shapes"] else "timm")
    by_name = {names[vision._path(path)]: value for path, value in jax.tree.leaves_with_path(moved)}
    for key, value in expected["moved"].items():
        np.testing.assert_allclose(by_name[key][:2], value, rtol=2e-3, atol=1e-4, err_msg=key)


def assert_close(ours, theirs):
    """Float32 against the original in float64."""
    theirs = np.array(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max(), rtol=0)


def test_weight_files(tmp_path):
    """Counters are ignored; a new head leaves the file's alone; what does not fit is named, in one line."""
    whole = tensors("mobilenetv3_small_100") | {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    path = tmp_path / "weights.safetensors"
    save_file(whole, path)
    config = CONFIGS["mobilenetv3_small_100"]
    params, stats = vision.load(path, config)
    np.testing.assert_array_equal(params["stem"]["conv"], whole["conv_stem.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(stats["stages"][1][1]["project"]["norm"]["var"], whole["blocks.1.1.bn3.running_var"])
    ten = mobilenet.v3_small(num_classes=10)
    params, _ = vision.load(path, ten, new_head=jax.random.key(0))
    assert params["head"]["weight"].shape == (1024, 10)
    fresh = jax.eval_shape(lambda key: efficientnet.init(key, ten), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    for config, message in (
        (ten, r"classifier\.bias has shape \(1000,\), which does not fit \(10,\)"),
        (resnet.resnet18(), r"conv1\.weight is missing.* and \d+ more"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            vision.load(path, config)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"extra\.weight is not part of the model"):
        vision.from_tensors({**whole, "extra.weight": np.zeros(1)}, CONFIGS["mobilenetv3_small_100"])
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        vision.load(path, ten)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        vision.load(tmp_path / "absent", ten)


def test_tap_sees_what_convolutions_read_and_may_change_it():
    params, stats = resnet.init(jax.random.key(0), SMALL), resnet.init_stats(SMALL)
    x = images(8)[..., :1]
    seen = {}

    def record(where, activations):
        seen[where] = activations
        return activations

    logits, _ = resnet.apply(params, stats, SMALL, x, tap=record)
    assert list(seen) == ["input", "stem", "stages.0.0.1", "stages.0.0", "stages.1.0.1", "stages.1.0"]
    assert seen["stages.1.0"].shape == (2, 4, 4, 16)
    assert all(np.all(value >= 0) for where, value in seen.items() if where != "input")
    for where in seen:
        changed, _ = resnet.apply(params, stats, SMALL, x, tap=lambda at, y, where=where: y * (1 + (at == where)))
        assert np.abs(changed - logits).max() > 1e-4, where


def test_folded_norm_equals_the_norm():
    params, stats = resnet.init(jax.random.key(0), SMALL), resnet.init_stats(SMALL)
    x = images(8)[..., :1]
    for n in range(3):  # statistics that differ from their start
        _, stats = resnet.apply(params, stats, SMALL, x * (n + 1) + n, train=True)
    unit, running = params["stem"], stats["stem"]
    unit["norm"]["scale"] = unit["norm"]["scale"] * 1.7 + 0.1
    expected, _ = resnet.conv_norm.apply(unit, running, SMALL.norm, x, train=False)
    kernel, bias = batch_norm.fold(unit["norm"], running["norm"], SMALL.norm, unit["conv"])
    np.testing.assert_allclose(resnet.conv_norm.conv2d.apply(kernel, x) + bias, expected, atol=1e-5)


def test_statistics_move_only_in_training_and_by_the_momentum():
    stats = {"mean": jnp.array([1.0]), "var": jnp.array([2.0])}
    params = {"scale": jnp.array([3.0]), "bias": jnp.array([-1.0])}
    x = jnp.array([1.0, 2.0, 6.0])[:, None]
    config = batch_norm.Config(momentum=0.25, eps=1e-3)
    y, same = batch_norm.apply(params, stats, config, x, train=False)
    assert same is stats
    np.testing.assert_allclose(y[:, 0], (x[:, 0] - 1) / np.sqrt(2.001) * 3 - 1, rtol=1e-6)
    y, moved = batch_norm.apply(params, stats, config, x, train=True)
    np.testing.assert_allclose(y[:, 0], (x[:, 0] - 3) / np.sqrt(14 / 3 + 1e-3) * 3 - 1, rtol=1e-6)
    np.testing.assert_allclose([moved["mean"][0], moved["var"][0]], [0.75 * 1 + 0.25 * 3, 0.75 * 2 + 0.25 * 7])


def test_loss_and_bfloat16():
    """Weights of zero take an example out of the loss; bfloat16 stays near, with float32 gradients and statistics."""
    batch = {"images": images(8)[..., :1], "targets": np.array([1, 3]), "weights": np.array([1.0, 0.0], np.float32)}
    params, stats = resnet.init(jax.random.key(0), SMALL), resnet.init_stats(SMALL)
    sums, _ = resnet.loss_sums(params, stats, SMALL, batch, key=None, train=False)
    logits, _ = resnet.apply(params, stats, SMALL, batch["images"])
    assert float(sums["loss"]) == pytest.approx(-float(jax.nn.log_softmax(logits[0])[1]), rel=1e-5)
    assert (sums["weight"], sums["accuracy"]) == (1, float(jnp.argmax(logits[0]) == 1))

    def loss(params, dtype):
        config = resnet.resnet_small(widths=(8, 16), blocks=(1, 1), in_channels=1, num_classes=4, dtype=dtype)
        sums, moved = resnet.loss_sums(params, stats, config, batch, key=None, train=True)
        return sums["loss"], moved

    results = [jax.value_and_grad(loss, has_aux=True)(params, dtype) for dtype in ("float32", "bfloat16")]
    assert float(results[1][0][0]) == pytest.approx(float(results[0][0][0]), abs=0.05)
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in jax.tree.leaves(results[1]))


def test_dropout_and_stochastic_depth_need_a_key():
    stages = (efficientnet.Stage("fused", 8, 1, 3, 1, 2), efficientnet.Stage("inverted", 8, 2, expansion=2.0))
    config = efficientnet.Config(8, stages, 16, in_channels=1, num_classes=4, dropout=0.5, drop_path=0.9)
    params, stats = efficientnet.init(jax.random.key(0), config), efficientnet.init_stats(config)
    x = images(8)[..., :1]
    plain, again = (efficientnet.apply(params, stats, config, x)[0] for _ in range(2))
    np.testing.assert_array_equal(plain, again)
    first, second = (efficientnet.apply(params, stats, config, x, key=jax.random.key(n))[0] for n in (1, 2))
    assert np.abs(first - second).max() > 1e-4
    batch = {"images": x, "targets": np.array([1, 3]), "weights": np.ones(2, np.float32)}
    sums = [
        efficientnet.loss_sums(params, stats, config, batch, key=jax.random.key(n), train=False)[0]["loss"]
        for n in (1, 2)
    ]
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet.Config(blocks=(1, 2), widths=(8,)), "blocks and widths must be equally many integers >= 1"),
        (lambda: resnet.Config(stem="large"), "stem must be one of imagenet, small, got 'large'"),
        (lambda: resnet.Config(dropout=1.0), r"dropout must be a number in \[0, 1\), got 1.0"),
        (lambda: batch_norm.Config(momentum=0.0), r"momentum must be a number in \(0, 1\], got 0.0"),
        (lambda: efficientnet.Stage("dense", 8), "block must be one of inverted, fused, got 'dense'"),
        (lambda: efficientnet.Stage("fused", 8, kernel=4), "kernel must be odd, got 4"),
        (lambda: efficientnet.Stage("fused", 8, 2, expansion=(1.0,)), "expansion must be .* repeats = 2 of them"),
        (lambda: efficientnet.Config(8, (), 8), "stages must hold at least one stage"),
        (lambda: mobilenet.v3_small(activation="tanh"), "activation must be one of relu, .*got 'tanh'"),
    ],
)
def test_bad_configs_are_named(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
