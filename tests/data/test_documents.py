import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltajax.data.documents import find_files, read_documents, split_of


def test_one_corpus_by_many_names(corpus):
    files = find_files(corpus)
    assert len(files) == 60 and files == sorted(files)
    parts = sorted(Path(corpus).iterdir())
    for name in (
        f"{corpus}/**/*.txt",
        ",".join(map(str, parts)),
        ", ".join(map(str, reversed(files))),
        f"{corpus}/part?,{corpus}",
    ):
        assert find_files(name) == files, name


def test_hidden_files_are_left_out_and_a_comma_in_a_name_is_allowed(tmp_path):
    folder = tmp_path / "a,b"
    (folder / ".git").mkdir(parents=True)
    for name in (".git/x", ".y", "z"):
        (folder / name).write_text("text")
    assert find_files(str(folder)) == [folder / "z"]


def test_stdlib_is_source_without_tests_and_packages():
    root = sysconfig.get_path("stdlib")
    files = [f.relative_to(root) for f in find_files("stdlib")]
    assert len(files) > 300 and all(f.suffix == ".py" for f in files)
    assert {Path("dataclasses.py"), Path("json/decoder.py")} <= set(files)
    folders = {part for f in files for part in f.parts[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "pydoc_data"}


def test_read_documents_leaves_out_empty_files(corpus, texts):
    read = [content for _, content in read_documents(corpus, 0.5)]
    assert sorted(read) == sorted(t for t in texts if t)


@given(st.binary(min_size=1, max_size=50), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_split_depends_on_content_only_and_grows_with_the_fraction(content, one, other):
    low, high = sorted((one, other))
    assert split_of(content, low) == split_of(bytes(content), low)
    assert not (split_of(content, low) == "validation" and split_of(content, high) == "train")


def test_split_is_stable_and_of_the_right_size():
    splits = [split_of(str(i).encode(), 0.1) for i in range(5000)]
    assert 0.08 < splits.count("validation") / 5000 < 0.12
    # written down once: a change would leak the validation text of old checkpoints into their training
    assert [i for i in range(40) if splits[i] == "validation"] == [9, 39]


def test_copies_stand_on_one_side(corpus):
    splits: dict[bytes, set[str]] = {}
    for split, content in read_documents(corpus, 0.5):
        splits.setdefault(content, set()).add(split)
    assert all(len(s) == 1 for s in splits.values())
    assert {next(iter(s)) for s in splits.values()} == {"train", "validation"}


def test_bad_corpora(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^corpus: the folder '.*empty' holds no files; allowed: [^\n]*$"):
        find_files(str(tmp_path / "empty"))
    for missing in (str(tmp_path / "absent"), f"{tmp_path}/*.md", f"{__file__},", f"{__file__},nowhere"):
        with pytest.raises(FileNotFoundError, match=r"^corpus: nothing found at '[^\n]*allowed: [^\n]*$"):
            find_files(missing)
    (tmp_path / "train-00000-of-00001.array_record").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^corpus: '.*' is a shard, not text"):
        find_files(str(tmp_path))
