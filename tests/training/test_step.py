"""One update: normalisation, accumulation, layout, skipping, what each optimiser touches."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from training_runs import HERE, TINY, start

from deltajax import data
from deltajax.layers.param import ParamSpec, is_spec
from deltajax.models import lm
from deltajax.training import loop, mesh, metrics, optimizer
from deltajax.training.config import Mesh, NonFinite, Optimizer, Sampling, Schedule, load_config
from deltajax.training.sampling import generate, sample
from deltajax.training.step import gradients


@pytest.fixture(scope="module")
def setup(_environment):
    """(config of one attention layer, which compiles quickly; a batch whose rows weigh differently; its functions)"""
    config = load_config(TINY)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=("swa",)))
    batch = next(data.load(config.data).train_iterator())
    batch["weights"] = batch["weights"] * np.linspace(0, 1, 8, dtype=np.float32)[:, None] ** 2
    return config, batch, loop.make_step(config)


def test_accumulated_gradients_are_those_of_the_whole_batch(setup):
    config, batch, step = setup
    params, key = step.init(0).params, jax.random.key(0)
    whole, parts = (jax.jit(gradients, static_argnums=(2, 5))(params, {}, config.model, batch, key, n) for n in (1, 4))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert whole[1]["weight"] == pytest.approx(batch["weights"].sum(), rel=1e-6)


def test_non_finite_gradients_change_nothing_but_counters(setup):
    _, batch, step = setup
    bad = {**batch, "weights": np.full_like(batch["weights"], np.nan)}
    before = jax.device_get(step.init(0))
    once, values = step.train(step.init(0), step.put(bad))
    for name in ("params", "opt_state", "rng"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), jax.device_get(getattr(once, name)))
    assert (once.step, once.skipped, once.streak) == (1, 1, 1)
    assert not np.isfinite(values["loss"])
    good, _ = step.train(once, step.put(batch))
    assert (good.step, good.skipped, good.streak) == (2, 1, 0)
    assert not np.array_equal(good.params["embed"], before.params["embed"])


def test_a_spike_is_skipped(setup):
    """A gradient norm above the limit changes nothing but counters; one below it is an update."""
    config, batch, step = setup
    norm = float(step.train(step.init(0), step.put(batch))[1]["grad_norm"])
    for limit, skipped in ((norm * 0.99, 1), (norm * 1.01, 0)):
        limited = loop.make_step(dataclasses.replace(config, nonfinite=NonFinite(max_grad_norm=limit)))
        after, values = limited.train(limited.init(0), limited.put(batch))
        assert (after.skipped, values["streak"]) == (skipped, skipped)
        same = np.array_equal(after.params["embed"], limited.init(0).params["embed"])
        assert same == bool(skipped)


def test_one_and_eight_devices_agree(finished):
    """The steps that the finished run did on one device, on eight simulated devices that share every kind of axis."""
    meshes = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "sequence": 4, "tensor": 2}]
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ended = start(HERE / "eight_devices.py", json.dumps(meshes), env=settings)
    assert ended.returncode == 0, ended.stderr
    one = [[row["loss"], row["grad_norm"]] for row in metrics.read_rows(finished) if "loss" in row][:3]
    for rows in json.loads(ended.stdout):
        np.testing.assert_allclose(np.array(rows)[:, 0], np.array(one)[:, 0], rtol=2e-4)
        # Muon takes the singular values out of its updates: where they are small it amplifies rounding.
        np.testing.assert_allclose(np.array(rows)[:, 1], np.array(one)[:, 1], rtol=2e-3)


def test_checkpoints_move_between_meshes_bit_by_bit(finished, tmp_path):
    """From one device to eight laid out in three ways, from there to disk and back to another layout."""
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    ended = start(HERE / "moved_checkpoint.py", str(finished), str(tmp_path), env=settings)
    assert ended.stdout.endswith("same\n"), ended.stderr


@dataclasses.dataclass(frozen=True)
class PodDevice:
    """As much of a TPU's description as laying out a mesh takes."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"

    @property
    def process_index(self) -> int:
        return self.id // 4


def test_only_data_crosses_slices():
    """Two slices of 4 x 4 chips: fsdp and tensor stay within one; a data axis that they do not divide is refused."""
    coords = [(x, y, 0) for y in range(4) for x in range(4)]
    devices = [PodDevice(16 * s + i, s, xyz) for s in range(2) for i, xyz in enumerate(coords)]
    laid_out = mesh.make_mesh(Mesh(data=4, fsdp=4, tensor=2), devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(laid_out)
    assert slices.shape == (4, 4, 1, 2)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None, None]).all()
    assert len({device.id for device in laid_out.flat}) == 32
    one_slice = mesh.make_mesh(Mesh(data=2, fsdp=8), devices[:16]).devices  # 8 is no side of the slice: a side is split
    assert one_slice.shape == (2, 8, 1, 1)
    with pytest.raises(ValueError, match=r"mesh\.data must be a multiple of the 2 slices, got 1"):
        mesh.make_mesh(Mesh(data=1, fsdp=32), devices)


