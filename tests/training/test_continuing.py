"""Runs that continue with other settings: position and counts, what is refused, skipped updates, the best checkpoint."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import HERE, losses

from deltajax import data, generate, train
from deltajax.data import generated, mad, moving_digits, text, ucf101, vision
from deltajax.data.loader import ShuffledBatches
from deltajax.fields import fixed_leaves
from deltajax.layers import batch_norm, delta, delta_activation
from deltajax.models import delta_lm, efficientnet, frames, gpt_neox, lm, registry, resnet
from deltajax.training import checkpoint_reader, loop, metrics
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.step import TrainState

FAST = ("--config.model.pattern=swa", "--config.optimizer.name=adamw", "--config.evaluation.every=100")
NAN, INF = math.nan, math.inf


@pytest.fixture
def consumed(monkeypatch):
    """The batches that training takes, one after the other."""
    batches = []
    take = ShuffledBatches.__next__
    monkeypatch.setattr(ShuffledBatches, "__next__", lambda self: batches.append(take(self)) or batches[-1])
    return batches


@pytest.fixture(scope="module")
def short(_environment, tmp_path_factory):
    """The workdir of a run of 6 steps of 8 examples. Copy it before changing anything in it."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    command = ["train", f"--config={HERE / 'tiny.py'}", f"--workdir={workdir}", "--config.steps=6", *FAST]
    assert train.main(command) == 0
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def rewrite(workdir, step, change, **metrics_row):
    """Let `change` edit the JSON of a checkpoint as a version without checksums wrote it."""
    folder = workdir / "checkpoints" / str(step)
    file = folder / "progress" / "metadata"
    progress = json.loads(file.read_text())
    for name in ("sum", "loss", "checksums"):
        progress.pop(name, None)
    change(progress)
    file.write_text(json.dumps(progress))
    if metrics_row:
        (folder / "metrics").mkdir(exist_ok=True)
        (folder / "metrics" / "metrics").write_text(json.dumps(metrics_row))


@pytest.mark.parametrize("of_version", ["this", "older"])
def test_batch_sizes_change_at_the_exact_example(of_version, short, tmp_path, run_train, tiny_config, consumed):
    """8, then 16, then 12 with accumulation: the examples are those of one run, and the summary counts them."""
    workdir = shutil.copytree(short, tmp_path / "run")
    if of_version == "older":

        def in_batches(progress):
            progress["iterator"] = {"next_index": progress["iterator"]["next_example"] // 8}
            del progress["examples"]

        rewrite(workdir, 6, in_batches)
    for steps, size, more in ((9, 16, ()), (11, 12, ("--config.grad_accumulation=3",))):
        flags = (f"--config.steps={steps}", f"--config.data.batch_size={size}", *more)
        code, out, err = run_train(workdir, *FAST, *flags)
        assert (code, err) == (0, "")
        assert f"data.batch_size: {8 if size == 16 else 16} -> {size}" in out
    assert summary(workdir)["examples"] == 6 * 8 + 3 * 16 + 2 * 12
    whole = data.load(dataclasses.replace(tiny_config.data, batch_size=6 * 8 + 3 * 16 + 2 * 12)).train_iterator()
    read = np.concatenate([batch["tokens"] for batch in consumed])
    np.testing.assert_array_equal(read, next(whole)["tokens"][6 * 8 :])
    assert sorted(losses(workdir)) == list(range(1, 12))


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("data.seq_len=16", "data.seq_len: 32 -> 16"),
        ("data.seed=1", "data.seed: 0 -> 1"),
        ("data.half=even", "data.half: 'all' -> 'even'"),
        ("data.validation_fraction=0.4", "data.validation_fraction: 0.3 -> 0.4"),
        ("data.tokenizer=other.json", "data.tokenizer: 'byte' -> 'other.json'"),
        ("model.d_model=64", "model.d_model: 32 -> 64"),
        ("model.mixers.swa.window=4", "model.mixers.swa.window: 8 -> 4"),
        ("model.norm_eps=1e-5", "model.norm_eps: 1e-06 -> 1e-05"),
    ],
)
def test_what_moves_the_position_or_the_parameters_is_refused(flag, change, short, run_train):
    code, _, err = run_train(short, *FAST, "--config.steps=7", f"--config.{flag}")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"the config disagrees with the checkpoint of step 6 in {short / 'checkpoints'}: {change};" in err
    assert f"--config.init_from={short} and another --workdir" in err


