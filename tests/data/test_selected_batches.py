"""Batches that a policy chooses: the same on any number of processes and after a restart."""

import concurrent.futures
import doctest
import itertools
import json
import threading

import numpy as np
import pytest

from deltajax.data import selection
from deltajax.data.loader import Dataset
from deltajax.data.selection import UnrankableLoss
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


class Process:
    """One of several processes that train together, each in a thread of its own; they meet where devices would gather."""

    def __init__(self, data, index=0, together=None, updates=30):
        self.step, self.index = 0, index
        self.barrier, self.parts = together or (threading.Barrier(1), [None])
        self.iterator = data.train_iterator(index, len(self.parts), updates=updates, score=self.score)

    def gather(self, batch):
        """The rows of all processes."""
        self.parts[self.index] = batch
        self.barrier.wait(timeout=60)
        whole = {name: np.concatenate([part[name] for part in self.parts]) for name in batch}
        self.barrier.wait(timeout=60)
        return whole

    def score(self, batch):
        return loss(-1, self.gather(batch)["x"])

    def __next__(self):
        batch = self.gather(next(self.iterator))
        losses = loss(self.step, batch["x"])
        self.iterator.observe(lambda: losses if self.iterator.by_example else losses.mean())
        self.step += 1
        return batch["x"].astype(int).tolist(), batch.get("rescale", np.ones(0)).tolist()


def train(data, processes, updates):
    """The global batches as each process saw them."""
    together = threading.Barrier(processes), [None] * processes

    def run(index):
        process = Process(data, index, together)
        return [next(process) for _ in range(updates)]

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


