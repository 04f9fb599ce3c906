"""Policies against simulations written down independently, step by step, from the papers."""

import doctest
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltajax import hard_batches
from deltajax.hard_batches import (
    EasyBatches,
    HardBatches,
    InfoBatch,
    InOrder,
    RandomBatches,
    RhoLoss,
    SelectiveBackprop,
)


def trace(policy, num_batches, updates, loss_of):
    """Indices that the policy asks for; `loss_of(update, index)` is the loss of that step."""
    state, indices = policy.init(num_batches), []
    for update in range(updates):
        ahead = policy.upcoming(state)
        index = int(policy.next(state))
        assert index == ahead[0]
        indices.append(index)
        state = policy.update(state, index, loss_of(update, index))
    return indices


def simulate(num_batches, delta, updates, loss_of, hardest=True):
    """The paper's algorithm with lists: pass 1, then rounds over a sorted table of stale losses."""
    table, indices = {}, []
    chosen = list(range(num_batches))
    while len(indices) < updates:
        for index in chosen:
            if len(indices) == updates:
                break
            table[index] = loss_of(len(indices), index)
            indices.append(index)
        ranking = sorted(table.items(), key=lambda item: (-item[1] if hardest else item[1], item[0]))
        chosen = sorted(index for index, _ in ranking[: int(delta * num_batches + 1e-9)])
    return indices


@settings(max_examples=60)
@given(
    st.integers(1, 30), st.floats(0.05, 1), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([2, 1000]), st.booleans()
)  # fmt: skip
def test_traces_equal_a_simulation(num_batches, delta, epochs, seed, values, hardest):
    """Random losses, also with many ties; both directions; E N updates."""
    if int(delta * num_batches + 1e-9) == 0:
        delta = 1.0
    table = np.random.default_rng(seed).integers(0, values, (epochs * num_batches, num_batches))

    def loss_of(update, index):
        return float(table[update, index])

    policy = (HardBatches if hardest else EasyBatches)(delta=delta)
    expected = simulate(num_batches, delta, epochs * num_batches, loss_of, hardest)
    assert trace(policy, num_batches, epochs * num_batches, loss_of) == expected


@pytest.mark.parametrize(
    ("delta", "num_batches", "per_round"),
    [
        (1 / 49, 49, 1),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1 - 0.9, 10, 1),
        (1 / 3, 7, 2),
        (0.7 + 0.1, 10, 8),
        (0.28, 99, 27),
    ],
)
def test_length_of_a_round(delta, num_batches, per_round):
    """A product that is whole but for the rounding of floats is that number; others are rounded down."""
    for policy in (HardBatches(delta=delta), EasyBatches(delta=delta), RandomBatches(delta=delta)):
        indices = trace(policy, num_batches, num_batches + 2 * per_round, lambda _, index: index)
        first, second = np.split(np.array(indices[num_batches:]), 2)
        assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all() and len(first) == per_round
        if isinstance(policy, HardBatches):
            assert first.tolist() == second.tolist() == list(range(num_batches - per_round, num_batches))


def test_delta_one_is_plain_training():
    losses = random.Random(0)
    indices = trace(HardBatches(delta=1.0), 7, 21, lambda *_: losses.random())
    assert indices == list(range(7)) * 3 == trace(InOrder(), 7, 21, lambda *_: 0.0)


def test_traced_policy_equals_the_one_on_the_host():
    """The same functions inside jit and scan, on JAX arrays."""
    policy = HardBatches(delta=0.4)
    losses = np.random.default_rng(0).random((33, 11)).astype(np.float32)

    @jax.jit
    def run(state):
        def step(state, row):
            index = policy.next(state)
            return policy.update(state, index, row[index]), index

        return jax.lax.scan(step, state, losses)

    state, indices = run(jax.tree.map(jax.numpy.asarray, policy.init(11)))
    assert indices.tolist() == trace(policy, 11, 33, lambda update, index: losses[update, index])
    assert state["losses"].dtype == np.float32


