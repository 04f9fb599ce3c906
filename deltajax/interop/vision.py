"""Weights of torchvision's and timm's convolutional networks: safetensors files to our parameters and statistics."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from safetensors import SafetensorError, safe_open

from deltajax.interop import architectures
from deltajax.interop.architectures import Layout
from deltajax.layers.param import init_params
from deltajax.models import efficientnet, registry, resnet

Units = dict[str, tuple[str, str]]  # path of a `conv_norm` -> names of its convolution and its norm
Linears = dict[tuple[str, str], str]  # paths of weight and bias -> name


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load(
    path: str | Path,
    config: Any,
    *,
    new_head: PRNGKeyArray | None = None,
    architecture: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[dict, dict]:
    """(parameters, running statistics) in float32 from a safetensors file.

    What the weights do not show, such as the activation, must be what their architecture has (`architectures`).

    Args:
      path: weights of the same architecture, in the names of timm or of torchvision.
      config: of `models.resnet` or `models.efficientnet` (`models.mobilenet` too).
      new_head: draw the classifier from this key instead of reading it, to train on other classes.
      architecture: its library's name for it, such as "mobilenetv2_100"; "other": one's own, with any settings; None: what
        the file, a config.json beside it or its name says, else what its shapes are known for.
      say: called with a line that says what is assumed of the weights.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a safetensors file, or the file and the config differ; the message names the first differences.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            named = architectures.name_of(Path(path), file.metadata() or {}) if architecture is None else None
    except FileNotFoundError:
        raise FileNotFoundError(f"weights: {str(path)!r} does not exist") from None
    except (SafetensorError, TypeError, OSError) as error:
        raise ValueError(f"weights: {str(path)!r} is not a readable safetensors file: {error}") from None
    try:
        return _read(tensors, config, new_head, named if architecture is None else _given(architecture), say)
    except ValueError as error:
        raise ValueError(f"weights: {str(path)!r}: {error}") from None


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Any,
    *,
    new_head: PRNGKeyArray | None = None,
    architecture: str | None = None,
) -> tuple[dict, dict]:
    """(parameters, running statistics) from arrays by PyTorch name; see `load`."""
    named = None if architecture is None else _given(architecture)
    return _read(tensors, config, new_head, named, lambda line: None)


def _given(architecture: str) -> tuple[str, str]:
    names = sorted({a.name for a in architectures.known()})
    if architecture not in (*names, architectures.OTHER):
        raise ValueError(
            f"architecture must be one of {', '.join(names)} or {architectures.OTHER}, got {architecture!r}"
        )
    return architecture, "as given"


