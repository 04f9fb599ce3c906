"""Data selection in the trainer: plain training at delta = 1, exact resume, costs, every policy, losses by example."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from training_runs import HERE, TINY, losses, run_together, start

from deltajax import data, score, train
from deltajax.models import resnet
from deltajax.training import loop, metrics
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import load_config
from deltajax.training.step import gradients

VISION = str(HERE / "tiny_vision.py")
DIVERGES = ("optimizer.learning_rate=1e10", "optimizer.weight_decay=1e30")
KEPT = {"step", "loss", "grad_norm", "validation_loss"}  # what several processes compute too, up to rounding


def run(workdir: Path, *flags: str, config: str = VISION) -> int:
    return train.main(["train", f"--config={config}", f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)])


def final(workdir: Path):
    """(state, progress) of the last checkpoint."""
    checkpoints = Checkpoints(workdir, read_only=True)
    config = checkpoints.progress(12)["config"]
    _, state, progress = checkpoints.restore(loop.make_step(config).abstract, config)
    return jax.device_get(state), progress


def assert_same(one: Path, other: Path):
    assert losses(one) == losses(other)
    jax.tree.map(np.testing.assert_array_equal, final(one)[0], final(other)[0])


@pytest.fixture(scope="module")
def hard(_environment, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("hard") / "run"
    assert run(workdir) == 0
    return workdir


def test_delta_one_is_plain_training_bit_for_bit(hard, tmp_path):
    """Unshuffled training and delta = 1, chosen by flags; delta = 0.4 is something else."""
    assert run(tmp_path / "plain", "data.selection=in_order") == 0
    assert run(tmp_path / "one", "data.selection=hard_batches", "data.selection.delta=1.0") == 0
    assert_same(tmp_path / "plain", tmp_path / "one")
    assert losses(hard) != losses(tmp_path / "one")
    assert [row for row in losses(hard).items()][:5] == [row for row in losses(tmp_path / "one").items()][:5]


def test_one_wrong_digit_in_the_table_of_losses(hard, tmp_path, capfd):
    """It would choose other batches, and JSON does not notice: the checkpoint before is used."""
    workdir = shutil.copytree(hard, tmp_path / "run")
    newest, before = Checkpoints(workdir, read_only=True).steps()[::-1][:2]
    file = workdir / "checkpoints" / str(newest) / "progress" / "metadata"
    progress = json.loads(file.read_text())
    progress["iterator"]["state"]["losses"]["values"][0] += 1
    file.write_text(json.dumps(progress))
    capfd.readouterr()
    assert run(workdir) == 0
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and f"checkpoint of step {newest} in" in err and "is not what was written" in err
    assert f"continuing after step {before}" in out
    assert_same(workdir, hard)


def test_evaluation_changes_nothing(hard, tmp_path):
    """Nor the running statistics: they never see test data."""
    assert run(tmp_path, "evaluation.every=1") == 0
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path)[0], final(hard)[0])


def test_the_table_holds_the_losses_of_the_steps(hard):
    """The trace that the logged losses imply, by the paper's algorithm, has exactly the recorded end."""
    logged = [loss for _, (loss, _) in sorted(losses(hard).items())]
    table, order, chosen = {}, [], list(range(5))
    while len(order) < 12:
        for index in chosen[: 12 - len(order)]:
            table[index] = logged[len(order)]
            order.append(index)
        chosen = sorted(sorted(table, key=lambda i: (-table[i], i))[:2])
    state = final(hard)[1]["iterator"]
    assert (state["step"], len(order)) == (12, 12)
    np.testing.assert_array_equal(state["state"]["losses"]["values"], [table[i] for i in range(5)])


