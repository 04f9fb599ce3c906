"""Predictors of the law's parameters: features, tables, honest splits, and that what is learnable is learned."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from deltajax.layers import attention, delta
from deltajax.massive_activations import features, fits, laws, predict
from deltajax.massive_activations.features import FEATURES, Architecture
from deltajax.massive_activations.fit import PARAMETERS
from deltajax.massive_activations.trajectories import Trajectories
from deltajax.models import gpt_neox, lm

PUBLISHED = Path(__file__).parents[2] / "docs/massive_activations/published_fits.csv"


def test_features():
    found = dict(zip(FEATURES, features.of_name("EleutherAI/pythia-410m-deduped").features(5), strict=True))
    expected = {"l/L": 0.25, "(l/L)^2": 0.0625, "(l/L)^3": 0.015625, "sqrt(l/L)": 0.5, "l L": 144, "H/d": 1 / 64}
    expected |= {"d_ff/d": 4, "d/L": 1024 / 24, "H/L": 16 / 24, "log d": np.log(1024)}
    expected |= {"rotary base": 10000, "rotary fraction": 0.25}
    assert found == pytest.approx(expected)
    assert sorted(name for names in features.GROUPS.values() for name in names) == sorted(FEATURES)
    with pytest.raises(ValueError, match="layer must be in 0 to 5, got 6"):
        features.of_name("70m").features(6)


def test_architectures_of_configs():
    mixers = {"d": delta.deltanet(4, 16), "a": attention.Config(2, 32, rope_base=500.0)}
    hybrid = lm.Config(257, 64, ("d", "a") * 2, mixers, mlp_dim=192)
    assert features.of_config(hybrid) == Architecture(4, 64, 4, 192, 500.0, 1.0)
    pure = dataclasses.replace(hybrid, pattern=("d",) * 3, mixers={"d": mixers["d"]})
    assert features.of_config(pure) == Architecture(3, 64, 4, 192, 0.0, 0.0)
    assert features.of_config(gpt_neox.pythia("14m")) == Architecture(6, 128, 4, 512)
    with pytest.raises(ValueError, match=r"must be a config of models\.lm"):
        features.of_config(mixers["d"])


@pytest.mark.parametrize("name", ["pythia-2b", "14million", "run7"])
def test_unknown_models(name):
    with pytest.raises(ValueError, match="is not one of Pythia's"):
        features.of_name(name)


def law_of(architecture, layer):
    """Parameters that follow from the architecture; K, alone, from the model and not from the depth."""
    depth = (layer + 1) / architecture.layers
    return dict(zip(PARAMETERS, (5 + 40 * depth, 0.1 + depth, 0.01, 1, architecture.d_model), strict=True))


ARCHITECTURES = [Architecture(n, d, d // 16, 4 * d) for n, d in ((3, 32), (4, 64), (5, 96), (6, 128), (8, 192))]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two seeds of each of five models; gamma is noise."""
    path = tmp_path_factory.mktemp("fits") / "fits.csv"
    rng = np.random.default_rng(0)
    rows = []
    for i, architecture in enumerate(ARCHITECTURES):
        for seed in range(2):
            for layer in range(architecture.layers):
                row = {"model": f"m{i}-{seed}", "layer": layer, **dataclasses.asdict(architecture)}
                rows.append(row | law_of(architecture, layer) | {"gamma": rng.uniform()})
    fits.write(path, rows)
    return fits.read([path])


def test_what_can_be_learned_is_and_noise_is_not(table):
    learned = {name: table.y[name] for name in ("A", "lambda", "gamma", "K")}
    scores = predict.evaluate(dataclasses.replace(table, y=learned), 1, ["ridge"])
    found = {key: score.r2 for key, score in predict.best(scores).items()}
    for split, sizes in zip(predict.SPLITS, (0.9, 0.5), strict=True):  # the smallest and the largest are extrapolated
        assert min(found["A", split], found["lambda", split]) > 0.9, split
        assert found["K", split] > sizes, split
        assert found["gamma", split] < 0.3
    assert all(score.lowest <= score.highest for score in scores)


