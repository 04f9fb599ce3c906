"""What weights were trained with and do not show, by architecture: activations, strides, padding, the norms' epsilon.

Weights of MobileNetV2 have the shapes of a network with relu as well as of one with relu6; in the wrong one they load and
misclassify. So the name of the architecture says what they are for, or their shapes, if a known architecture has them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from deltajax.layers import batch_norm
from deltajax.models import efficientnet, mobilenet, registry, resnet

Layout = Literal["timm", "torchvision"]
TF_EPS = batch_norm.Config(eps=1e-3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHER = "other"  # the name of what is none of these
# Beginnings of names, and a member: all sizes have its activation, padding and epsilon.
FAMILIES = {
    "mobilenetv2": "mobilenetv2_100",
    "mobilenet_v2": "mobilenet_v2",
    "efficientnet_lite": "efficientnet_lite0",
    "tf_efficientnet_lite": "tf_efficientnet_lite0",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network as its library defines it.

    Attributes:
      name: in the library.
      layouts: libraries that use this name for it.
      config: its settings.
      inputs: mean and deviation by which pixels in [0, 1] are normalised; None: they depend on the weights' tag.
    """

    name: str
    layouts: tuple[Layout, ...]
    config: Any
    inputs: tuple[tuple[float, ...], tuple[float, ...]] | None = IMAGENET


@functools.cache
def known() -> tuple[Architecture, ...]:
    """All architectures that this package can build and whose settings are recorded here."""
    timm, torchvision, both = ("timm",), ("torchvision",), ("timm", "torchvision")
    made: list[Architecture] = []

    def add(name: str, layouts: Any, config: Any, inputs: Any = IMAGENET) -> None:
        made.append(Architecture(name, layouts, config, inputs))

    for depth, blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
        add(f"resnet{depth}", both, resnet.Config(blocks=blocks))
    for depth, blocks in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))):
        add(f"resnet{depth}", both, resnet.Config(blocks=blocks, bottleneck=True))
    for n in range(len(efficientnet.SCALES)):
        torchvisions = n in (5, 6, 7)
        add(f"efficientnet_b{n}", timm if torchvisions or n == 8 else both, efficientnet.b(n))
        if torchvisions:
            add(f"efficientnet_b{n}", torchvision, efficientnet.b(n, norm=TF_EPS))
        add(f"tf_efficientnet_b{n}", timm, efficientnet.b(n, norm=TF_EPS, padding="same"), None)
    for n in range(5):
        add(f"efficientnet_lite{n}", timm, efficientnet.lite(n))
        add(f"tf_efficientnet_lite{n}", timm, efficientnet.lite(n, norm=TF_EPS, padding="same"), HALVES)
    add("efficientnet_v2_s", torchvision, efficientnet.v2_s())
    add("efficientnetv2_s", timm, efficientnet.v2_s(norm=batch_norm.Config()))
    add("tf_efficientnetv2_s", timm, efficientnet.v2_s(padding="same"), HALVES)
    for width in (35, 50, 75, 100, 140):
        add(f"mobilenetv2_{width:03}", timm, mobilenet.v2(width / 100))
    add("mobilenetv2_110d", timm, mobilenet.v2_deep(1.1, 1.2))
    add("mobilenetv2_120d", timm, mobilenet.v2_deep(1.2, 1.4))
    add("mobilenet_v2", torchvision, mobilenet.v2())
    add("mobilenetv3_small_100", timm, mobilenet.v3_small())
    add("tf_mobilenetv3_small_100", timm, mobilenet.v3_small(norm=TF_EPS, padding="same"), HALVES)
    add("mobilenet_v3_small", torchvision, mobilenet.v3_small(norm=TF_EPS))
    return tuple(made)


