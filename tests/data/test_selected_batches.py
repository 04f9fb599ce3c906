"""Batches that a policy chooses: the same on any number of processes and after a restart."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from deltajax.data.loader import Dataset
from deltajax.errors import RunError
from deltajax.hard_batches import (
    EasyBatches,
    HardBatches,
    InfoBatch,
    InOrder,
    RandomBatches,
    RhoLoss,
    SelectiveBackprop,
)


class Numbers:
    """Example i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"x": np.float32(i), "weights": np.float32(1)}


def dataset(selection, size=45, batch_size=8):
    return Dataset(Numbers(size), Numbers(size), batch_size=batch_size, seed=3, selection=selection)


def loss(step, x):
    """Of an example at a step: anything that only depends on these."""
    return np.float32(np.sin(x * 12.9898 + step * 78.233) + 2)


class Training:
    """Simulated processes in step; the global batch is the rows of all of them."""

    def __init__(self, data, processes=1, updates=30):
        self.step, self.scored = 0, []
        self.iterators = [
            data.train_iterator(i, processes, updates=updates, score=self.score) for i in range(processes)
        ]
        self.rows = data.batch_size // processes

    def score(self, batch):
        """A process only knows its rows; the global losses are what the device would gather."""
        self.scored.append(batch["x"])
        calls = len(self.scored)
        return np.resize(loss(-1, batch["x"]), self.rows * len(self.iterators)) if calls else None

    def __next__(self):
        parts = [next(iterator) for iterator in self.iterators]
        x = np.concatenate([part["x"] for part in parts])
        by_example = self.iterators[0].by_example
        losses = loss(self.step, x) if by_example else loss(self.step, x).mean()
        for iterator in self.iterators:
            iterator.observe(lambda: losses)
        self.step += 1
        rescale = [part["rescale"] for part in parts if "rescale" in part]
        return x.astype(int).tolist(), np.concatenate(rescale).tolist() if rescale else None


BATCHES = [InOrder(), HardBatches(delta=0.5), EasyBatches(delta=0.5), RandomBatches(delta=0.5)]
BATCHES += [dataclasses.replace(p, composition="seeded") for p in BATCHES[1:2]]


@pytest.mark.parametrize(
    "policy", [*BATCHES, InfoBatch()], ids=lambda p: f"{type(p).__name__}-{getattr(p, 'composition', '')}"
)
def test_one_and_four_processes(policy):
    """The same batches in the same order."""
    one, four = Training(dataset(policy)), Training(dataset(policy), processes=4)
    assert [next(one) for _ in range(30)] == [next(four) for _ in range(30)]


@pytest.mark.parametrize("policy", [*BATCHES, InfoBatch(), SelectiveBackprop(), "rho"], ids=str)
def test_restart_anywhere(policy, tmp_path):
    """From the JSON of any step on, the batches that follow are those of a run that was not stopped."""
    if policy == "rho":
        np.save(tmp_path / "table.npy", np.linspace(0, 1, 45))
        policy = RhoLoss(table=str(tmp_path / "table.npy"), pool=3)
    whole = Training(dataset(policy))
    expected = [next(whole) for _ in range(24)]
    for stop in (1, 5, 6, 11, 17):
        first = Training(dataset(policy))
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.iterators[0].get_state()))
        second = Training(dataset(policy))
        second.step = stop
        second.iterators[0].set_state(state)
        assert [next(second) for _ in range(24 - stop)] == expected[stop:]
        assert second.iterators[0].scored == whole.iterators[0].scored


def test_batches_are_always_the_same_examples():
    """The last, incomplete one is left out; a seeded composition is one permutation."""
    for policy in (HardBatches(delta=0.4), HardBatches(delta=0.4, composition="seeded")):
        run = Training(dataset(policy))
        batches = [tuple(next(run)[0]) for _ in range(25)]
        assert len(set(batches)) == 5
        examples = list(itertools.chain(*batches[:5]))
        assert len(set(examples)) == 40
        assert (examples == list(range(40))) == (policy.composition == "source")
        rounds = [batches[i : i + 2] for i in range(5, 25, 2)]
        assert all(batches.index(a) < batches.index(b) for a, b in rounds)


def test_losses_are_read_only_when_a_round_ends():
    """So the loop stays ahead of the device."""
    iterator = dataset(HardBatches(delta=0.4)).train_iterator()
    read = []
    for step in range(8):
        next(iterator)
        iterator.observe(lambda step=step: read.append(step) or np.float32(step))
        assert read == ([] if step < 5 else list(range(5)) if step < 7 else list(range(7)))


@pytest.mark.parametrize(
    ("policy", "size", "message"),
    [
        (HardBatches(), 7, "batch_size must be at most the 7 examples of the training set, got 8"),
        (HardBatches(delta=0.1), 45, "delta must be at least 1 / 5"),
        (InfoBatch(), 7, "batch_size must be at most the 7 examples"),
    ],
)
def test_data_that_do_not_fit(policy, size, message):
    with pytest.raises(ValueError, match=message):
        dataset(policy, size).train_iterator()


def test_nan_ends_the_run_in_one_line():
    iterator = dataset(HardBatches(delta=0.4)).train_iterator()
    for _ in range(5):
        next(iterator)
        iterator.observe(lambda: np.float32(np.nan))
    with pytest.raises(RunError, match="selection: loss of batch 0 must be a number to rank it by, got nan"):
        next(iterator)


def test_a_state_of_something_else_is_refused():
    state = dataset(HardBatches(delta=0.4)).train_iterator().get_state()
    with pytest.raises(ValueError, match="the checkpoint was made with HardBatches, not EasyBatches"):
        dataset(EasyBatches()).train_iterator().set_state(state)
    with pytest.raises(ValueError, match="the checkpoint's table has 5 losses, the data 2"):
        dataset(HardBatches(), size=17).train_iterator().set_state(state)
    with pytest.raises(ValueError, match="made with shuffled"):
        dataset(HardBatches()).train_iterator().set_state({"next_index": 3})
