"""Networks over frames: sparsities against counts written out by hand, penalties, where delta activations stand, training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import data, train
from deltajax.data import moving_digits
from deltajax.layers import delta_activation
from deltajax.models import efficientnet, frames, mobilenet, registry, resnet
from deltajax.training import metrics

SIZE = (24, 24)
CONFIG = frames.Config(
    resnet.resnet_small(blocks=(1, 1), widths=(4, 8), in_channels=2, num_classes=6),
    SIZE,
    delta_activation.Config(init_step=0.5),
    rate=1e-3,
)
# Products of one activation, by hand: kernel area times output channels, over the square of the stride, for every reader.
FAN_OUT = {
    "input": 9 * 4,
    "stem": 9 * 4,
    "stages.0.0.1": 9 * 4,
    "stages.0.0": 9 * 8 / 4 + 8 / 4,  # the strided convolution of the next block and its 1 x 1 shortcut
    "stages.1.0.1": 9 * 8,
    "stages.1.0": 6 / (12 * 12),  # the head reads the mean over pixels
}


def batch(seed=0, count=3):
    rng = np.random.default_rng(seed)
    clips = np.repeat(rng.standard_normal((count, 1, *SIZE, 2)), 4, axis=1)
    clips[:, 1:, 8:16, 8:16] += rng.standard_normal((count, 3, 8, 8, 2))
    weights = np.array([1, 1, 0][:count], np.float32)
    return {
        "frames": jnp.asarray(clips, jnp.float32),
        "targets": jnp.arange(count) % 6,
        "weights": jnp.asarray(weights),
    }


@pytest.fixture(scope="module")
def model():
    return frames.init(jax.random.key(0), CONFIG), frames.init_stats(CONFIG)


def sums_of(model, config, **arguments):
    return frames.loss_sums(*model, config, batch(), key=None, train=False, **arguments)[0]


def test_operation_sparsity_is_an_independent_count(model):
    """Products with a zero counted activation by activation, clips of weight 0 left out."""
    seen = {}
    frames.apply(*model, CONFIG, batch()["frames"], observe=seen.__setitem__)
    assert set(seen) == set(FAN_OUT)
    done, every, spatial = 0.0, 0.0, 0.0
    for place, o in seen.items():
        o = np.asarray(o)[:2]
        d = o[:, 1:] - o[:, :-1]
        done += np.count_nonzero(d) * FAN_OUT[place]
        spatial += np.count_nonzero(o[:, 1:]) * FAN_OUT[place]
        every += d.size * FAN_OUT[place]
    sums = sums_of(model, CONFIG)
    assert sums["weight"] == 2
    assert float(sums["temporal_sparsity"]) / 2 == pytest.approx(1 - done / every, abs=1e-5)
    assert float(sums["spatial_sparsity"]) / 2 == pytest.approx(1 - spatial / every, abs=1e-5)
    for place, o in seen.items():
        d = np.diff(np.asarray(o)[:2], axis=1)
        assert float(sums[f"sparsity/{place}"]) / 2 == pytest.approx(np.mean(d == 0), abs=1e-5)


def test_every_skipped_product_has_a_zero(model):
    """The products of one convolution counted by running it on the mask of changes, with kernels of ones."""
    seen = {}
    frames.apply(*model, CONFIG, batch()["frames"], observe=seen.__setitem__)
    changed = (np.diff(seen["stages.0.0.1"], axis=1) != 0).astype(np.float32).reshape(-1, 24, 24, 4)
    kernel = jnp.ones((3, 3, 4, 4))
    products = jax.lax.conv(changed.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), [(2, 2), (2, 2)])
    assert float(products.sum()) == np.count_nonzero(changed) * FAN_OUT["stages.0.0.1"]


def test_penalties(model):
    """Each by its definition; the rate scales it in the loss."""
    seen = {}
    frames.apply(*model, CONFIG, batch()["frames"], observe=seen.__setitem__)
    for penalty in ("temporal", "spatial", "tile"):
        sums = sums_of(model, dataclasses.replace(CONFIG, penalty=penalty))
        want = 0.0
        for place, o in seen.items():
            o = np.asarray(o)[:2]
            d = np.diff(o, axis=1)
            if penalty == "tile":
                side = 8 * o.shape[2] // 24
                tiles = d.reshape(2, 3, o.shape[2] // side, side, o.shape[3] // side, side, -1)
                of = np.sqrt((tiles**2).mean(axis=(3, 5, 6)))
                of = np.stack([clip / (clip + clip[clip > 0].mean()) for clip in of])
            else:
                of = np.abs(d if penalty == "temporal" else o)
            want += FAN_OUT[place] * of.mean()
        assert float(sums["penalty"]) / 2 == pytest.approx(want, rel=1e-4), penalty
        assert float(sums["loss"]) == pytest.approx(float(sums["cross_entropy"] + 1e-3 * sums["penalty"]), rel=1e-5)


def test_without_delta_activations_the_network_is_the_plain_one(model):
    plain = dataclasses.replace(CONFIG, delta=None, rate=0.0)
    x = batch()["frames"]
    logits, _ = frames.apply(*model, plain, x)
    want, _ = resnet.apply(model[0]["network"], model[1]["network"], CONFIG.network, x.reshape(-1, *SIZE, 2))
    np.testing.assert_array_equal(logits.reshape(-1, 6), want)
    fine = jax.tree.map(lambda x: x, model[0])
    fine["delta"] = jax.tree.map(lambda step: step * 1e-5, fine["delta"])
    np.testing.assert_allclose(frames.apply(fine, model[1], CONFIG, x)[0], logits, atol=1e-3)


def test_places():
    """As in the paper: the input, after every activation and residual add, nothing twice; steps of the shapes asked for."""
    names = list(frames.activations(resnet.resnet50(), (224, 224)))
    assert names[:5] == ["input", "stem", "stages.0.0.1", "stages.0.0.2", "stages.0.0"]
    assert len(names) == 2 + 16 * 3
    names = frames.activations(mobilenet.v3_small(), (64, 64))
    assert "stages.1.0.depthwise" in names and "last" in names
    assert isinstance(mobilenet.v3_small(), efficientnet.Config)
    for steps, shape in (("channel", (8,)), ("layer", ()), ("neuron", (12, 12, 8))):
        config = dataclasses.replace(CONFIG, delta=delta_activation.Config(steps=steps))
        assert frames.param_specs(config)["delta"]["stages.1.0"]["step"].shape == shape


def test_errors(model):
    with pytest.raises(ValueError, match=r"frames must be \[B, T >= 2, 24, 24, 2\], got \(3, 1, 24, 24, 2\)"):
        frames.loss_sums(*model, CONFIG, {**batch(), "frames": batch()["frames"][:, :1]}, key=None, train=False)
    for field, value, message in (
        ("rate", -1e-3, "rate must be a number >= 0"),
        ("penalty", "l0", "penalty must be one of temporal, tile, spatial"),
        ("frame_size", (24,), "frame_size must be a tuple \\(an integer, an integer\\), got"),
        ("tile", 0, "tile must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=r"network must be resnet.Config or efficientnet.Config, got"):
        dataclasses.replace(CONFIG, network=moving_digits.Config())


EXPERIMENT = """
import dataclasses
from deltajax.data import moving_digits
from deltajax.layers import delta_activation
from deltajax.models import frames, resnet
from deltajax.training.config import Checkpoint, Evaluation, Schedule, TrainConfig