def test_random_batches_are_as_many_and_depend_on_seed_and_round_only():
    policies = [RandomBatches(delta=0.3, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (
        trace(policy, 10, 40, lambda update, index, n=n: n * index) for n, policy in enumerate(policies)
    )
    assert first == again != other
    rounds = [first[i : i + 3] for i in range(10, 40, 3)]
    assert first[:10] == list(range(10)) and all(r == sorted(set(r)) for r in rounds)
    assert len(set(map(tuple, rounds))) > 5


def drive(policy, num_examples, batch_size, updates, loss_of):
    """All draws until `updates` of them were trained on; `loss_of(draws so far, example)`."""
    state, draws = policy.init(num_examples, batch_size, updates), []
    while sum(not d.scored for d in draws) < updates:
        for draw in policy.upcoming(state):
            assert len(draw.examples) == batch_size
            losses = np.array([loss_of(len(draws), int(e)) for e in draw.examples], np.float32)
            draws.append(draw)
            state = policy.update(state, draw, losses)
    return draws


def test_selective_backprop():
    """Against lists: percentile among the recent losses, a draw for each candidate, a queue."""
    policy = SelectiveBackprop(beta=2.0, history=24, seed=5)
    table = np.random.default_rng(1).random((400, 20)).astype(np.float32)
    draws = drive(policy, 20, 6, 15, lambda n, e: table[n, e])
    recent, queue, scored, expected = [], [], 0, []
    while sum(not s for _, s in expected) < 15:
        if len(queue) >= 6:
            expected.append((queue[:6], False))
            del queue[:6]
            continue
        order = np.random.default_rng((5, scored // 3)).permutation(20)
        candidates = order[scored % 3 * 6 :][:6].tolist()
        losses = [table[len(expected), e] for e in candidates]
        recent = (recent + losses)[-24:]
        chance = np.random.default_rng((5, scored, 1)).random(6)
        for e, loss, u in zip(candidates, losses, chance, strict=True):
            if u < (sum(r <= loss for r in recent) / len(recent)) ** 2:
                queue.append(e)
        expected.append((candidates, True))
        scored += 1
    assert [(d.examples.tolist(), d.scored) for d in draws] == expected


def test_selective_backprop_keeps_the_expected_share():
    table = np.random.default_rng(1).random((3000, 64))
    draws = drive(SelectiveBackprop(beta=1.0), 64, 16, 100, lambda n, e: table[n, e])
    assert 100 / sum(d.scored for d in draws) == pytest.approx(1 / 2, rel=0.1)
    assert all(not d.scored for d in drive(SelectiveBackprop(beta=0.0), 64, 16, 10, lambda n, e: 1.0)[1::2])


def test_info_batch():
    """Against lists: whole epochs first and last; between them easy examples are left out or count 1 / (1 - r)."""
    updates, n, size = 60, 53, 5
    table = np.random.default_rng(1).random((2 * updates, n)).astype(np.float32)
    draws = drive(InfoBatch(ratio=0.6, full=0.3, seed=3), n, size, updates, lambda draw, e: table[draw, e])
    last, expected, epoch = {}, [], 0
    while len(expected) < updates:
        rng = np.random.default_rng((3, epoch))
        chance, whole = rng.random(n), len(expected) >= 0.7 * updates
        mean = sum(map(float, last.values())) / len(last) if last else 0
        easy = [not whole and last.get(e, np.inf) < mean for e in range(n)]
        order = rng.permutation([e for e in range(n) if not (easy[e] and chance[e] < 0.6)]).tolist()
        for batch in (order[i : i + size] for i in range(0, len(order) - size + 1, size)):
            if len(expected) < updates:
                last |= {e: table[len(expected), e] for e in batch}
                expected.append((batch, [2.5 if easy[e] else 1.0 for e in batch]))
        epoch += 1
    assert epoch >= 6
    assert [(d.examples.tolist(), d.rescale.tolist()) for d in draws[:updates]] == expected


@pytest.mark.parametrize(
    ("full", "updates", "last"), [(0.7, 10, 7), (0.3, 10, 3), (0.1, 30, 3), (0.29, 100, 29), (0, 10, 0)]
)
def test_the_last_part_of_info_batch(full, updates, last):
    """The floats 1 - 0.7 times 10 are above 3: the last part would begin an update late."""
    policy = InfoBatch(full=full, ratio=0.5)
    state = policy.init(8, 4, updates) | {"losses": np.array([0, 0, 0, 0, 0, 0, 0, 9], np.float32)}
    pruned = [len(policy._epoch(state | {"done": n, "epoch": n})["order"]) < 8 for n in range(updates)]
    assert pruned.index(True) < updates - last and not any(pruned[updates - last :])
    if last == 0:  # no part of whole epochs at the end, so the number of updates is not needed
        state |= {"updates": 0}
        assert any(len(policy._epoch(state | {"done": n, "epoch": n})["order"]) < 8 for n in range(updates))
        assert policy.init(8, 4, 0)["done"] == 0
    else:
        assert (
            pruned[updates - last - 1]
            or len(policy._epoch(state | {"done": updates - last - 1, "epoch": 99})["order"]) < 8
        )


def test_info_batch_keeps_the_expected_gradient():
    """The mean over many epochs of factor times indicator is 1 for every example."""
    policy = InfoBatch(ratio=0.6)
    state = policy.init(40, 4, 10**6) | {"losses": np.arange(40, dtype=np.float32)}
    total = np.zeros(40)
    for epoch in range(1, 4001):
        drawn = policy._epoch(state | {"epoch": epoch})
        total[drawn["order"]] += drawn["rescale"]
    np.testing.assert_allclose(total / 4000, 1, atol=0.08)


def test_rho_loss(tmp_path):
    irreducible = np.random.default_rng(0).random(23).astype(np.float32)
    np.save(tmp_path / "table.npy", irreducible)
    table = np.random.default_rng(1).random((200, 23)).astype(np.float32)
    policy = RhoLoss(table=str(tmp_path / "table.npy"), pool=3, seed=2)
    draws = drive(policy, 23, 4, 8, lambda n, e: table[n, e])
    assert [d.scored for d in draws] == [True, True, True, False] * 8
    for i in range(0, 32, 4):
        excess = [
            (-(table[i + j, e] - irreducible[e]), j * 4 + k, e)
            for j in range(3)
            for k, e in enumerate(draws[i + j].examples.tolist())
        ]
        assert draws[i + 3].examples.tolist() == [e for _, _, e in sorted(excess)[:4]]
    seen = np.concatenate([d.examples for d in draws if d.scored])
    assert sorted(seen[:20]) == sorted(set(seen[:20]))  # five candidate batches to an epoch, none twice


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HardBatches(delta=0.0), r"delta must be a number in \(0, 1\], got 0.0"),
        (lambda: HardBatches(delta=1.5), r"delta must be a number in \(0, 1\], got 1.5"),
        (lambda: EasyBatches(delta=float("nan")), "delta must be a number"),
        (lambda: HardBatches(delta=0.1).init(9), "delta must be at least 1 / 9, or a round of the 9 batches is empty, got 0.1"),
        (lambda: HardBatches().init(0), "num_batches must be >= 1, got 0: the data are fewer than one batch"),
        (lambda: HardBatches(composition="random"), "composition must be one of source, seeded, got 'random'"),
        (lambda: RandomBatches(seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: HardBatches().update(HardBatches().init(4), 2, np.nan), "loss of batch 2 must be a number"),
        (lambda: SelectiveBackprop(beta=-1.0), "beta must be a number >= 0, got -1.0"),
        (lambda: InfoBatch(ratio=1.0), r"ratio must be a number in \[0, 1\), got 1.0"),
        (lambda: InfoBatch().init(3, 4, 10), "batch_size must be at most the 3 examples of the training set, got 4"),
        (lambda: InfoBatch().init(4, 4, 9), "batch_size must be less than the 4 examples for InfoBatch to prune any, got 4"),
        (lambda: InfoBatch().init(40, 4, 0), "updates must be .* InfoBatch does not prune in the last 12.5% of them; got 0"),
        (lambda: InfoBatch().init(40, 4, 11), r"must be > 11 .* first 10 and the last 1 \(full = 0.125\) .* got 11"),
        (lambda: InfoBatch(full=0.95).init(40, 4, 100), "updates must be > 105 for InfoBatch to prune"),
        (lambda: RhoLoss(table="absent.npy").init(9, 4, 1), "table must be a .npy file .* the 9 .*'absent.npy'"),
        (lambda: drive(SelectiveBackprop(), 8, 4, 1, lambda n, e: np.nan if e == 3 else 1.0), "loss of example 3 must"),
    ],
)  # fmt: skip
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros(8), r"with float64 \(8,\)"),
        (np.full(9, np.nan), r"with float64 \(9,\)"),
        (np.array(list("abcdefghi")), r"with <U1 \(9,\)"),
        (np.array([None] * 9), "allow_pickle=False"),
        (b"", "reading magic string"),
        (b"PK\x03\x04 and more", "magic string is not correct"),  # as in a .npz file
    ],
)
def test_bad_tables_of_irreducible_losses(content, reason, tmp_path):
    path = tmp_path / "table.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=f"table must be a .npy file with .* 9 .*{reason}") as error:
        RhoLoss(table=str(path)).init(9, 4, 1)
    assert "\n" not in str(error.value)


def test_examples_for_loops_of_ones_own():
    failed, tried = doctest.testmod(hard_batches)
    assert (failed, tried > 10) == (0, True)