def test_a_random_split_flatters_what_only_tells_models_apart(table):
    """Seeds of one architecture leave together, so a parameter that is random by model cannot be predicted."""
    rng = np.random.default_rng(1)
    of_model = {a: rng.normal() for a in sorted(set(table.architectures))}
    luck = np.array([of_model[a] for a in table.architectures])
    scores = predict.evaluate(dataclasses.replace(table, y={"A": luck}), 1, ["gradient boosting"])
    found = {key: score.r2 for key, score in predict.best(scores).items()}
    assert found["A", "random rows"] > 0.9
    assert found["A", "leave one model out"] < 0.3


def test_importance_finds_what_matters(table):
    by_depth = predict.importance(table, "lambda", "ridge", repeats=2)
    by_size = predict.importance(table, "K", "ridge", repeats=2)
    assert max(by_depth, key=by_depth.__getitem__) == "depth"
    assert max(by_size, key=by_size.__getitem__) in ("log d", "d/L", "H/L")
    assert by_depth["rotary base"] == by_size["rotary base"] == 0


def test_a_model_that_is_not_in_the_table(table):
    found = predict.predict(table, Architecture(7, 160, 10, 640), dict.fromkeys(("lambda", "K"), "ridge"))
    np.testing.assert_allclose(found["lambda"], 0.1 + np.arange(1, 8) / 7, rtol=0.1)
    assert found["K"].mean() == pytest.approx(160, rel=0.2)


def test_parameters_of_absurd_size(table):
    """Fits of open parameters reach 1e15: scores stay numbers, predictions inside what was learned from."""
    rng = np.random.default_rng(0)
    for name in ("A", "K"):
        y = np.where(rng.uniform(size=len(table.models)) < 0.2, -(10 ** rng.uniform(3, 15, len(table.models))), 5.0)
        (score, _) = predict.evaluate(dataclasses.replace(table, y={name: y}), 1, ["ridge"])
        assert np.isfinite(score.r2)
        found = predict.train(table.x, y, None, name, "ridge").predict(3 * table.x - 2)
        assert np.isfinite(found).all() and found.min() >= 1.001 * y.min() and found.max() <= 5.001