def get_config(base: str = ""):
    network = resnet.resnet_small(blocks=(1,), widths=(4,), in_channels=2, num_classes=6)
    model = frames.Config(network, (24, 24), delta_activation.Config() if base else None, rate=1e-4 if base else 0.0)
    return TrainConfig(
        model=model,
        data=moving_digits.Config(size=24, frames=3, batch_size=4, validation_examples=8),
        steps=4,
        init_from=base,
        checkpoint=Checkpoint(every=4),
        evaluation=Evaluation(every=4),
        schedule=Schedule(warmup_steps=1),
        log_every=2,
    )
"""


def test_baseline_then_refinement_by_the_command(tmp_path, capfd):
    """What the refinement begins with is what the baseline ended with; sparsities are in the metrics and on the screen."""
    file, base, refined = tmp_path / "experiment.py", tmp_path / "base", tmp_path / "refined"
    file.write_text(EXPERIMENT)

    def run(workdir, argument="", *flags):
        code = train.main(["train", f"--config={file}{argument}", f"--workdir={workdir}", *flags])
        return code, *capfd.readouterr()

    code, _, error = run(base)
    assert code == 0, error
    code, out, _ = run(refined, f":base={base}", "--config.optimizer.learning_rate=1e-9")
    assert code == 0 and "parameters from step 4" in out and "temporal_sparsity 0." in out
    first, second = (
        next(row for row in metrics.read_rows(workdir) if "validation_loss" in row) for workdir in (base, refined)
    )
    # Steps of 0.1 and a learning rate of nothing: nearly the same network, far from a new one.
    assert abs(first["validation_cross_entropy"] - second["validation_cross_entropy"]) < 0.05
    assert {"validation_sparsity/stages.0.0", "validation_temporal_sparsity"} <= second.keys()
    assert "validation_tile_sparsity" in json.loads((refined / "summary.json").read_text())
    code, _, error = run(tmp_path / "other", f":base={tmp_path / 'none'}")
    assert code == 2, error
    assert "does not exist" in error and len(error.splitlines()) == 1


def test_steps_begin_where_their_place_says():
    config = dataclasses.replace(CONFIG, init_steps=(("input", 0.05), ("stages.0.0.", 3.0), ("stages", 4.0)))
    steps = {where: float(of["step"][0]) for where, of in frames.init(jax.random.key(0), config)["delta"].items()}
    assert steps["input"] == pytest.approx(0.05) and steps["stem"] == 0.5
    assert steps["stages.0.0.1"] == 3 and steps["stages.0.0"] == 4
    for given, message in (
        ((("stage7", 1.0),), "no place begins with 'stage7'; places: input, stem"),
        ((("stem", 0.0),), r"init_steps must have steps > 0 for names, got \('stem', 0.0\)"),
        ((("stem",),), r"init_steps\[0\] must be a tuple \(text, a number\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            frames.init(jax.random.key(0), dataclasses.replace(CONFIG, init_steps=given))
    with pytest.raises(ValueError, match="has none of"):
        dataclasses.replace(CONFIG, delta=None, init_steps=(("input", 1.0),))


def test_registered():
    assert registry.module_of(CONFIG) is frames


def test_moving_digits():
    """The class is the motion: pictures move or turn as named, the background stands still, digits are held out."""
    rng = np.random.default_rng(0)
    digit = np.zeros((8, 8), np.float32)
    digit[1, 2:6] = 1  # a bar in the upper half

    def centre(picture):
        rows, columns = np.indices(picture.shape)
        return np.array([(rows * picture).sum(), (columns * picture).sum()]) / picture.sum()

    for name, want in (("up", (-2, 0)), ("down", (2, 0)), ("left", (0, -2)), ("right", (0, 2))):
        pictures = moving_digits.motion(digit, name, 32, 5, 2.0, rng)
        np.testing.assert_allclose(np.diff([centre(p) for p in pictures], axis=0), [want] * 4, atol=1e-3)
    for name, sign in (("clockwise", 1), ("counterclockwise", -1)):
        pictures = moving_digits.motion(digit, name, 32, 4, 2.0, rng)
        middle = np.mean(
            [centre(p) for p in moving_digits.motion(digit, name, 32, 48, 2.0, np.random.default_rng(1))], 0
        )
        ours = np.array([centre(p) for p in moving_digits.motion(digit, name, 32, 48, 2.0, np.random.default_rng(1))])
        angle = np.unwrap(np.arctan2(ours[:, 1] - middle[1], middle[0] - ours[:, 0]))
        np.testing.assert_allclose(np.diff(angle), sign * np.pi / 12, atol=0.03)
        assert pictures.shape == (4, 32, 32)
    config = moving_digits.Config(batch_size=4)
    dataset = data.load(config)
    example = dataset.train[5]
    assert example["frames"].shape == (6, 32, 32, 2) and example["frames"].dtype == np.float32
    np.testing.assert_array_equal(example["frames"][1:, ..., 0], example["frames"][:-1, ..., 1])
    np.testing.assert_array_equal(example["frames"], data.load(config).train[5]["frames"])
    assert not np.array_equal(dataset.train[5]["frames"], dataset.validation[5]["frames"])
    assert {int(dataset.train[i]["targets"]) for i in range(60)} == set(range(6))
    still, restless = (data.load(moving_digits.Config(flicker=x)).train[5]["frames"] for x in (0.0, 0.1))
    noise = (restless - still)[..., 0]
    assert (
        noise.std() == pytest.approx(0.1, rel=0.05) and abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    )
    with pytest.raises(ValueError, match="flicker must be a number in"):
        moving_digits.Config(flicker=1)
    with pytest.raises(ValueError, match="for the digit to stay in the picture"):
        moving_digits.Config(frames=20)
    with pytest.raises(ValueError, match="noise must be a number in"):
        moving_digits.Config(noise=-0.1)
