"""A small corpus of text files, and a byte-level BPE trained on it."""

import numpy as np
import pytest
import tokenizers

WORDS = ["delta", "rule", "state", "größe", "key", "value", "naïve", "gate", "漢字", "product", "\n"]


@pytest.fixture(scope="session")
def texts() -> list[bytes]:
    """60 documents of 0 to some thousand bytes; two are equal, one is empty, one is not UTF-8."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)).encode() for size in rng.integers(1, 400, 57)]
    return [*texts, texts[0], b"", bytes(range(256))]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        file = folder / f"part{i % 3}" / f"{i:03d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text)
    return str(folder)


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory, texts) -> str:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator((t.decode(errors="replace") for t in texts), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    bpe.save(str(path))
    return str(path)