def test_another_corpus_is_read_from_its_first_example(short, tmp_path, run_train, tiny_config, consumed):
    """As the warning says; a copy of the same corpus continues without one."""
    corpus = shutil.copytree(tiny_config.data.corpus, tmp_path / "corpus")
    for name in ("copy", "other"):
        if name == "other":
            (corpus / "more.py").write_text("# something new\n" * 50)
        workdir = shutil.copytree(short, tmp_path / name)
        code, _, err = run_train(workdir, *FAST, "--config.steps=7", f"--config.data.corpus={corpus}")
        assert (code, "it is read from its first example on" in err) == (0, name == "other"), err
        assert summary(workdir)["examples"] == 7 * 8
    stream = data.load(dataclasses.replace(tiny_config.data, corpus=str(corpus))).train_iterator()
    np.testing.assert_array_equal(consumed[-1]["tokens"], next(stream)["tokens"])
    code, _, err = run_train(workdir, *FAST, "--config.steps=8", f"--config.data.corpus={corpus}")
    assert (code, err) == (0, "")
    np.testing.assert_array_equal(consumed[-1]["tokens"], next(stream)["tokens"])


def test_how_a_model_is_computed_may_change(short, tmp_path, run_train):
    """Losses are those of the same model to rounding, of bfloat16 to its rounding."""
    variants = {
        "plain": (),
        "same": ("remat=full", "scan_layers=false", "mixers.delta.implementation=chunked"),
        "rounded": ("dtype=bfloat16",),
    }
    found = {}
    for name, flags in variants.items():
        workdir = shutil.copytree(short, tmp_path / name)
        code, out, err = run_train(workdir, *FAST, "--config.steps=8", *(f"--config.model.{flag}" for flag in flags))
        assert (code, err) == (0, "")
        assert all(f"model.{flag.split('=')[0]}: " in out for flag in flags)
        found[name] = [loss for loss, _ in losses(workdir).values()]
    np.testing.assert_allclose(found["same"], found["plain"], rtol=1e-5)
    np.testing.assert_allclose(found["rounded"], found["plain"], rtol=2e-2)


NEOX = gpt_neox.Config(64, 32, 2, 2)
MIXERS = {"delta": delta.gated_deltanet(num_heads=2, head_dim=16)}
LM = lm.Config(64, 32, ("delta", "delta"), MIXERS)
RESNET = resnet.resnet_small(in_channels=1, widths=(4,), blocks=(1,))
EFFICIENT = efficientnet.Config(8, (efficientnet.Stage("inverted", 8),), 16)
CHANGES = [
    (LM, dict(dtype="bfloat16", scan_layers=False, remat="full")),
    (LM, dict(mixers={"delta": dataclasses.replace(MIXERS["delta"], implementation="chunked")})),
    (NEOX, dict(dtype="bfloat16", scan_layers=False, remat=True)),
    (delta_lm.Config(LM), dict(rate=0.1, lm=dataclasses.replace(LM, remat="dots"))),
    (RESNET, dict(dtype="bfloat16", dropout=0.1, norm=batch_norm.Config(momentum=0.2))),
    (EFFICIENT, dict(dtype="bfloat16", dropout=0.1, drop_path=0.1)),
    (
        frames.Config(RESNET, (8, 8), delta_activation.Config()),
        dict(rate=0.1, penalty="tile", tile=4, delta=delta_activation.Config(step_gradient="lsq")),
    ),
]


