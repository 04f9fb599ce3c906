"""Image classification: scikit-learn's digits, which need no download, or the official archives of CIFAR and STL-10."""

import dataclasses
import hashlib
import math
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, SupportsIndex

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from sklearn.datasets import load_digits

from deltajax.data.loader import Dataset, half_of
from deltajax.errors import check_integers, check_types
from deltajax.fields import CHANGEABLE
from deltajax.hard_batches import Selection, Shuffled

Arrays = tuple[UInt8[np.ndarray, "N H W C"], Int[np.ndarray, "N"]]


@dataclasses.dataclass(frozen=True)
class Archive:
    """What an official archive holds.

    Attributes:
      name, md5: of the file.
      train, test: its members: files of records, or a file of images and one of labels.
      size: pixels on a side.
      labels: bytes before each image, the last of them the label; 0: labels are in a file of their own and begin at 1,
        and images are stored column by column.
      classes: number of labels.
    """

    name: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    size: int
    labels: int
    classes: int


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
        ("cifar-10-batches-bin/test_batch.bin",),
        size=32,
        labels=1,
        classes=10,
    ),
    "cifar100": Archive(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("cifar-100-binary/train.bin",),
        ("cifar-100-binary/test.bin",),
        size=32,
        labels=2,
        classes=100,
    ),
    "stl10": Archive(
        "stl10_binary.tar.gz",
        "91f7769df0f17e558f3565bffb0c7dfb",
        ("stl10_binary/train_X.bin", "stl10_binary/train_y.bin"),
        ("stl10_binary/test_X.bin", "stl10_binary/test_y.bin"),
        size=96,
        labels=0,
        classes=10,
    ),
}
DIGITS_TEST = 360  # of the 1,797 digits, drawn once


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train on.

    Attributes:
      name: "digits" (8 x 8, grey), or the name of an archive.
      folder: where the archive is; of no use for the digits.
      verify: compare the archive's MD5 with the official one. False: an archive of one's own in the same format.
      image_size: pixels on a side after bilinear resizing; None: as stored.
      augment: "none", or "crop_flip": pad by an eighth of the size, crop at random, mirror half of the images.
      half: train on all examples, or on those of even or odd index only, to score the others (`deltajax.score`).
      batch_size: images per global batch.
      seed: of the order of the examples, of augmentation and of seeded compositions.
      selection: which examples the next update learns from, see `hard_batches`.
    """

    name: Literal["digits", "cifar10", "cifar100", "stl10"] = "digits"
    folder: str = dataclasses.field(default="", metadata=CHANGEABLE)
    verify: bool = dataclasses.field(default=True, metadata=CHANGEABLE)
    image_size: int | None = dataclasses.field(default=None, metadata=CHANGEABLE)
    augment: Literal["none", "crop_flip"] = dataclasses.field(default="none", metadata=CHANGEABLE)
    half: Literal["all", "even", "odd"] = "all"
    batch_size: int = dataclasses.field(default=64, metadata=CHANGEABLE)
    seed: int = 0
    selection: Selection = dataclasses.field(default_factory=Shuffled)

    def __post_init__(self):
        """Check every field."""
        check_types(self)
        check_integers(self, 1, "batch_size", "image_size")
        check_integers(self, 0, "seed")

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return 10 if self.name == "digits" else ARCHIVES[self.name].classes

    @property
    def channels(self) -> int:
        """Of the images."""
        return 1 if self.name == "digits" else 3


def load(config: Config) -> Dataset:
    """Images as float32 [H, W, C], normalised per channel by mean and deviation of the training images.

    Raises:
      FileNotFoundError: the archive is not in the folder.
      ValueError: its checksum or its content is wrong.
    """
    train, test = _digits() if config.name == "digits" else _read(config)
    mean, deviation = _moments(train[0])
    digest = hashlib.sha256()
    for images, labels in (train, test):
        digest.update(np.ascontiguousarray(images))
        digest.update(labels.astype("<i4"))
    sources = [Images(*split, mean, deviation, config.image_size) for split in (train, test)]
    return Dataset(
        train=half_of(sources[0], config.half),
        validation=sources[1],
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=config.num_classes,
        unit="images",
        chance=1 / config.num_classes,
        augment=crop_flip if config.augment == "crop_flip" else None,
        selection=config.selection,
        fingerprint=digest.hexdigest(),
    )


@dataclasses.dataclass(frozen=True)
class Images:
    """A source of {"images", "targets", "weights"}; see `loader.Source`."""

    pixels: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    mean: Float[np.ndarray, "C"]
    deviation: Float[np.ndarray, "C"]
    size: int | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Image `index`, resized and normalised, with its label and weight 1."""
        pixels = self.pixels[index]
        if self.size is not None and self.size != len(pixels):
            channels = [
                Image.fromarray(c).resize((self.size, self.size), Image.Resampling.BILINEAR)
                for c in np.moveaxis(pixels, -1, 0)
            ]
            pixels = np.stack([np.asarray(c) for c in channels], axis=-1)
        return {
            "images": ((pixels - self.mean) / self.deviation).astype(np.float32),
            "targets": np.int32(self.labels[index]),
            "weights": np.float32(1),
        }


