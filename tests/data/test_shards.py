import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltajax import data
from deltajax.data import shards
from deltajax.data.documents import SPLITS, read_documents


def convert(corpus, output, tokenizer="byte", num_shards=3):
    loaded = data.load_tokenizer(tokenizer)
    documents = read_documents(corpus, 0.3)
    return shards.write_shards(output, documents, loaded, num_shards=num_shards, validation_fraction=0.3)


@pytest.fixture
def converted(corpus, tmp_path) -> Path:
    convert(corpus, tmp_path / "shards")
    return tmp_path / "shards"


def config(corpus, **changes):
    return data.Config(**{"corpus": str(corpus), "seq_len": 64, "batch_size": 4, "validation_fraction": 0.3, **changes})


@pytest.mark.parametrize("num_shards", [1, 3, 70])  # 70: more shards than documents
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_shards_give_the_batches_that_the_files_give(corpus, bpe_file, tmp_path, monkeypatch, num_shards, tokenizer):
    monkeypatch.setattr(shards, "RECORD_TOKENS", 50)  # documents of many records, windows across them
    name = bpe_file if tokenizer == "bpe" else "byte"
    index = convert(corpus, tmp_path / "shards", name, num_shards)
    direct = data.load(config(corpus, tokenizer=name))
    read = data.load(config(tmp_path / "shards", tokenizer=name))
    for split in SPLITS:
        ours, theirs = getattr(read, split), getattr(direct, split)
        assert len(ours) == len(theirs) > 3
        for i in range(len(ours)):
            for key, value in theirs[i].items():
                np.testing.assert_array_equal(ours[i][key], value)
    assert read.validation_text == direct.validation_text
    assert read.bytes_per_target == direct.bytes_per_target
    assert sum(index["documents"]["validation"]["bytes"]) == len(read.validation_text)
    batch, same = next(read.train_iterator()), next(direct.train_iterator())
    np.testing.assert_array_equal(batch["tokens"], same["tokens"])


def test_a_failing_conversion_leaves_nothing(corpus, tmp_path):
    def failing():
        for i, document in enumerate(read_documents(corpus, 0.3)):
            if i == 20:
                raise KeyboardInterrupt
            yield document

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(tmp_path / "out", failing(), data.ByteTokenizer(), num_shards=2, validation_fraction=0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_is_not_mistaken_for_a_whole_one(corpus, tmp_path):
    """Killed after the last document, right before the index would be written."""
    killed = f"""
import os, signal
from deltajax.data import ByteTokenizer, shards
from deltajax.data.documents import read_documents
shards.json.dumps = lambda index: os.kill(os.getpid(), signal.SIGKILL)
shards.write_shards(
    {str(tmp_path / "out")!r}, read_documents({corpus!r}, 0.3), ByteTokenizer(), num_shards=2, validation_fraction=0.3
)
"""
    assert run_python("-c", killed, cwd=tmp_path).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.unfinished-") and len(list(left.iterdir())) == 5
    with pytest.raises(FileNotFoundError, match=r"^corpus: nothing found"):
        data.load(config(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"^corpus: '.*' is a shard, not text"):
        data.load(config(left))
    convert(corpus, tmp_path / "out")  # a second attempt is not in the way of the first
    assert len(data.load(config(tmp_path / "out")).train) > 0


def test_bad_output(corpus, converted):
    with pytest.raises(FileExistsError, match=r"^output: '.*shards' exists; allowed: [^\n]*$"):
        convert(corpus, converted)
    with pytest.raises(ValueError, match=r"^shards: got 0; allowed: >= 1$"):
        convert(corpus, converted.with_name("other"), num_shards=0)


def test_a_full_disk_is_an_error_of_the_output(corpus, tmp_path, monkeypatch):
    class Full(shards.ArrayRecordWriter):
        def __init__(self, path, options):
            super().__init__("/dev/full", options)

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"^output: '.*out' could not be written: .*No space left"):
        convert(corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards_made_with_other_settings(converted, bpe_file):
    with pytest.raises(ValueError, match=r"^tokenizer: got 'sha256:\w+', but '.*' was converted with 'byte'$"):
        data.load(config(converted, tokenizer=bpe_file))
    with pytest.raises(ValueError, match=r"^validation_fraction: got 0.2, but '.*' was converted with 0.3$"):
        data.load(config(converted, validation_fraction=0.2))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"format": "deltajax sh'])
def test_a_foreign_or_torn_index(converted, content):
    (converted / shards.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"^corpus: '.*json' has format .*; allowed: 'deltajax shards 1'$"):
        data.load(config(converted))


def test_a_torn_or_missing_file(converted):
    shard = sorted(converted.glob("train-*"))[0]
    os.truncate(shard, 1000)
    with pytest.raises(ValueError, match=r"^corpus: '.*train-00000.*' is torn: 1000 bytes, its index says \d+$"):
        data.load(config(converted))
    shard.unlink()
    with pytest.raises(ValueError, match=r"^corpus: '.*train-00000.*' is torn: no bytes"):
        data.load(config(converted))


def test_a_foreign_shard_of_the_right_size(converted):
    shard = sorted(converted.glob("train-*"))[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=r"^corpus: '.*' holds a foreign or corrupted shard: "):
        data.load(config(converted))


def change_index(folder, change):
    index = json.loads((folder / shards.INDEX).read_text())
    change(index)
    (folder / shards.INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_fit_its_shards(converted):
    change_index(converted, lambda index: index["documents"]["train"]["tokens"].append(3))
    with pytest.raises(ValueError, match=r"^corpus: '.*' holds \d+ train records, its index says \d+$"):
        data.load(config(converted))
    change_index(converted, lambda index: index["documents"]["train"]["tokens"].pop())
    change_index(converted, lambda index: index["documents"]["train"]["tokens"].reverse())
    windows = data.load(config(converted)).train
    with pytest.raises(ValueError, match=r"^corpus: document \d+ in '.*' is shorter than its index says$"):
        for i in range(len(windows)):
            windows[i]


def test_a_flipped_bit_is_found_when_it_is_read(converted):
    shard = sorted(converted.glob("train-*"))[0]
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    windows = data.load(config(converted)).train
    with pytest.raises(ValueError, match=r"^corpus: document \d+ in '.*' is corrupted: "):
        for i in range(len(windows)):
            windows[i]


def run_python(*arguments, cwd):
    """A process of its own, which finds this deltajax whether or not it is installed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_the_command_line(corpus, tmp_path):
    arguments = [f"--input={corpus}", "--output=out", "--shards=2", "--validation_fraction=0.3"]
    done = run_python("-m", "deltajax.data.convert", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train: ") and "\nvalidation: " in done.stdout
    assert len(data.load(config(tmp_path / "out")).train) > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input=x"], 2, "--output"),
        (["--input=x", "--output=y", "--shard=3"], 2, "did you mean --shards?"),
        (["--input=x", "--output=y", "--shards=0"], 2, "shards"),
        (["--input=x", "--output=y", "--validation_fraction=1"], 2, "between 0 and 1"),
        (["--input=x", "--output=y", "z"], 2, "z: only flags are allowed"),
        (["--input=/nowhere", "--output=y"], 2, "corpus: nothing found at '/nowhere'"),
        (["--input=stdlib", "--output=/dev/null/y"], 1, "Not a directory"),
    ],
)
def test_bad_command_lines(arguments, code, message, tmp_path):
    done = run_python("-m", "deltajax.data.convert", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert list(tmp_path.iterdir()) == []
