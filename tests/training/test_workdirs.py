"""Where a run may be kept, and what happens if its checkpoints have disappeared."""

import os
import shutil
from pathlib import Path

import pytest

from deltajax import generate, train
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.lock import InUse, check_path, lock


@pytest.mark.parametrize("name", ["a\\b", "\udcff"])
def test_paths_that_tensorstore_would_misread(name, tmp_path, run_train):
    """One line before anything is written, whatever the path was reached by."""
    code, _, err = run_train(tmp_path / name)
    assert (code, err.count("\n")) == (2, 1), err
    assert "must be a path without" in err and os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="must be a path without"):
        check_path(tmp_path / name / "run")


@pytest.mark.parametrize("name", ["a b", "100%", "%41", "a#b", "a?b", "a:b", "a|b", "日本 é", "a'b\"c"])
def test_other_names_are_kept(name, finished, tmp_path):
    """A run is read where it is, whatever it is called."""
    workdir = shutil.copytree(finished, tmp_path / name)
    check_path(workdir)
    assert Checkpoints(workdir, read_only=True).steps()[-1] == 12
    assert generate.main(["generate", f"--workdir={workdir}", "--max_tokens=1"]) == 0


def test_a_tilde_is_the_home_folder(finished, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny = Path(__file__).parent / "tiny.py"
    assert train.main(["train", f"--config={tiny}", "--workdir=~/run"]) == 0
    assert "is complete: 12 steps" in capfd.readouterr().out
    assert not (tmp_path / "~").exists()


def lose(workdir, how):
    folder = workdir / "checkpoints"
    if how == "removed":
        shutil.rmtree(folder)
    elif how == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        folder.rename(workdir.parent / "elsewhere")
        if how == "link":
            folder.symlink_to(workdir.parent / "absent")
        else:
            folder.write_text("")


@pytest.mark.parametrize("how", ["removed", "emptied", "link", "file"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_run_whose_checkpoints_are_gone(how, complete, finished, tmp_path, run_train):
    """Nothing begins anew without a word, and nothing is touched."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    if not complete:
        (workdir / "summary.json").unlink()
    lose(workdir, how)
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    code, _, err = run_train(workdir)
    assert (code, err.count("\n")) == (1, 1), err
    assert str(workdir / "checkpoints") in err
    assert ("to start over" in err) == (how in ("removed", "emptied"))
    assert {path: path.read_bytes() for path in workdir.glob("*.json*")} == before


def test_a_run_without_a_checkpoint_yet_begins_anew(finished, tmp_path, run_train):
    """It was killed before its first save: it has rows, and no sign of a checkpoint."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished / "metrics.jsonl", workdir)
    code, out, err = run_train(workdir)
    assert (code, err) == (0, "") and "parameters on" in out


def test_who_holds_a_workdir(tmp_path):
    said = rf"is in use by another run \(process {os.getpid()} on .* since "
    with lock(tmp_path), pytest.raises(InUse, match=said), lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""
    with lock(tmp_path):
        pass
