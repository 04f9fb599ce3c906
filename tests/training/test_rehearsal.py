"""Rehearsal: reading compiled programs, reports, executables that train, remedies; the TPU compiler where it is installed."""

import copy
import dataclasses
import importlib.util
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from training_runs import TINY, losses

from deltajax import rehearse
from deltajax.errors import RunError
from deltajax.training import hlo, loop, rehearsal
from deltajax.training.step import COMPILER_OPTIONS

PROGRAM = """
HloModule jit_f

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %inner = f32[4,8]{1,0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = f32[4,8]{1,0} fusion(%x), calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"100"}
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%fusion.1), channel_id=1, dimensions={0}
}

%condition (arg: (s32[], f32[4,8])) -> pred[] {
  %arg = (s32[], f32[4,8]) parameter(0)
  %limit = s32[] constant(24)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %while.1 = (s32[], f32[4,8]) while(%a), condition=%condition, body=%body
  %start = ((f32[4,8]{1,0}), f32[16,8]{1,0}) all-gather-start(%a), channel_id=2, dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%start)
  %reduced = (f32[], f32[3]{0}) all-reduce(%a, %a), channel_id=3, to_apply=%add, backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_and_collectives_are_counted():
    """A loop's body counts as often as its condition allows, a fusion once as a whole, a started collective once."""
    collectives, costs = rehearsal.summarise(hlo.ops(PROGRAM))
    assert collectives == {"all-gather": (25, 24 * 8 * 8 * 2 + 16 * 8 * 4), "all-reduce": (1, 4 + 12)}
    assert costs == {"jit(f)/mul": 2400, "(all-reduce of the compiler)": 7}
    started, all_bytes = 16 * 8 * 4, sum(size for _, size in collectives.values())
    assert rehearsal.in_background(hlo.ops(PROGRAM)) == pytest.approx(started / all_bytes)
    renamed = PROGRAM.replace("%body", "%async_collective_fusion.1")  # all that is in a computation of this name
    assert rehearsal.in_background(hlo.ops(renamed)) == pytest.approx((all_bytes - 16) / all_bytes)


def test_what_sparse_cores_do_is_in_the_background():
    """A TPU's SparseCores gather while its TensorCores compute: their cycles are not the step's."""
    offloaded = PROGRAM.replace(
        "%all-gather.1 = bf16[8,8]{1,0} all-gather(%fusion.1), channel_id=1, dimensions={0}\n}",
        '%begun = ((), ()) custom-call-start(), async_execution_thread="sparsecore", called_computations={%called.1}\n}\n\n'
        "%called.1 (p: f32[4,8]) -> bf16[8,8] {\n"
        "  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=1, "
        'backend_config={"estimated_cycles":"5000"}\n}, execution_thread="sparsecore"',
    )
    plain, found = hlo.ops(PROGRAM), hlo.ops(offloaded)
    assert rehearsal.summarise(found) == rehearsal.summarise(plain)
    gathered = [op for op in found if op.name == "all-gather.1"]
    assert [(op.times, op.bytes, op.background) for op in gathered] == [(24, 128, True)]


def test_options_of_the_compiler_are_for_devices_that_exist():
    """A misspelt kind of device would match none, and its collectives would hold up the step."""
    assert set(COMPILER_OPTIONS) - {"gpu"} == set(rehearsal.CHIPS) - {"TPU v5 lite"}


def test_text_of_a_real_program():
    """A scan of 5 rounds with a product in it: the compiler's own text is understood."""
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, length=5)[0])
    found = hlo.ops(compiled.lower(jnp.ones((64, 64))).compile().as_text())
    assert {op.times for op in found if "sin" in op.source or op.kind == "dot"} == {5}


def test_report_executable_and_run(finished, tmp_path, run_train):
    """The rehearsed step, saved and loaded by the trainer, does what the trainer's own does; not for another config."""
    file = tmp_path / "step.bin"

    def command(
        module, *arguments
    ):  # as users do: XLA's CPU need not find a program again in the process that saved it
        line = [sys.executable, "-m", f"deltajax.{module}", f"--config={TINY}", *arguments]
        done = subprocess.run(
            line, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = command("rehearse", f"--save={file}")  # the compilation cache knows the program by `finished`
    assert "devices  1 x cpu; mesh data=1, fsdp=1, sequence=1, tensor=1" in out
    assert "model    30,644 parameters; 256 tokens a step" in out
    assert "travels" not in out
    command("train", f"--workdir={tmp_path / 'run'}", f"--executable={file}")
    assert losses(tmp_path / "run") == losses(finished)
    code, _, err = run_train(tmp_path / "other", f"--executable={file}", "--config.seed=5")
    assert (code, err.count("\n")) == (2, 1)
    assert "made for another config: seed: 0 -> 5" in err
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()) | {"devices": "4 x TPU v5 lite"}))
    code, _, err = run_train(tmp_path / "other", f"--executable={file}")
    assert (code, err) == (2, f"error: --executable={file}: made for 4 x TPU v5 lite, here are 1 x cpu\n")
    file.write_bytes(b"something else")
    code, _, err = run_train(tmp_path / "other", f"--executable={file}")
    assert (code, err) == (2, f"error: --executable={file}: not a file that deltajax.rehearse --save wrote\n")


