"""Tables from runs and from folders of checkpoints, and what is wrong with other people's."""

import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from deltajax.interop import gpt_neox as interop
from deltajax.massive_activations import laws, trajectories
from deltajax.models import gpt_neox

CONFIG = gpt_neox.Config(257, 16, 3, 2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Steps 0, 1 and 10 of a model whose weights grow by chance, not by training."""
    folder = tmp_path_factory.mktemp("tiny")
    for step in (10, 0, 1):
        params = jax.tree.map(lambda x, step=step: x * (1 + step / 10), gpt_neox.init(jax.random.key(0), CONFIG))
        interop.save(params, CONFIG, folder / f"step{step}")
    return folder


def test_checkpoints_of_two_models(checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints, tmp_path / "two")
    other = dataclasses.replace(CONFIG, mlp_dim=32)
    interop.save(gpt_neox.init(jax.random.key(0), other), other, folder / "step2")
    flags = [f"--checkpoints={folder}", "--text=README.md", "--tokenizer=byte", f"--out={tmp_path / 'out.csv'}"]
    assert trajectories.main(["", *flags]) == 2
    assert (
        f"{folder / 'step2'}: its config.json is of another model than that of {folder / 'step0'}"
        in capsys.readouterr().err
    )


def test_a_folder_of_checkpoints(checkpoints, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out.csv"
    text.write_bytes(bytes(range(60, 120)) * 3)
    flags = [f"--checkpoints={checkpoints}", f"--text={text}", f"--out={out}", "--tokenizer=byte", "--model=tiny"]
    assert trajectories.main(["", *flags, "--sequences=2", "--length=20"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 steps of tiny\n"
    table = trajectories.read(out)
    assert table.model == "tiny"
    assert list(table.steps) == [0, 1, 2]
    np.testing.assert_array_equal(table.steps[2], [0, 1, 10])
    params, _ = interop.load(checkpoints / "step10")
    tokens = np.frombuffer(text.read_bytes()[:40], np.uint8).reshape(2, 20).astype(np.int32)
    x = gpt_neox.hidden(params, CONFIG, tokens)[0]
    assert x.shape == (2, 20, 16)
    h, block = params["embed"][tokens], jax.tree.map(lambda leaf: leaf[0], params["layers"])
    first, _ = gpt_neox._block(CONFIG, None, h, (block, None))
    magnitudes = np.sort(np.abs(first).reshape(2, -1), -1)
    assert table.values["top2"][0][2] == pytest.approx(magnitudes[:, -2].mean(), rel=1e-5)
    assert table.values["ratio"][0][2] == pytest.approx(magnitudes[:, -1].mean() / magnitudes[:, 159].mean(), rel=1e-5)
    assert 0 < table.values["first_token_share"][1][0] < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --workdir or --checkpoints"),
        (["--workdir=a", "--checkpoints=b"], "give either --workdir or --checkpoints"),
        (["--workdir=/nowhere"], "/nowhere/activations.csv: no such file; train with --config.probes.every=N"),
        (["--checkpoints=/nowhere"], "--text: a text file is missing"),
        (["--checkpoints=/nowhere", "--text=README.md"], "holds no directories whose names end in step<N>"),
        (
            ["--checkpoints=FOLDER", "--text=SHORT", "--tokenizer=byte"],
            "text: 5 tokens are fewer than 10 sequences of 512",
        ),
        (["--checkpoints=FOLDER", "--text=SHORT"], "tokenizer.json' does not exist"),
    ],
)
def test_usage(flags, message, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "short").write_text("12345")
    flags = [x.replace("FOLDER", str(checkpoints)).replace("SHORT", str(tmp_path / "short")) for x in flags]
    assert trajectories.main(["", *flags, f"--out={tmp_path / 'out.csv'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def table(path, rows, columns=("model", "step", "layer", "ratio")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


STEPS = [*range(0, 1000, 50)]
CURVE = laws.modulated_logarithm(np.array(STEPS), 1, 0.3, 0.02, 1, 2)


def test_one_bad_layer_does_not_stop_the_others(tmp_path):
    rows = [("m", step, 0, value) for step, value in zip(STEPS, CURVE, strict=True)]
    rows += [("m", step, 1, value) for step, value in zip(STEPS[::-1], CURVE, strict=True)]
    rows += [("m", step, 2, value) for step, value in zip(STEPS[:5], CURVE[:5], strict=True)]
    rows += [("m", step, 3, "" if step == 100 else 3) for step in STEPS]
    rows += [("m", step, 4, value) for _ in "ab" for step, value in zip(STEPS, CURVE, strict=True)]
    fits = trajectories.read(table(tmp_path / "t.csv", rows)).fits()
    assert [fits[layer].problem for layer in range(5)] == [
        "",
        "steps must increase, got 950 before 900",
        "5 points; at least 8 are needed for five parameters",
        "1 of 20 values are not finite",
        "step 0 comes twice; rows of several models?",
    ]
    assert fits[0].score.r2 > 0.999


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", 0, 0, 1), ("b", 0, 0, 1)], ("model", "step", "layer", "ratio"), r"rows of 2 models \(a, b\)"),
        ([], ("step", "layer", "ratio"), "holds no rows"),
        ([(0, 0), (1, 0, 1)], ("step", "layer", "ratio"), "line 2: 2 cells, where the header has 3 columns"),
        ([(0, 1)], ("step", "ratio"), "column layer is missing"),
        ([(0, 0, "many")], ("step", "layer", "ratio"), "line 2: 0,0,many is not made of numbers"),
    ],
)
def test_tables_that_make_no_sense(rows, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trajectories.read(table(tmp_path / "t.csv", rows, columns))


def test_a_run_s_log(tmp_path, capsys):
    run = tmp_path / "my_run"
    run.mkdir()
    rows = [(step, layer, 5, 1, 5) for step in (0, 1, 2) for layer in (0, 1)]
    table(run / "activations.csv", rows, ("step", "layer", "top1", "median", "ratio"))
    with open(run / "activations.csv", "a") as file:
        file.write("3,0,5.")  # of a run that was killed
    out = tmp_path / "new" / "out.csv"
    assert trajectories.main(["", f"--workdir={run}", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 steps of my_run\n"
    read = trajectories.read(out)
    assert read.model == "my_run"
    np.testing.assert_array_equal(read.values["ratio"][1], [5, 5, 5])
    before = out.read_text()
    (run / "activations.csv").write_text("")
    assert trajectories.main(["", f"--workdir={run}", f"--out={out}"]) == 2
    assert "column step is missing (needed: step, layer, ratio; there: " in capsys.readouterr().err
    assert out.read_text() == before
