"""Bad input to `deltajax.train` and `deltajax.generate`: one line, the right exit code, nothing lost."""

import json
import re
import shutil

import pytest
from training_runs import losses

from deltajax import generate, train
from deltajax.training import pretrained
from deltajax.training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--workdri=x"], ["--workdri: no such flag; did you mean --workdir?"]),
        (["--confg.steps=3"], ["did you mean --config.steps?"]),
        (["--config.optimizer.learning_rat=1"], ["did you mean config.optimizer.learning_rate?"]),
        (["--config.optimizer.learning_rate", "fast"], ["--config.optimizer.learning_rate=fast: must be a number"]),
        (["--config.optimizer.learning_rate=-1"], ["learning_rate must be > 0 and finite, got -1.0"]),
        (["--config.model.mixers.swa.window=0"], ["window must be an integer >= 1 or none, got 0"]),
        (["--config.steps"], ["--config.steps: a value is missing"]),
        (["--config.steps=2"], ["schedule.warmup_steps must be < steps = 2, got 2"]),
        (["stray"], ["stray: only flags are allowed"]),
        (["--config.data.corpus=/nowhere"], ["/nowhere"]),
        (["--config.mesh.data=3"], ["mesh must multiply to the 1 device(s)", "data=3, fsdp=1, sequence=1, tensor=1"]),
        (["--config.mesh.fsdp=-1"], ["at most one -1"]),
        (["--config.grad_accumulation=3"], ["data.batch_size must be a multiple of", "3, got 8"]),
        (["--config.model.vocab_size=100"], ["model.vocab_size must be >= 257"]),
        (["--nodebug=3"], ["nodebug"]),
        (["--config.seed=1e30"], ["seed must be in [0, 2**32)"]),
        (["--config.data.seq_len=1000000000"], ["seq_len", "1000000000"]),
    ],
)
def test_usage_errors(arguments, parts, tmp_path, run_train):
    code, _, err = run_train(tmp_path / "run", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "no such file"),
        ("x = 1", "the file defines no get_config()"),
        ("import nonsense_module", "ModuleNotFoundError: No module named 'nonsense_module'"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config(): return 3", "must return a TrainConfig, got int"),
    ],
)
def test_bad_experiment_files(content, part, tmp_path, capfd):
    path = tmp_path / "experiment.py"
    if content is not None:
        path.write_text(content)
    code = train.main(["train", f"--config={path}", f"--workdir={tmp_path / 'run'}"])
    err = capfd.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert f"--config={path}: " in err
    assert part in err


def test_config_is_required_and_help_needs_nothing(capfd):
    assert train.main(["train"]) == 2
    assert "--config: an experiment file is missing" in capfd.readouterr().err
    assert train.main(["train", "--help"]) == 0
    assert "--workdir" in capfd.readouterr().out


