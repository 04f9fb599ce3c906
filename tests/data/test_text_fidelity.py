"""Text that must come back from tokens as it was, and what happens where it cannot."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from deltajax.data import load_tokenizer, text
from deltajax.data.documents import find_files


def save(tokenizer, path):
    """The library's tokenizer as a file that ours reads."""
    tokenizer.save(str(path))
    return str(path)


def metaspace(folder):
    vocabulary = [("<unk>", 0.0), ("\u2581", -3.0), ("\u2581hello", -1.0), ("\u2581world", -1.0), ("!", -2.0)]
    tokenizer = Library(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return save(tokenizer, folder / "metaspace.json")


def llama(folder):
    pieces = [
        "<unk>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "\u2581",
        "h",
        "i",
        "y",
        "o",
        "hi",
        "yo",
        "\u2581hi",
        "\u2581yo",
    ]
    merges = [("h", "i"), ("y", "o"), ("\u2581", "hi"), ("\u2581", "yo")]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return save(tokenizer, folder / "llama.json")


def word_piece(folder):
    vocabulary = {piece: n for n, piece in enumerate(["[UNK]", "[CLS]", "hello", "world", "##s", "!"])}
    tokenizer = Library(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return save(tokenizer, folder / "word_piece.json")


@pytest.mark.parametrize(
    ("make", "prompt", "rest"),
    [
        (metaspace, "hello", " world"),
        (metaspace, "hello", "!"),
        (metaspace, "", "hello"),
        (llama, "hi", " yo"),
        (llama, "hi", "\u00e9"),
        (word_piece, "hello", " world"),
        (word_piece, "hello", "s world"),
    ],
)
def test_a_continuation_keeps_its_first_space(make, prompt, rest, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path))
    context, whole = tokenizer.encode(prompt.encode()), tokenizer.encode((prompt + rest).encode())
    assert list(whole[: len(context)]) == list(context)
    assert tokenizer.decode(whole[len(context) :], context=context).decode() == rest


def test_characters_cut_between_tokens(tmp_path):
    """Half a character in the context becomes whole with the tokens that follow."""
    tokenizer = load_tokenizer(llama(tmp_path))
    ids = tokenizer.encode("hi\u00e9".encode())
    assert tokenizer.decode(ids[-1:], context=ids[:-1]).decode() == "\u00e9"


def test_special_tokens_in_a_document_are_text(bpe_file, tmp_path):
    content = json.loads(Path(bpe_file).read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": 300, "content": "<|endoftext|>", **flags}]
    path = tmp_path / "special.json"
    path.write_text(json.dumps(content))
    document = b"a <|endoftext|> b"
    plain = load_tokenizer(str(path))
    assert list(plain.encode(document)).count(300) == 1  # BOS alone
    assert plain.decode(plain.encode(document)) == document
    parsed = load_tokenizer(str(path), special_tokens=True)
    assert list(parsed.encode(document)).count(300) == 2
    assert parsed.identity != plain.identity


def corpus(folder, content):
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_bytes(content + b" hello" * n)
    return str(folder)


def test_no_bits_per_byte_for_text_that_is_lost(tmp_path, capsys, bpe_file):
    make = {"unknown": b"hello zebra", "changed": b"HELLO  world"}
    for name, content in make.items():
        folder = corpus(tmp_path / name, content)
        config = text.Config(folder, word_piece(tmp_path), seq_len=8, batch_size=2, validation_fraction=0.3)
        assert text.load(config).bytes_per_target is None
        warning = capsys.readouterr().err
        assert warning.startswith("warning: tokenizer ") and warning.count("\n") == 1
        assert ("are unknown to it" if name == "unknown" else "it changes the text") in warning
        assert text.load(
            text.Config(folder, bpe_file, seq_len=8, batch_size=2, validation_fraction=0.3)
        ).bytes_per_target
        assert not capsys.readouterr().err


def test_linked_folders_count_once_and_loops_end(tmp_path):
    inside, outside = tmp_path / "corpus", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "a.txt").write_text("a")
    (outside / "b.txt").write_text("b")
    os.symlink(outside, inside / "link")
    os.symlink(outside, inside / "link2")
    os.symlink(inside, outside / "loop")
    assert [path.name for path in find_files(str(inside))] == ["a.txt", "b.txt"]


def test_nothing_of_a_corpus_is_left_out_silently(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    os.symlink(tmp_path / "absent", tmp_path / "dangling")
    with pytest.raises(ValueError, match=r"^corpus: '.*dangling' is a link that leads nowhere"):
        find_files(str(tmp_path))
    (tmp_path / "dangling").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^corpus: '.*pipe' is neither a file nor a folder"):
        find_files(str(tmp_path))
    (tmp_path / "pipe").unlink()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for name in (str(tmp_path), str(tmp_path / "**" / "*.txt")):
        with pytest.raises(ValueError, match=r"^corpus: '.*closed' cannot be read: Permission denied"):
            find_files(name)


def test_unknown_is_read_from_the_file(tmp_path, bpe_file):
    assert load_tokenizer(metaspace(tmp_path)).unknown == 0
    assert load_tokenizer(word_piece(tmp_path)).unknown == 0
    assert load_tokenizer(llama(tmp_path)).unknown is None
    assert load_tokenizer(bpe_file).unknown is None
    assert np.asarray(load_tokenizer("byte").encode(b"a")).tolist() == [256, 97]
