"""A checkpoint whose bits have changed is not used, and what is used is what was saved."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.errors import RunError
from deltajax.training import checksums, pretrained
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.loop import make_step

RNG = np.random.default_rng(0)
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def array(shape, dtype):
    return jnp.asarray(RNG.integers(0, 2 if dtype == "bool" else 200, shape)).astype(dtype)


def cut(x, *parts):
    """The array as a sharded one: every combination of the slices of its axes is a shard, each with a replica."""
    whole = np.asarray(x)
    shards = []
    for where in np.ndindex(*map(len, parts)):
        index = tuple(part[n] for part, n in zip(parts, where, strict=True))
        shards += [SimpleNamespace(index=index, data=whole[index], replica_id=replica) for replica in range(2)]
    return SimpleNamespace(shape=whole.shape, dtype=whole.dtype, addressable_shards=shards)


def slices(*bounds):
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_give_the_checksum_of_the_whole(dtype):
    """Also where a shard begins within 64 bits, and along several axes at once."""
    x, y = array((6, 5, 11), dtype), array((29,), dtype)
    for sharded in (
        cut(x, slices(0, 6), slices(0, 5), slices(0, 11)),
        cut(x, slices(0, 2, 3, 6), slices(0, 5), slices(0, 11)),
        cut(x, slices(0, 4, 6), slices(0, 1, 5), slices(0, 3, 8, 11)),
    ):
        assert checksums.partial_sums([sharded]) == checksums.partial_sums([x])
    assert checksums.partial_sums([cut(y, slices(0, 7, 16, 29))]) == checksums.partial_sums([y])


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_every_single_bit_counts(dtype):
    x = np.asarray(array((3, 5), dtype))
    expected = checksums.partial_sums([jnp.asarray(x)])
    for bit in range(8 * x.nbytes):
        changed = bytearray(x.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        other = jnp.asarray(np.frombuffer(bytes(changed), x.dtype).reshape(x.shape))
        assert checksums.partial_sums([other]) != expected, bit


def test_what_else_a_checksum_tells_apart():
    """Rows that changed places, types and shapes; empty arrays and scalars have one too."""
    x = array((4, 6), "float32")

    def of(tree):
        return checksums.checksums(tree, checksums.partial_sums(tree))

    tree = {"x": x, "empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2)}
    assert checksums.mismatch(tree, checksums.partial_sums(tree), of(tree)) is None
    for other in (x[::-1], x.reshape(6, 4), x.astype(jnp.int32)):
        problem = checksums.mismatch({"x": other}, checksums.partial_sums({"x": other}), of(tree))
        assert problem.startswith("['x'] has checksum ")
    assert "no such array" in checksums.mismatch({"y": x}, checksums.partial_sums({"y": x}), of(tree))


def flips(folder: Path, count: int):
    """(file, bit) of bits spaced evenly over all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.cumsum([8 * path.stat().st_size for path in files])
    for place in np.linspace(0, sizes[-1] - 1, count, dtype=int) ^ 5:
        place = min(place, sizes[-1] - 1)
        n = int(np.searchsorted(sizes, place, side="right"))
        yield files[n], int(place - (sizes[n - 1] if n else 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of threads of Orbax
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("item", ["params", "rest", "progress"])
def test_flipped_bits_are_noticed(item, finished, tmp_path, tiny_config, capfd):
    """Of a flip anywhere in a checkpoint's files the values are right, or the checkpoint is not used."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    newest = Checkpoints(workdir, read_only=True).steps()[-1]
    abstract = make_step(tiny_config).abstract
    expected = Checkpoints(workdir, read_only=True).restore(abstract, tiny_config)
    used = Checkpoints(workdir, read_only=True)
    noticed = 0
    for file, bit in flips(workdir / "checkpoints" / str(newest) / item, 24):
        content = bytearray(file.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            step, state, progress = used.restore(abstract, tiny_config)
        except ValueError:  # the config in it is one that this version does not have
            assert item == "progress"
            noticed += 1
        else:
            noticed += step != newest
            if step == newest:
                jax.tree.map(np.testing.assert_array_equal, state, expected[1])
                assert progress == expected[2]
        file.write_bytes(whole)
    assert noticed >= 8
    assert used.restore(abstract, tiny_config)[0] == newest


def test_a_flipped_value_is_named_and_the_one_before_is_used(finished, tmp_path, run_train, monkeypatch, capfd):
    """By training, and by all that reads a model; where there is none before, it is an error."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    before, newest = Checkpoints(workdir, read_only=True).steps()[-2:]
    partial_sums = checksums.partial_sums
    calls = iter(range(100))

    def damaged(tree):
        return partial_sums(tree) + np.uint64(next(calls) == 0)  # as if the first arrays that are read had changed

    monkeypatch.setattr(checksums, "partial_sums", damaged)
    capfd.readouterr()
    assert pretrained.load(workdir).step == before
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"checkpoint of step {newest} in" in err and "has checksum" in err
    calls = iter(range(100))
    code, out, err = run_train(workdir, "--config.steps=13")
    assert (code, err.count("\n")) == (0, 1), err
    assert f"using step {before}" in err and f"continuing after step {before}" in out
    for step in Checkpoints(workdir, read_only=True).steps()[:-1]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    calls = iter([0, 1])
    with pytest.raises(RunError, match=r"^checkpoint of step 13 in .* cannot be read: params\['"):
        pretrained.load(workdir)


def test_checkpoints_without_checksums_are_read(finished, monkeypatch):
    """Older versions wrote none."""
    stored = Checkpoints._stored
    monkeypatch.setattr(
        Checkpoints, "_stored", lambda self, step: {k: x for k, x in stored(self, step).items() if k != "checksums"}
    )
    assert pretrained.load(finished).step == 12
