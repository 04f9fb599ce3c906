"""The GPU kernels: numbers and races in Mosaic GPU's interpreter; lowered for an H100 that is not there."""

import csv
import dataclasses
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import NAMES, draw
from jax.sharding import PartitionSpec as P

from benchmarks import gpu_machine_code, worker
from deltajax.ops import delta_product
from pallas_kernels import gpu, gpu_channel_masks
from pallas_kernels.gpu_common import ROWS

ROOT = Path(worker.__file__).parents[1]


@pytest.fixture(scope="module")
def interpreter():
    """Asked for a case of `interpret_gpu`, it raises what is wrong."""
    paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    process = worker.Worker(
        sys.executable, "interpret_gpu", {"JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": paths}
    )
    yield process
    process.stop()


def compare(
    interpreter, blocks=None, segment=None, scale=None, gates=None, size=1.0, zeros=False, gradients=2e-2, **case
):
    settings = {"blocks": blocks, "segment": segment, "scale": scale, "gates": gates, "size": size}
    interpreter.ask(settings | {"zeros": zeros, "gradients": gradients} | case, 900)


def case(b, t, r, h, hv, key_dim, value_dim, gate, beta=None, cosine=0.0):
    names = ("b", "t", "r", "h", "hv", "key_dim", "value_dim", "gate", "beta", "cosine")
    return dict(zip(names, (b, t, r, h, hv, key_dim, value_dim, gate, beta, cosine), strict=True))


@pytest.mark.parametrize(
    ("case", "segment"),
    [
        (case(2, 70, 1, 1, 1, 200, 64, "scalar"), None),
        (case(1, 40, 3, 2, 4, 40, 24, "scalar"), 7),
        (case(1, 330, 1, 1, 1, 64, 128, "strong", 2.0, 0.95), None),
        (case(1, 30, 4, 1, 1, 128, 128, None, 2.0, 0.5), None),
        (case(1, 40, 3, 1, 2, 80, 24, "channel", 2.0, 0.5), 7),
        (case(1, 70, 1, 1, 1, 200, 24, "channel"), None),
        (case(2, 70, 2, 2, 4, 64, 64, "channel"), None),
    ],
)
def test_against_the_reference(interpreter, case, segment):
    compare(interpreter, **case, segment=segment, scale=0.3 if segment else None)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_all_gates_nearly_closed(interpreter, gate):
    """Their gradients of 1e-13 come of nothing larger that cancels; float16 would make nothing of exp(-30)."""
    compare(interpreter, **case(1, 70, 2, 1, 1, 64, 64, gate, 2.0, 0.95), gates=-30.0)


@pytest.mark.parametrize(("steps", "gate"), [(2, "scalar"), (2, "channel"), (1, "channel")])
def test_weak_gates_and_zero_betas(interpreter, steps, gate):
    """What the first token of a chunk leaves still matters at its end, in the gates' gradients too."""
    compare(interpreter, **case(1, 70, steps, 1, 1, 64, 64, gate, None, 0.5), gates=-0.02, zeros=True)


def test_queries_and_keys_past_float16(interpreter):
    compare(interpreter, **case(1, 40, 1, 1, 1, 64, 64, "channel"), size=1e6)


def test_gradients_of_like_keys(interpreter):
    """A difference of large numbers in that of beta erred by 1.3e-2."""
    compare(interpreter, **case(1, 200, 2, 1, 1, 64, 64, None, 2.0, 0.95), gradients=1e-2)


