"""Statistics of activations read off training steps: which steps, which values, and that the run stays what it was."""

import csv
import functools

import jax
import numpy as np
import pytest
from training_runs import losses

from benchmarks import massive_probes
from deltajax import data
from deltajax.models import gpt_neox, lm
from deltajax.ops import taps
from deltajax.training import activation_log
from deltajax.training.config import Probes
from deltajax.training.loop import make_step
from deltajax.training.step import gradients


def read(workdir):
    with open(workdir / activation_log.FILE, newline="") as file:
        return list(csv.DictReader(file))


def test_when_probes_are_due():
    steps = [step for step in range(31) if Probes(every=10).due(step)]
    assert steps == [0, 1, 2, 4, 8, 10, 20, 30]
    assert not any(Probes().due(step) for step in range(31))


def test_a_probed_run(finished, tmp_path, run_train, tiny_config):
    """Stopped and continued: every row once; a probed step is the step that it would have been."""
    probed = "--config.probes.every=8"
    assert run_train(tmp_path, probed, "--config.steps=6")[0] == 0
    assert run_train(tmp_path, probed)[0] == 0
    rows = read(tmp_path)
    assert [(int(row["step"]), int(row["layer"])) for row in rows] == [(s, n) for s in (0, 1, 2, 4, 8) for n in (0, 1)]
    assert [row["first_token_share"] != "" for row in rows[:2]] == [False, True]  # a delta layer, an attention layer
    for step in (1, 2, 3):  # before the shorter run's schedule tells
        assert losses(tmp_path)[step][0] == pytest.approx(losses(finished)[step][0], rel=1e-4)
    # The first rows are statistics of the initial parameters on the first batch.
    params = make_step(tiny_config).init(tiny_config.seed).params
    batch = next(data.load(tiny_config.data).train_iterator())

    def hidden(params):
        return lm.hidden(params, tiny_config.model, batch["tokens"], segment_ids=batch["segment_ids"])[0]

    _, seen = jax.jit(taps.capture(hidden, {"residual": lambda x: x}))(params)
    for row, x in zip(rows[:2], np.abs(seen["residual"]), strict=True):
        assert float(row["top1"]) == pytest.approx(x.max((1, 2)).mean(), rel=1e-5)
        medians = np.sort(x.reshape(len(x), -1), -1)[:, (x[0].size - 1) // 2]
        assert float(row["ratio"]) == pytest.approx(float(row["top1"]) / medians.mean(), rel=1e-5)
        where = np.unravel_index(x.argmax(), x.shape)
        assert (int(row["position"]), int(row["channel"])) == where[1:]


def test_probes_see_every_microbatch(tiny_config):
    """The statistics of the same sequences, whether they come in one batch or in two."""
    model = tiny_config.model
    params = lm.init(jax.random.key(0), model)
    batch = next(data.load(tiny_config.data).train_iterator())
    seen = {}
    for parts in (1, 2):
        run = functools.partial(gradients, microbatches=parts, probed_sequences=2)
        seen[parts] = jax.jit(run, static_argnums=2)(params, {}, model, batch, jax.random.key(0))[3]
    assert seen[1]["top1"].shape == (2, 2)
    assert seen[2]["top1"].shape == (2, 4)
    # Rows are dealt out in turn: of eight, the two microbatches begin with rows 0, 2 and 1, 3.
    np.testing.assert_allclose(seen[2]["top1"][:, [0, 2]], seen[1]["top1"], rtol=1e-5)


def test_a_torn_line_and_rows_to_come_are_dropped(tmp_path):
    path = tmp_path / activation_log.FILE
    row = ",".join("1" * len(activation_log.COLUMNS))
    path.write_text(f"{','.join(activation_log.COLUMNS)}\n{row}\n5{row[1:]}\n7,1,3")
    activation_log.Writer(tmp_path, 5).close()
    assert [int(r["step"]) for r in read(tmp_path)] == [1]


def test_steps_in_between_pay_nothing():
    """The program of a step without probes is that of a model without tags; the tags are there all the same."""
    model, batch = gpt_neox.Config(257, 16, 2, 2), massive_probes.random_batch(8, 2)
    tagged = massive_probes.operations(model, batch)
    with massive_probes.untagged():
        assert massive_probes.operations(model, batch) == tagged
    assert sum(tagged.values()) > 50
    loss = functools.partial(gpt_neox.loss_sums, key=None, train=False)
    params = gpt_neox.init(jax.random.key(0), model)
    assert taps.tags(lambda p: loss(p, {}, model, batch), params) == ["first_token_share", "residual"] * 2
