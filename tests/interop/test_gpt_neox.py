"""Hugging Face directories of GPT-NeoX: transformers' logits from its files, ours back to its layout, what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltajax.interop import gpt_neox as interop
from deltajax.models import gpt_neox
from deltajax.ops.taps import capture

GOLDEN = Path(__file__).parent / "golden"  # made by make_gpt_neox_golden.py
FORMS = ["gpt_neox_shards", "gpt_neox_float16"]


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_blocks_of_transformers(form):
    params, config = interop.load(GOLDEN / form)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    golden = np.load(GOLDEN / form / "golden.npz")
    apply = capture(lambda params: gpt_neox.apply(params, config, golden["tokens"])[0], {"residual": lambda x: x})
    logits, seen = jax.jit(apply)(params)
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()
    np.testing.assert_allclose(seen["residual"], golden["blocks"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (50_000, 2)])
def test_written_back_and_read_again(shard_bytes, files, tmp_path):
    """Every tensor of the library's own file, bit for bit; then our reader on our files."""
    params, config = interop.load(GOLDEN / "gpt_neox_float16")
    interop.save(params, config, tmp_path, dtype="float16", shard_bytes=shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    written = {name: x for path in paths for name, x in load_file(path).items()}
    theirs = load_file(GOLDEN / "gpt_neox_float16" / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, x in theirs.items():
        assert written[name].dtype == np.float16
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    again, same = interop.load(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_our_own_parameters_survive(tmp_path):
    config = gpt_neox.Config(17, 24, 2, 3, mlp_dim=40, rotary_fraction=0.5)
    params = gpt_neox.init(jax.random.key(0), config)
    interop.save(params, config, tmp_path)
    again, same = interop.load(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ValueError, match="no place for sink = 'kv', gated = True"):
        interop.save(params, gpt_neox.Config(17, 24, 2, 3, sink="kv", gated=True), tmp_path)


def edited(tmp_path, tensors=None, config=None):
    """A copy of the float16 directory with tensors dropped, renamed or replaced and config fields changed."""
    directory = shutil.copytree(GOLDEN / "gpt_neox_float16", tmp_path / "model")
    content = load_file(directory / "model.safetensors")
    for name, x in (tensors or {}).items():
        content.pop(name, None)
        if x is not None:
            content[name] = x
    save_file(content, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return directory


LAYER = "gpt_neox.layers.1."


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"embed_out.weight": None}, {}, "missing: embed_out.weight"),
        (
            {f"{LAYER}attention.query_key_value.{k}": None for k in ("weight", "bias")},
            {},
            "missing: gpt_neox.layers.1.attention.query_key_value.bias, gpt_neox.layers.1.attention.query_key_value.weight",
        ),
        ({}, {"num_hidden_layers": 4}, r"missing: gpt_neox.layers.3.attention.dense.bias, .*, and 9 more"),
        ({"other": np.ones(2)}, {}, "not part of the model: other"),
        ({f"{LAYER}mlp.dense_h_to_4h.bias": np.ones(7)}, {}, r"dense_h_to_4h.bias must have shape \(96,\), got \(7,\)"),
        ({}, {"model_type": "llama"}, "model_type must be 'gpt_neox', got 'llama'"),
        ({}, {"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({}, {"hidden_size": None}, "hidden_size is missing"),
        ({}, {"hidden_size": 33}, "d_model must be a multiple of num_heads = 4, got 33"),
    ],
)
def test_wrong_directories_are_named(tensors, config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        interop.load(edited(tmp_path, tensors, config))
    assert "\n" not in str(error.value)


def test_bfloat16(tmp_path):
    content = load_file(GOLDEN / "gpt_neox_float16" / "model.safetensors")
    params, _ = interop.load(edited(tmp_path, {name: x.astype(jnp.bfloat16) for name, x in content.items()}))
    embed = content["gpt_neox.embed_in.weight"]
    np.testing.assert_array_equal(params["embed"], embed.astype(jnp.bfloat16).astype(np.float32))


def test_buffers_of_older_versions_are_passed_over(tmp_path):
    buffers = {f"{LAYER}attention.bias": np.ones(3), f"{LAYER}attention.rotary_emb.inv_freq": np.ones(2)}
    params, _ = interop.load(edited(tmp_path, buffers))
    jax.tree.map(np.testing.assert_array_equal, params, interop.load(GOLDEN / "gpt_neox_float16")[0])


def test_incomplete_and_damaged_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        interop.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no config"):
        interop.load(tmp_path)
    shutil.copy(GOLDEN / "gpt_neox_float16" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        interop.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin but no safetensors; pickle files are refused"):
        interop.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        interop.load(tmp_path)
    shards = shutil.copytree(GOLDEN / "gpt_neox_shards", tmp_path / "shards")
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard model-00002-of-00003.safetensors is missing \(1 in all\)"):
        interop.load(shards)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling must be None, got {'type': 'linear'"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 4.0},
            "rope_parameters.rope_type must be 'default', got 'yarn'",
        ),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 4.0}, "rope_parameters.factor is not supported, got 4.0"),
        ("rope_parameters", {"rope_type": "default", "type": "linear"}, "rope_type must be 'default', got 'linear'"),
        ("rope_theta", 5e5, "rope_theta must be in rope_parameters; got 500000.0 beside 10000"),
        ("quantization_config", {"bits": 4}, "quantization_config must be None, got {'bits': 4}"),
    ],
)
def test_rotary_embeddings_that_are_scaled(field, value, said, tmp_path):
    """Nothing that changes the mathematics is read as if it were not there."""
    raw = json.loads((GOLDEN / FORMS[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, field: value}))
    with pytest.raises(ValueError) as caught:
        interop.read_config(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
