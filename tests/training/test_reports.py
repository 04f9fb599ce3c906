"""Reports: medians, verdicts and figures from a table whose numbers are known."""

import csv

import pytest

from deltajax import report
from deltajax.training import reports
from deltajax.training.reports import Claim, Curves, Table, Tradeoff
from deltajax.training.sweeps import COLUMNS


def make_rows():
    """Three seeds of two mixers: accuracy over positions at the last step, 10; one run failed."""
    header = ["mixer", "seed", *COLUMNS]
    rows = []
    for mixer, finals in (("delta", [0.9, 1.0, 0.95]), ("linear", [0.5, 0.25, 0.3])):
        for seed, final in enumerate(finals):
            run = [mixer, str(seed), "complete"]
            rows.append([*run, "10", "", "", "chance", "0.25"])
            rows.append([*run, "5", "validation", "", "accuracy", "0.1"])
            rows.append([*run, "10", "validation", "", "accuracy", str(final)])
            rows += [[*run, "10", "length_8", str(p), "accuracy", str(final / p)] for p in (1, 2, 4)]
    rows.append(["linear", "3", "failed: boom", "", "", "", "", ""])
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def rows():
    return make_rows()


def test_table_has_medians_best_chance_and_the_papers_figures(rows):
    table = Table(
        "", ["mixer"], ["set"], where={"set": "validation"}, published={"delta": "0.99"}, labels={"delta": "DeltaNet"}
    )
    assert reports.tabulate(table, rows).splitlines() == [
        "| mixer | validation | random guess | paper |",
        "|---|---|---|---|",
        "| DeltaNet | 0.950 (0.900 to 1.000, n=3) | 0.250 | 0.99 |",
        "| linear | 0.300 (0.250 to 0.500, n=3) | 0.250 |  |",
    ]
    named = reports.tabulate(Table("", ["mixer"], [], where={"set": "validation"}, published={"delta": "0.99"}), rows)
    assert "| delta | 0.950 (0.900 to 1.000, n=3) | 0.250 | 0.99 |" in named


def test_scaled_accuracy_is_zero_at_chance(rows):
    text = reports.tabulate(Table("", ["mixer"], [], where={"set": "validation"}, scaled=True), rows)
    assert "| delta | 0.933 (0.867 to 1.000, n=3) | 0.000 |" in text  # (0.95 - 0.25) / 0.75
    assert "| linear | 0.067 (0.000 to 0.333, n=3) | 0.000 |" in text


def test_a_cell_without_runs_says_so(rows):
    kept = [row for row in rows if (row["mixer"], row["set"]) != ("linear", "length_8")]
    text = reports.tabulate(Table("", ["mixer"], ["set", "position"], where={"position": ["", 4]}), kept)
    assert "not run" in text


def test_a_table_without_rows_says_so_and_a_misspelt_column_is_an_error(rows, tmp_path):
    assert reports.tabulate(Table("", ["mixer"], ["set"], where={"set": "length_9"}), rows) == "No numbers."
    report = reports.Report("T", "", tables=[Table("", ["mixr"], [])])
    with pytest.raises(ValueError, match=r"x\.csv has no column 'mixr' \(it has mixer, seed, status"):
        reports.section(report, rows, "x", tmp_path, tmp_path / "page.md")
    unscaled = [row for row in rows if row["metric"] != "chance"]
    with pytest.raises(ValueError, match="no level of chance is known of delta, 0"):
        reports.tabulate(Table("", ["mixer"], [], where={"set": "validation"}, scaled=True), unscaled)


def test_lower_is_better_where_it_is(rows):
    assert "| delta | 0.950 (1.000 to 0.900, n=3) |" in reports.tabulate(
        Table("", ["mixer"], [], where={"set": "validation"}, better="low"), rows
    )


@pytest.mark.parametrize(
    "threshold, verdict",
    [
        (0.9, "- Shown. C Medians: ours 0.9500 (0.9000 to 1.0000, n=3), theirs 0.0750 (0.0625 to 0.1250, n=3)."),
        (0.99, "- **Not shown.** C Medians: ours"),
    ],
)
def test_a_claim_is_judged_by_the_numbers(rows, threshold, verdict):
    values = {
        "ours": {"mixer": "delta", "set": "validation"},
        "theirs": {"mixer": "linear", "set": "length_8", "position": 4},
    }
    claim = Claim("C", values, lambda ours, theirs: ours >= threshold and theirs < 0.3)
    assert reports.check(claim, rows).startswith(verdict)


def test_a_claim_without_numbers_is_not_run(rows):
    claim = Claim("C", {"x": {"mixer": "kda"}}, lambda x: True)
    assert reports.check(claim, rows) == "- **Not run.** C (no numbers for x)"


def test_numbers_match_however_they_are_written(rows):
    assert len(reports.select(rows, {"seed": 1.0, "metric": "chance"})) == 2
    assert len(reports.select(rows, {"seed": [0, "2"], "metric": "accuracy", "set": "validation", "step": "last"})) == 4
    assert not reports.select(rows, {"mixer": "linear", "seed": 3})


