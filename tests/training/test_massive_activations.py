"""Commands that look into finished runs: interventions, the report, the study; and the section of the results page."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from deltajax import report as results
from deltajax import sweep
from deltajax.massive_activations import intervene, laws, report, study
from deltajax.training import reports
from experiments import massive_activations as experiment


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
        ([], 2, "give either --workdir or --checkpoint"),
        (["--checkpoint=/nowhere"], 2, "--text: a text file is missing"),
        (["--checkpoint=/nowhere", "--text=README.md"], 2, "'/nowhere' is not a directory"),
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
    ("missing", "message"),
    [
        ("activations.csv", "activations.csv: no such file; train with --config.probes.every=N"),
        ("checkpoints", "no checkpoint in"),
    ],
)
def test_page_of_a_run_without_probes_or_without_checkpoint(missing, message, probed, tmp_path):
    path = probed / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    out = tmp_path / "new" / "page.html"
    assert report.main(["", f"--workdir={probed}", "--batches=1", f"--out={out}"]) == 0
    text = out.read_text()
    assert text.count("Nothing to show") == 1 and message in text
    assert ("<h3>Interventions</h3>" in text) == (missing != "checkpoints")
    assert ("Massive in blocks 0" in text) == (missing != "activations.csv")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "--workdir: the workdir of a training run is missing"),
        (["--workdir=/nowhere"], 1, "no checkpoint in /nowhere/checkpoints; /nowhere/activations.csv: no such file"),
        (["--workdir=EMPTY"], 2, "activations.csv: holds no rows"),
    ],
)
def test_usage_of_the_report(flags, code, message, probed, capsys):
    (probed / "activations.csv").write_text("step,layer,ratio\n")
    assert report.main(["", *(flag.replace("EMPTY", str(probed)) for flag in flags)]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (probed / "massive_activations.html").exists()


def test_study_of_runs(probed, tmp_path, capsys):
    """One run of two blocks: too few for a predictor, everything else in tables; one that was stopped early is left out."""
    run = tmp_path / "runs" / "model=mine,seed=3"
    shutil.copytree(probed, run)
    shutil.copytree(probed, run.with_name("model=early,seed=0"))
    shutil.rmtree(run.with_name("model=early,seed=0") / "checkpoints")
    out = tmp_path / "results" / "tables"
    flags = [f"--runs={tmp_path}/runs/*", f"--out={out}", "--surfaces=mine-3", "--batches=1"]
    assert study.main(["", *flags]) == 0
    printed = capsys.readouterr().out
    assert "early-0: left out: no checkpoint in " in printed
    assert "mine-3: ratio " in printed and "no predictor: 1 rows of 1 architectures" in printed
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.csv"))
    assert files == ["fits.csv", "interventions.csv", "surface_mine-3.csv", "trajectories/mine-3.csv"]
    with open(out / "fits.csv", newline="") as file:
        fitted, constant = csv.DictReader(file)
    assert float(fitted["lambda"]) == pytest.approx(0.3, rel=1e-3)
    assert (constant["problem"], constant["d_model"]) == ("constant at 7", "32")
    assert np.loadtxt(out / "surface_mine-3.csv", delimiter=",").shape == (32, 32)
    with open(out.with_name("tables_measures.csv"), newline="") as file:
        measures = {row["metric"]: row for row in csv.DictReader(file)}
    assert measures["ratio"] | {"value": ""} == {
        **dict(model="mine", seed="3", status="complete", step="12", set="", position="", metric="ratio", value="")
    }
    expected = np.mean(laws.modulated_logarithm(np.arange(900, 1000, 20), 500, 0.3, 0.02, 1, 900))
    assert float(measures["ratio"]["value"]) == pytest.approx(expected, rel=1e-4)
    assert {name: float(measures[name]["value"]) for name in ("massive_blocks", "law_is_best", "early_peak")} == {
        "massive_blocks": 1,
        "law_is_best": 1,
        "early_peak": 1,
    }
    assert float(measures["first_token_share"]["value"]) == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--runs: workdirs of runs with probes are missing"),
        (["--runs=/nowhere/*"], "--runs=/nowhere/*: no run with probes there; train with --config.probes.every=N"),
        (["--runs=MINE", "--surfaces=other"], "--surfaces=other: no such model"),
        (["--runs=MINE", "--family=("], "--family=(: missing ), unterminated subpattern"),
    ],
)
def test_usage_of_the_study(flags, message, probed, tmp_path, capsys):
    out = tmp_path / "out"
    assert study.main(["", *(flag.replace("MINE", str(probed)) for flag in flags), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_one_command_makes_everything(monkeypatch):
    """Runs, tables and page in turn, until one fails; the tables are of models that the runs make."""
    called = {}

    def record(command, code):
        monkeypatch.setattr(command, "main", lambda argv: called.setdefault(command.__name__, argv[1:]) and code)

    for command, code in ((sweep, 0), (study, 3), (results, 0)):
        record(command, code)
    assert experiment.main() == 3
    assert list(called) == ["deltajax.sweep", "deltajax.massive_activations.study"]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in called["deltajax.massive_activations.study"])
    names = {f"{model}-{seed}" for grid in experiment.get_grid() for model in grid["model"] for seed in grid["seed"]}
    assert {name for name in names if re.fullmatch(flags["family"], name)} == {f"{m}-0" for m in experiment.FAMILY}
    assert set(flags["surfaces"].split(",")) <= names
    assert f"--workdir={Path(flags['runs']).parent}" in called["deltajax.sweep"]


RESULTS = Path(__file__).parents[2] / "docs/results"


def test_section_of_the_results(tmp_path):
    """Every figure and claim finds its numbers in the committed tables; without them figures are left out."""
    shared = [path for path in RESULTS.glob(f"{experiment.NAME}*") if path.suffix != ".png"]
    for path in shared:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    rows = reports.read(tmp_path / f"{experiment.NAME}.csv")
    text = reports.section(experiment.get_report(), rows, experiment.NAME, tmp_path, tmp_path / "page.md")
    assert text.count("](massive_activations_") == 4 == len(list(tmp_path.glob("*.png")))
    assert "**Not run.**" not in text
    assert "| neox-14m |" in text and "show less than large ones" in text
    shutil.rmtree(tmp_path / experiment.NAME)
    bare = reports.section(experiment.get_report(), rows, experiment.NAME, tmp_path, tmp_path / "page.md")
    assert "](massive_activations_" not in bare
