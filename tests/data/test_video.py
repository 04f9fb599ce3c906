"""Frames by number against frames one after the other, and videos of unusual kinds, written by the test."""

import shutil
from fractions import Fraction

import av
import numpy as np
import pytest

from deltajax.data import ucf101, video

SIZE = (32, 48)
MIDDLE = (0.5, 0.5, 0.5)


def picture(t, size=SIZE):
    """A red quarter at the top left, a green one at the bottom right, a blue rest that moves and grows brighter."""
    rows, columns = (n // 2 for n in size)
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 2] = (4 * t + np.arange(size[1])) % 100 + 100
    pixels[:rows, :columns] = (220, 20, 20)
    pixels[rows:, columns:] = (20, 220, 20)
    return pixels


def write(
    path,
    codec="mpeg4",
    frames=20,
    size=SIZE,
    pix_fmt="yuv420p",
    options=(),
    times=None,
    shape=None,
    turn=None,
    matrix=None,
):
    """A video; `turn`: arguments of `set_display_rotation`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=dict(options))
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, pix_fmt, 4_000_000
        stream.gop_size = 5
        if shape is not None:
            stream.codec_context.sample_aspect_ratio = shape
        if turn is not None:
            stream.set_display_rotation(*turn)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        container.start_encoding()
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(t, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corrupt(path, number):
    """Make the packet of this number unreadable."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    with open(path, "r+b") as file:
        file.seek(packet.pos)
        file.write(b"\xff" * packet.size)


def converted(monkeypatch):
    """Numbers of frames that are converted, call by call."""
    counts, real = [], video._shown

    def shown(*arguments):
        counts.append(1)
        return real(*arguments)

    monkeypatch.setattr(video, "_shown", shown)
    return counts


X264 = {"x264-params": "open-gop=1:bframes=3:keyint=6:log-level=-1"}
CODECS = [
    ("avi", "mpeg4", {}),
    ("mp4", "mpeg4", {"bf": "2"}),
    ("mp4", "libx264", X264),
    ("avi", "libx264", X264),
    ("mkv", "ffv1", {}),
]


@pytest.mark.parametrize(("suffix", "codec", "options"), CODECS)
def test_chosen_frames_are_those_of_the_whole_video(suffix, codec, options, tmp_path, monkeypatch):
    """First with the file unseen, then from the last key frame before them; only these are converted."""
    path = write(
        tmp_path / f"video.{suffix}", codec, 40, pix_fmt="bgr0" if codec == "ffv1" else "yuv420p", options=options
    )
    whole = list(video.decode(path, 24))
    assert len(whole) == 40
    counts, seen = converted(monkeypatch), []

    def choose(index):
        assert index.frames == 40 and index.damage is None and len(index.keys) > 4
        return chosen

    for first in (23, 0, 7, 22, 35):
        chosen = [first, first + 2, first + 4, first + 4]
        for frame, number in zip(video.read(path, choose, 24), chosen, strict=True):
            np.testing.assert_array_equal(frame, whole[number])
        seen.append(len(counts))
    assert np.diff([0, *seen]).tolist() == [3] * 5


def test_reading_begins_at_a_key_frame(tmp_path):
    """Far into a video: what comes before it is not decoded again."""
    path = write(tmp_path / "video.mp4", "libx264", 60, options={"x264-params": "keyint=5:log-level=-1"})
    video.read(path, lambda index: [0])
    index = next(index for key, index in video._INDICES.items() if key[0] == path)
    start = int(index.keys[index.keys <= 51].max())
    assert start >= 45
    decoded = []
    frames = video._frames

    def counting(*arguments):
        for frame in frames(*arguments):
            decoded.append(frame.pts)
            yield frame

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_frames", counting)
        (frame,) = video.read(path, lambda index: [51])
    np.testing.assert_array_equal(frame, list(video.decode(path))[51])
    assert len(decoded) < 15