@pytest.mark.parametrize(("model", "changes"), CHANGES, ids=lambda x: type(x).__module__.rpartition(".")[2])
def test_changeable_fields_of_models(model, changes):
    """Parameters and statistics keep their paths and shapes, and no fixed field differs."""
    module = registry.module_of(model)

    def arrays(config):
        return jax.eval_shape(lambda: (module.init(jax.random.key(0), config), module.init_stats(config)))

    changed = dataclasses.replace(model, **changes)
    assert changed != model
    assert arrays(changed) == arrays(model)
    assert dict(fixed_leaves(changed, "model")) == dict(fixed_leaves(model, "model"))


def test_changeable_fields_of_data():
    """By name: whatever else a task's config has decides which example is where."""

    def changeable(kind):
        return {field.name for field in dataclasses.fields(kind) if field.metadata}

    common = {"batch_size", "lengths", "validation_examples", "evaluation_examples"}
    assert changeable(generated.Config) == changeable(mad.Config) == common
    assert changeable(moving_digits.Config) == {"batch_size", "validation_examples"}
    assert changeable(text.Config) == {"corpus", "batch_size", "lengths", "evaluation_windows"}
    assert changeable(vision.Config) == {"folder", "verify", "image_size", "augment", "batch_size"}
    frames_of_videos = {"frames", "stride", "resize", "size"}
    assert changeable(ucf101.Config) == frames_of_videos | {"folder", "splits", "damaged", "batch_size"}


SPIKES = "--config.nonfinite.max_grad_norm=1e-9"  # every update is one


def test_a_last_update_that_is_skipped_completes_the_run(short, tmp_path, run_train):
    """It has a checkpoint, so the tail is not trained again; with more steps the run goes on."""
    workdir = shutil.copytree(short, tmp_path / "run")
    assert run_train(workdir, *FAST, SPIKES, "--config.steps=7")[0] == 0
    assert Checkpoints(workdir, read_only=True).steps()[-1] == 7
    rows = metrics.read_rows(workdir)
    code, out, _ = run_train(workdir, *FAST, SPIKES, "--config.steps=7")
    assert (code, "is complete: 7 steps" in out, metrics.read_rows(workdir)) == (0, True, rows)
    code, out, _ = run_train(workdir, *FAST, "--config.steps=8")
    assert (code, "continuing after step 7" in out, summary(workdir)["examples"]) == (0, True, 64)
    rows = [row for row in metrics.read_rows(workdir) if "skipped" in row]
    assert [(row["skipped"], row["streak"]) for row in rows[-3:]] == [(0, 0), (1, 1), (1, 0)]


def test_a_run_whose_every_update_is_skipped(tmp_path, run_train):
    """Complete with its first parameters; the limit of skipped updates holds over all starts and takes no checkpoint away."""
    assert run_train(tmp_path, *FAST, SPIKES, "--config.steps=8")[0] == 0
    assert "is complete: 8 steps" in run_train(tmp_path, *FAST, SPIKES, "--config.steps=8")[1]
    code, _, err = run_train(tmp_path, *FAST, SPIKES, "--config.steps=20")
    assert code == 1 and "at step 11: 11 updates in a row and 11 in all" in err
    assert "last good checkpoint: step 9" in err
    code, out, _ = run_train(tmp_path, *FAST, "--config.steps=11")
    assert (code, "continuing after step 9" in out) == (0, True)


