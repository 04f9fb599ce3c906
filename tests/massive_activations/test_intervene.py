"""Overwriting the largest activations of one block: which values, and which block."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.interop import gpt_neox as interop
from deltajax.massive_activations import intervene, surface
from deltajax.models import gpt_neox
from deltajax.ops.taps import tag


def test_what_each_mode_writes():
    x = jnp.array([[[9.0, 1, 2], [3, -8, 1]], [[1, 2, 3], [7, 1, -6]]])
    expected = {
        "none": x,
        "zero": [[[0, 1, 2], [3, 0, 1]], [[1, 2, 3], [0, 1, 0]]],
        "mean": [[[8, 1, 2], [3, -5, 1]], [[1, 2, 3], [8, 1, -4]]],
        "neighbours": [[[9, 0, 2], [3, -8, 0]], [[1, 2, 3], [0, 0, -6]]],
    }
    for mode, y in expected.items():
        np.testing.assert_array_equal(intervene.overwrite(x, mode, 2, jnp.array([8.0, -5, -4])), y, err_msg=mode)
    with pytest.raises(ValueError, match="mode must be one of none, zero, mean, neighbours, got 'median'"):
        intervene.overwrite(x, "median", 2)


def test_more_values_than_there_are():
    with pytest.raises(ValueError, match="top must be an integer from 1 to 6, the values of a sequence, got 7"):
        intervene.massive(jnp.ones((2, 3, 2)), 7)


@pytest.mark.parametrize("top", [0, -1, 2.0, True])
def test_top_must_be_a_number_of_values(top):
    with pytest.raises(ValueError, match="top must be an integer from 1 to 6"):
        intervene.massive(jnp.ones((2, 3, 2)), top)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exactly_top_values_of_equals(dtype):
    """The first of them, and none of the padding."""
    x = jnp.ones((2, 4, 8), dtype).at[1, 3, 7].set(1.001)
    assert np.flatnonzero(intervene.massive(x, 5)[0]).tolist() == [0, 1, 2, 3, 4]
    mask = jnp.array([[False, True, True, False]] * 2)
    chosen = intervene.massive(x.at[:, 0].set(100), 5, mask)
    assert np.flatnonzero(chosen[0]).tolist() == [8, 9, 10, 11, 12] and not chosen[:, ~mask[0]].any()
    assert intervene.massive(x, 20, mask).sum() == 2 * 16


def stack(params, batch):
    """Two blocks, and a loss that leaves out masked positions."""
    x = batch["x"]
    for p in params:
        x = tag(x + p, "residual")
    weight = batch.get("segment_ids", jnp.ones(x.shape[:2])) > 0
    return {"loss": jnp.sum(jnp.abs(x) * weight[..., None]), "weight": jnp.sum(weight)}


def test_a_block_that_is_not_there():
    """An intervention that would happen nowhere is an error, not a loss without change."""
    batch = {"x": jnp.ones((1, 2, 3))}
    for layer in (-1, 2, 0.5, 1.0, True):
        with pytest.raises(ValueError, match=f"layer must be a block's number, 0 to 1, got {layer}"):
            intervene.losses(stack, jnp.ones(2), [batch], [0, layer], 1)
        with pytest.raises(ValueError, match=f"layer must be a block's number, 0 to 1, got {layer}"):
            intervene.intervened(stack, layer, lambda x: 0 * x)(jnp.ones(2), batch)
        with pytest.raises(ValueError, match=f"layer must be a block's number, 0 to 1, got {layer}"):
            surface.magnitudes(stack, jnp.ones(2), batch, layer)
    assert intervene.intervened(stack, 1, lambda x: 0 * x)(jnp.ones(2), batch)["loss"] == 0


def test_batches_are_read_once_and_there_is_one():
    batches = [{"x": jnp.arange(12.0).reshape(2, 2, 3) + n} for n in range(2)]
    assert intervene.losses(stack, jnp.ones(2), iter(batches), [1], 2) == intervene.losses(
        stack, jnp.ones(2), batches, [1], 2
    )
    with pytest.raises(ValueError, match="layers must name at least one block, got none"):
        intervene.losses(stack, jnp.ones(2), batches, [], 1)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        intervene.losses(stack, jnp.ones(2), [], [0], 1)


def test_one_channel_has_no_neighbours():
    with pytest.raises(ValueError, match="mode 'neighbours' needs at least 2 channels, got 1"):
        intervene.overwrite(jnp.ones((1, 4, 1)), "neighbours", 1)


def test_padding_is_neither_massive_nor_overwritten():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    padded = {"x": jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=50.0)}
    padded["segment_ids"] = jnp.pad(jnp.ones((2, 5), int), ((0, 0), (0, 3)))
    plain = intervene.losses(stack, jnp.ones(2), [{"x": x}], [0, 1], 3)
    for layer, by_mode in intervene.losses(stack, jnp.ones(2), [padded], [0, 1], 3).items():
        assert by_mode == pytest.approx(plain[layer], rel=1e-6)
    block, size = surface.magnitudes(stack, jnp.ones(2), padded)
    expected_block, expected = surface.magnitudes(stack, jnp.ones(2), {"x": x})
    assert block == expected_block and np.isnan(size[5:]).all()
    np.testing.assert_array_equal(size[:5], expected)


GOLDEN = Path(__file__).parents[1] / "interop/golden"


def test_a_checkpoint_of_hugging_face_s(tmp_path, capsys):
    """Loss before and after on a text, against one computed from the library's layout by hand."""
    text = tmp_path / "text"
    text.write_bytes(bytes(i * i % 67 for i in range(200)))
    flags = [f"--checkpoint={GOLDEN / 'gpt_neox_float16'}", f"--text={text}", "--tokenizer=byte"]
    assert intervene.main(["", *flags, "--batches=2", "--length=30", "--layer=1", "--top=2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[1:]] == [["gpt_neox_float16", "1", "2", mode] for mode in intervene.MODES]
    params, config = interop.load(GOLDEN / "gpt_neox_float16")
    tokens = np.frombuffer(text.read_bytes()[:62], np.uint8).reshape(2, 31).astype(np.int32)
    logits, _ = gpt_neox.apply(params, config, tokens[:, :-1])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()
    assert float(rows[1][4]) == pytest.approx(float(expected), abs=2e-5)
    assert all(float(row[5]) != 0 for row in rows[2:])


def constant_model(params, batch):
    """Two blocks; the first adds a constant of 50 in channel 1 at the first token, which the second must find there.

    The loss is the squared distance of that constant from 50 as the second block sees it.
    """
    x = batch["x"].at[:, 0, 1].add(params)
    x = tag(x, "residual")
    loss = jnp.sum((x[:, 0, 1] - 50) ** 2)
    x = tag(x * jnp.array([1.0, 0, 1]), "residual")
    return {"loss": loss, "weight": jnp.float32(len(x))}


def test_zero_destroys_what_is_a_constant_and_its_mean_does_not():
    """The paper's finding, in a model made to show it; the second block's output no longer matters."""
    batches = [{"x": np.asarray(jax.random.normal(jax.random.key(i), (4, 5, 3)))} for i in range(3)]
    found = intervene.losses(constant_model, jnp.float32(50), batches, [0, 1], top=1)
    assert found[0]["none"] == pytest.approx(np.mean([b["x"][:, 0, 1] ** 2 for b in batches]), rel=1e-4)
    assert found[0]["zero"] == pytest.approx(2500)
    assert found[0]["mean"] == pytest.approx(np.mean([b["x"][:, 0, 1] for b in batches]) ** 2, abs=1e-3)
    assert found[0]["neighbours"] == pytest.approx(found[0]["none"])
    assert set(found[1].values()) == {found[0]["none"]}