POLICIES = [
    InOrder(),
    HardBatches(delta=0.5),
    HardBatches("seeded", 0.5),
    EasyBatches(delta=0.5),
    RandomBatches(delta=0.5),
    InfoBatch(),
    SelectiveBackprop(),
    RhoLoss(table="table.npy", pool=3),
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Irreducible losses in the working directory."""
    np.save(tmp_path / "table.npy", np.linspace(0, 1, 45))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_and_four_processes(policy, table):
    """The same batches in the same order, each process reading only its rows."""
    ((one,), four) = (train(dataset(policy), processes, 30) for processes in (1, 4))
    assert all(seen == one for seen in four)
    assert len({tuple(examples) for examples, _ in one}) > 1


@pytest.mark.parametrize("policy", POLICIES[5:], ids=str)
def test_each_example_gets_its_own_loss(policy, table):
    """The policy driven by hand, with losses by the number of the example, draws the same."""
    state, expected = policy.init(45, 8, 30), []
    while len(expected) < 30:
        for draw in policy.upcoming(state):
            step = -1 if draw.scored else len(expected)
            state = policy.update(state, draw, loss(step, draw.examples.astype(np.float32)))
            if not draw.scored:
                expected.append(draw.examples.tolist())
    assert [examples for examples, _ in train(dataset(policy), 1, 30)[0]] == expected[:30]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_restart_anywhere(policy, table):
    """From the JSON of any step on, the batches that follow are those of a run that was not stopped."""
    whole = Process(dataset(policy))
    expected = [next(whole) for _ in range(24)]
    for stop in (1, 5, 6, 11, 17):
        first = Process(dataset(policy))
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.iterator.get_state()))
        second = Process(dataset(policy))
        second.step = stop
        second.iterator.set_state(state)
        assert [next(second) for _ in range(24 - stop)] == expected[stop:]
        assert second.iterator.scored == whole.iterator.scored


def test_another_batch_size_after_a_restart(table):
    """Policies over examples go on with it; those over batches have other batches then."""
    for policy in POLICIES:
        first = Process(dataset(policy))
        next(first)
        second = Process(dataset(policy, batch_size=4))
        if first.iterator.by_example:
            second.iterator.set_state(first.iterator.get_state())
            assert all(len(next(second)[0]) == 4 for _ in range(8))
        else:
            with pytest.raises(ValueError, match="the checkpoint's table has 5 losses, the data 11"):
                second.iterator.set_state(first.iterator.get_state())


def test_batches_of_another_size_are_refused_though_they_are_as_many():
    """45 examples are 5 batches of 8 and of 9: the losses are of other batches."""
    for policy in POLICIES[:5]:
        with pytest.raises(ValueError, match=r"ranks batches that were composed once \(data.batch_size: 8 -> 9\)"):
            dataset(policy, batch_size=9).train_iterator().set_state(dataset(policy).train_iterator().get_state())


@pytest.mark.parametrize("number", [0, 1, 4, 5, 7, 12])
@pytest.mark.parametrize("sizes", [(8, 4), (8, 16), (8, 7, 3), (8, 45, 1)])
def test_candidates_of_another_size_follow_the_old_ones(number, sizes):
    """No example is skipped or repeated within an epoch but those that do not fill its last batch."""
    policy = SelectiveBackprop()
    state = policy.init(45, sizes[0], 0) | {"scored": number}
    drawn = [policy._candidates(state, n) for n in range(number)]
    for size in sizes[1:]:
        state = policy.resize(state, size)
        for _ in range(3):
            drawn.append(policy._candidates(state, state["scored"]))
            assert len(drawn[-1]) == size
            state |= {"scored": state["scored"] + 1}
    epoch, at = 0, 0
    order = np.random.default_rng((policy.seed, epoch)).permutation(45)
    for batch in drawn:
        if at + len(batch) > 45:
            epoch, at = epoch + 1, 0
            order = np.random.default_rng((policy.seed, epoch)).permutation(45)
        np.testing.assert_array_equal(batch, order[at : at + len(batch)])
        at += len(batch)


def test_rho_loss_scores_an_open_pool_again_in_batches_of_another_size(table):
    policy = RhoLoss(table="table.npy", pool=3)
    state = policy.init(45, 8, 30) | {"pools": 1}
    first = policy._candidates(state, 3)[:4]
    open_pool = state | {"excess": np.ones(8, np.float32)}
    chosen = state | {"pools": 2, "chosen": np.arange(8)}
    for now in (state, open_pool, chosen):
        draw = policy.upcoming(policy.resize(now, 4))[0]
        assert draw.scored
        np.testing.assert_array_equal(draw.examples, first)


def test_info_batch_ends_an_epoch_that_has_no_batch_of_the_new_size_left():
    policy = InfoBatch()
    state = policy.init(45, 8, 30)
    order = state["order"]
    for draw in policy.upcoming(state)[:4]:
        state = policy.update(state, draw, np.ones(8, np.float32))
    np.testing.assert_array_equal(policy.upcoming(policy.resize(state, 4))[0].examples, order[32:36])
    larger = policy.resize(state, 16)
    assert (larger["epoch"], larger["position"], len(policy.upcoming(larger)[0].examples)) == (1, 0, 16)


def test_batches_are_always_the_same_examples():
    """The last, incomplete one is left out; a seeded composition is one permutation."""
    for policy in (HardBatches(delta=0.4), HardBatches(delta=0.4, composition="seeded")):
        run = Process(dataset(policy))
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
        (
            InfoBatch(),
            45,
            "InfoBatch does not prune in the last 12.5% of them; got 0",
        ),
    ],
)
def test_data_that_do_not_fit(policy, size, message):
    with pytest.raises(ValueError, match=message):
        dataset(policy, size).train_iterator()


def test_info_batch_prunes_without_a_number_of_updates():
    """With no last part of whole epochs it needs none."""
    process = Process(dataset(InfoBatch(full=0.0)), updates=0)
    factors = [next(process)[1] for _ in range(20)]
    assert {1.0} == set(np.ravel(factors[:5])) and 2.0 in np.ravel(factors[5:])


@pytest.mark.parametrize(
    ("policy", "said"), [(HardBatches(delta=0.4), True), (RandomBatches(), True), (InOrder(), False)]
)
def test_a_run_within_the_first_pass_says_so(policy, said, capfd):
    """Nothing is chosen before all batches had their turn. Only the first process says it."""
    for index, updates in ((0, 5), (1, 5), (0, 6), (0, 0)):
        dataset(policy).train_iterator(index, 2, updates=updates)
    out = capfd.readouterr().out
    assert out.count("chooses nothing in this run: its 5 updates are of the first pass") == out.count("\n") == said


def test_nan_ends_the_run_in_one_line():
    iterator = dataset(HardBatches(delta=0.4)).train_iterator()
    for _ in range(5):
        next(iterator)
        iterator.observe(lambda: np.float32(np.nan))
    with pytest.raises(UnrankableLoss, match="selection: loss of batch 0 must be a number to rank it by, got nan"):
        next(iterator)


def test_a_state_of_something_else_is_refused():
    state = dataset(HardBatches(delta=0.4)).train_iterator().get_state()
    with pytest.raises(ValueError, match="the checkpoint was made with HardBatches, not EasyBatches"):
        dataset(EasyBatches()).train_iterator().set_state(state)
    with pytest.raises(ValueError, match="the checkpoint's table has 5 losses, the data 2"):
        dataset(HardBatches(), size=17).train_iterator().set_state(state)
    state = dataset(SelectiveBackprop()).train_iterator().get_state()
    with pytest.raises(ValueError, match="the checkpoint is of 45 examples, the data have 17"):
        dataset(SelectiveBackprop(), size=17).train_iterator().set_state(state)
    with pytest.raises(ValueError, match="made with Shuffled, not HardBatches"):
        dataset(HardBatches()).train_iterator().set_state({"next_index": 3})


def test_example_for_a_loop_of_ones_own():
    failed, tried = doctest.testmod(selection)
    assert (failed, tried > 8) == (0, True)
