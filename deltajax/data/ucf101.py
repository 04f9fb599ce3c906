"""UCF101 (arXiv 1212.0402): clips of its videos, decoded while they are read (`video`), from the official folder and split files.

Nothing is downloaded. Any videos in folders of this form will do: `<folder>/<class>/<video>`, and in `<splits>` the files
`classInd.txt` ("1 Archery"; numbers begin at 1 and leave none out), `trainlist01.txt` ("Archery/v_Archery_g08_c01.avi 1") and
`testlist01.txt` (no number). Frames are counted as they are decoded, whatever their times.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from deltajax.data import video
from deltajax.data.loader import Dataset
from deltajax.data.video import decode as decode
from deltajax.errors import RunError, check_integers, check_types
from deltajax.fields import CHANGEABLE

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, which pretrained weights expect


@dataclasses.dataclass(frozen=True)
class Config:
    """Clips of UCF101.

    Attributes:
      folder: of the videos, a folder for each class.
      splits: folder of the split files.
      split: 1, 2 or 3.
      frames: T, frames of a clip.
      stride: frames of the video from one of the clip to the next.
      resize: the shorter side of a decoded frame, in pixels.
      size: height and width of the square that is cut out of it, <= resize.
      damaged: what happens at a video that is missing or cannot be decoded: "skip" says so once and goes on without it, or
        with as much of it as can be decoded if that is enough for a clip; "fail" stops.
      batch_size: clips per global batch.
      seed: of the order of the clips and of their augmentation.
    """

    folder: str = dataclasses.field(metadata=CHANGEABLE)
    splits: str = dataclasses.field(metadata=CHANGEABLE)
    split: Literal[1, 2, 3] = 1
    frames: int = dataclasses.field(default=8, metadata=CHANGEABLE)
    stride: int = dataclasses.field(default=4, metadata=CHANGEABLE)
    resize: int = dataclasses.field(default=256, metadata=CHANGEABLE)
    size: int = dataclasses.field(default=224, metadata=CHANGEABLE)
    damaged: Literal["skip", "fail"] = dataclasses.field(default="skip", metadata=CHANGEABLE)
    batch_size: int = dataclasses.field(default=8, metadata=CHANGEABLE)
    seed: int = 0

    def __post_init__(self):
        """Check every field."""
        check_types(self)
        check_integers(self, 1, "stride", "size", "batch_size")
        check_integers(self, 2, "frames")
        check_integers(self, self.size, "resize")
        check_integers(self, 0, "seed")


def load(config: Config) -> Dataset:
    """Training clips begin anywhere, are cut out anywhere, half are mirrored, one transform per clip; others are from the middle.

    Raises:
      FileNotFoundError: a split file is missing.
      ValueError: a line of one is not what it should be, no video of a split is there, or PyAV is not installed. The message
        names file and line.
      RunError: a video is missing and `damaged` is "fail". While reading: one cannot be decoded.
    """
    video.require()
    classes = _classes(config)
    train, test = (_videos(config, f"{kind}list0{config.split}.txt", classes) for kind in ("train", "test"))
    both = sorted(set(train) & set(test))
    if both:
        print_warning(f"{len(both)} videos are in the training and in the test list, the first is {both[0][0]}")
    reported: set[str] = set()
    return Dataset(
        train=_Listed(train),
        validation=_Centred(config, test, reported),
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=len(classes),
        unit="clips",
        chance=1 / len(classes),
        augment=functools.partial(_anywhere, config, train, reported),
        fingerprint=hashlib.sha256(repr((config.split, train, test)).encode()).hexdigest(),
    )


Video = tuple[str, int]  # path under the folder, label


def print_warning(message: str) -> None:
    """One line on the standard error."""
    print(f"warning: {message}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Listed:
    """Training videos by number: which clip of one is read depends on what augmentation draws."""

    videos: list[Video]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        return {"video": np.array(index.__index__(), np.int32)}


@dataclasses.dataclass(frozen=True)
class _Centred:
    """The clip in the middle of each video, and of it the square in the middle."""

    config: Config
    videos: list[Video]
    reported: set[str]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return _example(self.config, self.videos, index.__index__(), (0.5, 0.5, 0.5), False, self.reported)


def _anywhere(
    config: Config, videos: list[Video], reported: set[str], example: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    place = tuple(rng.random(3))
    return _example(config, videos, int(example["video"]), place, rng.random() < 0.5, reported)


def _example(
    config: Config, videos: list[Video], index: int, place: tuple[float, ...], mirrored: bool, reported: set[str]
) -> dict[str, Any]:
    """frames [T, size, size, 3], normalised; targets []; weights []: 0 for a video that cannot be decoded."""
    name, label = videos[index]
    path = Path(config.folder).expanduser() / name

    def report(problem: str, what_now: str) -> None:
        if config.damaged == "fail":
            raise RunError(f"{problem}; --config.data.damaged=skip goes on") from None
        if name not in reported:
            reported.add(name)
            print_warning(f"{problem}; {what_now}")

    try:
        clip = read_clip(path, config.frames, config.stride, config.resize, config.size, place, report)
        weight = 1.0
    except ValueError as error:
        report(str(error), "it is skipped")
        clip = np.zeros((config.frames, config.size, config.size, 3), np.uint8)
        weight = 0.0
    if mirrored:
        clip = clip[:, :, ::-1]
    pixels = (clip / np.float32(255) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return {"frames": pixels.astype(np.float32), "targets": np.int32(label), "weights": np.float32(weight)}


def read_clip(
    path: Path,
    frames: int,
    stride: int,
    resize: int,
    size: int,
    place: tuple[float, ...],
    report: Callable[[str, str], None] = lambda problem, what_now: print_warning(f"{problem}; {what_now}"),
) -> UInt8[np.ndarray, "T size size 3"]:
    """Frames of a video; a video that is too short holds its last one.

    Args:
      path: of the file.
      frames, stride, resize, size: see `Config`.
      place: where the clip begins, and the row and column of the square, each from 0 (first) to 1 (last).
      report: what is called with the problem and what is done if only a first part of the video can be decoded.

    Raises:
      ValueError: the file cannot be decoded, or too little of it for a clip.
    """
    needed = (frames - 1) * stride + 1

    def choose(index: video.Index) -> list[int]:
        if index.damage is not None:
            decoded = f"{path}: only {index.frames} frames can be decoded, then: {index.damage}"
            if index.frames < needed:
                raise ValueError(f"{decoded}; a clip needs {needed}")
            report(decoded, "clips are taken from these")
        first = int(place[0] * (max(0, index.frames - needed) + 0.999))
        return [min(first + t * stride, index.frames - 1) for t in range(frames)]

    chosen = video.read(path, choose, resize)
    if len({frame.shape for frame in chosen}) > 1:
        raise ValueError(f"{path}: its frames have different sizes")
    height, width, _ = chosen[0].shape
    top, left = (int(p * (n - size + 0.999)) for p, n in zip(place[1:], (height, width), strict=True))
    return np.stack([frame[top : top + size, left : left + size] for frame in chosen])


Line = tuple[str, tuple[str, ...]]  # file and number, fields


def _lines(config: Config, name: str) -> Iterator[Line]:
    """Lines of a split file that are not blank.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not text, or has no line.
    """
    path = Path(config.splits).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(f"splits: {name} is not in {config.splits!r}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n")
        raise ValueError(f"splits: {path}, line {before + 1} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"splits: {path} is empty")
    for number, line in enumerate(text.split("\n"), 1):
        if fields := tuple(line.split()):
            yield f"splits: {path}, line {number}", fields


def _malformed(where: str, fields: tuple[str, ...]) -> ValueError:
    return ValueError(f"{where} is not of the official form: {' '.join(fields)!r}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _classes(config: Config) -> dict[str, int]:
    """Class -> label: one less than its number in classInd.txt.

    Raises:
      ValueError: a line is not what it should be, or the numbers are not 1, 2, ..., one for each class.
    """
    lines = list(_lines(config, "classInd.txt"))
    labels: dict[str, int] = {}
    for where, fields in lines:
        if len(fields) != 2 or not _is_number(fields[0]):
            raise _malformed(where, fields)
        number, name = int(fields[0]), fields[1]
        if not 1 <= number <= len(lines):
            raise ValueError(
                f"{where} gives {name} the number {number}; the {len(lines)} classes must have 1 to {len(lines)}"
            )
        if name in labels or number - 1 in labels.values():
            raise ValueError(f"{where}: class {name} or number {number} is on an earlier line, too")
        labels[name] = number - 1
    return labels


def _videos(config: Config, name: str, classes: dict[str, int]) -> list[Video]:
    """The videos of a split that are there, those that are not reported.

    Raises:
      ValueError: a line is not what it should be, its label is not that of its class, or its video is on two lines; or no
        video is there.
      RunError: one is not there and `damaged` is "fail".
    """
    found: list[Video] = []
    missing: list[Video] = []
    listed: dict[str, str] = {}
    for where, fields in _lines(config, name):
        path, *numbers = fields
        folders = path.split("/")
        if len(numbers) > 1 or not all(map(_is_number, numbers)) or len(folders) < 2 or {"", ".", ".."} & set(folders):
            raise _malformed(where, fields)
        if folders[0] not in classes:
            raise ValueError(f"{where} has a video of {folders[0]!r}, which is no class of classInd.txt")
        label = classes[folders[0]]
        if numbers and int(numbers[0]) - 1 != label:
            raise ValueError(
                f"{where} gives {path} the number {numbers[0]}, but {folders[0]} has {label + 1} in classInd.txt"
            )
        if path in listed:
            raise ValueError(f"{where}: {path} is on line {listed[path]}, too")
        listed[path] = where.rpartition(" ")[2]
        there = (Path(config.folder).expanduser() / path).is_file()
        (found if there else missing).append((path, label))
    if missing:
        message = f"{len(missing)} videos of {name} are not in {config.folder!r}, the first is {missing[0][0]}"
        if config.damaged == "fail":
            raise RunError(f"{message}; --config.data.damaged=skip goes on without them")
        print_warning(f"{message}; they are skipped")
    if not found:
        raise ValueError(f"folder: no video of {name} is in {config.folder!r}")
    return found