def name_of(path: Path, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(architecture, where it is named) of a file of weights: its metadata, a config.json beside it, or its own name."""
    if "architecture" in metadata:
        return metadata["architecture"], "by its metadata"
    beside = path.with_name("config.json")  # as timm's are distributed
    try:
        content = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and isinstance(content.get("architecture"), str):
        return content["architecture"], "by the config.json beside it"
    known_name = _known_name(path.stem) or _family(path.stem)
    return None if known_name is None else (path.stem, "by its file's name")


def _known_name(text: str) -> str | None:
    """The longest name of a known architecture that `text` begins with, as a whole."""
    names = {a.name for a in known() if re.match(rf"{a.name}(?![A-Za-z0-9])", text)}
    return max(names, key=len, default=None)


def _family(text: str) -> str | None:
    """The known architecture whose activation, padding and epsilon networks of such a name have."""
    return next((member for beginning, member in FAMILIES.items() if text.startswith(beginning)), None)


def check(config: Any, layout: Layout, named: tuple[str, str] | None) -> str:
    """Compare a config with what weights of its shapes are for; a line that says what is assumed of them.

    Args:
      config: that they are loaded for.
      layout: of their names; a ResNet's are the same in both.
      named: see `name_of`; a name that is of no known family is of one's own weights, for which any settings are taken.

    Raises:
      ValueError: the config has other settings than the architecture.
    """
    assumed = ", ".join(f"{name} = {value}" for name, value in settings(config).items() if "stages" not in name)
    of_name = None if named is None else _known_name(named[0])
    member = None if named is None else _family(named[0])
    if named is not None and of_name is None and member is None:
        return f"{named[0]} ({named[1]}): taken with the config's {assumed}"
    shapes = _shapes(_plain(config))
    layouts = ("timm", "torchvision") if isinstance(config, resnet.Config) else (layout,)
    same = [
        a
        for a in known()
        if type(a.config) is type(config) and set(a.layouts) & set(layouts) and _shapes(_plain(a.config)) == shapes
    ]
    how = "by the shapes of its arrays"
    if any(a.name == of_name for a in same) and named is not None:
        same, how = [a for a in same if a.name == of_name], named[1]
    if not same and member is not None and named is not None and isinstance(config, efficientnet.Config):
        (family,) = (a for a in known() if a.name == member)
        stages = tuple(dataclasses.replace(stage, activation=family.config.activation) for stage in config.stages)
        general = {name: getattr(family.config, name) for name in ("activation", "padding", "norm")}
        _refuse(named[0], named[1], _differences(dataclasses.replace(config, stages=stages, **general), config))
        return f"{named[0]} ({named[1]}): {assumed}"
    if not same:
        return f"an architecture that is not known: taken with the config's {assumed}"
    best = min(same, key=lambda a: len(_differences(a.config, config)))
    _refuse(" or ".join(a.name for a in same), how, _differences(best.config, config))
    rest = "".join(
        f"; {a.name}, of the same shapes, has {', '.join(_differences(a.config, config))}"
        for a in same
        if a.name != best.name and _differences(a.config, config)
    )
    inputs = "" if best.inputs is None else f"; pixels in [0, 1] normalised by {best.inputs[0]} and {best.inputs[1]}"
    return f"{best.name} ({how}): {assumed}{inputs}{rest}"


def _refuse(name: str, how: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights are of {name} ({how}), made for {', '.join(problems[:3])}{more}; weights of your own "
            f'say so by "architecture": "{OTHER}" in a config.json beside them'
        )


def settings(config: Any) -> dict[str, Any]:
    """Settings that no array's shape shows."""
    if isinstance(config, resnet.Config):
        return {"norm.eps": config.norm.eps}
    values = {"activation": config.activation, "padding": config.padding, "norm.eps": config.norm.eps}
    for i, stage in enumerate(config.stages):
        values[f"stages[{i}].activation"] = stage.activation
        values[f"stages[{i}].stride"] = stage.stride
        if stage.squeeze is not None:
            values[f"stages[{i}].squeeze.activation"] = stage.squeeze.activation
            values[f"stages[{i}].squeeze.gate"] = stage.squeeze.gate
    return values


def _differences(theirs: Any, ours: Any) -> list[str]:
    mine = settings(ours)
    return [
        f"{name} = {value} (the config has {mine.get(name)})"
        for name, value in settings(theirs).items()
        if mine.get(name) != value
    ]


def _plain(config: Any) -> Any:
    """With inputs and head of ImageNet, so that networks differ only in between."""
    return dataclasses.replace(config, in_channels=3, num_classes=1000)


@functools.lru_cache(maxsize=256)
def _shapes(config: Any) -> Any:
    specs = {name: tree for name, tree in registry.module_of(config).param_specs(config).items() if name != "head"}
    return jax.tree.map(lambda spec: spec.shape, specs)
