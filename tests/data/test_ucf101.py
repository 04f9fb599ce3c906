"""UCF101's reader on a folder of made videos in its official form, and the recipe on it from end to end."""

import json
import re
import shutil
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltajax import data, train
from deltajax.data import ucf101
from deltajax.errors import RunError
from deltajax.interop import vision
from deltajax.layers.param import is_spec
from deltajax.models import frames, resnet
from deltajax.training import optimizer
from deltajax.training.config import load_config

COLOURS = {"Archery": (200, 30, 30), "Biking": (30, 30, 200)}


def write_video(path, colour, length=14, size=(48, 64)):
    """A colour that grows brighter from frame to frame, with a white left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 2_000_000
        for t in range(length):
            picture = np.full((*size, 3), colour, np.uint8) // 2 + 5 * t
            picture[:, : size[1] // 2] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf101")
    videos, splits = root / "UCF-101", root / "ucfTrainTestlist"
    splits.mkdir()
    splits.joinpath("classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(COLOURS, 1)))
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for i, (name, colour) in enumerate(COLOURS.items(), 1):
        for group in range(1, 4):
            file = f"{name}/v_{name}_g{group:02}_c01.avi"
            write_video(videos / file, colour)
            lists["test" if group == 1 else "train"].append(file if group == 1 else f"{file} {i}")
    lists["train"] += ["Archery/v_Archery_g08_c01.avi 1", "Biking/v_Biking_g09_c01.avi 2"]
    (videos / "Archery/v_Archery_g08_c01.avi").write_bytes(b"not a video" * 50)  # and the other one is missing
    for kind, lines in lists.items():
        splits.joinpath(f"{kind}list01.txt").write_text("\r\n".join(lines) + "\r\n")
    return str(videos), str(splits)


def config(folders, **changes):
    return ucf101.Config(*folders, **{"frames": 4, "stride": 3, "resize": 36, "size": 32, "batch_size": 2, **changes})


def pixels(frames):
    return frames * np.array(ucf101.DEVIATION) + np.array(ucf101.MEAN)


def test_clips(folders, capfd):
    dataset = data.load(config(folders))
    assert "1 videos of trainlist01.txt are not in" in capfd.readouterr().err
    assert len(dataset.train) == 5 and len(dataset.validation) == 2 and dataset.num_classes == 2
    example = dataset.validation[1]
    assert example["frames"].shape == (4, 32, 32, 3) and example["targets"] == 1 and example["weights"] == 1
    # The middle of 14 frames, at steps of 3 from frame 2: the right half has the colour of frames 2, 5, 8 and 11.
    got = pixels(example["frames"])[:, 8:24, 24:, :].mean((1, 2))
    want = [(np.array(COLOURS["Biking"]) // 2 + 5 * t) / 255 for t in (2, 5, 8, 11)]
    np.testing.assert_allclose(got, want, atol=0.04)
    np.testing.assert_allclose(pixels(example["frames"])[:, :, :8].mean(), 1, atol=0.03)


def test_one_transform_per_clip(folders):
    """Mirrored clips are mirrored in every frame; the first frame differs; draws decide and nothing else."""
    dataset = data.load(config(folders))
    rng, firsts, sides = np.random.default_rng(0), set(), set()
    for _ in range(12):
        example = dataset.augment(dataset.train[2], rng)
        clip = pixels(example["frames"])
        white_left = clip[:, :, :6].mean((1, 2, 3)) > 0.9
        assert white_left.all() or not white_left.any()
        sides.add(bool(white_left[0]))
        firsts.add(round(float(np.median(clip[0, :, 26:] if white_left[0] else clip[0, :, :6])), 2))
    assert sides == {False, True} and len(firsts) > 1
    a, b = (dataset.augment(dataset.train[2], np.random.default_rng(5))["frames"] for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_damaged_videos(folders, capfd):
    dataset = data.load(config(folders))
    capfd.readouterr()
    broken = next(i for i, (name, _) in enumerate(dataset.train.videos) if "g08" in name)
    for _ in range(2):
        example = dataset.augment(dataset.train[broken], np.random.default_rng(0))
        assert example["weights"] == 0 and np.isfinite(example["frames"]).all()
    error = capfd.readouterr().err
    assert error.count("not a video that can be decoded") == 1 and error.endswith("it is skipped\n")
    with pytest.raises(RunError, match=r"1 videos of trainlist01.txt are not in"):
        data.load(config(folders, damaged="fail"))
    videos = ucf101._Listed(dataset.train.videos)
    with pytest.raises(RunError, match=r"g08_c01.avi: not a video .* --config.data.damaged=skip"):
        ucf101._anywhere(
            config(folders, damaged="fail"), videos.videos, set(), videos[broken], np.random.default_rng(0)
        )


def test_short_videos_hold_their_last_frame(folders, tmp_path):
    write_video(tmp_path / "short.avi", (0, 0, 0), length=2)
    clip = ucf101.read_clip(tmp_path / "short.avi", 4, 3, 36, 32, (0.9, 0.5, 0.5))
    np.testing.assert_array_equal(clip[1], clip[3])


def test_bad_folders(folders, tmp_path):
    videos, splits = folders
    for changes, error, message in (
        ({"splits": str(tmp_path)}, FileNotFoundError, "classInd.txt is not in"),
        ({"split": 2}, FileNotFoundError, "trainlist02.txt is not in"),
        ({"folder": str(tmp_path)}, ValueError, "no video of trainlist01.txt is in"),
        ({"split": 4}, ValueError, "split must be one of 1, 2, 3, got 4"),
        ({"size": 40}, ValueError, "resize must be an integer >= 40, got 36"),
        ({"damaged": "ask"}, ValueError, "damaged must be one of skip, fail"),
    ):
        with pytest.raises(error, match=message):
            data.load(config((changes.pop("folder", videos), changes.pop("splits", splits)), **changes))
    (tmp_path / "classInd.txt").write_text("1 Archery\nBiking\n")
    with pytest.raises(ValueError, match=r"classInd.txt, line 2 is not of the official form: 'Biking'"):
        data.load(config((videos, str(tmp_path))))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classInd.txt", "0 Archery\n1 Biking\n", "line 1 gives Archery the number 0; the 2 classes must have 1 to 2"),
        ("classInd.txt", "1 Archery\n\n3 Biking\n", "line 3 gives Biking the number 3; the 2 classes must have 1 to 2"),
        ("classInd.txt", "1 Archery\n1 Biking\n", "line 2: class Biking or number 1 is on an earlier line, too"),
        ("classInd.txt", "1 Archery\n2 Archery\n", "line 2: class Archery or number 2 is on an earlier line, too"),
        ("classInd.txt", "1 Archery\n2 Biking fast\n", "line 2 is not of the official form: '2 Biking fast'"),
        ("classInd.txt", "1 Archery\n\u00b2 Biking\n", "line 2 is not of the official form: '\u00b2 Biking'"),
        ("classInd.txt", "1 Archery\n-2 Biking\n", "line 2 is not of the official form: '-2 Biking'"),
        ("classInd.txt", b"1 Archery\n2 B\xffking\n", "line 2 is not UTF-8 text"),
        ("classInd.txt", " \n", "is empty"),
        ("trainlist01.txt", "", "is empty"),
        ("trainlist01.txt", "Archery/a.avi 2\n", "line 1 gives Archery/a.avi the number 2, but Archery has 1 in classInd.txt"),
        ("trainlist01.txt", "Archery/a.avi 0\n", "line 1 gives Archery/a.avi the number 0, but Archery has 1"),
        ("trainlist01.txt", "Archery/a.avi 1 7\n", "line 1 is not of the official form: 'Archery/a.avi 1 7'"),
        ("trainlist01.txt", "Archery/a.avi one\n", "line 1 is not of the official form: 'Archery/a.avi one'"),
        ("trainlist01.txt", "1 Archery/a.avi\n", "line 1 is not of the official form: '1 Archery/a.avi'"),
        ("trainlist01.txt", "a.avi 1\n", "line 1 is not of the official form: 'a.avi 1'"),
        ("trainlist01.txt", "Archery/../a.avi 1\n", "line 1 is not of the official form"),
        ("trainlist01.txt", "Archery/a.avi 1\r\n\r\nArchery/a.avi 1\r\n", "line 3: Archery/a.avi is on line 1, too"),
        ("testlist01.txt", "Diving/a.avi\n", "line 1 has a video of 'Diving', which is no class of classInd.txt"),
        ("testlist01.txt", "Biking/a.avi 1\n", "line 1 gives Biking/a.avi the number 1, but Biking has 2"),
    ],
)  # fmt: skip
def test_malformed_split_files(file, text, message, folders, tmp_path):
    """One line with file and line, instead of labels of other classes."""
    for original in Path(folders[1]).iterdir():
        shutil.copy(original, tmp_path)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        data.load(config((folders[0], str(tmp_path))))
    assert f"{tmp_path / file}" in str(error.value) and "\n" not in str(error.value)


def test_harmless_forms_of_split_files(folders, tmp_path, capfd):
    """A byte-order mark, blank lines, any order of the classes, a number in the test list; a video in both lists is reported."""
    (tmp_path / "classInd.txt").write_text("\ufeff2 Biking\r\n\r\n1 Archery\n", newline="")
    (tmp_path / "trainlist01.txt").write_text("\nArchery/v_Archery_g01_c01.avi\r\n", newline="")
    (tmp_path / "testlist01.txt").write_text("Biking/v_Biking_g01_c01.avi 2\nArchery/v_Archery_g01_c01.avi")
    dataset = data.load(config((folders[0], str(tmp_path))))
    assert [int(example["targets"]) for example in map(dataset.validation.__getitem__, range(2))] == [1, 0]
    assert dataset.train.videos == [("Archery/v_Archery_g01_c01.avi", 0)]
    err = capfd.readouterr().err
    assert (
        err
        == "warning: 1 videos are in the training and in the test list, the first is Archery/v_Archery_g01_c01.avi\n"
    )


def test_a_video_with_one_corrupt_packet(folders, tmp_path, capfd):
    """Its first frames are read, it counts, and it is reported once."""
    videos = shutil.copytree(folders[0], tmp_path / "videos")
    damaged = videos / "Archery/v_Archery_g01_c01.avi"
    with av.open(str(damaged)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][11]
    with open(damaged, "r+b") as file:
        file.seek(packet.pos)
        file.write(b"\xff" * packet.size)
    dataset = data.load(config((str(videos), folders[1])))
    capfd.readouterr()
    for _ in range(2):
        example = dataset.validation[0]
        assert example["weights"] == 1 and example["targets"] == 0
    assert capfd.readouterr().err == (
        f"warning: {damaged}: only 11 frames can be decoded, then: Invalid data found when processing input; "
        "clips are taken from these\n"
    )
    longer = data.load(config((str(videos), folders[1]), frames=5))
    capfd.readouterr()
    assert longer.validation[0]["weights"] == 0
    assert capfd.readouterr().err.endswith("; a clip needs 13; it is skipped\n")
    for length in (4, 5):
        strict = config((str(videos), folders[1]), damaged="fail", frames=length)
        with pytest.raises(RunError, match=r"g01_c01.avi: only 11 frames can .*damaged=skip goes on") as error:
            ucf101._example(strict, dataset.validation.videos, 0, (0, 0, 0), False, set())
        assert "\n" not in str(error.value)


def test_the_recipe_from_end_to_end(folders, tmp_path, capfd):
    """Pretrained weights by torchvision's names, the baseline, its refinement with delta activations."""
    network = resnet.resnet_small(blocks=(1, 1), widths=(4, 8), num_classes=2)
    rng, file = np.random.default_rng(0), tmp_path / "weights.safetensors"
    shapes = {
        vision.tensor_names(network, "timm")[path]: leaf
        for path, leaf in _leaves({**resnet.param_specs(network)}, resnet.init_stats(network))
    }
    save_file({name: np.abs(rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}, file)
    given = f"folder={folders[0]},splits={folders[1]},size=small,classes=2,clip=3"

    def run(workdir, more):
        code = train.main(["train", f"--config=experiments/ucf101.py:{given},{more}", f"--workdir={workdir}"])
        return code, *capfd.readouterr()

    code, out, error = run(tmp_path / "head", f"start={file}")
    assert code == 0, error
    assert f"parameters from {file}" in out and "validation accuracy" in out and "training those of network.head" in out
    code, out, error = run(tmp_path / "refined", f"phase=delta,start={tmp_path / 'head'}")
    assert code == 0, error
    summary = json.loads((tmp_path / "refined" / "summary.json").read_text())
    assert 0 < summary["validation_temporal_sparsity"] < 1
    code, _, error = run(tmp_path / "other", f"start={tmp_path / 'none.safetensors'}")
    assert code == 2 and "does not exist" in error
    code, _, error = run(tmp_path / "other", "phase=conv5")
    assert code == 2 and "it needs start=" in error


def test_the_phases_of_the_recipe():
    """At paper size: what each trains, with which clips, rates and first steps."""
    phases = ("head", "conv5", "delta", "delta_short")
    made = {phase: load_config(f"experiments/ucf101.py:phase={phase},start=before") for phase in phases}
    for phase, config in made.items():
        specs = frames.param_specs(config.model)
        mask = optimizer.trained(config.optimizer, specs)
        whole = {name for name, tree in mask["network"].items() if all(jax.tree.leaves(tree))}
        assert whole == {"head"} if config.optimizer.trainable else {"head", "stem", "stages"}
        assert [all(jax.tree.leaves(stage)) for stage in mask["network"]["stages"]] == [
            phase.startswith("delta")
        ] * 3 + [phase != "head"]
    assert [config.data.frames for config in made.values()] == [8, 8, 8, 2]
    assert [config.model.rate for config in made.values()] == [0, 0, 1e-4, 1e-6]
    steps = frames.param_specs(made["delta"].model)["delta"]
    first = {where: float(of["step"].init(jax.random.key(0), (1,), float)[0]) for where, of in steps.items()}
    assert first["input"] == pytest.approx(0.05) and first["stages.0.0"] == 3 and first["stages.3.0.1"] == 4


def _leaves(specs, stats):
    """(dotted path, PyTorch's shape) of every parameter and statistic."""

    def theirs(shape):
        return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]

    for tree in (specs, stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec):
            yield jax.tree_util.keystr(path, simple=True, separator="."), theirs(leaf.shape)
