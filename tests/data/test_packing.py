import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltajax.data.packing import FullWindows, PackedWindows, best_fit_decreasing, plan_windows
from deltajax.data.text import TokensInMemory

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 40))
def test_every_prediction_is_planned_exactly_once(predictions, seq_len):
    plan = plan_windows(np.array(predictions), seq_len)
    made = sorted(
        (d, t) for d, s, n in zip(plan.document, plan.start, plan.length, strict=True) for t in range(s, s + n)
    )
    assert made == [(d, t) for d, n in enumerate(predictions) for t in range(n)]


@given(LENGTHS, st.integers(1, 40))
def test_windows_fit_and_short_documents_are_whole(predictions, seq_len):
    predictions = np.array(predictions)
    plan = plan_windows(predictions, seq_len)
    assert plan.first[0] == 0 and plan.first[-1] == len(plan.length)
    filled = [plan.length[a:b].sum() for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)]
    assert all(0 < n <= seq_len for n in filled)
    pieces = np.bincount(plan.document, minlength=len(predictions))
    np.testing.assert_array_equal(pieces, -(-predictions // seq_len))


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 45))
def test_grouped_best_fit_equals_one_item_at_a_time(sizes, capacity):
    sizes = np.array(sizes, np.int64)
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(np.bincount(bins, sizes)) == sorted(_best_fit_decreasing_one_by_one(sizes, capacity))


def _best_fit_decreasing_one_by_one(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(capacity - size)
    return [capacity - room for room in rooms]


@pytest.mark.parametrize("seq_len", [128, 1024, 4096])
def test_padding_is_rare_on_realistic_lengths(seq_len):
    predictions = np.random.default_rng(0).lognormal(6.5, 1.3, 5000).astype(np.int64) + 1
    plan = plan_windows(predictions, seq_len)
    assert predictions.sum() / ((len(plan.first) - 1) * seq_len) > 0.95


@given(st.lists(st.integers(1, 50), min_size=1, max_size=25), st.integers(1, 30))
def test_windows_hold_each_target_once_and_never_across_documents(lengths, seq_len):
    # Document d, token t is 100 d + t: a target tells where it comes from.
    documents = TokensInMemory([100 * d + np.arange(n) for d, n in enumerate(lengths)])
    windows = PackedWindows(documents, seq_len)
    targets = []
    for i in range(len(windows)):
        window = windows[i]
        assert {k: (v.shape, v.dtype.name) for k, v in window.items()} == {
            "tokens": ((seq_len,), "int32"),
            "targets": ((seq_len,), "int32"),
            "segment_ids": ((seq_len,), "int32"),
            "weights": ((seq_len,), "float32"),
        }
        real = window["segment_ids"] > 0
        np.testing.assert_array_equal(window["weights"], real)
        np.testing.assert_array_equal(window["targets"][real], window["tokens"][real] + 1)
        assert not window["tokens"][~real].any() and not window["targets"][~real].any()
        steps = np.diff(window["segment_ids"][real])
        assert window["segment_ids"][0] == 1 and set(steps) <= {0, 1}
        for segment in range(1, window["segment_ids"].max() + 1):
            tokens = window["tokens"][window["segment_ids"] == segment]
            assert np.all(np.diff(tokens) == 1) and len(set(tokens // 100)) == 1
        targets.extend(window["targets"][real])
    assert sorted(targets) == [100 * d + t for d, n in enumerate(lengths) for t in range(1, n)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=25), st.integers(1, 30), st.integers(1, 8))
def test_full_windows_lie_within_one_document(lengths, seq_len, limit):
    documents = TokensInMemory([100 * d + np.arange(n) for d, n in enumerate(lengths)])
    windows = FullWindows(documents, seq_len, limit)
    assert len(windows) == min(limit, sum((n - 1) // seq_len for n in lengths))
    seen = set()
    for window in map(windows.__getitem__, range(len(windows))):
        start = window["tokens"][0]
        assert start % 100 % seq_len == 0
        np.testing.assert_array_equal(window["tokens"], start + np.arange(seq_len))
        np.testing.assert_array_equal(window["targets"], window["tokens"] + 1)
        assert (window["weights"] == 1).all() and (window["segment_ids"] == 1).all()
        seen.add(int(start))
    assert len(seen) == len(windows)
