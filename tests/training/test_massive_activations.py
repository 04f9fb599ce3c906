"""Commands that look into a finished run: interventions and the report."""

import csv
import re
import shutil

import numpy as np
import pytest

from deltajax.massive_activations import intervene, laws, report


def test_interventions(finished, tmp_path, capsys):
    path = tmp_path / "table.csv"
    assert intervene.main(["", f"--workdir={finished}", "--top=3", "--batches=2", f"--csv={path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(intervene.COLUMNS)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line.split() for line in lines[1:]] == [list(row.values()) for row in rows]
    assert [(row["layer"], row["mode"]) for row in rows] == [(n, m) for n in "01" for m in intervene.MODES]
    changes = np.array([float(row["change"]) for row in rows]).reshape(2, 4)
    assert (changes[:, 0] == 0).all() and (changes[:, 1:] != 0).any(1).all()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "--workdir: the workdir of a training run is missing"),
        (["--workdir=/nowhere"], 1, "no checkpoint in /nowhere/checkpoints"),
        (["--workdir=MINE", "--layer=2"], 2, "--layer=2: the model has 2 blocks, 0 to 1"),
        (["--workdir=MINE", "--top=0"], 2, "--top"),
    ],
)
def test_usage_of_interventions(flags, code, message, finished, capsys):
    assert intervene.main(["", *(flag.replace("MINE", str(finished)) for flag in flags)]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture
def probed(finished, tmp_path):
    """The finished run with a log as of probes: one block after the law, one constant."""
    workdir = tmp_path / "<mine>"
    shutil.copytree(finished, workdir)
    steps = np.arange(0, 1000, 20)
    curve = laws.modulated_logarithm(steps, 500, 0.3, 0.02, 1, 900)
    with open(workdir / "activations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "layer", "top1", "median", "ratio", "first_token_share"))
        for step, value in zip(steps, curve, strict=True):
            writer.writerow((step, 0, value, 0.1, value, ""))
            writer.writerow((step, 1, 7, 1, 7, 0.5))
    return workdir


def test_page_of_a_run(probed, capsys):
    assert report.main(["", f"--workdir={probed}", "--batches=1"]) == 0
    out = probed / "massive_activations.html"
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    assert "Massive activations of &lt;mine&gt;" in text and "<mine>" not in text
    assert "<b>Massive in blocks 0</b>" in text  # above 100, and 10,000 times the median
    assert text.count('src="data:image/png;base64,') == 2
    rows = [re.findall(r"<td>(.*?)</td>", line) for line in text.splitlines() if line.startswith("<tr><td>")]
    fitted, constant, first, second = rows
    assert fitted[:2] == ["0", "early peak"] and fitted[8] == "1.000"
    assert fitted[3].startswith("0.3<br>[0.3")
    assert constant[:2] == ["1", "constant at 7"]
    assert (first[0], second[0]) == ("0", "1") and re.fullmatch(r"\d\.\d{4} \([+-]\d\.\d{4}\)", first[2])


@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        (None, 2, "--workdir: the workdir of a training run is missing"),
        ("activations.csv", 2, "activations.csv: no such file; train with --config.probes.every=N"),
        ("checkpoints", 1, "no checkpoint in"),
    ],
)
def test_usage_of_the_report(missing, code, message, probed, capsys):
    if missing is not None:
        path = probed / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert report.main(["", *([f"--workdir={probed}"] if missing else [])]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (probed / "massive_activations.html").exists()