def test_debug_adds_the_traceback(tmp_path, run_train):
    code, _, err = run_train(tmp_path, "--config.steps=x", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_empty_corpus(tmp_path, run_train):
    (tmp_path / "corpus").mkdir()
    code, _, err = run_train(tmp_path / "run", f"--config.data.corpus={tmp_path / 'corpus'}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "corpus" in err


def test_outputs_of_a_finished_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 12
    assert 0 < summary["bits_per_byte"] < 9
    assert set(summary["baselines"]) == {"gzip -9", "xz -9"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").read_bytes().startswith(b"def ")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    table = losses(finished)
    assert sorted(table) == list(range(1, 13))
    assert [step for step, (_, validation) in table.items() if validation is not None] == [4, 8, 12]
    assert table[12][0] < table[1][0]


def test_second_run_says_that_it_is_complete(finished, run_train):
    before = losses(finished)
    code, out, err = run_train(finished)
    assert (code, err) == (0, "")
    assert "is complete: 12 steps, validation" in out
    assert losses(finished) == before


def test_a_complete_run_goes_on_with_more_steps(finished, tmp_path, run_train):
    workdir = shutil.copytree(finished, tmp_path / "run")
    code, out, _ = run_train(workdir, "--config.steps=13")
    assert code == 0
    assert "continuing after step 12 with changed steps: 12 -> 13" in out
    assert sorted(losses(workdir)) == list(range(1, 14))


def test_another_model_in_the_same_workdir(finished, run_train):
    code, _, err = run_train(finished, "--config.model.mlp_dim=96", "--config.optimizer.name=adamw")
    assert (code, err.count("\n")) == (2, 1), err
    assert "model.mlp_dim: 64 -> 96" in err
    assert "optimizer.name: 'muon' -> 'adamw'" in err


def test_torn_newest_checkpoint_falls_back(finished, tmp_path, run_train):
    workdir = shutil.copytree(finished, tmp_path / "run")
    older, newest = Checkpoints(workdir, read_only=True).steps()[-2:]
    for path in (workdir / "checkpoints" / str(newest) / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = run_train(workdir)
    assert code == 0
    assert f"warning: checkpoint of step {newest}" in err
    assert f"using step {older}" in err
    assert err.count("\n") == 1
    assert f"continuing after step {older}" in out
    assert losses(workdir) == losses(finished)
    assert Checkpoints(workdir, read_only=True).steps()[-1] == 12


def test_other_parts_trained_in_the_same_workdir(tmp_path, run_train):
    """Moments are of what is trained: no run goes on with those of other parameters, and nothing is lost."""
    more = ("--config.optimizer.name=adamw", "--config.steps=4", "--config.optimizer.trainable=")
    assert run_train(tmp_path, f"{more[0]}", "--config.steps=3", f"{more[2]}embed")[0] == 0
    for parts in ("groups", ""):
        code, _, err = run_train(tmp_path, *more[:2], more[2] + parts)
        assert (code, err.count("\n")) == (2, 1), err
        assert "optimizer.trainable: ('embed',) -> " in err
    code, out, _ = run_train(tmp_path, *more[:2], f"{more[2]}embed")
    assert (code, "continuing after step 3" in out) == (0, True)


def test_damaged_losses_of_checkpoints(finished, tmp_path, run_train, capfd):
    """As torn arrays: the run goes on with what can be read, and the checkpoint is set aside; the best can no longer be told."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    newest = Checkpoints(workdir, read_only=True).steps()[-1]
    older = Checkpoints(workdir, read_only=True).steps()[-2]
    damaged = workdir / "checkpoints" / str(newest) / "metrics" / "metrics"
    damaged.write_text("{")
    command = ["generate", f"--workdir={workdir}", "--max_tokens=2"]
    assert generate.main([*command, "--checkpoint=best"]) == 1
    assert f"checkpoint of step {newest} in" in capfd.readouterr().err
    assert generate.main(command) == 0
    code, out, err = run_train(workdir)
    assert (code, err.count("\n")) == (0, 1), err
    assert (
        f"warning: checkpoint of step {newest} in" in err and "JSONDecodeError" in err and f"using step {older}" in err
    )
    assert f"continuing after step {older}" in out
    assert losses(workdir) == losses(finished)
    assert (workdir / "set_aside_checkpoints" / str(newest)).is_dir()
    first = Checkpoints(workdir, read_only=True).steps()[0]  # one that the run does not begin from
    measured = workdir / "checkpoints" / str(first) / "metrics"
    measured.mkdir(exist_ok=True)
    (measured / "metrics").write_text('{"loss": null}')
    code, out, err = run_train(workdir, "--config.steps=13")
    assert (code, err.count("\n")) == (0, 1), err
    assert f"checkpoint of step {first} in" in err and f"continuing after step {newest}" in out
    assert first not in Checkpoints(workdir, read_only=True).steps()


def test_checkpoints_of_another_version(finished, tmp_path, run_train, capfd):
    """A field that has another name by now: one line with field and file, nothing is touched. One that came later: a warning."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    steps = Checkpoints(workdir, read_only=True).steps()
    file = workdir / "checkpoints" / "12" / "progress" / "metadata"
    now = file.read_text()

    file.write_text(now.replace('"mlp_dim"', '"mlp_dims"'))
    capfd.readouterr()
    for code, _, err in (
        run_train(workdir, "--config.steps=13"),
        run_train(tmp_path / "next", f"--config.init_from={workdir}", "--config.steps=3"),
        (generate.main(["generate", f"--workdir={workdir}"]), *capfd.readouterr()),
    ):
        assert (code, err.count("\n")) == (2, 1), err
        assert f"error: {file}: config.model.mlp_dims: this deltajax has no such field (did it become mlp_dim?)" in err
    assert Checkpoints(workdir, read_only=True).steps() == steps
    file.write_text(re.sub(r'"grad_accumulation": 1, ', "", now))
    assert file.read_text() != now
    warning = f"warning: {file} is of an older deltajax; it is read with grad_accumulation=1\n"
    assert pretrained.load(workdir).step == 12
    assert capfd.readouterr().err == warning
    code, out, err = run_train(workdir, "--config.steps=13")
    assert (code, err) == (0, warning)
    assert "continuing after step 12 with changed steps: 12 -> 13\n" in out


def test_foreign_checkpoints(tmp_path, run_train, capfd):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "model.bin").write_bytes(b"foreign")
    code, _, err = run_train(tmp_path)
    assert (code, err.count("\n")) == (1, 1), err
    assert "no checkpoint in" in err
    assert "can be read; step 7" in err
    assert (tmp_path / "checkpoints" / "7" / "model.bin").read_bytes() == b"foreign"
    assert generate.main(["generate", f"--workdir={tmp_path}"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_updates_that_stay_non_finite_end_the_run(tmp_path, run_train):
    """The parameters that such updates left are never saved: with better settings the same run goes on."""
    assert run_train(tmp_path, "--config.steps=3")[0] == 0
    bad = ["--config.optimizer.learning_rate=1e38", "--config.optimizer.clip_norm=none", "--config.checkpoint.every=1"]
    code, _, err = run_train(tmp_path, *bad, "--config.checkpoint.keep=1", "--config.nonfinite.max_consecutive=2")
    assert (code, err.count("\n")) == (1, 1), err
    assert "3 updates in a row and 3 in all were skipped (allowed: 2 and 100); last good checkpoint: step 3" in err
    code, out, _ = run_train(tmp_path)
    assert (code, "continuing after step 3" in out) == (0, True)


def test_best_checkpoint_outlives_the_process(tmp_path, run_train, capfd):
    """The first evaluation is the best one, for after it the run diverges; a resumed run keeps it, and generate finds it."""
    worse = ["--config.optimizer.learning_rate=3", "--config.schedule.decay=constant", "--config.checkpoint.keep=1"]
    assert run_train(tmp_path, "--config.steps=4")[0] == 0
    for steps in (8, 12):
        assert run_train(tmp_path, *worse, f"--config.steps={steps}")[0] == 0
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.best_step(), checkpoints.steps()) == (4, [4, 9, 12])
    assert generate.main(["generate", f"--workdir={tmp_path}", "--max_tokens=2", "--checkpoint=best"]) == 0
    capfd.readouterr()


def test_a_mistake_does_not_touch_a_complete_run(finished, tmp_path, run_train):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.glob("*.*") if path.is_file()}
    assert run_train(workdir, "--config.steps=20", "--config.data.corpus=/nowhere")[0] == 2
    assert before == {path: path.read_bytes() for path in workdir.glob("*.*") if path.is_file()}
    assert "is complete" in run_train(workdir)[1]


def test_fewer_steps_than_the_first_evaluation(tmp_path, run_train):
    """A run that is cut short where nothing was evaluated yet is evaluated at its end."""
    never = "--config.evaluation.every=50"
    assert run_train(tmp_path, never, "--config.steps=3")[0] == 0
    (tmp_path / "summary.json").unlink()
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines(True) if "validation" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    code, out, err = run_train(tmp_path, never, "--config.steps=3")
    assert (code, "is complete: 3 steps, validation" in out) == (0, True), err


@pytest.mark.parametrize(
    "name, code, part", [("summary.json", 0, ""), ("metrics.jsonl", 1, "metrics.jsonl: line 1 is damaged")]
)
def test_damaged_files(name, code, part, finished, tmp_path, run_train):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "summary.json").unlink()
    (workdir / name).write_text("{\n")
    actual, _, err = run_train(workdir)
    assert (actual, err.count("\n")) == (code, code), err
    assert part in err


def test_workdir_that_is_a_file(tmp_path, run_train):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run_train(path)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"--workdir={path}: must be a folder that can be written" in err


def test_generate(finished, capfd):
    texts = []
    for arguments in (["--prompt=def f"], ["--prompt=def f"], ["--prompt=def f", "--seed=1"], ["--prompt="]):
        assert generate.main(["generate", f"--workdir={finished}", "--max_tokens=8", *arguments]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def f")


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        ([], 2, "--workdir: the workdir of a training run is missing"),
        (["--workdir=/nowhere"], 1, "no checkpoint in /nowhere/checkpoints"),
        (["--workdir=/nowhere", "--temperature=-1"], 2, "temperature must be >= 0"),
        (["--workdir=/nowhere", "--top_p=many"], 2, "top_p"),
        (["--workdir=/nowhere", "--promt=x"], 2, "did you mean --prompt?"),
        (["--workdir=/nowhere", "--config.steps=3"], 2, "this command takes no config keys"),
    ],
)
def test_generate_usage(arguments, code, part, capfd):
    assert generate.main(["generate", *arguments]) == code
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert part in err
