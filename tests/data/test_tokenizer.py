import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltajax.data import ByteTokenizer, load_tokenizer


@given(st.binary(max_size=200))
@example(bytes(range(256)))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens[0] == tokenizer.bos and len(tokens) == len(text) + 1
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


def test_byte_tokenizer_ignores_ids_of_a_padded_vocabulary():
    assert ByteTokenizer().decode([104, 300, 105]) == b"hi"


@given(text=st.text(max_size=200))
def test_file_round_trip(bpe_file, text):
    tokenizer = load_tokenizer(bpe_file)
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == np.int32
    assert tokens[0] == tokenizer.bos and np.all(tokens < tokenizer.vocab_size)
    assert tokenizer.decode(tokens) == text.encode()


def test_file_tokenizer_compresses_and_replaces_bad_bytes(bpe_file):
    tokenizer = load_tokenizer(bpe_file)
    assert len(tokenizer.encode(b"delta rule state")) < 10
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb".encode()


def test_bos_is_the_files_own_or_one_more_id(bpe_file, tmp_path):
    plain = load_tokenizer(bpe_file)
    assert plain.bos == 300 and plain.vocab_size == 301
    content = json.loads(Path(bpe_file).read_text(encoding="utf-8"))
    content["model"]["vocab"]["<|endoftext|>"] = 300
    (tmp_path / "with_bos.json").write_text(json.dumps(content))
    own = load_tokenizer(str(tmp_path / "with_bos.json"))
    assert own.bos == 300 and own.vocab_size == 301
    assert own.identity != plain.identity


def test_truncation_in_the_file_loses_no_text(bpe_file, tmp_path):
    content = json.loads(Path(bpe_file).read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "truncating.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path / "truncating.json"))
    assert tokenizer.decode(tokenizer.encode(b"delta rule " * 20)) == b"delta rule " * 20


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^tokenizer: '.*absent.json' does not exist"):
        load_tokenizer(str(tmp_path / "absent.json"))
    for content in (b"{}", b"\xff\xfe", b"not json"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^tokenizer: '.*bad.json' is not a Hugging Face [^\n]*$"):
            load_tokenizer(str(tmp_path / "bad.json"))