def test_layout_errors_name_parameter_axis_and_mesh():
    spec = {"w": ParamSpec((6, 5), ("embed", "mlp"), jax.nn.initializers.zeros)}
    eight = jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match=r"parameter \['w'\]: axis 'mlp' = 5 must be a multiple of mesh tensor=2"):
        mesh.param_shardings(spec, eight)
    with pytest.raises(ValueError, match="logical axis 'depth' has no rule"):
        mesh.param_shardings({"w": ParamSpec((6,), ("depth",), jax.nn.initializers.zeros)}, eight)
    with pytest.raises(ValueError, match="mesh must multiply to the 1 device"):
        mesh.make_mesh(Mesh(tensor=2))
    spread = jax.sharding.AbstractMesh((1, 4), ("data", "sequence"))
    with pytest.raises(ValueError, match=r"data\.seq_len must be a multiple of mesh\.sequence = 4, got 30"):
        mesh.check_sequence(30, spread)
    with pytest.raises(ValueError, match=r"mesh\.sequence must be 1 for data without seq_len, got 4"):
        mesh.check_sequence(None, spread)


@pytest.mark.parametrize("decay, end", [("cosine", 1e-4), ("linear", 1e-4), ("constant", 1e-3)])
def test_schedule(decay, end):
    schedule = optimizer.make_schedule(Schedule(decay, warmup_steps=10, decay_steps=20), 1e-3, 100)
    rates = [float(schedule(i)) for i in range(101)]
    assert 0 < rates[0] < rates[5] < rates[9] < 1e-3
    np.testing.assert_allclose(rates[10:80], 1e-3, rtol=1e-6)
    assert rates[100] == pytest.approx(end)


def test_muon_takes_matrices_and_decay_spares_vectors(setup):
    """With zero gradients only decay moves parameters; with any, Muon's updates have one known size."""
    config, _, _ = setup
    specs = lm.param_specs(config.model)
    params = lm.init(jax.random.key(0), config.model)
    settings = Optimizer(name="muon", learning_rate=1.0, weight_decay=0.1, clip_norm=None)
    tx = optimizer.make_optimizer(settings, lambda _: 1.0, specs)
    still, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    jax.tree.map(
        lambda s, u, p: np.testing.assert_allclose(u, -0.1 * p if s.weight_decay else 0 * p, atol=1e-6),
        specs, still, params, is_leaf=is_spec,
    )  # fmt: skip
    tx = optimizer.make_optimizer(dataclasses.replace(settings, weight_decay=0.0), lambda _: 1.0, specs)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    gate = updates["groups"][0]["0"]["mlp"]["gate"]
    assert np.sqrt(np.mean(np.square(gate))) == pytest.approx(optimizer.MUON_RMS, rel=0.2)
    np.testing.assert_allclose(np.abs(updates["embed"]), 1, rtol=1e-3)  # Adam's first step


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_not_trainable_stays(setup, name):
    """Untouched by gradient, decay and moments; the gradient's norm is that of the rest."""
    config, batch, _ = setup
    given = Optimizer(name=name, weight_decay=0.5, trainable=("embed", "groups.0.0.mlp"))
    step = loop.make_step(dataclasses.replace(config, optimizer=given))
    before = jax.device_get(step.init(0))
    after, values = step.train(step.init(0), step.put(batch))
    whole = gradients(before.params, {}, config.model, batch, jax.random.key(0), 1)[0]
    of_rest = [whole["embed"], *jax.tree.leaves(whole["groups"][0]["0"]["mlp"])]
    assert values["grad_norm"] == pytest.approx(np.sqrt(sum(np.sum(np.square(x)) for x in of_rest)), rel=1e-4)
    chosen = [x.shape for x in of_rest]
    for (path, old), new in zip(jax.tree.leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True):
        moves = jax.tree_util.keystr(path, simple=True, separator=".").startswith(("embed", "groups.0.0.mlp."))
        assert np.array_equal(old, new) != moves, path
    moments = [x.shape for x in jax.tree.leaves(before.opt_state) if x.ndim > 1]
    assert set(moments) <= set(chosen) and len(moments) <= 2 * len(chosen)
    with pytest.raises(ValueError, match=r"no parameter is at 'groups.1' \(there are: .*groups.0"):
        loop.make_step(dataclasses.replace(config, optimizer=Optimizer(trainable=("groups.1",))))
    with pytest.raises(ValueError, match=r"trainable must be a tuple \(text, \.\.\.\), got 'embed'"):
        Optimizer(trainable="embed")


def test_sampling_filters():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))

    def drawn(**settings):
        keys = jax.random.split(jax.random.key(0), 200)
        tokens = jax.vmap(lambda key: sample(logits, key, Sampling(**settings)))(keys)
        return set(np.asarray(tokens).ravel().tolist())

    assert drawn(temperature=0) == {0}
    assert drawn(temperature=1.0, top_p=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_p=1.0, top_k=2) == {0, 1}
    assert drawn(temperature=1.0, top_p=0.79) == {0, 1}
    assert drawn(temperature=1.0, top_p=0.81) == {0, 1, 2}
    assert drawn(temperature=1.0, top_p=0.01) == {0}


def test_generation_is_that_of_the_parallel_model(setup, tiny_config):
    """Greedy tokens, drawn one by one with carried state, are the parallel pass' own choices."""
    _, batch, _ = setup
    model = tiny_config.model
    params = lm.init(jax.random.key(0), model)
    prompt = batch["tokens"][:2, :11]
    drawn = generate(params, model, prompt, jax.random.key(0), Sampling(max_tokens=20, temperature=0))
    whole = np.concatenate([prompt, drawn], axis=1)
    logits, _ = lm.apply(params, model, whole)
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, 10:-1], drawn)
