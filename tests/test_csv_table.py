"""Damaged tables are errors with file and line, and a run without a number decides no claim."""

import itertools

import pytest

from deltajax.csv_table import read_table
from deltajax.massive_activations import fits, trajectories
from deltajax.training import reports, results

HEAD = "model,status,step,set,position,metric,value\n"
ROW = "a,complete,10,validation,,accuracy,0.5\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n3\n", "line 3: 1 cells, where the header has 2 columns"),
        (b"a,b\n1,234,5\n", "line 2: 3 cells, where the header has 2 columns"),
        (b"a,b\n1,\xff\n", "line 2: the file must be UTF-8"),
        (b"a,b\n1,2\n3,4", "the last line has no end"),
        (b'a,b\n1,"2\n', "line 2: unexpected end of data"),
        (b"a,a\n1,2\n", "line 1: column 'a' comes twice"),
        (b"b\n1\n", "column a is missing"),
        (b"", "column a is missing"),
    ],
)
def test_damaged_tables(content, said, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_table(path, ["a"])
    assert str(caught.value).startswith(f"{path}: {said}") and "\n" not in str(caught.value)


def test_harmless_forms(tmp_path):
    """A byte-order mark, Windows' ends of lines, empty lines, quoted commas and newlines."""
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1,"x,\ny"\r\n\r\n2,z\r\n')
    assert read_table(path, ["a", "b"]) == (["a", "b"], [(3, {"a": "1", "b": "x,\ny"}), (5, {"a": "2", "b": "z"})])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROW + ROW, "line 3 repeats the number of line 2"),
        (ROW.replace("0.5", '"1,234"'), "line 2: step '10' and value '1,234' must be numbers"),
        (ROW.replace("10", "x"), "line 2: step 'x' and value '0.5' must be numbers"),
    ],
)
def test_results(rows, said, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(HEAD + rows)
    with pytest.raises(ValueError, match=f"table.csv: {said}"):
        results.read(path)


def test_trajectories(tmp_path):
    """A cut number looks like a whole one, so an unfinished last line is left out."""
    path = tmp_path / "t.csv"
    path.write_text("step,layer,ratio\n0,0,1.5\n1,0,2.25\n2,0,12")
    assert trajectories.read(path).values["ratio"][0].tolist() == [1.5, 2.25]
    path.write_text("model,layer,A,lambda,gamma,t0,K\npythia-14m,0,1,1,1,1,1")
    with pytest.raises(ValueError, match="the last line has no end"):
        fits.read([path])


@pytest.mark.parametrize("values", list(itertools.permutations(["0.9", "nan", "0.8"])))
def test_a_claim_over_a_run_without_a_number(values, tmp_path):
    rows = [
        {"model": "a", "seed": str(n), "status": "complete", "step": "1", "set": "validation", "position": "",
         "metric": "accuracy", "value": value}
        for n, value in enumerate(values)
    ]  # fmt: skip
    claim = reports.Claim("It learns.", {"a": {"model": "a"}}, lambda a: a > 0.5)
    assert reports.check(claim, rows) == "- **Not shown.** It learns. Medians: a nan (1 of n=3 are no numbers)."
    table = reports.tabulate(reports.Table("t", ["model"], []), rows)
    assert "nan (1 of n=3 are no numbers)" in table


def test_a_run_that_is_in_a_table_twice_in_two_spellings():
    rows = [
        {"rate": rate, "status": "complete", "step": "1", "set": "validation", "position": "", "metric": "loss",
         "value": "0.5"}
        for rate in ("0.01", "1e-2")
    ]  # fmt: skip
    results.check_unique(rows, "mine")
    with pytest.raises(
        ValueError, match=r"^mine.csv, with the tables beside it, has two numbers for rate 0.01, step 1"
    ):
        results.check_unique(results.unify(rows), "mine")