def crop_flip(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random crop of the image padded by an eighth of its size, mirrored with probability 1/2."""
    image = example["images"]
    size, margin = len(image), len(image) // 8
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    top, left = rng.integers(2 * margin + 1, size=2)
    image = padded[top : top + size, left : left + size]
    return {**example, "images": image[:, ::-1] if rng.random() < 0.5 else image}


def _moments(pixels: UInt8[np.ndarray, "N H W C"]) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Mean and deviation of each channel, in blocks: all pixels in float64 would take eight times the images' memory."""
    count = math.prod(pixels.shape[:3])
    blocks = np.array_split(pixels, len(pixels) // 1024 + 1)
    mean = np.sum([x.sum((0, 1, 2), dtype=np.float64) for x in blocks], axis=0) / count
    variance = np.sum([np.square(x - mean).sum((0, 1, 2)) for x in blocks], axis=0) / count
    return mean, np.maximum(np.sqrt(variance), 1e-6)


def _digits() -> tuple[Arrays, Arrays]:
    """Pixels of 0 to 16, split once at random: the file's last images come from other hands than the first."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = digits.images[order, :, :, None].astype(np.uint8), digits.target[order]
    return (images[DIGITS_TEST:], labels[DIGITS_TEST:]), (images[:DIGITS_TEST], labels[:DIGITS_TEST])


def _read(config: Config) -> tuple[Arrays, Arrays]:
    archive = ARCHIVES[config.name]
    path = Path(config.folder).expanduser() / archive.name
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: {archive.name} is not in {config.folder!r}; it is the official archive's name"
        )
    if config.verify:
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != archive.md5:
            raise ValueError(
                f"folder: {path} has MD5 {md5}, the official archive {archive.md5}: download it again, "
                "or set verify=false for an archive of your own"
            )
    wanted = {*archive.train, *archive.test}
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = dict(_members(tar, wanted))
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError) as error:  # KeyError: a link to no member
        raise ValueError(f"folder: {path} is damaged: {error}") from None
    missing = sorted(wanted - members.keys())
    if missing:
        raise ValueError(f"folder: {path} lacks {missing[0]}")
    train, test = (
        _decode(archive, {name: members[name] for name in split}, path) for split in (archive.train, archive.test)
    )
    return train, test


def _members(tar: tarfile.TarFile, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    left = set(wanted)
    for member in tar:  # in the order of the file: a compressed one cannot be searched
        name = member.name.removeprefix("./")
        file = tar.extractfile(member) if name in left else None
        if file is not None:
            yield name, file.read()
            left.discard(name)
            if not left:
                return


def _decode(archive: Archive, contents: dict[str, bytes], path: Path) -> Arrays:
    """Images and labels of one split, from its members by name."""
    stride = archive.size**2 * 3 + archive.labels
    names = list(contents) if archive.labels else list(contents)[:1]
    for name in names:
        if not contents[name] or len(contents[name]) % stride:
            size = len(contents[name])
            raise ValueError(f"folder: {path} holds {size} bytes in {name}, which are not records of {stride}")
    records = np.frombuffer(b"".join(contents[name] for name in names), np.uint8).reshape(-1, stride)
    images = records[:, archive.labels :].reshape(-1, 3, archive.size, archive.size)
    if archive.labels:
        labels, stored = records[:, archive.labels - 1].astype(np.int64), 0
    else:
        images = images.swapaxes(2, 3)
        (name,) = contents.keys() - set(names)
        labels, stored = np.frombuffer(contents[name], np.uint8).astype(np.int64) - 1, 1
    wrong = f"folder: {path} has labels that are not one in [0, {archive.classes}) for each image"
    if len(labels) != len(images):
        raise ValueError(f"{wrong}: {len(labels)} labels and {len(images)} images in {' and '.join(contents)}")
    outside = np.flatnonzero((labels < 0) | (labels >= archive.classes))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{wrong}: image {first} of {', '.join(contents)} has {labels[first]} (stored as {labels[first] + stored})"
        )
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels
