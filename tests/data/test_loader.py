import collections

import numpy as np
import pytest

from deltajax.data import Dataset


class Numbers:
    """Example i is the number i + 1, so that padding shows."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.full(3, index + 1, np.int32), "weights": np.ones(3, np.float32)}


def make(batch_size=8, seed=0, train=30, validation=13):
    return Dataset(Numbers(train), Numbers(validation), vocab_size=9, batch_size=batch_size, seed=seed)


def take(iterator, steps):
    return np.stack([next(iterator)["x"][:, 0] for _ in range(steps)])


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(processes):
    data = make()
    alone = take(data.train_iterator(), 10)
    together = [take(data.train_iterator(p, processes), 10) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(together, axis=1), alone)
    alone = [b["x"] for b in data.validation_batches()]
    together = [[b["x"] for b in data.validation_batches(None, p, processes)] for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(together, axis=1), alone)


def test_a_run_moves_between_numbers_of_processes():
    data = make()
    alone = data.train_iterator()
    take(alone, 7)
    state = alone.get_state()
    expected = take(alone, 6)
    four = [data.train_iterator(p, 4) for p in range(4)]
    for iterator in four:
        iterator.set_state(state)
    np.testing.assert_array_equal(np.concatenate([take(i, 3) for i in four], axis=1), expected[:3])
    assert len({i.get_state()["next_example"] for i in four}) == 1
    alone.set_state(four[2].get_state())
    np.testing.assert_array_equal(take(alone, 3), expected[3:])


def test_resuming_at_any_step_equals_going_on():
    data = make(seed=3)
    whole = take(data.train_iterator(), 40)
    for step in np.random.default_rng(0).integers(0, 40, 5):
        resumed = data.train_iterator()
        resumed.set_state({"next_index": int(step)})
        np.testing.assert_array_equal(take(resumed, 40 - step), whole[step:])


def test_epochs_cover_all_examples_in_different_orders():
    epochs = take(make(batch_size=8, train=30).train_iterator(), 15).reshape(4, 30)
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 31))
    assert len({tuple(e) for e in epochs}) == 4


def test_the_seed_decides_the_order():
    one, again, other = (take(make(seed=s).train_iterator(), 4) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_batch_may_be_larger_than_an_epoch():
    count = collections.Counter(take(make(batch_size=64, train=30).train_iterator(), 1)[0])
    assert set(count) == set(range(1, 31)) and set(count.values()) == {2, 3}


def test_validation_covers_every_example_once_and_pads_with_weight_zero():
    batches = list(make().validation_batches())
    x, weights = (np.concatenate([b[k] for b in batches]) for k in ("x", "weights"))
    assert x.shape == (16, 3) and x.dtype == np.int32 and weights.dtype == np.float32
    assert sorted(x[weights > 0][::3]) == list(range(1, 14))
    assert sorted(x[:, 0])[:3] == [0, 0, 0] and np.all(weights[x[:, 0] == 0] == 0)


def test_validation_is_the_same_every_time_and_may_be_cut():
    first = [b["x"] for b in make(seed=1).validation_batches()]
    again = [b["x"] for b in make(seed=2).validation_batches()]
    np.testing.assert_array_equal(first, again)
    cut = [b["x"] for b in make().validation_batches(num_batches=1)]
    np.testing.assert_array_equal(cut, first[:1])
    assert len(list(make().validation_batches(num_batches=9))) == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^batch_size: 8 is not divisible by the 3 processes$"):
        make().train_iterator(0, 3)
    with pytest.raises(ValueError, match=r"^process_index: got 2; allowed: 0 to process_count - 1 = 1$"):
        make().validation_batches(None, 2, 2)
    with pytest.raises(ValueError, match=r"^num_batches: got 0; allowed: >= 1, or None for all$"):
        make().validation_batches(0)
