"""Frames of video files by number, by PyAV: as players show them, and only those that are asked for are converted."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

Frame = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Index:
    """What decoding a whole file has shown.

    Attributes:
      frames: that can be decoded, from the first one on.
      stamps: time of each frame; empty if the times are missing or do not rise.
      keys: numbers of the frames from which decoding can begin.
      damage: why decoding ended before the file did; None: it did not.
    """

    frames: int
    stamps: Int[np.ndarray, "frames"]
    keys: Int[np.ndarray, "keys"]
    damage: str | None


KEPT = 256 * 2**20  # bytes of decoded frames that are kept while a file is decoded for the first time
_INDICES: dict[tuple[Path, int, int], Index] = {}  # by file and what tells whether it was changed


def read(path: Path, choose: Callable[[Index], Sequence[int]], resize: int | None = None) -> list[Frame]:
    """Frames whose numbers depend on how many there are.

    A file is decoded as a whole once; from then on from the last frame before the chosen ones from which it can be, to the last
    of them. The frames are the same.

    Args:
      path: of the file.
      choose: what gives the numbers, each in [0, index.frames).
      resize: see `decode`.

    Raises:
      ValueError: as `decode`, or no frame can be decoded.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error.strerror})") from None
    key = path.absolute(), stat.st_mtime_ns, stat.st_size
    if key in _INDICES:
        numbers = choose(_INDICES[key])
        pixels = _read(path, _INDICES[key], set(numbers), resize)
    else:
        index, kept, shape = _scan(path)
        _INDICES[key] = index
        numbers = choose(index)
        if len(kept) == index.frames:
            pixels = {number: _shown(path, kept[number], shape, resize) for number in set(numbers)}
        else:
            pixels = _read(path, index, set(numbers), resize)
    return [pixels[number] for number in numbers]


def _scan(path: Path) -> tuple[Index, list[Any], Fraction]:
    """What decoding a file shows, its frames if they are few, and the shape of a pixel."""
    stamps: list[int | None] = []
    keys, kept, size, damage = [], [], 0, None
    with _opened(path) as (container, stream):
        shape = _pixel(stream)
        try:
            for frame in _frames(container, stream):
                if frame.key_frame:
                    keys.append(len(stamps))
                stamps.append(frame.pts)
                size += sum(plane.buffer_size for plane in frame.planes)
                kept.append(frame)
                if size > KEPT:
                    kept = []
        except (require().FFmpegError, OSError) as error:
            if not stamps:
                raise
            damage = error.strerror or str(error)
    if not stamps:
        raise ValueError(f"{path}: no frame can be decoded")
    times = np.array([] if None in stamps else stamps, np.int64)
    if not (np.diff(times) > 0).all():
        times = times[:0]
    return Index(len(stamps), times, np.array(keys, np.int64), damage), kept, shape


def _read(path: Path, index: Index, numbers: set[int], resize: int | None) -> dict[int, Frame]:
    """Frames by number."""
    key = int(index.keys[index.keys <= min(numbers)].max(initial=0)) if len(index.stamps) else 0
    for start in (key, 0):
        pixels: dict[int, Frame] = {}
        with _opened(path) as (container, stream):
            if start:
                container.seek(int(index.stamps[start]), stream=stream)
            for count, frame in enumerate(_frames(container, stream)):
                number = count if not start else int(np.searchsorted(index.stamps, frame.pts))
                if number >= start and number in numbers:
                    pixels[number] = _shown(path, frame, _pixel(stream), resize)
                if number >= max(numbers):
                    break
        if pixels.keys() == numbers:
            break  # else the seek went elsewhere
    return pixels


def decode(path: Path, resize: int | None = None, *, square: bool = True) -> Iterator[Frame]:
    """All frames of a video file, turned and mirrored as its display matrix says.

    Args:
      path: of the file.
      resize: pixels of the shorter side; None: as stored.
      square: stretch frames of pixels that are not square; False: take them as if they were.

    Raises:
      ValueError: PyAV is not installed, the file cannot be decoded, or is to be shown at another angle than a multiple of 90
        degrees.
    """
    with _opened(path) as (container, stream):
        for frame in _frames(container, stream):
            yield _shown(path, frame, _pixel(stream) if square else Fraction(1), resize)


def require() -> Any:
    """PyAV.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV: pip install 'deltajax[video]'") from None
    return av


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream that is not a cover picture); what goes wrong inside becomes a ValueError."""
    av = require()
    try:
        with av.open(str(path)) as container:
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & av.stream.Disposition.attached_pic
            ]
            if not streams:
                raise ValueError(f"{path}: not a video that can be decoded (no video stream is in it)")
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error.strerror or error})") from None


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order in which they are shown, up to the first packet that cannot be decoded."""
    try:
        yield from container.decode(stream)
    except require().FFmpegError:
        yield from stream.decode(None)  # those before it that wait to be put in order
        raise


def _pixel(stream: Any) -> Fraction:
    """Width of a pixel over its height."""
    return Fraction(stream.sample_aspect_ratio or 1)


def _shown(path: Path, frame: Any, pixel: Fraction, resize: int | None) -> Frame:
    """Pixels of a decoded frame."""
    width, height = frame.width * pixel, Fraction(frame.height)
    if resize is not None:
        scale = resize / min(width, height)
        width, height = max(Fraction(resize), width * scale), max(Fraction(resize), height * scale)
    pixels = frame.reformat(width=round(width), height=round(height), format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # Column x and row y are shown at column a x + c y, row b x + d y.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    upright, lying = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(upright, lying) > 0.02 * max(upright, lying):  # a degree
        angle = round(math.degrees(math.atan2(c, a)))
        raise ValueError(f"{path}: turned by {angle} degrees, which is no multiple of 90")
    if lying > upright:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
