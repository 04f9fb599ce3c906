"""Weights are refused by a network of the same shapes that computes something else."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltajax.interop import architectures, vision
from deltajax.layers import batch_norm
from deltajax.layers.param import is_spec
from deltajax.models import efficientnet, mobilenet, registry, resnet

TF = {"padding": "same", "norm": batch_norm.Config(eps=1e-3)}
SLIM = mobilenet.v2(0.35, num_classes=3)  # mobilenetv2_035


def arrays(config, layout="timm"):
    """Zeros by PyTorch name."""
    module, names = registry.module_of(config), vision.tensor_names(config, layout)
    trees = (module.param_specs(config), module.init_stats(config))
    leaves = [leaf for tree in trees for leaf in jax.tree.leaves_with_path(tree, is_leaf=is_spec)]
    shapes = {names[vision._path(path)]: leaf.shape for path, leaf in leaves}
    return {
        name: np.zeros((shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1], np.float32)
        for name, shape in shapes.items()
    }


def with_activation(config, name):
    stages = tuple(dataclasses.replace(stage, activation=name) for stage in config.stages)
    return dataclasses.replace(config, activation=name, stages=stages)


def with_stage(config, **changes):
    return dataclasses.replace(config, stages=(*config.stages[:-1], dataclasses.replace(config.stages[-1], **changes)))


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_the_activation_that_is_not_in_the_weights(layout, tmp_path, capfd):
    """MobileNetV2, whatever the file is called, into relu: refused in one line. Into relu6: taken, and said what for."""
    config = mobilenet.v2(0.35 if layout == "timm" else 1.0)
    name = "mobilenetv2_035" if layout == "timm" else "mobilenet_v2"
    path = tmp_path / "weights.safetensors"
    save_file(arrays(config, layout), path)
    with pytest.raises(
        ValueError, match=rf"of {name} \(by the shapes .*, made for activation = relu6 \(the config has relu\)"
    ) as error:
        vision.load(path, with_activation(config, "relu"))
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "and 5 more" in str(error.value)
    with pytest.raises(ValueError, match=r"activation = relu6 \(the config has relu\)"):
        vision.from_tensors(arrays(config, layout), with_activation(config, "relu"))
    capfd.readouterr()
    vision.load(path, config)
    said = capfd.readouterr().out
    assert said == (
        f"weights of {name} (by the shapes of its arrays): activation = relu6, padding = symmetric, norm.eps = 1e-05; "
        "pixels in [0, 1] normalised by (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)\n"
    )
    other = dataclasses.replace(with_activation(config, "relu"), num_classes=7)
    with pytest.raises(ValueError, match="made for activation = relu6"):
        vision.load(path, other, new_head=jax.random.key(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(SLIM, padding="same"), r"padding = symmetric \(the config has same\)"),
        (dataclasses.replace(SLIM, norm=batch_norm.Config(eps=1e-3)), r"norm.eps = 1e-05 \(the config has 0.001\)"),
        (with_stage(SLIM, stride=2), r"stages\[6\].stride = 1 \(the config has 2\)"),
        (with_stage(SLIM, activation="silu"), r"stages\[6\].activation = relu6 \(the config has silu\)"),
    ],
)
def test_other_settings_that_are_not_in_the_weights(config, message):
    with pytest.raises(ValueError, match=f"made for {message}; weights of your own"):
        vision.from_tensors(arrays(SLIM), config)
    vision.from_tensors(arrays(SLIM), dataclasses.replace(SLIM, norm=batch_norm.Config(momentum=0.01), dropout=0.2))


def test_squeeze_and_excitation():
    config = mobilenet.v3_small(num_classes=3)
    tensors = arrays(config)
    vision.from_tensors(tensors, config)
    squeeze = dataclasses.replace(config.stages[-1].squeeze, gate="sigmoid")
    with pytest.raises(ValueError, match=r"mobilenetv3_small_100 or tf_.*stages\[4\].squeeze.gate = hard_sigmoid"):
        vision.from_tensors(tensors, with_stage(config, squeeze=squeeze))
    with pytest.raises(
        ValueError, match=r"of mobilenet_v3_small \(.*made for norm.eps = 0.001 \(the config has 1e-05\)"
    ):
        vision.from_tensors(arrays(config, "torchvision"), config)


@pytest.mark.parametrize("how", ["file", "metadata", "config", "given"])
def test_the_name_decides_between_equal_shapes(how, tmp_path, capfd):
    """Of EfficientNet-Lite0 there are timm's own weights, and TensorFlow's with other padding and epsilon."""
    stages = efficientnet.lite(0).stages
    config = efficientnet.lite(0, num_classes=3)
    path = tmp_path / ("tf_efficientnet_lite0-0aa007d2.safetensors" if how == "file" else "model.safetensors")
    full = "tf_efficientnet_lite0.in1k"
    save_file(arrays(config), path, metadata={"architecture": full} if how == "metadata" else {"format": "pt"})
    if how == "config":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": full, "num_classes": 3}))
    given = {"architecture": "tf_efficientnet_lite0"} if how == "given" else {}
    with pytest.raises(ValueError, match=r"of tf_efficientnet_lite0 \(.*padding = same .*norm.eps = 0.001"):
        vision.load(path, config, **given)
    capfd.readouterr()
    vision.load(path, efficientnet.lite(0, num_classes=3, **TF), **given)
    assert "normalised by (0.5, 0.5, 0.5) and (0.5, 0.5, 0.5)\n" in capfd.readouterr().out
    assert stages == config.stages


def test_a_family_of_another_size(tmp_path):
    """Its activation, padding and epsilon are known, though its sizes are not."""
    stages = (
        efficientnet.Stage("inverted", 8, 1, activation="relu6"),
        efficientnet.Stage("inverted", 8, 2, 3, 2, 2.0, activation="relu6"),
    )
    config = efficientnet.Config(8, stages, 16, activation="relu6", num_classes=3)
    for name, right, wrong in (
        ("mobilenetv2_tiny", config, with_activation(config, "relu")),
        ("mobilenetv2_tiny", config, with_stage(config, activation="relu")),
        ("mobilenetv2_100", config, dataclasses.replace(config, padding="same")),
        ("tf_efficientnet_lite9", dataclasses.replace(config, **TF), config),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(arrays(config), path)
        vision.load(path, right)
        with pytest.raises(ValueError, match=rf"of {name} \(by its file's name\), made for .* \(the config has"):
            vision.load(path, wrong)
    save_file(arrays(config), tmp_path / "tiny.safetensors")
    vision.load(tmp_path / "tiny.safetensors", with_activation(config, "relu"))


def test_equal_shapes_without_a_name(tmp_path, capfd):
    """Either is taken; the line says what the other would have been."""
    config, path = efficientnet.lite(0, num_classes=3), tmp_path / "model.safetensors"
    save_file(arrays(config), path)
    vision.load(path, config)
    out = capfd.readouterr().out
    assert out.startswith("weights of efficientnet_lite0 (by the shapes") and out.count("\n") == 1
    assert "tf_efficientnet_lite0, of the same shapes, has padding = same (the config has symmetric)" in out
    vision.load(path, dataclasses.replace(config, **TF))
    assert capfd.readouterr().out.startswith("weights of tf_efficientnet_lite0 (by the shapes")
    with pytest.raises(ValueError, match=r"efficientnet_lite0 or tf_efficientnet_lite0 .* made for"):
        vision.load(path, dataclasses.replace(config, padding="same"))


def test_weights_of_ones_own(tmp_path, capfd):
    """A name that is not known, or "other", is taken with any settings; a known name must be spelled right."""
    config, path = with_activation(SLIM, "relu"), tmp_path / "model.safetensors"
    save_file(arrays(SLIM), path)
    vision.load(path, config, architecture="other")
    assert capfd.readouterr().out.startswith(
        "weights of other (as given): taken with the config's activation = relu, padding"
    )
    with pytest.raises(
        ValueError, match=r"architecture must be one of .*mobilenetv2_035.* or other, got 'mobilnetv2_035'"
    ):
        vision.load(path, config, architecture="mobilnetv2_035")
    for content, refused in (
        ('{"architecture": "other"}', False),
        ("[]", True),
        ("{", True),
        ('{"architecture": 3}', True),
    ):
        (tmp_path / "config.json").write_text(content)
        if refused:
            with pytest.raises(ValueError, match="made for activation = relu6"):
                vision.load(path, config)
        else:
            vision.load(path, config)
    mine = resnet.resnet_small()
    save_file(arrays(mine), tmp_path / "small.safetensors")
    (tmp_path / "config.json").unlink()
    capfd.readouterr()
    vision.load(tmp_path / "small.safetensors", mine)
    assert (
        capfd.readouterr().out
        == "weights of an architecture that is not known: taken with the config's norm.eps = 1e-05\n"
    )


def test_known_architectures():
    """No name belongs to two networks of one library, and names in the libraries' files are recognised."""
    keys = [(a.name, layout) for a in architectures.known() for layout in a.layouts]
    assert len(keys) == len(set(keys)) > 50
    for text, name in (
        ("mobilenetv2_100.ra_in1k", "mobilenetv2_100"),
        ("mobilenetv2_110d_ra-77090ade", "mobilenetv2_110d"),
        ("mobilenet_v2-b0353104", "mobilenet_v2"),
        ("efficientnet_b4_rwightman-23ab8bcd", "efficientnet_b4"),
        ("tf_efficientnet_b4_ns-d6313a46", "tf_efficientnet_b4"),
        ("resnet50-11ad3fa6", "resnet50"),
        ("resnet50d_ra2-464e36ba", None),
        ("my_resnet50", None),
    ):
        assert architectures._known_name(text) == name, text


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (mobilenet.v2(0.5), 1_968_680),
        (mobilenet.v2(1.4), 6_108_776),
        (mobilenet.v2_deep(1.1, 1.2), 4_516_520),
        (efficientnet.lite(4), 13_006_568),
        (efficientnet.b(0), 5_288_548),
        (efficientnet.b(5), 30_389_784),
    ],
)
def test_parameter_counts_are_timms(config, parameters):
    assert efficientnet.num_params(config) == parameters