def test_a_large_video_is_not_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "video.avi")
    whole = list(video.decode(path))
    monkeypatch.setattr(video, "KEPT", 10_000)
    for frame, number in zip(video.read(path, lambda index: [3, 17]), (3, 17), strict=True):
        np.testing.assert_array_equal(frame, whole[number])


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    path = write(tmp_path / "video.avi", frames=9)
    lengths = []
    for frames in (9, 12):
        write(path, frames=frames)
        video.read(path, lambda index: [lengths.append(index.frames) or 0])
    assert lengths == [9, 12]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(degrees, tmp_path):
    """As PyAV gives it: counterclockwise degrees."""
    plain, turned = write(tmp_path / "plain.mp4"), write(tmp_path / "turned.mp4", turn=(degrees,))
    with av.open(str(turned)) as container:
        rotation = next(container.decode(video=0)).rotation
    assert rotation % 360 == degrees
    for resize in (None, 24):
        for a, b in zip(video.decode(plain, resize), video.decode(turned, resize), strict=True):
            np.testing.assert_array_equal(b, np.rot90(a, degrees // 90))
    clips = [ucf101.read_clip(path, 3, 2, 24, 24, MIDDLE) for path in (plain, turned)]
    np.testing.assert_array_equal(clips[1], np.rot90(clips[0], degrees // 90, axes=(1, 2)))


ONE = 1 << 16


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "shown"),
    [
        (1, 0, 0, 1, lambda x: x),
        (-1, 0, 0, 1, lambda x: x[:, ::-1]),
        (1, 0, 0, -1, lambda x: x[::-1]),
        (0, 1, -1, 0, lambda x: np.rot90(x, -1)),  # what telephones write that are held upright
        (0, 1, 1, 0, lambda x: x.swapaxes(0, 1)),
        (0, -1, -1, 0, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
        (0, 0, 0, 0, lambda x: x),  # says nothing
    ],
)
def test_display_matrices(a, b, c, d, shown, tmp_path):
    """Turned and mirrored: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    plain = write(tmp_path / "plain.mp4", frames=1)
    path = write(tmp_path / "shown.mp4", frames=1, matrix=[a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30])
    np.testing.assert_array_equal(next(video.decode(path)), shown(next(video.decode(plain))))


def test_other_angles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tilted.mp4: turned by 30 degrees, which is no multiple of 90"):
        next(video.decode(write(tmp_path / "tilted.mp4", turn=(30,))))


def test_pixels_that_are_not_square(tmp_path):
    path = write(tmp_path / "wide.mp4", "libx264", options={"x264-params": "log-level=-1"}, shape=Fraction(3, 2))
    assert next(video.decode(path)).shape == (32, 72, 3)
    assert next(video.decode(path, 24)).shape == (24, 54, 3)
    assert next(video.decode(path, 24, square=False)).shape == (24, 36, 3)
    assert next(video.decode(write(tmp_path / "square.mp4"), 24)).shape == (24, 36, 3)


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [
        ("gray", SIZE),
        ("gray10le", SIZE),
        ("yuv420p10le", SIZE),
        ("yuv444p12le", SIZE),
        ("bgra", SIZE),
        ("yuv420p", (33, 47)),
    ],
)
def test_formats(pix_fmt, size, tmp_path):
    """All become 8 bits of red, green and blue."""
    path = write(tmp_path / "video.mkv", "ffv1", 4, size, pix_fmt)
    frames = list(video.decode(path))
    assert len(frames) == 4 and all(frame.shape == (*size, 3) and frame.dtype == np.uint8 for frame in frames)
    wanted = picture(0, size).astype(int)
    if pix_fmt.startswith("gray"):
        wanted = np.repeat((wanted @ [0.299, 0.587, 0.114]).astype(int)[..., None], 3, -1)
    corners = frames[0].astype(int)[[3, -4]][:, [3, -4]]
    assert np.abs(corners - wanted[[3, -4]][:, [3, -4]]).max() < 12
    assert ucf101.read_clip(path, 4, 1, 24, 24, MIDDLE).shape == (4, 24, 24, 3)


def test_uneven_times(tmp_path):
    """Frames are counted, not timed."""
    times = [0, 1, 2, 10, 11, 40, 41, 42]
    path = write(tmp_path / "video.mkv", "ffv1", 8, pix_fmt="bgr0", times=times)
    for t, frame in enumerate(video.decode(path)):
        np.testing.assert_array_equal(frame, picture(t))
    assert len(list(video.decode(path))) == 8


def test_one_frame(tmp_path):
    clip = ucf101.read_clip(write(tmp_path / "one.avi", frames=1), 4, 3, 24, 24, MIDDLE)
    assert (clip == clip[0]).all()


def test_files_without_a_frame(tmp_path):
    empty, absent, folder, none, sound = (
        tmp_path / f"{name}.mp4" for name in ("empty", "absent", "folder", "none", "sound")
    )
    empty.write_bytes(b"")
    folder.mkdir()
    none = write(tmp_path / "none.avi", frames=0)
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for path, reason in (
        (empty, r"not a video that can be decoded \(Invalid data"),
        (absent, r"not a video that can be decoded \(No such file"),
        (folder, "not a video that can be decoded"),
        (none, "no frame can be decoded"),
        (sound, r"not a video that can be decoded \(no video stream is in it\)"),
    ):
        with pytest.raises(ValueError, match=rf"{path.name}: {reason}") as error:
            ucf101.read_clip(path, 4, 3, 24, 24, MIDDLE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
def test_one_corrupt_packet(codec, tmp_path, capfd):
    """What comes before it is read, with a warning; if it is too little for a clip the video is refused."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / "good.avi", codec, pix_fmt=pix_fmt, options=X264 if codec == "libx264" else {})
    damaged = shutil.copy(path, tmp_path / "damaged.avi")
    corrupt(damaged, 14)
    readable, whole = [], list(video.decode(path, 24))
    with pytest.raises(ValueError, match=r"damaged.avi: not a video that can be decoded \(Invalid data"):
        readable.extend(video.decode(damaged, 24))
    for place in (0, 0.5, 1, 0.5):
        clip = ucf101.read_clip(damaged, 4, 3, 24, 24, (place, 0, 0))
        index = next(index for key, index in video._INDICES.items() if key[0] == damaged)
        assert 10 <= index.frames <= 14
        first = round(place * (index.frames - 10) - 0.01)
        for t, frame in enumerate(clip):
            np.testing.assert_array_equal(frame, whole[first + 3 * t][:24, :24])
    err = capfd.readouterr().err
    assert err.count("\n") == 4 and err.count(f"warning: {damaged}: only {index.frames} frames can be decoded") == 4
    with pytest.raises(ValueError, match=rf"damaged.avi: only {index.frames} frames .*; a clip needs 16"):
        ucf101.read_clip(damaged, 6, 3, 24, 24, MIDDLE)


def test_frames_of_different_sizes(tmp_path):
    """Two streams, one after the other, as some recorders write when the picture changes."""
    both = tmp_path / "both.mpg"
    parts = [write(tmp_path / f"{n}.m2v", "mpeg2video", 6, size) for n, size in enumerate((SIZE, (48, 32)))]
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ValueError, match=r"both.mpg: its frames have different sizes"):
        ucf101.read_clip(both, 4, 3, 24, 24, MIDDLE)