def _read(
    tensors: Mapping[str, np.ndarray],
    config: Any,
    new_head: PRNGKeyArray | None,
    named: tuple[str, str] | None,
    say: Callable[[str], None],
) -> tuple[dict, dict]:
    layout: Layout = "torchvision" if any(name.startswith("features.") for name in tensors) else "timm"
    names = tensor_names(config, layout)
    module = registry.module_of(config)
    specs = module.param_specs(config)
    drawn = {} if new_head is None else {"head": init_params(new_head, specs.pop("head"))}
    problems: list[str] = []
    used = set()

    def read(path: Any, leaf: Any) -> Any:
        name = names[_path(path)]
        used.add(name)
        if name not in tensors:
            problems.append(f"{name} is missing")
            return leaf
        x = _to_ours(np.asarray(tensors[name]), len(leaf.shape))
        if x.shape != leaf.shape:
            problems.append(f"{name} has shape {tensors[name].shape}, which does not fit {leaf.shape}")
        return jnp.asarray(x, jnp.float32)

    stats = jax.eval_shape(lambda: module.init_stats(config))
    read_params, read_stats = (jax.tree_util.tree_map_with_path(read, tree) for tree in (specs, stats))
    heads = {name for path, name in names.items() if path.startswith("head.")}
    ignored = {name for name in tensors if name.endswith("num_batches_tracked")} | (heads if drawn else set())
    problems += [f"{name} is not part of the model" for name in sorted(tensors.keys() - used - ignored)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the config: {', '.join(problems[:3])}{more}")
    say(f"weights of {architectures.check(config, layout, named)}{'; its classifier is left out' if drawn else ''}")
    return {**read_params, **drawn}, read_stats


def tensor_names(config: Any, layout: Layout) -> dict[str, str]:
    """Dotted path of every parameter and statistic of ours -> its PyTorch name."""
    if isinstance(config, resnet.Config):
        units, linears = _resnet(config)
    elif isinstance(config, efficientnet.Config):
        units, linears = (_timm if layout == "timm" else _torchvision)(config)
    else:
        raise ValueError(f"no weight layout is known for {type(config).__module__}.{type(config).__name__}")
    names = {}
    for path, (conv, norm) in units.items():
        names[f"{path}.conv"] = f"{conv}.weight"
        names |= {f"{path}.norm.{ours}": f"{norm}.{theirs}" for ours, theirs in _NORM.items()}
    for (weight, bias), name in linears.items():
        names |= {weight: f"{name}.weight", bias: f"{name}.bias"}
    return names


_HEAD, _HIDDEN = ("head.weight", "head.bias"), ("head.hidden", "head.hidden_bias")


def _resnet(config: resnet.Config) -> tuple[Units, Linears]:
    """Both libraries use the same names; a hidden layer of the head, which they do not have, is called "hidden"."""
    units = {"stem": ("conv1", "bn1")}
    for i, stage in enumerate(resnet.param_specs(config)["stages"]):
        for j, block in enumerate(stage):
            theirs = f"layer{i + 1}.{j}"
            for name in block:
                pair = ("downsample.0", "downsample.1") if name == "shortcut" else (f"conv{name}", f"bn{name}")
                units[f"stages.{i}.{j}.{name}"] = (f"{theirs}.{pair[0]}", f"{theirs}.{pair[1]}")
    hidden = {} if config.head_hidden is None else {_HIDDEN: "hidden"}
    return units, {**hidden, _HEAD: "fc"}


def _timm(config: efficientnet.Config) -> tuple[Units, Linears]:
    units: Units = {"stem": ("conv_stem", "bn1")}
    linears: Linears = {}
    for path, stage, block, _ in _blocks(config):
        theirs = path.replace("stages", "blocks")
        if stage.block == "fused":
            convolutions = {"expand": "conv_exp" if "project" in block else "conv", "project": "conv_pwl"}
        elif "expand" in block:
            convolutions = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        else:
            convolutions = {"depthwise": "conv_dw", "project": "conv_pw"}
        present = [name for name in convolutions if name in block]
        for n, name in enumerate(present, 1):
            units[f"{path}.{name}"] = (f"{theirs}.{convolutions[name]}", f"{theirs}.bn{n}")
        if "squeeze" in block:
            linears |= _squeeze(path, f"{theirs}.se.conv_reduce", f"{theirs}.se.conv_expand")
    if config.head_hidden is None:
        units["last"] = ("conv_head", "bn2")
    else:
        last = f"blocks.{len(config.stages)}.0"
        units["last"] = (f"{last}.conv", f"{last}.bn1")
        linears[_HIDDEN] = "conv_head"
    return units, {**linears, _HEAD: "classifier"}


def _torchvision(config: efficientnet.Config) -> tuple[Units, Linears]:
    units: Units = {"stem": ("features.0.0", "features.0.1")}
    linears: Linears = {}
    mobile = config.head_hidden is not None  # MobileNetV3 numbers blocks through, EfficientNet within a stage
    count = len(config.stages)
    if not any(stage.squeeze or stage.block == "fused" for stage in config.stages):
        return _mobilenet_v2(config)
    for path, _, block, index in _blocks(config):
        _, i, j = path.split(".")
        theirs = f"features.{index + 1}.block" if mobile else f"features.{int(i) + 1}.{j}.block"
        for n, name in enumerate(x for x in ("expand", "depthwise", "squeeze", "project") if x in block):
            if name == "squeeze":
                linears |= _squeeze(path, f"{theirs}.{n}.fc1", f"{theirs}.{n}.fc2")
            else:
                units[f"{path}.{name}"] = (f"{theirs}.{n}.0", f"{theirs}.{n}.1")
        count = index + 1 if mobile else count
    units["last"] = (f"features.{count + 1}.0", f"features.{count + 1}.1")
    if mobile:
        return units, {**linears, _HIDDEN: "classifier.0", _HEAD: "classifier.3"}
    return units, {**linears, _HEAD: "classifier.1"}


def _mobilenet_v2(config: efficientnet.Config) -> tuple[Units, Linears]:
    """Torchvision's names of a network without squeeze and excitation: blocks are numbered through, projections apart."""
    units: Units = {"stem": ("features.0.0", "features.0.1")}
    count = 0
    for path, _, block, index in _blocks(config):
        theirs, count = f"features.{index + 1}.conv", index + 1
        for n, name in enumerate(x for x in ("expand", "depthwise", "project") if x in block):
            last = name == "project"
            units[f"{path}.{name}"] = (
                (f"{theirs}.{n}", f"{theirs}.{n + 1}") if last else (f"{theirs}.{n}.0", f"{theirs}.{n}.1")
            )
    units["last"] = (f"features.{count + 1}.0", f"features.{count + 1}.1")
    return units, {_HEAD: "classifier.1"}


def _blocks(config: efficientnet.Config) -> Iterator[tuple[str, efficientnet.Stage, dict, int]]:
    """(path, stage, specs, index in the whole network) of every block."""
    index = 0
    for i, (stage, blocks) in enumerate(zip(config.stages, efficientnet.param_specs(config)["stages"], strict=True)):
        for j, block in enumerate(blocks):
            yield f"stages.{i}.{j}", stage, block, index
            index += 1


def _squeeze(path: str, reduce: str, expand: str) -> Linears:
    return {
        (f"{path}.squeeze.reduce", f"{path}.squeeze.reduce_bias"): reduce,
        (f"{path}.squeeze.expand", f"{path}.squeeze.expand_bias"): expand,
    }


def _to_ours(x: np.ndarray, ndim: int) -> np.ndarray:
    """[out, in, K, K] to [K, K, in, out]; a linear map, perhaps stored as a 1 x 1 convolution, to [in, out]."""
    if x.ndim == 4 and ndim == 2 and x.shape[2:] == (1, 1):
        x = x[:, :, 0, 0]
    if x.ndim == ndim == 4:
        return x.transpose(2, 3, 1, 0)
    return x.T if x.ndim == ndim == 2 else x


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
