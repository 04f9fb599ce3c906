import dataclasses
import gzip

import numpy as np
import pytest

from deltajax import data
from deltajax.data.documents import read_documents


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_one_epoch_predicts_every_token_of_every_document_once(corpus, bpe_file, tokenizer):
    name = bpe_file if tokenizer == "bpe" else "byte"
    config = data.Config(corpus=corpus, tokenizer=name, seq_len=64, batch_size=4, validation_fraction=0.3)
    dataset = data.load(config)
    for split, windows in (("train", dataset.train), ("validation", dataset.validation)):
        contents = [content for s, content in read_documents(corpus, 0.3) if s == split]
        expected = np.concatenate([dataset.tokenizer.encode(content)[1:] for content in contents])
        made = np.concatenate([w["targets"][w["weights"] > 0] for w in map(windows.__getitem__, range(len(windows)))])
        np.testing.assert_array_equal(np.sort(made), np.sort(expected))
        if split == "validation":
            assert dataset.validation_text == b"".join(contents)
            assert dataset.bytes_per_target == sum(map(len, contents)) / len(expected)
    assert (dataset.bytes_per_target == 1) == (tokenizer == "byte")
    assert dataset.vocab_size == dataset.tokenizer.vocab_size


def test_batches_read_as_text(corpus):
    dataset = data.load(data.Config(corpus=corpus, seq_len=64, batch_size=4, validation_fraction=0.3))
    text = b"\n".join(content for _, content in read_documents(corpus, 0.3))
    batch = next(dataset.train_iterator())
    for row in range(4):
        first = batch["segment_ids"][row] == 1
        assert dataset.tokenizer.decode(batch["targets"][row][first]) in text


def test_the_default_corpus_loads():
    dataset = data.load(data.Config())
    share = len(dataset.validation_text) / (len(dataset.train) * 512 + len(dataset.validation_text))
    assert 0.01 < share < 0.15
    assert len(dataset.validation_text) > 100_000


def test_compressed_bits_per_byte():
    rates = data.compressed_bits_per_byte(b"delta rule " * 1000)
    assert set(rates) == {"gzip -9", "xz -9"} and all(0 < r < 1 for r in rates.values())
    assert rates["gzip -9"] == 8 * len(gzip.compress(b"delta rule " * 1000, 9)) / 11000
    noise = np.random.default_rng(0).bytes(10_000)
    assert all(8 <= r < 8.3 for r in data.compressed_bits_per_byte(noise).values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus", ""), ("corpus", None), ("tokenizer", 3), ("seq_len", 0), ("seq_len", 2.0), ("seq_len", True),
        ("batch_size", -1), ("seed", -1), ("seed", 2**32), ("validation_fraction", 0), ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")), ("validation_fraction", "0.1"),
    ],
)  # fmt: skip
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"^(text.Config.)?{field}(: got| must be) [^\n]*(; allowed:|, got) [^\n]*$"):
        data.Config(**{field: value})


def test_a_corpus_without_text_in_a_split(tmp_path):
    (tmp_path / "one.txt").write_text("one document cannot stand in two splits")
    config = data.Config(corpus=str(tmp_path), validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"^corpus: '.*' has no text in its (train|validation) split [^\n]*$"):
        data.load(config)
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(ValueError, match=r"^corpus: '.*' has no text in its train split"):
        data.load(config)


def test_an_unknown_config():
    @dataclasses.dataclass
    class Other:
        seed: int = 0

    with pytest.raises(ValueError, match=r"^data must be a config of one of deltajax.data.text.Config, "):
        data.load(Other())


def test_evaluation_at_other_lengths(corpus):
    config = data.Config(
        corpus=corpus, seq_len=64, batch_size=4, validation_fraction=0.3, lengths=(128, 256), evaluation_windows=5
    )
    dataset = data.load(config)
    assert {name: len(windows) for name, windows in dataset.evaluations.items()} == {"length_128": 5, "length_256": 5}
    batches = list(dataset.validation_batches(evaluation="length_256"))
    assert [batch["tokens"].shape for batch in batches] == [(4, 256)] * 2
    assert sum(batch["weights"].sum() for batch in batches) == 5 * 256
    with pytest.raises(ValueError, match="length_999999 is longer than every held-out document; allowed: up to"):
        data.load(dataclasses.replace(config, lengths=(999999,)))
    with pytest.raises(ValueError, match="lengths: got"):
        dataclasses.replace(config, lengths=(0,))


def test_halves(corpus):
    """Even and odd windows together are all windows."""
    config = data.Config(corpus=corpus, seq_len=64, batch_size=2, validation_fraction=0.3)
    whole, *parts = (data.load(dataclasses.replace(config, half=half)).train for half in ("all", "even", "odd"))
    assert sum(map(len, parts)) == len(whole)
    for i in range(len(whole)):
        np.testing.assert_array_equal(parts[i % 2][i // 2]["tokens"], whole[i]["tokens"])
    with pytest.raises(ValueError, match="half must be one of all, even, odd, got 'left'"):
        data.Config(half="left")