def test_parameters_that_no_update_can_follow_never_replace_good_ones(tmp_path, run_train):
    """Neither by periodic checkpoints nor by those of completed runs; when the limit is reached all of them are set aside."""
    assert run_train(tmp_path, *FAST, "--config.steps=3")[0] == 0
    broken = ["--config.optimizer.learning_rate=1e38", "--config.optimizer.clip_norm=none"]
    broken += ["--config.checkpoint.every=1", "--config.checkpoint.keep=1"]
    for steps in (6, 7):
        assert run_train(tmp_path, *FAST, *broken, f"--config.steps={steps}")[0] == 0
        assert Checkpoints(tmp_path, read_only=True).steps() == [3, steps]
        assert Checkpoints(tmp_path, read_only=True).best_step() == 3
    code, _, err = run_train(tmp_path, *FAST, *broken, "--config.steps=9", "--config.nonfinite.max_consecutive=3")
    assert (code, "last good checkpoint: step 3" in err) == (1, True), err
    code, out, _ = run_train(tmp_path, *FAST)
    assert (code, "continuing after step 3" in out) == (0, True)


@pytest.mark.parametrize("starts", ["one start", "a start for each"])
@pytest.mark.parametrize(
    ("measured", "steps", "best"),
    [
        ({4: 1.0, 8: NAN, 12: 5.0, 16: NAN, 20: 4.9, 24: 4.8}, [4, 20, 24], 4),
        ({8: 1.0, 12: NAN, 16: NAN, 20: NAN}, [8, 16, 20], 8),
        ({4: INF, 8: 5.0, 12: 6.0, 16: 7.0}, [8, 12, 16], 8),
        ({4: 2.0, 8: -INF, 12: 3.0, 16: 4.0}, [4, 12, 16], 4),
        ({4: 2.0, 8: 2.0, 12: 2.0, 16: 2.0}, [4, 12, 16], 4),
        ({4: NAN, 8: INF, 12: -INF, 16: NAN}, [12, 16], 16),
        ({4: 2.0, 8: None, 12: 3.0, 16: None}, [4, 12, 16], 4),
    ],
)
def test_losses_that_are_not_finite_are_never_the_best(measured, steps, best, starts, tmp_path, tiny_config):
    """Of equal losses the earliest is; without a finite one the latest checkpoint counts as the best."""
    zero = jnp.zeros((), jnp.int32)
    checkpoints = Checkpoints(tmp_path)
    for step, loss in measured.items():
        state = TrainState({"w": jnp.full(3, step)}, {}, (), jnp.zeros(2, jnp.uint32), zero, zero, zero)
        checkpoints.save(step, state, tiny_config, {"iterator": {}}, loss)
        if starts != "one start":
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    found = Checkpoints(tmp_path, read_only=True)
    assert (found.steps(), found.best_step()) == (steps, best)
    finite = [loss for loss in measured.values() if loss is not None and math.isfinite(loss)]
    assert found.best_loss() == min(finite, default=INF)


def test_the_best_outlives_losses_that_are_nan_in_every_start(short, tmp_path, run_train, monkeypatch, capfd):
    """Checkpoints of older versions hold such losses, and as the best so far what is not to be trusted."""
    evaluate, measured = loop.Run._evaluate, {7: 1.0, 8: 0.5, 9: NAN, 10: 0.75, 11: NAN}
    monkeypatch.setattr(loop.Run, "_evaluate", lambda self: (evaluate(self), measured[self.step])[1])
    workdir = shutil.copytree(short, tmp_path / "run")
    rewrite(workdir, 6, lambda progress: progress.update(best_loss=-INF), loss=NAN)
    often = ("--config.evaluation.every=1", "--config.checkpoint.every=100", "--config.checkpoint.keep=1")
    for steps in (9, 11):
        code, _, err = run_train(workdir, *FAST, *often, f"--config.steps={steps}")
        assert (code, err) == (0, "")
    checkpoints = Checkpoints(workdir, read_only=True)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([8, 9, 11], 8)
    assert generate.main(["generate", f"--workdir={workdir}", "--max_tokens=1", "--checkpoint=best"]) == 0
    assert capfd.readouterr().err == ""


def test_lowest():
    assert checkpoint_reader.lowest({1: NAN, 2: 3.0, 3: None, 4: 3.0, 5: INF}) == 2
    assert checkpoint_reader.lowest({1: NAN, 2: None}) is None
