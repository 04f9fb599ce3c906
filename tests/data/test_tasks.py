"""Synthetic tasks: every target against a slow, independent solution; random access, sharding, resumption."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from deltajax import data
from deltajax.data import formal, generated, groups, mad, mqar, word_problem

CONFIGS = {
    "S5": word_problem.Config(group="S5", seq_len=20, lengths=(50,)),
    "D4 by generators": word_problem.Config(group="D4", letters="generators", bos=False, seq_len=20),
    "parity": formal.Config(task="parity", seq_len=41, lengths=(100,)),
    "parity of prefixes": formal.Config(task="parity", seq_len=41, every_prefix=True),
    "arithmetic": formal.Config(task="arithmetic", seq_len=41),
    "arithmetic of prefixes": formal.Config(task="arithmetic", modulus=7, seq_len=41, every_prefix=True),
    "brackets": formal.Config(task="brackets", seq_len=41, lengths=(100,)),
    "mqar": mqar.Config(seq_len=64, pairs=16, min_pairs=4, vocab_size=256, lengths=(128,)),
    "mqar with blanks": mqar.Config(seq_len=64, pairs=5, vocab_size=64, noise=False, power=1.0),
    **{task: mad.Config(task=task, seq_len=64, copies=8) for task in mad.TASKS},
}


def examples(name: str, split: str, count: int = 50) -> list[dict[str, np.ndarray]]:
    dataset = data.load(CONFIGS[name])
    source = dataset.evaluations[split] if split in dataset.evaluations else getattr(dataset, split)
    return [source[i] for i in range(count)]


def asked(example: dict[str, np.ndarray]) -> dict[int, int]:
    """Position -> target of all that weigh something."""
    return {int(i): int(example["targets"][i]) for i in np.flatnonzero(example["weights"])}


@pytest.mark.parametrize("name", CONFIGS)
def test_examples_are_what_a_language_model_takes(name):
    dataset = data.load(CONFIGS[name])
    sets = {"train": dataset.train, "validation": dataset.validation, **dataset.evaluations}
    for split, source in sets.items():
        length = int(split.split("_")[1]) if split.startswith("length") else CONFIGS[name].seq_len
        some = [source[i] for i in range(30)]
        for example in some:
            for key, x in example.items():
                assert x.shape == (length,)
                assert x.dtype == (np.float32 if key == "weights" else np.int32)
            tokens = example["sequence" if name == "compression" else "tokens"]
            assert tokens.min() >= 0 and tokens.max() < dataset.vocab_size
            assert example["targets"].min() >= 0 and example["targets"].max() < dataset.vocab_size
            assert set(example["weights"].tolist()) <= {0.0, 1.0}
        assert sum(len(asked(example)) for example in some) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_example_is_a_function_of_seed_split_and_index(name):
    config = CONFIGS[name]

    def words(config, split="train"):
        source = getattr(data.load(config), split)
        return [{k: x.tolist() for k, x in source[i].items()} for i in (7, 3, 2**31 - 2 if split == "train" else 4)]

    assert words(config) == words(config)
    assert words(dataclasses.replace(config, seed=1)) != words(config)
    assert words(config, "validation") != words(config)
    assert words(config)[0] != words(config)[1]
    fixed = data.load(dataclasses.replace(config, train_examples=5)).train
    assert len(fixed) == 5
    with pytest.raises(IndexError):
        fixed[5]


def test_batches_shard_and_resume():
    dataset = data.load(dataclasses.replace(CONFIGS["S5"], batch_size=8))
    whole = dataset.train_iterator()
    batches = [next(whole)["tokens"] for _ in range(4)]
    parts = [dataset.train_iterator(i, 2) for i in range(2)]
    for batch in batches:
        np.testing.assert_array_equal(np.concatenate([next(part)["tokens"] for part in parts]), batch)
    again = dataset.train_iterator()
    again.set_state({"next_index": 2})
    np.testing.assert_array_equal(next(again)["tokens"], batches[2])


@pytest.mark.parametrize("split", ["train", "validation", "length_50"])
def test_word_problem_against_permutations(split):
    elements = groups.group("S5").elements
    for example in examples("S5", split):
        begin, *word = example["tokens"].tolist()
        assert begin == 120
        places = range(5)  # where each point is by now
        for i, letter in enumerate(word, 1):
            places = [elements[letter][p] for p in places]
            assert asked(example)[i] == elements.index(tuple(places))
        assert len(asked(example)) == len(word)


def test_word_problem_by_generators_against_the_table():
    group = groups.group("D4")
    for example in examples("D4 by generators", "train"):
        assert set(example["tokens"].tolist()) <= {0, 1}
        state = 0
        for letter, target in zip(example["tokens"], example["targets"], strict=True):
            state = group.table[state, group.generators[letter]]
            assert state == target
        assert (example["weights"] == 1).all()


def test_word_problem_targets_are_uniform():
    counts = np.zeros(120)
    for example in examples("S5", "train", 1000):
        np.add.at(counts, example["targets"][1:], 1)
    np.testing.assert_allclose(counts / counts.sum(), data.load(CONFIGS["S5"]).chance, rtol=0.4)


def text_of(name: str, example: dict[str, np.ndarray]) -> str:
    return "".join(CONFIGS[name].symbols[t] for t in example["tokens"])


@pytest.mark.parametrize("split", ["train", "length_100"])
def test_parity_counts_ones(split):
    lengths = set()
    for example in examples("parity", split, 300):
        bits, _ = text_of("parity", example).split("=")
        assert asked(example) == {len(bits): bits.count("1") % 2}
        lengths.add(len(bits))
    assert min(lengths) < 10 and max(lengths) > 0.9 * len(example["tokens"]) - 1
    for example in examples("parity of prefixes", "train"):
        text = text_of("parity of prefixes", example)
        assert asked(example) == {i: text[: i + 1].count("1") % 2 for i in range(40)}


def test_arithmetic_against_the_interpreter():
    for example in examples("arithmetic", "train", 300):
        text, padding = text_of("arithmetic", example).split("=")
        assert re.fullmatch(r"[0-4]([-+*][0-4])*", text) and set(padding) <= {"."}
        assert asked(example) == {len(text): eval(text) % 5}
    for example in examples("arithmetic of prefixes", "train"):
        text = text_of("arithmetic of prefixes", example)
        assert asked(example) == {i: eval(text[: i + 1]) % 7 for i in range(0, 39, 2)}


@pytest.mark.parametrize("split", ["train", "length_100"])
def test_brackets_against_the_interpreter(split):
    used: set[str] = set()
    for example in examples("brackets", split, 300):
        text, padding = text_of("brackets", example).split("=")
        assert len(text) >= 3 and set(padding) <= {"."}
        assert asked(example) == {len(text): eval(text) % 5}
        used |= set(text)
    assert used == set("01234+-*()")


@pytest.mark.parametrize("task", ["parity", "arithmetic", "brackets"])
def test_formal_answers_are_what_chance_says_at_least(task):
    """0 is more likely where there are products, but no answer is rare."""
    dataset = data.load(formal.Config(task=task, seq_len=41))
    answers = [answer for i in range(1000) for answer in asked(dataset.train[i]).values()]
    frequencies = np.bincount(answers) / 1000
    assert len(frequencies) == round(1 / dataset.chance)
    assert frequencies.min() > dataset.chance / 3


@pytest.mark.parametrize("name, split", [("mqar", "train"), ("mqar", "length_128"), ("mqar with blanks", "train")])
def test_mqar_against_a_dictionary(name, split):
    config, counts = CONFIGS[name], set()
    middle = config.vocab_size // 2
    for example in examples(name, split):
        tokens, pairs = example["tokens"].tolist(), len(asked(example))
        value_of = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == pairs
        assert all(0 < key < middle <= value for key, value in value_of.items())
        assert asked(example) == {i: value_of[tokens[i]] for i in asked(example)}
        assert sorted(tokens[i] for i in asked(example)) == sorted(value_of)
        assert min(asked(example)) >= 2 * pairs
        if not config.noise:
            assert set(tokens[2 * pairs :]) == {0, *value_of}
        counts.add(pairs)
    assert counts <= ({*range(4, 17)} if (name, split) == ("mqar", "train") else {32 if name == "mqar" else 5})
    assert len(counts) > 5 or split != "train" or config.min_pairs is None


def test_mqar_power_law_asks_soon():
    def mean_place(power):
        source = data.load(mqar.Config(seq_len=256, pairs=4, vocab_size=64, power=power)).train
        return np.mean([np.mean(list(asked(source[i]))) for i in range(200)])

    assert abs(mean_place(1.0) - (8 + 256) / 2) < 10
    assert mean_place(0.01) < 60


@pytest.mark.parametrize("task", ["recall", "noisy_recall"])
def test_recall_against_a_dictionary(task):
    noise = 0
    for example in examples(task, "train"):
        known: dict[int, int] = {}
        expected = {}
        tokens = iter(enumerate(example["tokens"].tolist()))
        for i, token in tokens:
            if token >= 16:
                noise += 1
            elif i + 1 < 64:
                assert token < 8
                if token in known:
                    expected[i] = known[token]
                known[token] = next(tokens)[1]
                assert 8 <= known[token] < 16
                assert expected.get(i, known[token]) == known[token]
        assert asked(example) == expected
    assert abs(noise / (50 * 64) - (0.2 if task == "noisy_recall" else 0)) < 0.02


def test_fuzzy_recall_against_a_dictionary_of_strings():
    longer = 0
    for example in examples("fuzzy_recall", "train"):
        text = "".join("k" if t < 8 else "v" if t < 16 else "." for t in example["tokens"])
        assert re.fullmatch(r"(k{1,3}v{1,3})+\.*", text)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = {}
        for pair in re.finditer(r"(k+)(v+)", text):
            key, value = (tuple(example["tokens"][slice(*pair.span(i))].tolist()) for i in (1, 2))
            if key in known:
                assert known[key] == value
                expected |= {pair.end(1) - 1 + i: v for i, v in enumerate(value)}
            known[key] = value
            longer += len(key) > 1
        assert not any(a != b and a[: len(b)] == b for a, b in itertools.product(known, repeat=2))
        assert asked(example) == expected
    assert longer > 50


def test_selective_copying_keeps_the_symbols_in_order():
    for example in examples("selective_copying", "train"):
        tokens = example["tokens"].tolist()
        symbols = [t for t in tokens if t < 16]
        assert tokens[-8:] == [17] * 8 and 17 not in tokens[:-8]
        assert asked(example) == dict(zip(range(56, 64), symbols, strict=True))


def test_compression_asks_for_the_whole_sequence():
    for example in examples("compression", "train"):
        *symbols, last = example["sequence"].tolist()
        assert last == 16 and max(symbols) < 16
        assert asked(example) == dict(enumerate(symbols))


def test_memorisation_uses_one_map_everywhere():
    value_of: dict[int, int] = {}
    for example in examples("memorisation", "train") + examples("memorisation", "validation"):
        assert example["tokens"][1::2].tolist() == [16] * 32
        for i, value in asked(example).items():
            assert i % 2 == 1
            assert value_of.setdefault(int(example["tokens"][i - 1]), value) == value
    assert sorted(value_of) == list(range(8))


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: word_problem.Config(group="Q8"), "group must be"),
        (lambda: word_problem.Config(letters="words"), "letters must be one of elements, generators, got 'words'"),
        (lambda: word_problem.Config(seq_len=0), "seq_len must be an integer >= 1, got 0"),
        (lambda: word_problem.Config(lengths=(3, -1)), "lengths must be integers >= 1, got (3, -1)"),
        (lambda: formal.Config(task="even"), "task must be"),
        (lambda: formal.Config(modulus=11), "modulus must be in [2, 10], got 11"),
        (lambda: formal.Config(seq_len=3), "min_length must be < seq_len"),
        (lambda: formal.Config(task="brackets", every_prefix=True), "every_prefix must be false for brackets"),
        (lambda: mqar.Config(seq_len=64, pairs=17), "pairs must be in [1, 16] for 64 tokens, got 17"),
        (lambda: mqar.Config(seq_len=64, pairs=8, vocab_size=16), "vocab_size must be > 17 for 8 pairs, got 16"),
        (lambda: mqar.Config(pairs=4, min_pairs=5), "min_pairs must be <= pairs = 4, got 5"),
        (lambda: mqar.Config(power=2), "power must be a number in (0, 1], got 2"),
        (lambda: mad.Config(task="copying"), "task must be one of recall, fuzzy_recall"),
        (lambda: mad.Config(task="selective_copying", seq_len=32), "must be >= 33 for selective_copying, got 32"),
    ],
)
def test_bad_configs(make, part):
    with pytest.raises(ValueError) as error:
        make()
    assert part in str(error.value) and "\n" not in str(error.value)


def test_source_without_end_is_shuffled_by_grain():
    assert len(data.load(CONFIGS["S5"]).train) == generated.ENDLESS


def test_noise_that_leaves_nothing_to_ask():
    """A key must come twice, which needs four tokens."""
    with pytest.raises(ValueError, match=r"noise must leave 4 of the 16 tokens or more, .*, got 0.9"):
        mad.Config(task="noisy_recall", seq_len=16, noise=0.9)
    mad.Config(task="noisy_recall", seq_len=16, noise=0.75)
    mad.Config(task="recall", seq_len=16, noise=0.9)