def test_fitted_trajectories_become_a_table(tmp_path):
    """With the numbers that made the curve; a block that cannot be fitted is left out with its reason."""
    steps = np.arange(0, 1000, 20.0)
    curve = laws.modulated_logarithm(steps, 5, 0.3, 0.02, 1, 2)
    made = Trajectories("mine", {0: steps, 1: steps}, {"ratio": {0: curve, 1: np.ones_like(steps)}})
    fits.write(tmp_path / "fits.csv", fits.rows(made, ARCHITECTURES[0]))
    read = fits.read([tmp_path / "fits.csv"])
    assert {name: y[0] for name, y in read.y.items()} == pytest.approx(
        dict(zip(PARAMETERS, (5, 0.3, 0.02, 1, 2), strict=True)), rel=1e-3
    )
    assert read.left_out == ["mine, layer 1: constant at 1"]
    with open(tmp_path / "fits.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["peak_step_low"]) <= float(row["peak_step"]) <= float(row["peak_step_high"])
    assert row["kind"] == "early peak" and float(row["r2"]) > 0.999 > float(row["first_order_r2"])


def test_other_peoples_table(tmp_path, capsys):
    """The committed example, under the names of its columns and under others, to scores and to a prediction."""
    text = PUBLISHED.read_text().replace("lambda", "lam", 1)
    renamed, scores = tmp_path / "theirs.csv", tmp_path / "scores.csv"
    renamed.write_text(text)
    flags = ["--estimators=ridge", "--repeats=1", f"--csv={scores}", "--architecture=31m"]
    falls = tmp_path / "importance.csv"
    assert predict.main(["", f"--fits={PUBLISHED}", *flags, f"--importance={falls}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "24 blocks of 3 models; 0 rows left out"
    assert len(lines) == 2 + len(PARAMETERS) + 1 + 6
    assert predict.main(["", f"--fits={renamed}", "--columns=lambda=lam", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    with open(scores, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["parameter"], row["split"]) for row in rows} == {(p, s) for p in PARAMETERS for s in predict.SPLITS}
    with open(falls, newline="") as file:
        found = {(row["parameter"], row["features"]): float(row["fall"]) for row in csv.DictReader(file)}
    assert found.keys() == {(p, group) for p in PARAMETERS for group in features.GROUPS}
    assert max(features.GROUPS, key=lambda group: found["lambda", group]) == "depth"


HEAD = "model,layer,A,lambda,gamma,t0,K\n"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (HEAD + "70m,0,1,2,3,4,5\n", [], "1 rows of 1 architectures; at least 10 of 2 are needed"),
        (HEAD + "70m,0,,,,,\n", [], "1 rows left out, the first 70m, layer 0: parameters are missing"),
        (HEAD + "70m,0,1,2,3,4,x\n", [], "line 2: could not convert string to float: 'x'"),
        (HEAD + "70m,6,1,2,3,4,5\n", [], "line 2: layer must be in 0 to 5, got 6"),
        (HEAD + "mine,0,1,2,3,4,5\n", [], "line 2: model 'mine': is not one of Pythia's"),
        (HEAD + "70m,0,1,2,3,4,5\n" * 2, [], "line 3: layer 0 of 70m comes twice"),
        ("model,layer,A,lam\n", [], "column lambda is missing (there: model, layer, A, lam); map it with --columns"),
        (HEAD, ["--columns=x"], "--columns=x: must be ours=theirs,..."),
        (HEAD, ["--columns=x=y"], "column 'x' is not one of ours"),
        (HEAD, ["--estimators=oracle"], "--estimators=oracle: must be among ridge, lasso"),
        (HEAD, ["--architecture=layers=2"], "--architecture=layers=2: d_model is missing"),
        (HEAD, ["--architecture=depth=2"], "'depth' is not one of layers, d_model"),
        (HEAD, ["--architecture=layers=two"], "'two' is not a number"),
        (None, [], "No such file or directory"),
    ],
)
def test_bad_input(text, flags, message, tmp_path, capsys):
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    assert predict.main(["", f"--fits={path}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def trajectory(path, model, curves):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "step", "layer", "ratio", "median"))
        writer.writerows((model, 20 * i, n, x, 2 * x) for n, curve in enumerate(curves) for i, x in enumerate(curve))
    return path


def test_tables_of_trajectories_become_one_of_fits(tmp_path, capsys):
    """A Pythia model is known by its name, one of ours by the flag; a block that cannot be fitted says why."""
    curve = laws.modulated_logarithm(np.arange(0, 1000, 20.0), 5, 0.3, 0.02, 1, 2)
    pythia = trajectory(tmp_path / "a.csv", "pythia-70m", [curve, np.ones(50), curve + 3])
    mine, out = trajectory(tmp_path / "b.csv", "mine", [curve]), tmp_path / "new" / "fits.csv"
    assert fits.main(["", f"--trajectories={pythia},{mine}", "--statistic=median", f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "pythia-70m, layer 0: early peak, R2 1.0000",
        "pythia-70m, layer 1: constant at 2",
        "pythia-70m, layer 2: early peak, R2 1.0000",
    ]
    assert lines[-1] == f"{out}: 4 blocks of 2 models"
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[i]["K"]) for i in (0, 2)] == pytest.approx([4, 10], rel=1e-3)
    assert [row["d_model"] for row in rows] == ["512"] * 3 + [""]
    with pytest.raises(ValueError, match="line 5: model 'mine': is not one of Pythia's"):
        fits.read([out])
    flags = [f"--trajectories={mine}", f"--out={out}", "--architecture=layers=1,d_model=8,num_heads=2,mlp_dim=32"]
    assert fits.main(["", *flags]) == 0
    assert fits.read([out]).models.tolist() == ["mine"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--trajectories: tables of trajectories are missing"),
        (["--trajectories=MINE,MINE"], "--trajectories: two tables are of a model 'mine'"),
        (["--trajectories=MINE", "--statistic=top1"], "column top1 is missing"),
        (["--trajectories=MINE", "--architecture=2b"], "model '2b': is not one of Pythia's"),
        (["--trajectories=/nowhere.csv"], "No such file or directory: /nowhere.csv"),
    ],
)
def test_usage_of_fits(flags, message, tmp_path, capsys):
    mine, out = trajectory(tmp_path / "b.csv", "mine", [[1, 2, 3]]), tmp_path / "fits.csv"
    assert fits.main(["", *(flag.replace("MINE", str(mine)) for flag in flags), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