def test_curves_are_medians_with_their_range(rows, monkeypatch, tmp_path):
    drawn = {}
    plot = reports.plt.Axes.plot

    def record(axes, x, y, label, **style):
        drawn[label] = (list(x), list(y))
        return plot(axes, x, y, label=label, **style)

    monkeypatch.setattr(reports.plt.Axes, "plot", record)
    figure = Curves("f", "", "position", "accuracy", ["mixer"], where={"set": "length_8"}, labels={"delta": "DeltaNet"})
    figure.draw(rows)
    assert drawn == {
        "DeltaNet": ([1.0, 2.0, 4.0], [0.95, 0.475, 0.2375]),
        "linear": ([1.0, 2.0, 4.0], [0.3, 0.15, 0.075]),
    }


def test_tradeoffs_join_the_medians_of_a_setting(rows):
    """A point a run that has both metrics, whatever other runs there are."""
    more = [
        {**row, "metric": "saved", "value": str(int(row["seed"]) / 10)}
        for row in rows
        if row["set"] == "validation" and row["step"] == "10" and (row["mixer"], row["seed"]) != ("linear", "2")
    ]
    figure = Tradeoff(
        "f",
        "",
        {"saved": "what is saved"},
        "accuracy",
        {"all": {}, "none": {"seed": 7}},
        "mixer",
        ("best", {"mixer": "delta"}),
    )
    drawing = figure.draw([*rows, *more])
    (axis,) = drawing.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines["all"] == [[0.05, 0.375], [0.1, 0.95]]
    assert sorted(axis.collections[0].get_offsets().tolist()) == [
        [0, 0.5],
        [0, 0.9],
        [0.1, 0.25],
        [0.1, 1],
        [0.2, 0.95],
    ]
    assert axis.get_xlabel() == "what is saved" and "none" not in lines
    assert set(lines["best"][0]) == {0, 0.95}
    assert figure.draw(rows) is None
    reports.plt.close(drawing)


def test_pictures_and_further_tables(tmp_path, rows):
    """A figure that draws itself stands in the page; rows of another table count as the sweep's own do."""
    other = {**rows[0], "metric": "ratio", "value": "7", "set": ""}
    with open(tmp_path / "more.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, other)
        writer.writeheader()
        writer.writerow(other)
    report = reports.Report(
        "T",
        "Text.",
        tables=[Table("Ratios.", ["mixer"], [], "ratio", digits=1)],
        pictures=[
            reports.Picture("drawn", "A picture.", lambda folder: reports.plt.figure()),
            reports.Picture("absent", "None.", lambda folder: None),
        ],
        also=["more", "nowhere"],
    )
    text = reports.section(report, rows, "t", tmp_path, tmp_path / "page.md")
    assert "| delta | 7.0 (n=1) |" in text
    assert "![A picture.](t_drawn.png)" in text and "None." not in text
    assert (tmp_path / "t_drawn.png").exists()


EXPERIMENT = """
from deltajax.training.reports import Claim, Curves, Report, Table

def get_report():
    return Report(
        "Recall", "As the paper did.",
        claims=[Claim("It works.", {"delta": {"mixer": "delta", "set": "validation"}}, lambda x: x > 0.9)],
        figures=[Curves("length", "By length.", "position", "accuracy", ["mixer"], where={"set": "length_8"}, log="x")],
        tables=[Table("At the end.", ["mixer"], ["set"], where={"set": "validation"})],
        notes=["Nothing was left out."],
    )
"""


def test_page_of_all_experiments(tmp_path, capsys, rows):
    (tmp_path / "recall.py").write_text(EXPERIMENT)
    (tmp_path / "later.py").write_text(EXPERIMENT)
    (tmp_path / "plain.py").write_text("def get_config(): ...")
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    with open(results / "recall.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    page = tmp_path / "RESULTS.md"
    arguments = [f"--experiments={tmp_path}/*.py", f"--results={results}", f"--output={page}"]
    assert report.main(["report", *arguments]) == 0
    text = page.read_text()
    assert "6 runs, [all their numbers](docs/results/recall.csv); 1 failed." in text
    assert "- Shown. It works. Medians: delta 0.9500 (0.9000 to 1.0000, n=3)." in text
    assert "](docs/results/recall_length.png)" in text
    assert (results / "recall_length.png").stat().st_size > 5000
    assert "Not run: there is no `later.csv`." in text
    assert text.count("## Recall") == 2
    before = text
    assert report.main(["report", *arguments]) == 0
    assert page.read_text() == before


def test_bad_reports(tmp_path, capfd):
    assert report.main(["report", f"--experiments={tmp_path}/*.py"]) == 2
    (tmp_path / "x.py").write_text("def get_report(): return 3")
    assert report.main(["report", f"--experiments={tmp_path}/x.py", f"--output={tmp_path / 'p'}"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True]
    assert "no such file" in lines[0] and "must return a Report, got int" in lines[1]
    assert not (tmp_path / "p").exists()