def test_inverses_of_like_keys(interpreter):
    """With beta = 2 nothing in the state decays, so their errors stay; after one Newton step they are 2e-3."""
    assert interpreter.ask({"cosine": 0.95, "beta": 2.0}, 900)["off_by"] < 5e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_masks_of_channel_gates(steps):
    """Every pair of tokens is parted at one level, and what is masked there sums up to the gates between them."""
    n = ROWS
    gates, pairs = (
        np.asarray(x, float).reshape(steps, gpu_channel_masks.MASKS, -1, n, n)
        for x in gpu_channel_masks.masks(steps, "float32")
    )
    g = -np.random.default_rng(0).exponential(size=n)
    until = np.cumsum(g)
    for step in range(steps):
        tokens = (step * n + np.arange(n)) // steps
        before = tokens[0] if step * n % steps else tokens[0] - 1  # the last token that began in an earlier block
        start = until[tokens] - (until[before] if before >= 0 else 0.0)
        np.testing.assert_allclose(gates[step, 0, 0] @ g, start, atol=1e-12)
        np.testing.assert_allclose(gates[step, 0, -1] @ g, until)
        np.testing.assert_allclose(gates[step, 1, 0] @ g, until[tokens[-1]] - until[tokens], atol=1e-12)
        for kind, down in ((0, tokens), (-1, np.arange(n))):
            np.testing.assert_array_equal(pairs[step, 0, kind], down[:, None] == tokens)
            np.testing.assert_array_equal(pairs[step, :, kind].sum(0), 1.0)
            for level in range(gpu_channel_masks.TO_MEETING, gpu_channel_masks.MASKS):
                later = pairs[step, level, kind] * (down[:, None] > tokens)
                found = (gates[step, level, kind] @ g)[:, None] + gates[step, level, 0] @ g
                np.testing.assert_allclose(later * found, later * (until[down][:, None] - until[tokens]), atol=1e-12)


@pytest.mark.parametrize("wide", [True, False])
def test_all_blocks_that_may_be_asked_for(interpreter, wide):
    """The widest columns and most stages, which `for_shape` chooses for more heads than the interpreter has time for."""
    blocks = gpu.Blocks(columns=64, stages=4, late_stages=1, places=2) if wide else gpu.Blocks(16, 2, 2, places=1)
    compare(interpreter, **case(1, 100, 4, 1, 1, 64, 64, "scalar"), blocks=dataclasses.asdict(blocks))


def shapes(length, steps, heads, value_heads, key_dim, value_dim, gate, dtype="bfloat16"):
    sizes = [(heads, key_dim), (steps, heads, key_dim), (steps, value_heads, value_dim), (steps, value_heads)]
    arguments = [jax.ShapeDtypeStruct((1, length, *size), dtype) for size in sizes]
    per_gate = {"channel": (value_heads, key_dim), "scalar": (value_heads,)}
    if gate:
        arguments.append(jax.ShapeDtypeStruct((1, length, *per_gate[gate]), "float32"))
    return arguments


def lower(arguments, vmapped=False, implementation="pallas_gpu", device=gpu_machine_code.H100):
    """The gradient's program for CUDA, as text."""

    def loss(*arguments):
        o, state = delta_product(*arguments, implementation=implementation)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state)

    gradient = jax.value_and_grad(loss, argnums=range(len(arguments)))
    if vmapped:
        gradient = jax.vmap(gradient)
        arguments = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in arguments]
    return gpu_machine_code.lower(gradient, *arguments, device=device).as_text()


@pytest.mark.parametrize(
    ("arguments", "vmapped"),
    [
        (shapes(8192, 1, 16, 16, 128, 128, "scalar"), False),
        (shapes(100, 3, 66, 132, 64, 40, None), True),
        (shapes(2048, 2, 8, 8, 256, 256, "scalar"), False),
        (shapes(300, 2, 2, 4, 256, 256, "channel"), False),
    ],
)
def test_lowers_for_an_h100(arguments, vmapped):
    channels = len(arguments) == 5 and arguments[4].ndim == 4
    gated = {f"channel_{x}" for x in ("scores", "inverses", "outputs_backward", "rows_backward", "scores_backward")}
    plain = {"inverses_and_scores", "outputs_backward", "rows_backward"}
    expected = {"scan", "backward_scan"} | (gated if channels else plain)
    found = set(re.findall(r"delta_product_(\w+)", lower(arguments, vmapped)))
    assert expected <= found, found


