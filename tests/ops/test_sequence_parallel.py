"""Tokens spread over devices: the numbers of one device, and communication that does not depend on their number."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from spread_tokens import BATCH, DIM

from deltajax.ops import delta_product

# devices, implementation, R, H, HV, gate, beta, cosine, whether documents are packed
CASES = {
    "no gate": (8, "chunked", 1, 1, 1, None, 2.0, 0.95, False),
    "scalar gate": (8, "chunked", 4, 1, 2, "scalar", 2.0, 0.5, True),
    "channel gate, three devices": (3, "chunked", 3, 2, 2, "channel", None, 0.0, True),
    "kernels": (8, "pallas_tpu", 2, 1, 2, "scalar", 2.0, 0.5, True),
    "one device": (1, "chunked", 1, 1, 1, None, 2.0, 0.95, False),
}


@pytest.fixture(scope="module")
def results():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    script = Path(__file__).with_name("spread_tokens.py")
    command = [sys.executable, str(script), json.dumps(list(CASES.values()))]
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(zip(["layers", *CASES], json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, results):
    """Against the recurrence in float64 on one device, with the bounds that one device is held to."""
    errors = results[case]["errors"]
    assert {"o", "state", "q", "k", "v", "beta", "initial_state"} <= errors.keys()
    for name, error in errors.items():
        assert error < (1e-5 if name in ("o", "state") else 1e-4), (name, error)


def test_layers(results):
    """Rotary embeddings and gates are float32; a wrong token would make a difference of order one."""
    assert len(results["layers"]) == 5
    for name, error in results["layers"].items():
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize("case", ["no gate", "channel gate, three devices"])
def test_only_transitions_and_states_travel(case, results):
    """Besides one id per row at a border, and the state that the caller asked for and gave."""
    devices, *_, heads, _, _, _, _ = CASES[case]
    permuted = sorted(shape for shape, kind in results[case]["collectives"] if kind == "collective-permute")
    rounds = math.ceil(math.log2(devices))
    state, pair = (f"f32[{BATCH},{heads},{DIM},{width}]" for width in (2 * DIM, 3 * DIM))
    forward_and_backward = 2 * ([state] * 2 + [pair] * (rounds - 1))
    assert permuted == sorted([*forward_and_backward, f"s64[{BATCH},1]"])
    others = [(shape, kind) for shape, kind in results[case]["collectives"] if kind != "collective-permute"]
    assert others == [(state, "all-reduce")] * 2


def test_every_reason_is_listed():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, beta = (np.ones(s, np.float32) for s in ((1, 4, 1, 2), (1, 4, 1, 1, 2), (1, 4, 1, 1, 2), (1, 4, 1, 1)))
    g = -np.ones((1, 4, 1, 2), np.float32)
    spec = jax.sharding.PartitionSpec(None, "x")

    def f(*x):
        return delta_product(*x, implementation="pallas_gpu", sequence_axis="x")[0]

    with pytest.raises(NotImplementedError, match="pallas_gpu: q, k and v must be bfloat16"):
        jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec)(q, k, v, beta, g)
