"""Values of the wrong type are refused when a config is built, whichever class it is of."""

import dataclasses
import re
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from deltajax import data
from deltajax.data import formal, moving_digits, text, ucf101, vision
from deltajax.hard_batches import HardBatches
from deltajax.layers import attention, delta, delta_activation
from deltajax.massive_activations.features import Architecture
from deltajax.models import autoencoder, delta_lm, efficientnet, frames, gpt_neox, lm, registry, resnet
from deltajax.training import serialize
from deltajax.training.config import (
    Checkpoint,
    Evaluation,
    NonFinite,
    Optimizer,
    Sampling,
    Schedule,
    TrainConfig,
    load_config,
)

LM = lm.Config(
    vocab_size=264, d_model=8, pattern=("a",), mixers={"a": attention.Config(num_heads=1, head_dim=4)}, mlp_dim=8
)
DATA = text.Config(corpus="somewhere")
EXAMPLES = {  # of the classes whose fields do not all have defaults
    attention.Config: attention.Config(num_heads=4, head_dim=4),
    autoencoder.Config: autoencoder.Config(backbone=LM, max_length=4),
    delta.Config: delta.Config(num_heads=1, head_dim=4),
    delta_lm.Config: delta_lm.Config(lm=LM),
    efficientnet.Config: efficientnet.b4(),
    efficientnet.Stage: efficientnet.Stage("fused", 8),
    frames.Config: frames.Config(network=resnet.Config(), frame_size=(8, 8)),
    gpt_neox.Config: gpt_neox.Config(vocab_size=264, d_model=32, num_layers=1, num_heads=4),
    lm.Config: LM,
    text.Config: DATA,
    ucf101.Config: ucf101.Config(folder="somewhere", splits="somewhere"),
    Architecture: Architecture(layers=1, d_model=8, num_heads=1, mlp_dim=8),
    TrainConfig: TrainConfig(model=LM, data=DATA, steps=200),
}


def config_classes() -> list[type]:
    """Every dataclass that a config of a run can hold, as the annotations say."""
    waiting, classes = [TrainConfig, Architecture, *registry.MODELS, *data.LOADERS], []
    while waiting:
        hint = waiting.pop()
        if dataclasses.is_dataclass(hint):
            if hint not in classes:
                classes.append(hint)
                waiting += typing.get_type_hints(hint).values()
        else:
            waiting += typing.get_args(hint)
    return classes


def example_of(kind: type):
    """A valid config of a class."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return kind(**dict.fromkeys(needed, 4))


CLASSES = config_classes()


def test_every_config_class_is_looked_at():
    assert {Optimizer, Sampling, delta.Config, HardBatches, efficientnet.Squeeze, formal.Config} <= set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_no_field_takes_what_it_is_not_annotated_with(kind):
    """One line with the field's name, the value and its type."""
    config = example_of(kind)
    for field in dataclasses.fields(kind):
        for value in (b"bytes", {"a", "b"}, object, 1j, [None, [b""]]):
            with pytest.raises(ValueError) as caught:
                dataclasses.replace(config, **{field.name: value})
            said = str(caught.value)
            assert field.name in said
            assert re.search(rf"\((bytes|set|type|complex|list|NoneType)\)|got {type(value).__name__}$", said)
            assert "\n" not in said


def fields_of(scalar: type) -> list:
    """(class, field) of every field that holds just this, or None."""
    return [
        pytest.param(kind, name, id=f"{kind.__module__}.{kind.__name__}.{name}")
        for kind in CLASSES
        for name, hint in typing.get_type_hints(kind).items()
        if hint in (scalar, scalar | None)
    ]


@pytest.mark.parametrize("kind, name", fields_of(int))
def test_integers(kind, name):
    """Integers of NumPy and JAX become Python's. Floats and truth values are refused, whatever their value."""
    config = example_of(kind)
    value = getattr(config, name)
    good = 4 if value is None else value
    for given in (np.int64(good), np.array(good), jnp.asarray(good)):
        made = getattr(dataclasses.replace(config, **{name: given}), name)
        assert type(made) is int and made == good
    for given in (float(good), np.float32(good), True, np.bool_(True), str(good), np.array([good])):
        with pytest.raises(ValueError, match=rf"{name} must be an integer( or none)?, got "):
            dataclasses.replace(config, **{name: given})