def test_remedies(tiny_config):
    """What does not fit is told which keys to change: only those that can help here."""
    found = rehearsal.remedies(tiny_config, loop.make_step(tiny_config))
    assert [text.split()[0] for text in found] == [
        "config.model.remat",
        "config.grad_accumulation",
        "config.mesh.tensor",
    ]
    full = dataclasses.replace(
        tiny_config, model=dataclasses.replace(tiny_config.model, remat="full"), grad_accumulation=8
    )
    found = rehearsal.remedies(full, loop.make_step(full))
    assert [text.split()[0] for text in found] == ["config.mesh.sequence", "config.mesh.tensor"]


def test_what_does_not_fit_is_told_what_to_change(tiny_config, monkeypatch):
    """XLA's refusal (its own words, as libtpu 0.0.52 gives them) becomes one line with keys of the config."""

    class TooLarge:
        def trace(self, *_):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (400.00G) exceeds available HBM (15.75G). HLO module: jit_traced.\nSee elsewhere."
            )

    step = copy.copy(loop.make_step(tiny_config))
    step.train = TooLarge()
    monkeypatch.setattr(loop, "make_step", lambda *_: step)
    with pytest.raises(RunError) as raised:
        rehearsal.rehearse(tiny_config)
    message = str(raised.value)
    assert message.startswith("does not fit: E1000") and "\n" not in message
    assert "(400.00G) exceeds available HBM (15.75G)" in message
    assert "Change config.model.remat to full" in message


@pytest.mark.tpu_compile
def test_two_slices_of_a_pod():
    """Data over two slices, weights and tokens over each, the kernels in between: the TPU compiler takes the train step."""
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2, "data.seq_len": 512, "optimizer.name": "adamw"} | {
        "model.pattern": "delta",
        "model.d_model": 1024,  # the compiler lets what is smaller travel by itself
    }
    flags = ["--topology=v5e:2x2", "--slices=2", *(f"--config.{key}={value}" for key, value in changes.items())]
    done = subprocess.run(
        [sys.executable, "-m", "deltajax.rehearse", f"--config={TINY}", *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "devices  8 x TPU v5 lite; mesh data=2, fsdp=2, sequence=2, tensor=1\n" in done.stdout
    assert re.search(r"memory   0\.\d\d of 15\.75 GiB a device", done.stdout)
    for kind in ("all-gather", "reduce-scatter", "collective-permute"):  # weights, their gradients, states
        assert f"travels  {kind}: " in done.stdout
    assert int(re.search(r"beside   (\d+)% of these bytes travel while something is computed", done.stdout)[1]) > 10
    # The delta rule is the platform's best by itself: Pallas, whose cycles the compiler does not say.
    assert re.search(
        r"time     [\d.]+ M cycles, .*MFU [\d.]+% .*, without \d+ executions of Pallas kernels", done.stdout
    )

    wrong = [sys.executable, "-m", "deltajax.rehearse", f"--config={TINY}", "--topology=v9:2x2"]
    done = subprocess.run(wrong, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology=v9:2x2: must be one that libtpu knows, e.g. v5e:16x16")
    assert done.stderr.count("\n") == 1


def test_bad_input_is_one_line(capfd):
    assert rehearse.main(["rehearse"]) == 2
    assert "--config: an experiment file is missing" in capfd.readouterr().err
    for topology in ("v5e:3x", "v5e:0x0", "16x16"):
        assert rehearse.main(["rehearse", f"--config={TINY}", f"--topology={topology}"]) == 2
        err = capfd.readouterr().err
        assert err == f"error: --topology={topology}: must be a generation and a shape such as {rehearsal.EXAMPLES}\n"
    if importlib.util.find_spec("libtpu") is None:
        assert rehearse.main(["rehearse", f"--config={TINY}", "--topology=v5e:2x2"]) == 1
        assert capfd.readouterr().err == "error: --topology=v5e:2x2 needs the TPU compiler: pip install libtpu\n"
    assert rehearse.main(["rehearse", f"--config={TINY}", "--slices=2"]) == 2
    assert "--slices=2: --topology, the slice, is missing" in capfd.readouterr().err
    assert rehearse.main(["rehearse", f"--config={TINY}", "--save=/nowhere/step.bin"]) == 2
    assert "--save=/nowhere/step.bin: the folder does not exist" in capfd.readouterr().err