def test_killed_inside_a_round(hard, tmp_path):
    """The same command goes on with the losses table of the checkpoint, to the same end."""
    ended = start(HERE / "accident.py", "kill", "10", f"--config={VISION}", f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == -signal.SIGKILL
    assert Checkpoints(tmp_path / "run", read_only=True).steps()[-1] in (4, 8)  # the second one was being written
    assert run(tmp_path / "run") == 0
    assert_same(tmp_path / "run", hard)


def test_several_processes(hard, tmp_path):
    """Two processes, one of them killed inside a round; then two, or one, go on: the batches and the table of one alone."""
    ended = run_together(tmp_path / "two", [("kill", 0), ("kill_saved", 9)], config=VISION)
    assert ended[1][0] == -signal.SIGKILL and ended[0][0], ended
    assert Checkpoints(tmp_path / "two", read_only=True).steps()[-1] == 8  # rounds end after steps 5, 7, 9, 11
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    ended = run_together(tmp_path / "two", [("kill", 0), ("kill", 0)], config=VISION)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert run(tmp_path / "one") == 0
    expected, table = metrics.read_rows(hard), final(hard)[1]["iterator"]
    norms = sorted(row["grad_norm"] for row in expected[:5])
    assert min(b / a for a, b in itertools.pairwise(norms)) > 1.01  # by which one batch is told from another
    for workdir in (tmp_path / "two", tmp_path / "one"):
        for row, wanted in zip(metrics.read_rows(workdir), expected, strict=True):
            near = {k: pytest.approx(wanted[k], rel=1e-4) for k in KEPT & wanted.keys()}
            assert {k: row[k] for k in KEPT & row.keys()} == near, wanted["step"]
        found = final(workdir)[1]["iterator"]
        assert found["state"].pop("losses")["values"] == pytest.approx(table["state"]["losses"]["values"], rel=1e-5)
        assert found["state"] == {name: x for name, x in table["state"].items() if name != "losses"}


def test_rivals_and_their_costs(hard, tmp_path):
    """Scored examples are counted; RHO-loss reads a table made from two halves."""
    halves = [f"--workdir={tmp_path / half}" for half in ("even", "odd")]
    for half in ("even", "odd"):
        assert run(tmp_path / half, "data.selection=shuffled", f"data.half={half}", "data.batch_size=128") == 0
    table = tmp_path / "irreducible.npy"
    assert score.main(["score", *halves, f"--output={table}"]) == 0
    assert np.load(table).shape == (1437,)
    assert score.main(["score", halves[0]]) == 2
    expected = {"info_batch": 0, "selective_backprop": None, "rho_loss": 12 * 3 * 256}
    for name, scored in expected.items():
        more = [f"data.selection.table={table}", "data.selection.pool=3"] if name == "rho_loss" else []
        assert run(tmp_path / name, f"data.selection={name}", *more) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["examples"] == 12 * 256 and summary["seconds"] > 0
        assert summary["examples_scored"] == scored or (scored is None and summary["examples_scored"] > 12 * 256)
        assert losses(tmp_path / name) != losses(hard)


def test_scores_are_the_losses_of_unseen_examples(tmp_path):
    assert run(tmp_path / "even", "data.selection=shuffled", "data.half=even") == 0
    assert run(tmp_path / "odd", "data.selection=shuffled", "data.half=odd", "seed=1") == 0
    assert score.main(["score", f"--workdir={tmp_path / 'even'}", f"--workdir={tmp_path / 'odd'}",
                       f"--output={tmp_path / 'table.npy'}"]) == 0  # fmt: skip
    table, config = np.load(tmp_path / "table.npy"), load_config(VISION)
    images = data.load(config.data).train
    for half, index in (("odd", 6), ("even", 7)):
        state, _ = final(tmp_path / half)
        example = images[index]
        logits, _ = resnet.apply(state.params, state.stats, config.model, example["images"][None])
        assert table[index] == pytest.approx(-float(jax.nn.log_softmax(logits[0])[example["targets"]]), rel=1e-4)


def test_language_models_select_too(tmp_path):
    """Batches of windows of text, for the half of the tiny model that compiles fast."""
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(f"document {n} " * 12)
    flags = ["data.selection=hard_batches", "data.selection.delta=0.5", f"data.corpus={tmp_path}"]
    flags += ["model.pattern=swa,swa", "optimizer.name=adamw"]
    assert run(tmp_path / "run", *flags, config=TINY) == 0
    table = final(tmp_path / "run")[1]["iterator"]["state"]["losses"]["values"]
    assert len(table) == 5 and np.isfinite(table).all()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["data.selection=hard_batch"], 2, "--config.data.selection=hard_batch: must be one of shuffled, in_order, hard_batches"),
        (["data.selection.delta=0"], 2, "--config.data.selection.delta=0: delta must be a number in (0, 1], got 0.0"),
        (["data.selection.delta=0.1"], 2, "delta must be at least 1 / 5, or a round of the 5 batches is empty, got 0.1"),
        (["data.batch_size=2000"], 2, "batch_size must be at most the 1437 examples of the training set, got 2000"),
        (["data.selection=shuffled", "data.selection.delta=0.1"], 2, "--config.data.selection.delta: no such key"),
        ([*DIVERGES, "steps=12"], 1, "rank it by, got nan; no checkpoint was saved yet"),
        ([*DIVERGES, "steps=2"], 1, "rank it by, got nan; no checkpoint was saved yet"),  # before the round ends
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(flags, code, message, tmp_path, capfd):
    assert run(tmp_path / "run", *flags) == code
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("other", ["EasyBatches", "Shuffled"])
def test_another_policy_cannot_go_on(hard, tmp_path, capfd, other):
    (tmp_path / "run").symlink_to(hard)
    flag = {"EasyBatches": "easy_batches", "Shuffled": "shuffled"}[other]
    assert run(tmp_path / "run", f"data.selection={flag}", "steps=14") == 2
    assert f"the checkpoint was made with HardBatches, not {other}" in capfd.readouterr().err


@pytest.mark.parametrize("microbatches", [1, 2])
def test_losses_by_example_and_rescaled_gradients(microbatches):
    """Against examples one by one: the losses, and the estimate that InfoBatch wants."""
    model = load_config(VISION).model
    params, stats = resnet.init(jax.random.key(0), model), resnet.init_stats(model)
    rng = np.random.default_rng(0)
    batch = {
        "images": np.repeat(rng.standard_normal((1, 8, 8, 1), np.float32), 4, 0),  # equal: statistics do not matter
        "targets": np.array([1, 4, 7, 4]),
        "weights": np.array([1, 2, 0.5, 1], np.float32),
        "rescale": np.array([1, 2, 2, 1], np.float32),
    }
    grads, sums, *_ = gradients(params, stats, model, batch, jax.random.key(0), microbatches, by_example=True)

    def loss(params, i):
        rows = {name: x[[i, i]] for name, x in batch.items() if name != "rescale"} | {"weights": np.ones(2, np.float32)}
        return resnet.loss_sums(params, stats, model, rows, key=None, train=True)[0]["loss"] / 2

    each = [jax.value_and_grad(loss)(params, i) for i in range(4)]
    np.testing.assert_allclose(sums["example_losses"], [value for value, _ in each], rtol=1e-5)
    factors = batch["weights"] * batch["rescale"] / batch["weights"].sum()
    expected = jax.tree.map(lambda *g: sum(f * x for f, x in zip(factors, g, strict=True)), *[g for _, g in each])
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
