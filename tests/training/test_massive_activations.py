"""Commands that look into a finished run: interventions and the report."""

import csv

import numpy as np
import pytest

from deltajax.massive_activations import intervene


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
