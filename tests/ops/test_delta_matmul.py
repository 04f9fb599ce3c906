"""The delta-skipping matrix product: numbers and races in interpret mode, what it skips; compiles for real TPUs."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place that tells of races
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import run_program

from pallas_kernels.delta_matmul import delta_matmul

BLOCK = (8, 16, 32)


@pytest.fixture(autouse=True)
def _interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not (interpret_pallas_call.races and interpret_pallas_call.races.races_found)


def draw(shape, density, dtype=np.float32, seed=0):
    """y, d, w; of d's blocks about `density` are not zero, its second row of blocks is all zero."""
    rng = np.random.default_rng(seed)
    rows, inner, columns = shape
    y, w = rng.standard_normal((rows, columns)).astype(np.float32), rng.standard_normal((inner, columns))
    d = np.zeros((rows, inner))
    worked, count = 0, 0
    for i in range(0, rows, BLOCK[0]):
        for k in range(0, inner, BLOCK[1]):
            count += 1
            if i != BLOCK[0] and rng.random() < density:
                d[i : i + BLOCK[0], k : k + BLOCK[1]][-1, 0] = rng.standard_normal()  # one change wakes a block
                worked += 1
    return jnp.asarray(y), jnp.asarray(d, dtype), jnp.asarray(w, dtype), worked / count


@pytest.mark.parametrize(
    ("shape", "density", "dtype"),
    [((20, 70, 40), 0.5, jnp.float32), ((16, 32, 64), 1.0, jnp.bfloat16), ((24, 48, 32), 0.0, jnp.float32)],
)
def test_numbers(shape, density, dtype):
    y, d, w, share = draw(shape, density, dtype)
    got, worked = delta_matmul(y, d, w, block=BLOCK)
    want = np.asarray(y, np.float64) + np.asarray(d, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(worked) == pytest.approx(share)


def test_blocks_without_change_are_not_multiplied():
    """Rows of w that only blocks without change would read are NaN, and NaN times zero is NaN."""
    y, d, w, _ = draw((16, 64, 32), 1.0)
    d = d.at[:8, 16:48].set(0)
    poisoned = w.at[16:48].set(jnp.nan)
    got, worked = delta_matmul(y, d, poisoned, block=BLOCK)
    np.testing.assert_allclose(got[:8], (y + d @ jnp.where(jnp.isnan(poisoned), 0, poisoned))[:8], atol=1e-5)
    np.testing.assert_array_equal(got[8:], y[8:])
    assert float(worked) == 2 / 8


def test_a_stream_of_deltas_sums_up_to_the_product():
    """Delta inference: after every frame the sum is what the whole activations give."""
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((32, 32)), jnp.float32)
    total, before = jnp.zeros((16, 32)), np.zeros((16, 32), np.float32)
    for t in range(4):
        o = before.copy()
        o[4 * t : 4 * t + 4, :8] = np.round(rng.standard_normal((4, 8)), 1)
        total, _ = delta_matmul(total, jnp.asarray(o - before), w, block=BLOCK)
        before = o
        np.testing.assert_allclose(total, o @ np.asarray(w), atol=1e-5)


def test_errors():
    y, d, w, _ = draw((16, 32, 32), 1.0)
    with pytest.raises(ValueError, match="must be"):
        delta_matmul(y, d.T, w)
    with pytest.raises(ValueError, match="y must be float32"):
        delta_matmul(y.astype(jnp.bfloat16), d, w)
    with pytest.raises(NotImplementedError, match="more than 32768"):
        delta_matmul(jnp.zeros((2048, 8)), jnp.zeros((2048, 4096)), jnp.zeros((4096, 8)), block=(8, 8, 8))


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.delta_matmul import delta_matmul
mesh = Mesh(np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices[:1]), ("x",))
for dtype in ("float32", "bfloat16"):
    shapes = ((1024, 512), "float32"), ((1024, 1152), dtype), ((1152, 512), dtype)
    arrays = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, PartitionSpec())) for s, t in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(delta_matmul).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    assert "delta_matmul" in compiled.as_text()
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_ahead_of_time(topology):
    """Through the real Mosaic and TPU compilers."""
    run_program(COMPILE, topology)
