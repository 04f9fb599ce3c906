"""Members of a sweep: which are the same, and what their folders are called."""

import csv
import json

import pytest
from training_runs import HERE

from deltajax import sweep, train
from deltajax.training import results, serialize, sweeps
from deltajax.training.config import default_workdir

FILE = str(HERE / "tiny_sweep.py")


def names(*grid: str) -> list[str]:
    return [member.name for member in sweeps.members(FILE, grid)]


@pytest.mark.parametrize(
    "values", ["a/b,a_b,a b,_a_b", "é,日本,日,_", "x" * 250 + "," + "x" * 249 + "y", "\udcff,\udcfe", "a,A"]
)
def test_every_member_has_a_folder_of_its_own(values):
    """Whatever the other members are, so that a larger grid goes on with the same folders."""
    of_all = names(f"config.prompt={values}")
    assert len(set(of_all)) == len(of_all) == values.count(",") + 1
    assert of_all == [name for value in values.split(",") for name in names(f"config.prompt={value}")]
    assert all(len(name) < 250 and "/" not in name and name.isascii() for name in of_all)


def test_names_that_lose_nothing_are_the_settings():
    assert names("config.prompt=a_b,1e-2,x+y") == ["prompt=a_b", "prompt=1e-2", "prompt=x+y"]


@pytest.mark.parametrize(
    "grid, said",
    [
        ("learning_rate=0.01,1e-2", "the members learning_rate=0.01 and learning_rate=1e-2 are the same run"),
        ("config.seed=1,2,1.0", "the members seed=1 and seed=1.0 are the same run"),
        ("config.seed=1,1", "the member seed=1 occurs twice"),
        (
            "config.model.tie_embeddings=True,true",
            "the members model.tie_embeddings=True and model.tie_embeddings=true are the same run",
        ),
        (
            "config.model.tie_embeddings=1,true",
            "the members model.tie_embeddings=1 and model.tie_embeddings=true are the same run",
        ),
        (
            "config.optimizer.clip_norm=None,none",
            "the members optimizer.clip_norm=None and optimizer.clip_norm=none are the same run",
        ),
        ("config.data.lengths=(7,8),(7, 8),(9)", "the members data.lengths=_7,8-"),
        ("group=S3, S3", "the member group=S3 occurs twice"),
    ],
)
def test_a_value_spelled_twice_is_one_member(grid, said, tmp_path, capfd):
    code = sweep.main(["sweep", f"--config={FILE}", f"--workdir={tmp_path / 'new'}", f"--grid={grid}"])
    err = capfd.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: --grid: {said}")
    assert not (tmp_path / "new").exists()


def test_texts_that_only_look_like_equal_numbers_are_two_members():
    assert len(names("config.prompt=1.1,1.10,01.1")) == 3


def test_a_folder_that_an_older_deltajax_named_goes_on(tmp_path, monkeypatch):
    """Only where it holds just this member's run."""
    found = sweeps.members(FILE, ["config.prompt=a/b,a_b,a b"])
    folder = tmp_path / found[0].older_name
    folder.mkdir()
    (folder / sweeps.CONFIG_FILE).write_text(json.dumps(serialize.to_json(found[0].config)))
    trained = []

    async def train_none(worker, member):
        trained.append(member.name)
        return "not trained"

    monkeypatch.setattr(sweeps.Worker, "train", train_none)
    with pytest.raises(Exception, match=r"prompt=a_b holds a run of another config \(prompt: 'a/b' -> 'a_b'\)"):
        sweeps.run(found, tmp_path, tmp_path / "table.csv")
    with pytest.raises(Exception, match="2 of 2 members failed"):
        sweeps.run([found[0], found[2]], tmp_path, tmp_path / "table.csv")
    assert trained == ["prompt=a_b", found[2].name]


def test_default_workdirs_that_an_older_deltajax_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    new = default_workdir(f"{FILE}:group=(0 1)")
    (tmp_path / "runs" / "tiny_sweep-group=_0_1").mkdir(parents=True)
    assert train.main(["train", f"--config={FILE}:group=(0 1)"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --workdir: runs/tiny_sweep-group=_0_1 may hold this run") and err.count("\n") == 1
    assert f"choose --workdir=runs/tiny_sweep-group=_0_1 to continue it or --workdir={new} to begin" in err
    new.mkdir()
    assert default_workdir(f"{FILE}:group=(0 1)") == new


def test_rows_of_one_setting_are_one_group():
    rows = [
        {"rate": rate, "flag": flag, "seed": seed, "status": "complete", "step": "4", "set": "", "position": "",
         "metric": "loss", "value": value}
        for rate, flag, seed, value in [("1e-2", "True", "1", "1"), ("0.01", "true", "1.0", "2"), ("0.1", "", "é", "3")]
    ]  # fmt: skip
    unified = results.unify(rows)
    assert {results.member(row) for row in unified} == {("1e-2", "True", "1"), ("0.1", "", "é")}
    assert results.group(unified, ["rate"]) == {("1e-2",): [1.0, 2.0], ("0.1",): [3.0]}
    assert [row["value"] for row in unified] == ["1", "2", "3"]


def test_a_table_takes_a_setting_in_another_spelling_as_the_same(tmp_path):
    table = tmp_path / "table.csv"
    members = sweeps.members(FILE, ["config.model.tie_embeddings=true,false"])
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model.tie_embeddings", *sweeps.COLUMNS])
        rows.writerow(["True", "complete", "4", "", "", "loss", "1"])
    assert sweeps._others(members, table) == []
    assert len(sweeps._others(members[1:], table)) == 1