@pytest.mark.parametrize("kind, name", fields_of(float))
def test_numbers(kind, name):
    """Those of NumPy and integers become floats; one that is not a number is outside every range."""
    config = example_of(kind)
    value = getattr(config, name)
    good = 0.5 if value is None else value
    given = [np.float64(good), np.float32(good), jnp.float32(good)] + [int(good)] * (good == int(good))
    for number in given:
        made = getattr(dataclasses.replace(config, **{name: number}), name)
        assert type(made) is float and made == pytest.approx(good, rel=1e-6)
    if kind is not Architecture:  # which has no ranges of them
        with pytest.raises(ValueError, match=r"must be|allowed"):
            dataclasses.replace(config, **{name: float("nan")})
    for wrong in ("fast", True, 10**400):
        with pytest.raises(ValueError, match=rf"{name} must be a number( or none)?, got "):
            dataclasses.replace(config, **{name: wrong})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lm.Config(264, 64.0, ("a",), {}), "lm.Config.d_model must be an integer, got 64.0 (float)"),
        (lambda: Schedule(warmup_steps=0.1), "Schedule.warmup_steps must be an integer, got 0.1 (float)"),
        (lambda: Checkpoint(keep=3.0), "Checkpoint.keep must be an integer, got 3.0 (float)"),
        (lambda: Evaluation(batches=2.0), "Evaluation.batches must be an integer or none, got 2.0 (float)"),
        (lambda: Optimizer(name="adm"), "Optimizer.name must be one of adamw, muon, sgd, got 'adm' (str)"),
        (lambda: Optimizer(trainable="head"), "Optimizer.trainable must be a tuple (text, ...), got 'head' (str)"),
        (lambda: Optimizer(trainable=["a", 3]), "Optimizer.trainable[1] must be text, got 3 (int)"),
        (lambda: lm.Config(264, 8, "ab", {}), "lm.Config.pattern must be a tuple (text, ...), got 'ab' (str)"),
        (lambda: lm.Config(264, 8, ("a",), None), "lm.Config.mixers must be a mapping from text to "),
        (
            lambda: lm.Config(264, 8, ("a",), {"a": None}),
            "lm.Config.mixers['a'] must be attention.Config, delta.Config or linear_attention.Config, got None",
        ),
        (lambda: ucf101.Config("a", "b", split=True), "ucf101.Config.split must be one of 1, 2, 3, got True (bool)"),
        (lambda: TrainConfig(LM, DATA, 11.5), "TrainConfig.steps must be an integer, got 11.5 (float)"),
        (
            lambda: TrainConfig(LM, DATA, 200, sampling=None),
            "TrainConfig.sampling must be Sampling, got None (NoneType)",
        ),
        (lambda: TrainConfig(LM, LM, 200), "data must be a config of one of deltajax.data.text.Config, "),
        (lambda: TrainConfig(DATA, DATA, 200), "model must be a config of one of deltajax.models.lm.Config, "),
        (lambda: TrainConfig(LM, DATA, 200, prompt="\ud800"), r"TrainConfig.prompt must be text, got '\ud800' (str)"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


def test_what_means_the_same_is_converted():
    """So that equal configs are equal, can be hashed and stored."""
    made = TrainConfig(LM, DATA, np.int64(200), seed=np.uint32(7), nonfinite=NonFinite(max_grad_norm=1))
    assert made == TrainConfig(LM, DATA, 200, seed=7, nonfinite=NonFinite(max_grad_norm=1.0))
    assert serialize.from_json(serialize.to_json(made)) == made
    assert type(made.nonfinite.max_grad_norm) is float
    of_lists = frames.Config(resnet.Config(), np.array([8, 8]), delta_activation.Config(), init_steps=[["a", 1]])
    assert of_lists == frames.Config(resnet.Config(), (8, 8), delta_activation.Config(), init_steps=(("a", 1.0),))
    assert text.Config("a", lengths=range(1, 3)).lengths == (1, 2)
    assert vision.Config(name=np.str_("digits")) == vision.Config()
    named = lm.Config(264, 8, [np.str_("a")], {np.str_("a"): attention.Config(num_heads=1, head_dim=4)})
    assert {type(name) for name in (*named.pattern, *named.mixers)} == {str}
    assert moving_digits.Config(speed=1) == moving_digits.Config(speed=1.0)


def test_a_config_of_an_older_deltajax_with_integers_for_floats():
    stored = serialize.to_json(TrainConfig(LM, DATA, 200))
    stored["optimizer"]["weight_decay"] = 0
    made = serialize.from_json(stored)
    assert type(made.optimizer.weight_decay) is float
    stored["schedule"]["warmup_steps"] = 0.5
    with pytest.raises(ValueError, match=r"^config\.schedule: Schedule\.warmup_steps must be an integer, got 0\.5"):
        serialize.from_json(stored)


@pytest.mark.parametrize(
    "line, part",
    [
        ("class Policy(hard_batches.HardBatches): pass\nMINE = Policy()", "vision.Config.selection must be "),
        ("MINE = hard_batches.HardBatches(delta='x')", "line 4: ValueError: HardBatches.delta must be a number"),
    ],
)
def test_a_config_file_with_a_value_that_could_not_be_stored(line, part, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from deltajax import hard_batches\nfrom deltajax.data import vision\nfrom deltajax.models import resnet\n"
        f"{line}\nfrom deltajax.training.config import TrainConfig\n"
        "def get_config():\n"
        "    return TrainConfig(resnet.Config(), vision.Config(selection=MINE), 200)\n"
    )
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"--config={path}")
