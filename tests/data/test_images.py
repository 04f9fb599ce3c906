"""Digits, and tiny archives in the formats of CIFAR and STL-10."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from deltajax import data, train
from deltajax.data import vision
from deltajax.training import sweeps

RECIPES = str(Path(__file__).parents[2] / "experiments" / "hard_batches_paper.py")


def make_archive(folder, name, train=12, test=4, seed=0, change=lambda members: members):
    """An archive with the official name and members; returns the images and labels it was made of."""
    archive, rng, made, members = vision.ARCHIVES[name], np.random.default_rng(seed), [], {}
    for names, count in ((archive.train, train), (archive.test, test)):
        images = rng.integers(0, 256, (count, archive.size, archive.size, 3), np.uint8)
        labels = rng.integers(0, archive.classes, count)
        made.append((images, labels))
        planes = images.transpose(0, 3, 1, 2)
        if archive.labels:
            records = [
                bytes([7] * (archive.labels - 1) + [label]) + plane.tobytes()
                for plane, label in zip(planes, labels, strict=True)
            ]
            for member, part in zip(names, np.array_split(np.arange(count), len(names)), strict=True):
                members[member] = b"".join(records[i] for i in part)
        else:
            members[names[0]] = planes.swapaxes(2, 3).tobytes()
            members[names[1]] = (labels + 1).astype(np.uint8).tobytes()
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / archive.name, "w:gz") as tar:
        for member, content in change(members).items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made


@pytest.mark.parametrize("name", vision.ARCHIVES)
def test_archives(name, tmp_path):
    """Pixels and labels come back; images are normalised by the training images."""
    (images, labels), (test_images, test_labels) = make_archive(tmp_path, name)
    dataset = data.load(vision.Config(name=name, folder=str(tmp_path), verify=False))
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (12, 4, vision.ARCHIVES[name].classes)
    assert dataset.chance == 1 / dataset.num_classes
    mean, deviation = images.mean((0, 1, 2)), images.std((0, 1, 2))
    for source, pixels, targets in ((dataset.train, images, labels), (dataset.validation, test_images, test_labels)):
        for i in range(len(source)):
            example = source[i]
            np.testing.assert_allclose(example["images"], (pixels[i] - mean) / deviation, atol=1e-5)
            assert (example["targets"], example["weights"]) == (targets[i], 1)


def test_bad_archives(tmp_path):
    config = vision.Config(name="cifar10", folder=str(tmp_path / "x"), verify=False)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz is not in .*x'"):
        data.load(config)
    make_archive(tmp_path / "x", "cifar10")
    with pytest.raises(
        ValueError, match=r"has MD5 [0-9a-f]{32}, the official archive c32a1d4ab5d03f1284b67883e8d87530"
    ):
        data.load(dataclasses.replace(config, verify=True))
    make_archive(tmp_path / "x", "cifar10", change=lambda m: {k: m[k] for k in m if "test" not in k})
    with pytest.raises(ValueError, match=r"lacks cifar-10-batches-bin/test_batch\.bin"):
        data.load(config)
    make_archive(tmp_path / "x", "cifar10", change=lambda m: {k: x[:-1] for k, x in m.items()})
    with pytest.raises(ValueError, match="are not records of 3073"):
        data.load(config)
    make_archive(tmp_path / "x", "stl10", change=lambda m: {k: x.replace(b"\x01", b"\x63") for k, x in m.items()})
    with pytest.raises(ValueError, match=r"labels that are not one in \[0, 10\)"):
        data.load(dataclasses.replace(config, name="stl10"))
    path = tmp_path / "x" / "stl10_binary.tar.gz"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"<html>Not found</html>", whole[: len(whole) // 2] + b"\xff" * 9999):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"stl10_binary\.tar\.gz is damaged: .") as error:
            data.load(dataclasses.replace(config, name="stl10"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "member", "change", "message"),
    [
        ("cifar10", "data_batch_3.bin", lambda x: b"", "holds 0 bytes in cifar-10-batches-bin/data_batch_3.bin, which are not"),
        ("cifar10", "data_batch_2.bin", lambda x: b"\x0a" + x[1:], "for each image: image 3 of .* has 10 (stored as 10)"),
        ("cifar100", "test.bin", lambda x: x[:3074] + b"\x63\x64" + x[3076:], "for each image: image 1 of .* has 100"),
        ("stl10", "train_y.bin", lambda x: b"\x00" + x[1:], "for each image: image 0 of .* has -1 (stored as 0)"),
        ("stl10", "train_y.bin", lambda x: x[1:], ": 11 labels and 12 images in stl10_binary/train_X.bin and .*train_y.bin"),
        ("stl10", "test_y.bin", lambda x: b"", ": 0 labels and 4 images"),
        ("stl10", "test_X.bin", lambda x: x[:-27648], ": 4 labels and 3 images"),
    ],
)  # fmt: skip
def test_members_that_do_not_fit(name, member, change, message, tmp_path):
    """A file of five that is cut, which the whole does not show; a label of no class; images without labels."""
    make_archive(tmp_path, name, change=lambda m: {k: change(x) if k.endswith(member) else x for k, x in m.items()})
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        data.load(vision.Config(name=name, folder=str(tmp_path), verify=False))
    assert "\n" not in str(error.value) and vision.ARCHIVES[name].name in str(error.value)


def test_official_checksum_is_compared_with_the_files(tmp_path, monkeypatch):
    make_archive(tmp_path, "cifar100")
    archive = vision.ARCHIVES["cifar100"]
    md5 = hashlib.md5((tmp_path / archive.name).read_bytes()).hexdigest()
    monkeypatch.setitem(vision.ARCHIVES, "cifar100", dataclasses.replace(archive, md5=md5))
    assert len(data.load(vision.Config(name="cifar100", folder=str(tmp_path))).train) == 12


def test_digits_and_halves():
    whole = data.load(vision.Config())
    assert (len(whole.train), len(whole.validation)) == (1797 - 360, 360)
    images = np.stack([whole.train[i]["images"] for i in range(len(whole.train))])
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-4)
    counts = np.bincount([int(whole.validation[i]["targets"]) for i in range(360)])
    assert len(counts) == 10 and counts.min() > 20
    for first, half in enumerate(("even", "odd")):
        part = data.load(vision.Config(half=half)).train
        assert len(part) == (len(whole.train) + 1 - first) // 2
        np.testing.assert_array_equal(part[3]["images"], whole.train[6 + first]["images"])


def test_sizes_and_augmentation():
    """Resizing keeps means; a crop is a shifted, perhaps mirrored part; both are functions of the position alone."""
    config = vision.Config(image_size=16, augment="crop_flip", batch_size=4)
    dataset, plain = data.load(config), data.load(dataclasses.replace(config, augment="none"))
    small = data.load(vision.Config()).train[5]["images"]
    large = plain.train[5]["images"]
    assert large.shape == (16, 16, 1)
    assert abs(large.mean() - small.mean()) < 0.1
    batches = [next(dataset.train_iterator()), next(dataset.train_iterator()), next(plain.train_iterator())]
    np.testing.assert_array_equal(batches[0]["images"], batches[1]["images"])
    changed = 0
    for image, original in zip(batches[0]["images"], batches[2]["images"], strict=True):
        padded = np.pad(original, ((2, 2), (2, 2), (0, 0)))
        crops = [padded[y : y + 16, x : x + 16][:, ::flip] for y in range(5) for x in range(5) for flip in (1, -1)]
        assert any(np.array_equal(image, crop) for crop in crops)
        changed += not np.array_equal(image, original)
    assert changed >= 3
    np.testing.assert_array_equal(dataset.validation[0]["images"], plain.validation[0]["images"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mnist"}, "name must be one of digits, cifar10, cifar100, stl10, got 'mnist'"),
        ({"augment": "mixup"}, "augment must be one of none, crop_flip, got 'mixup'"),
        ({"half": "left"}, "half must be one of all, even, odd"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"selection": "hard_batches"}, "selection must be Shuffled, InOrder, .* or RhoLoss, got 'hard_batches'"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        vision.Config(**fields)


@pytest.mark.parametrize("name", vision.ARCHIVES)
def test_the_papers_recipes_train_on_archives(name, tmp_path):
    """12 images in 3 batches: a first pass, then rounds of one. A narrow ResNet-18 of 100 classes: one program serves all."""
    make_archive(tmp_path / "data", name)
    flags = ["steps=7", "data.verify=false", "data.batch_size=4", "data.image_size=32"]
    flags += ["model.num_classes=100", "model.widths=4,4,4,4"]
    config = f"--config={RECIPES}:dataset={name},delta=0.4,folder={tmp_path / 'data'}"
    assert train.main(["", config, f"--workdir={tmp_path / 'run'}", *(f"--config.{flag}" for flag in flags)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["examples"], summary["chance"]) == (7, 28, 1 / vision.ARCHIVES[name].classes)


@pytest.mark.parametrize(("name", "batches"), [("cifar10", 97), ("cifar100", 97), ("stl10", 9)])
def test_every_recipe_of_the_paper(name, batches):
    """Five networks, four deltas; 100 N updates for every delta."""
    recipes = [member.config for member in sweeps.members(f"{RECIPES}:dataset={name},seeds=1")]
    assert len({recipe.model for recipe in recipes}) == 5
    assert sorted({recipe.data.selection.delta for recipe in recipes}) == [0.2, 0.5, 0.8, 1]
    assert {recipe.steps for recipe in recipes} == {100 * batches}
    assert {recipe.model.num_classes for recipe in recipes} == {vision.ARCHIVES[name].classes}


def test_an_absent_archive_ends_in_one_line(tmp_path, capfd):
    assert train.main(["", f"--config={RECIPES}:folder={tmp_path}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "cifar-10-binary.tar.gz is not in" in (error := capfd.readouterr().err) and error.count("\n") == 1
