"""UCF101 (arXiv 1212.0402): clips of its videos, decoded by PyAV while they are read, from the official folder and split files.

Nothing is downloaded. Any videos in folders of this form will do: `<folder>/<class>/<video>`, and in `<splits>` the files
`classInd.txt` ("1 Archery"), `trainlist01.txt` ("Archery/v_Archery_g08_c01.avi 1") and `testlist01.txt` (no number).
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from deltajax.data.loader import Dataset
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
      damaged: what happens at a video that is missing or cannot be decoded: "skip" says so once and goes on without it, "fail"
        stops.
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
      ValueError: a line of one is not what it should be, no video of a split is there, or PyAV is not installed.
      RunError: a video is missing and `damaged` is "fail". While reading: one cannot be decoded.
    """
    _av()
    classes = {name: int(number) - 1 for number, name, *_ in _lines(config, "classInd.txt", 2)}
    train, test = (_videos(config, f"{kind}list0{config.split}.txt", classes) for kind in ("train", "test"))
    reported: set[int] = set()
    return Dataset(
        train=_Listed(train),
        validation=_Centred(config, test, reported),
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=len(classes),
        unit="clips",
        chance=1 / len(classes),
        augment=functools.partial(_anywhere, config, train, set()),
        fingerprint=hashlib.sha256(repr((config.split, train, test)).encode()).hexdigest(),
    )


Video = tuple[str, int]  # path under the folder, label


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
    reported: set[int]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return _example(self.config, self.videos, index.__index__(), (0.5, 0.5, 0.5), False, self.reported)


def _anywhere(
    config: Config, videos: list[Video], reported: set[int], example: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    place = tuple(rng.random(3))
    return _example(config, videos, int(example["video"]), place, rng.random() < 0.5, reported)


def _example(
    config: Config, videos: list[Video], index: int, place: tuple[float, ...], mirrored: bool, reported: set[int]
) -> dict[str, Any]:
    """frames [T, size, size, 3], normalised; targets []; weights []: 0 for a video that cannot be decoded."""
    name, label = videos[index]
    path = Path(config.folder).expanduser() / name
    try:
        clip = read_clip(path, config.frames, config.stride, config.resize, config.size, place)
        weight = 1.0
    except ValueError as error:
        if config.damaged == "fail":
            raise RunError(f"{error}; --config.data.damaged=skip goes on without it") from None
        if index not in reported:
            reported.add(index)
            print(f"warning: {error}; it is skipped", file=sys.stderr)
        clip = np.zeros((config.frames, config.size, config.size, 3), np.uint8)
        weight = 0.0
    if mirrored:
        clip = clip[:, :, ::-1]
    pixels = (clip / np.float32(255) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return {"frames": pixels.astype(np.float32), "targets": np.int32(label), "weights": np.float32(weight)}


def read_clip(
    path: Path, frames: int, stride: int, resize: int, size: int, place: tuple[float, ...]
) -> UInt8[np.ndarray, "T size size 3"]:
    """Frames of a video; a video that is too short holds its last one.

    Args:
      place: where the clip begins, and the row and column of the square, each from 0 (first) to 1 (last).

    Raises:
      ValueError: the file cannot be decoded.
    """
    decoded = list(decode(path, resize))
    if not decoded:
        raise ValueError(f"{path}: no frame can be decoded")
    first = int(place[0] * (max(0, len(decoded) - (frames - 1) * stride - 1) + 0.999))
    chosen = [decoded[min(first + t * stride, len(decoded) - 1)] for t in range(frames)]
    height, width, _ = chosen[0].shape
    top, left = (int(p * (n - size + 0.999)) for p, n in zip(place[1:], (height, width), strict=True))
    return np.stack([frame[top : top + size, left : left + size] for frame in chosen])


def decode(path: Path, resize: int | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """All frames of a video file, the shorter side resized to `resize` pixels.

    Raises:
      ValueError: PyAV is not installed, or the file cannot be decoded.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                width, height = frame.width, frame.height
                if resize is not None:
                    scale = resize / min(width, height)
                    width, height = max(resize, round(width * scale)), max(resize, round(height * scale))
                yield frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error})") from None


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV: pip install 'deltajax[video]'") from None
    return av


def _lines(config: Config, name: str, fields: int) -> Iterator[tuple[str, ...]]:
    path = Path(config.splits).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(f"splits: {name} is not in {config.splits!r}")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        parts = tuple(line.split())
        if not parts:
            continue
        if len(parts) < fields or (fields == 2 and not parts[0].isdigit()):
            raise ValueError(f"splits: {path}, line {number} is not of the official form: {line!r}")
        yield parts


def _videos(config: Config, name: str, classes: dict[str, int]) -> list[Video]:
    """The videos of a split that are there, those that are not reported."""
    found: list[Video] = []
    missing: list[Video] = []
    for parts in _lines(config, name, 1):
        of_class = parts[0].split("/")[0]
        if of_class not in classes:
            raise ValueError(f"splits: {name} has a video of {of_class!r}, which is no class of classInd.txt")
        there = (Path(config.folder).expanduser() / parts[0]).is_file()
        (found if there else missing).append((parts[0], classes[of_class]))
    if missing:
        message = f"{len(missing)} videos of {name} are not in {config.folder!r}, the first is {missing[0][0]}"
        if config.damaged == "fail":
            raise RunError(f"{message}; --config.data.damaged=skip goes on without them")
        print(f"warning: {message}; they are skipped", file=sys.stderr)
    if not found:
        raise ValueError(f"folder: no video of {name} is in {config.folder!r}")
    return found
