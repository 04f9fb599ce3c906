"""GPT-NeoX weights (Pythia's) between Hugging Face's safetensors directories and our parameters.

params, config = load("pythia-160m-step1000")        # config.json, model.safetensors or its shards
save(params, config, "mine")                         # transformers reads it
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltajax.layers.param import abstract_params
from deltajax.models import gpt_neox

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
# Buffers of older versions of transformers: what they hold follows from the config.
_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq", "rotary_emb.inv_freq")

# Path of our parameter -> its name there; {} is the block. All others have their axes turned: products there are W x.
_NAMES = {
    "embed": "gpt_neox.embed_in.weight",
    "head": "embed_out.weight",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "layers.attention_norm.scale": "gpt_neox.layers.{}.input_layernorm.weight",
    "layers.attention_norm.bias": "gpt_neox.layers.{}.input_layernorm.bias",
    "layers.mlp_norm.scale": "gpt_neox.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.bias": "gpt_neox.layers.{}.post_attention_layernorm.bias",
    "layers.attention.o": "gpt_neox.layers.{}.attention.dense.weight",
    "layers.attention.o_bias": "gpt_neox.layers.{}.attention.dense.bias",
    "layers.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "layers.up_bias": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
    "layers.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "layers.down_bias": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
}
_FUSED = "gpt_neox.layers.{}.attention.query_key_value.{}"  # rows: per head its queries, its keys, its values


def load(directory: str | Path) -> tuple[dict, gpt_neox.Config]:
    """(parameters in float32, config) of a directory as transformers writes it, in float32, float16 or bfloat16.

    Raises:
      FileNotFoundError: no such directory, or no config.json or weights in it.
      ValueError: pickle files only (they can run code: refused), another architecture, a damaged file, or tensors that
        are missing, too many or of another shape; the message names the first.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _Tensors(directory)
    params = _from_tensors(tensors, config, str(directory))
    return params, config


def save(
    params: dict,
    config: gpt_neox.Config,
    directory: str | Path,
    dtype: Literal["float32", "float16"] = "float32",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that `load` and transformers read.

    Args:
      directory: made if missing; files of the same names are replaced.
      shard_bytes: weights that are larger go into several files with an index.

    Raises:
      ValueError: the model has parameters for which Hugging Face's layout has no name (sink "kv", gated).
    """
    if config.sink is not None or config.gated:
        raise ValueError(f"the layout has no place for sink = {config.sink!r}, gated = {config.gated}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x, dtype) for name, x in _to_tensors(params, config)}
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = x
    if len(shards) == 1:
        save_file(tensors, directory / SINGLE, {"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (directory / "config.json").write_text(json.dumps(_config_json(config, dtype), indent=1) + "\n")


def read_config(directory: str | Path) -> gpt_neox.Config:
    """The config of a directory; fields that it leaves out have transformers' defaults.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"weights: {str(directory)!r} is not a directory")
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"weights: {str(directory)!r} holds no config.json")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights: {path}: not JSON: {error}") from None
    rope: Any = raw.get("rope_parameters") or {} if isinstance(raw, dict) else None
    if not isinstance(rope, dict):
        raise ValueError(f"weights: {path}: not a model's config, which is a mapping, as is its rope_parameters")
    expected = {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "quantization_config": None,
    }
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise ValueError(f"weights: {path}: {key} must be {value!r}, got {raw[key]!r}")
    kind = next((rope[key] for key in ("rope_type", "type") if rope.get(key, "default") != "default"), "default")
    if kind != "default":
        raise ValueError(f"weights: {path}: rope_parameters.rope_type must be 'default', got {kind!r}")
    unknown = sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ValueError(f"weights: {path}: rope_parameters.{unknown[0]} is not supported, got {rope[unknown[0]]!r}")
    rotary = {
        "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25)),
        "rope_theta": rope.get("rope_theta", raw.get("rotary_emb_base", 10000)),
    }
    for key, used in rotary.items():  # transformers reads these names in rope_parameters only
        if raw.get(key, used) != used:
            raise ValueError(f"weights: {path}: {key} must be in rope_parameters; got {raw[key]!r} beside {used!r}")
    missing = [
        key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if key not in raw
    ]
    if missing:
        raise ValueError(f"weights: {path}: {missing[0]} is missing")
    try:
        return gpt_neox.Config(
            vocab_size=raw["vocab_size"],
            d_model=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            mlp_dim=raw.get("intermediate_size"),
            rotary_fraction=rotary["partial_rotary_factor"],
            rotary_base=rotary["rope_theta"],
            parallel_residual=raw.get("use_parallel_residual", True),
            norm_eps=raw.get("layer_norm_eps", 1e-5),
        )
    except ValueError as error:
        raise ValueError(f"weights: {path}: {error}") from None