@pytest.mark.parametrize(
    ("arguments", "sequence_axis", "moves"),
    [
        (shapes(300, 2, 4, 8, 64, 128, "scalar"), None, 0),
        (shapes(300, 1, 4, 8, 128, 64, "channel"), None, 0),
        (shapes(300, 3, 4, 4, 64, 64, None), None, 0),
        (shapes(300, 2, 4, 8, 64, 128, "scalar"), "data", 4),
    ],
)
def test_inside_shard_map(arguments, sequence_axis, moves):
    """Batch or tokens, and heads, over four H100s: each does its part, and only the gradient of what all share is summed.

    Where tokens are spread, what the first half leaves behind moves on and its gradient moves back.
    """
    mesh = jax.sharding.AbstractMesh(
        (2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, abstract_device=gpu_machine_code.H100
    )
    tokens = P(None, "data") if sequence_axis else P("data", None)
    by_token, rows = P(*tokens, "tensor"), P(*tokens, None, "tensor")
    specs = (by_token, rows, rows, rows, by_token)[: len(arguments)]
    batches = [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in arguments]

    def run(scale, *arguments):
        return delta_product(*arguments, scale=scale, implementation="pallas_gpu", sequence_axis=sequence_axis)[0]

    def loss(*arguments):
        return jnp.sum(jax.shard_map(run, mesh=mesh, in_specs=(P(), *specs), out_specs=by_token)(*arguments) ** 2)

    gradient = jax.grad(loss, argnums=range(1 + len(arguments)))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradient).trace(jax.ShapeDtypeStruct((), "float32"), *batches)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {"scan", "backward_scan"} <= set(re.findall(r"delta_product_(\w+)", text))
    kinds = "all_reduce|all_gather|all_to_all|reduce_scatter|collective_permute|collective_broadcast"
    collectives = re.findall(rf"stablehlo\.({kinds})", text)
    assert sorted(collectives) == ["all_reduce", *["collective_permute"] * moves], collectives  # of scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (shapes(9, 1, 1, 1, 64, 64, None, "float32"), "bfloat16, got float32"),
        (shapes(9, 1, 1, 1, 64, 300, None), "at most 256, got 64 and 300"),
    ],
)
def test_what_has_no_kernel_says_so(arguments, message):
    with pytest.raises(NotImplementedError, match=f"pallas_gpu: .*{message}"):
        lower(arguments)


def test_elsewhere_the_chunked_form_serves():
    a = draw(7, 1, 9, 1, 1, 1, 8, 8, dtype="bfloat16")
    tokens = [a[name] for name in NAMES[:4]]
    with pytest.raises(NotImplementedError, match=r"pallas_gpu: the kernels are for Hopper GPUs .* 'cpu'"):
        delta_product(*tokens, implementation="pallas_gpu")
    either, chunked = (delta_product(*tokens, implementation=x) for x in (("pallas_gpu", "chunked"), "chunked"))
    np.testing.assert_array_equal(either[0], chunked[0])


def test_on_an_older_gpu_the_chunked_form_serves():
    arguments = shapes(9, 1, 1, 1, 64, 64, None)
    ampere = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    with pytest.raises(NotImplementedError, match=r"for Hopper GPUs \(wgmma\), and this is 'NVIDIA A100-SXM4-80GB'"):
        lower(arguments, device=ampere)
    assert "mosaic_gpu" not in lower(arguments, implementation=("pallas_gpu", "chunked"), device=ampere)
    assert "mosaic_gpu" in lower(arguments, implementation=("pallas_gpu", "chunked"))


def test_blocks_check_their_ranges():
    few, many = (gpu.Blocks.for_shape(4, heads, 64, 64, channels=False) for heads in (16, 32))
    assert few == gpu.Blocks(columns=32, stages=3, late_stages=3, places=2)  # 128 CTAs
    assert many == gpu.Blocks(columns=64, stages=3, late_stages=3, places=2)  # 128, not 256 in two turns
    with pytest.raises(ValueError, match=r"stages must be one of \(2, 3, 4\), got 1"):
        dataclasses.replace(few, stages=1)
    with pytest.raises(ValueError, match="late_stages must be 1 or stages = 3, got 2"):
        dataclasses.replace(few, late_stages=2)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_machine_code_is_no_worse_than_the_committed_table(gate):
    """Through LLVM and ptxas; the toolchain, 270 MB, is not in the default install: the command is in `gpu_machine_code`."""
    toolchain = Path(gpu_machine_code.__file__).parents[1] / "build" / "cuda"
    if not toolchain.exists():
        pytest.skip(f"no {toolchain}")
    key = ("1", "128", gate)
    with Path(gpu_machine_code.__file__).with_name("results").joinpath("gpu_machine_code.csv").open() as file:
        committed = {
            row["kernel"]: row for row in csv.DictReader(file) if (row["steps"], row["dim"], row["gate"]) == key
        }
    for row in gpu_machine_code.measure(1, 16, 128, gate, toolchain):
        before = committed.pop(row["kernel"])
        for field in ("spilled_bytes", "shared_bytes", "serial_cycles", "issue_cycles", "barriers"):
            assert row[field] <= 1.05 * int(before[field]), (row, before)
    assert not committed
