"""Files of a workdir that somebody has damaged: one line with the file, and with the line in it."""

import json
import re
import shutil

import pytest
from training_runs import HERE

from deltajax import sweep
from deltajax.data import shards
from deltajax.errors import RunError
from deltajax.interop import gpt_neox
from deltajax.training import activation_log, metrics, rehearsal, sweeps

NO_CONFIGS = [b"[]", b"3", b"null", b'{"a"', b"", b"\xff", b"[" * 100_000, b'"text"']


@pytest.mark.parametrize(
    "line",
    [b"\xff", b"{", b"[]", b"3", b"null", b"{}", b'{"loss": 1}', b'{"step": "3"}', b'{"step": 3.0}', b'{"step": true}',
     b'{"step": 3, "loss": "x"}', b'{"step": 3, "loss": null}', b"", b"[" * 100_000],
)  # fmt: skip
def test_metrics(line, tmp_path):
    path = tmp_path / metrics.FILE
    path.write_bytes(b'{"step": 1, "loss": NaN}\n' + line + b'\n{"step": 3}\n{"ste')
    with pytest.raises(RunError, match=f"^{re.escape(str(path))}: line 2 is damaged"):
        metrics.read_rows(tmp_path)
    path.write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 3}\n{"st')
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [1, 3]


@pytest.mark.parametrize("text", [*NO_CONFIGS, b"{}", b'{"steps": 3}', b'{"steps": 3, "validation_loss": "low"}'])
def test_a_summary_that_is_none_is_of_a_run_that_is_not_complete(text, tmp_path):
    assert metrics.read_summary(tmp_path) is None
    (tmp_path / metrics.SUMMARY).write_bytes(text)
    assert metrics.read_summary(tmp_path) is None


def test_positions(tmp_path):
    assert metrics.read_positions(tmp_path) == []
    path = tmp_path / metrics.POSITIONS
    for line in (b"a,x,1,2", b"a,1,2", b"a,1,2,3,4", b"a,1,2,\xff", b"a,1,2,x", b'a,1,2,"3'):
        path.write_bytes(b"set,position,weight,loss\na,1,2,3\n" + line + b"\n")
        with pytest.raises(RunError, match=rf"^{re.escape(str(path))}: line \d: .*; remove the file and start again$"):
            metrics.read_positions(tmp_path)
    path.write_bytes(b"set,position,weight,loss\r\na,1,2,nan\r\nb,1,2,\r\n")
    assert [row["loss"] for row in metrics.read_positions(tmp_path)] == ["nan", ""]


def test_activations(tmp_path):
    path = tmp_path / activation_log.FILE
    header = ",".join(activation_log.COLUMNS).encode()
    row = b",".join([b"1", b"0", *[b"2"] * (len(activation_log.COLUMNS) - 2)])
    for number, lines in (
        (1, [b"step,layer", row]),
        (3, [header, row, b"\xff"]),
        (2, [header, b"x" + row]),
        (2, [header, b"1"]),
    ):
        path.write_bytes(b"\r\n".join([*lines, row]) + b"\r\n")
        with pytest.raises(RunError, match=f"^{re.escape(str(path))}: line {number} is damaged"):
            activation_log.Writer(tmp_path, 3)
    path.write_bytes(b"\r\n".join([header, row, row.replace(b"1", b"7", 1), row[:5]]))
    activation_log.Writer(tmp_path, 3).close()
    assert path.read_bytes() == header + b"\r\n" + row + b"\r\n"


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_config_of_a_sweeps_member(text, tmp_path, capfd):
    """One that holds nothing but this was killed before it trained anything."""
    member = sweeps.members(f"{HERE / 'tiny_sweep.py'}:rates=1")[0]
    folder = tmp_path / member.name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / sweeps.CONFIG_FILE).write_bytes(text)
    arguments = ["sweep", f"--config={HERE / 'tiny_sweep.py'}:rates=1", f"--workdir={tmp_path}"]
    assert sweep.main(arguments) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {folder / sweeps.CONFIG_FILE}: "), err


@pytest.mark.parametrize("text", [*NO_CONFIGS, b'{"rope_parameters": [1]}', b'{"hidden_size": null}'])
def test_config_of_a_hugging_face_folder(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"^weights: {re.escape(str(tmp_path / 'config.json'))}: ") as caught:
        gpt_neox.read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [*NO_CONFIGS, b'{"weight_map": [1]}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": []}}']
)
def test_index_of_a_hugging_face_folder(text, tmp_path):
    config = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / gpt_neox.INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=f"^weights: {re.escape(str(tmp_path / gpt_neox.INDEX))}: not an index"):
        gpt_neox.load(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"\x80", b"]\x94.", b"N.", b"}.", b"cno_module\nname\n.", b"\xff\xfe"])
def test_executables(contents, tmp_path, tiny_config):
    path = tmp_path / "step"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"^--executable={re.escape(str(path))}: not a file that deltajax.rehearse"):
        rehearsal.load(path, tiny_config)


def test_index_of_shards(tmp_path):
    for text in [*NO_CONFIGS, json.dumps({"format": shards.FORMAT}).encode()]:
        (tmp_path / shards.INDEX).write_bytes(text)
        with pytest.raises(ValueError, match=f"^corpus: '{re.escape(str(tmp_path / shards.INDEX))}' "):
            shards.open_shards(str(tmp_path), None, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line, said",
    [
        (b"S3,0.01", "line 3: 2 cells, where the header has 9 columns"),
        (b"\xff,,,,,,,,", "line 3: the file must be UTF-8"),
        (b"a" + b"," * 20, "line 3: 21 cells"),
    ],
)
def test_a_damaged_table_of_a_sweep(line, said, tmp_path, capfd):
    table = tmp_path / "table.csv"
    header = ",".join(["group", "learning_rate", "seed", *sweeps.COLUMNS]).encode()
    table.write_bytes(header + b"\n" + b",".join([b"x"] * 9) + b"\n" + line + b"\n")
    before = table.read_bytes()
    file = HERE / "tiny_sweep.py"
    assert sweep.main(["sweep", f"--config={file}", f"--workdir={tmp_path}", f"--csv={table}"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: --csv={table}: {said}"), err
    assert table.read_bytes() == before


def test_a_damaged_summary_is_written_anew(finished, tmp_path, run_train):
    workdir = shutil.copytree(finished, tmp_path / "run")
    whole = json.loads((workdir / metrics.SUMMARY).read_text())
    (workdir / metrics.SUMMARY).write_text(json.dumps({**whole, "validation_loss": "low"}))
    assert run_train(workdir)[0] == 0
    assert json.loads((workdir / metrics.SUMMARY).read_text())["validation_loss"] == whole["validation_loss"]