def _config_json(config: gpt_neox.Config, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "use_parallel_residual": config.parallel_residual,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


class _Tensors(Mapping):
    """Names to arrays of all safetensors files of a directory, each array read when it is asked for."""

    def __init__(self, directory: Path):
        self._directory = directory
        index = directory / INDEX
        if index.exists():
            try:
                self._file_of = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) for file in self._file_of.values()):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"weights: {index}: not an index of safetensors shards") from None
            absent = sorted({f for f in self._file_of.values() if not (directory / f).exists()})
            if absent:
                raise FileNotFoundError(
                    f"weights: {str(directory)!r}: shard {absent[0]} is missing ({len(absent)} in all)"
                )
        elif (directory / SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(SINGLE, lambda file: list(file.keys())), SINGLE)
        else:
            pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
            if pickles:
                raise ValueError(
                    f"weights: {str(directory)!r} holds {pickles[0]} but no safetensors; pickle files are refused, for "
                    "reading one can run any code"
                )
            raise FileNotFoundError(f"weights: {str(directory)!r} holds neither {SINGLE} nor {INDEX}")

    def _open(self, name: str, read: Any) -> Any:
        path = self._directory / name
        try:
            with safe_open(str(path), framework="numpy") as file:
                return read(file)
        except (SafetensorError, OSError, TypeError) as error:
            raise ValueError(f"weights: {path} cannot be read: {error}") from None

    def __getitem__(self, name: str) -> np.ndarray:
        file_name = self._file_of[name]
        return self._open(file_name, lambda file: file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _from_tensors(tensors: Mapping[str, np.ndarray], config: gpt_neox.Config, where: str) -> dict:
    shapes = abstract_params(gpt_neox.param_specs(config))
    heads, width, layers = config.num_heads, config.d_model, config.num_layers
    fused = {"weight": (3 * width, width), "bias": (3 * width,)}
    wanted: dict[str, tuple[int, ...]] = {_FUSED.format(i, k): s for i in range(layers) for k, s in fused.items()}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        ours = _path(path)
        if ours in _NAMES:
            per_block = ours.startswith("layers.")
            shape = leaf.shape[1:] if per_block else leaf.shape
            shape = shape if ours == "embed" else shape[::-1]
            wanted |= {_NAMES[ours].format(i): shape for i in (range(layers) if per_block else (0,))}
    _check_names(tensors, wanted, where)

    def read(name: str) -> np.ndarray:
        x = np.asarray(tensors[name])
        if x.shape != wanted[name]:
            raise ValueError(f"weights: {where!r}: {name} must have shape {wanted[name]}, got {x.shape}")
        return x.astype(np.float32)

    def stacked(ours: str, leaf: jax.ShapeDtypeStruct) -> Array:
        kind = ours.removeprefix("layers.attention.")
        if kind[0] in "qkv" and kind in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
            part, suffix = "qkv".index(kind[0]), "bias" if kind.endswith("bias") else "weight"

            def one(i: int) -> np.ndarray:
                x = read(_FUSED.format(i, suffix)).reshape(heads, 3, width // heads, -1)[:, part]
                return x.reshape(width, -1).T.reshape(leaf.shape[1:])
        else:

            def one(i: int) -> np.ndarray:
                return read(_NAMES[ours].format(i)).T

        whole = np.empty(leaf.shape, np.float32)
        for i in range(layers):
            whole[i] = one(i)
        return jnp.asarray(whole)

    def make(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        ours = _path(path)
        if ours.startswith("layers."):
            return stacked(ours, leaf)
        x = read(_NAMES[ours])
        return jnp.asarray(x if ours == "embed" else x.T)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _check_names(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any], where: str) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(name for name in tensors.keys() - wanted.keys() if not name.endswith(_BUFFERS))
    for names, what in ((missing, "missing"), (extra, "not part of the model")):
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"weights: {where!r}: {what}: {', '.join(names[:3])}{more}")


def _to_tensors(params: dict, config: gpt_neox.Config) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        ours = _path(path)
        if ours not in _NAMES:
            continue
        x = np.asarray(leaf)
        if ours.startswith("layers."):
            yield from ((_NAMES[ours].format(i), one.T) for i, one in enumerate(x))
        else:
            yield _NAMES[ours], x if ours == "embed" else x.T
    attend = {name: np.asarray(x) for name, x in params["layers"]["attention"].items()}
    for suffix, names in (("weight", "qkv"), ("bias", ("q_bias", "k_bias", "v_bias"))):
        for i in range(config.num_layers):
            parts = [
                attend[name][i].reshape(-1, config.num_heads, config.d_model // config.num_heads) for name in names
            ]
            fused = np.stack(parts, axis=2).transpose(1, 2, 3, 0)  # [heads, 3, head dim, inputs]
            shape = (3 * config.d_model,) if suffix == "bias" else (3 * config.d_model, math.prod(fused.shape[3:]))
            yield _FUSED.format(i, suffix), fused.reshape(shape)


def _path(path: Any) -> str:
    return ".".join(str(key.key) for key in path)
