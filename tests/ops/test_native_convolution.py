"""The streaming kernel's own promises: any vector width, busy threads, no memory. Values: test_native_stream.py."""

import platform
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_processes import compiler, run

from pallas_kernels import delta_convolution, native, processors

pytestmark = pytest.mark.skipif(not native.compiler(), reason="no C++ compiler")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of x86")
@pytest.mark.parametrize(("option", "width"), [("-mno-avx512f -O1", 32), ("-mno-avx -O1", 16)])
def test_narrower_vectors(option, width, tmp_path):
    """Strips are then shorter and blocks of channels narrower; weights are packed for them."""
    code = f"""
import test_native_stream
from pallas_kernels import delta_convolution
assert delta_convolution.register() <= {width} // 4
test_native_stream.test_equals_dense_inference("odd")
test_native_stream.test_rounding()
"""
    run(code, CXX=compiler(tmp_path, option), DELTAJAX_CACHE=str(tmp_path / "cache"))


def test_teams(tmp_path):
    """On a pool whose queues are full, which runs what is scheduled at once, a team waited for itself."""
    kernels, program = Path(native.__file__).parent, tmp_path / "team"
    include = [f"-I{kernels}", f"-I{jax.ffi.include_dir()}"]
    source = Path(__file__).with_name("team.cc")
    subprocess.run([*native.compiler(), "-std=c++17", "-O1", *include, source, "-pthread", "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, timeout=300).stdout == "done\n"


def test_no_memory():
    """Of what the kernel takes beside the memory that it is given: one error, not the end of the process."""
    node = [delta_convolution.KINDS.index("input"), 1, 1, 1, 0, 0, 0, 1, -1, -1, 0]
    step = jax.jit(delta_convolution.step, static_argnums=6)

    def call(sources, memory=10**5, shape=(1, 1, 1)):
        program = jnp.asarray([2, *node, sources], jnp.int32)
        frame, memory, parameters = jnp.ones((1, 1, 1)), jnp.zeros(memory, jnp.uint8), jnp.zeros(16)
        maps, *_ = step([jnp.zeros(shape)], memory, frame, jnp.zeros((), bool), program, parameters, 1)
        return np.asarray(maps[0])

    delta_convolution.register()
    assert call(0) == 1
    for arguments, message in (
        ((-1,), "RESOURCE_EXHAUSTED: delta inference has no memory"),
        ((0, 10), "bytes of memory are needed"),
        ((0, 10**5, (2, 1, 1)), "map 0 has another size than its node"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            call(*arguments)
    assert call(0) == 1


def test_all_memory_is_the_states():
    """A frame is computed when the process may take no more; the kernel took its own at the first frame of a thread."""
    code = """
import resource
import jax, numpy as np
import test_native_stream
from deltajax.delta_activations import graph, stream
from pallas_kernels import native
nodes = (graph.Node("input", "input", 3), graph.Node("big", "conv", 1, (("input", graph.Window()),), quantized=False))
params = {"input": {"step": np.float32(1)}, "big": {"kernel": np.ones((1, 1, 3, 1), np.float32), "bias": np.zeros(1, np.float32)}}
head = {"weight": np.ones((1, 2), np.float32), "bias": np.zeros(2, np.float32)}
def runner(size):
    it = stream.Stream(graph.Graph(nodes), {"maps": params, "head": head}, (size, size, 3))
    assert it.implementation == "native"
    return it
small, large = runner(16), runner(4096)
program = large._step.lower(large.init_state(), large._given, np.zeros(large.frame_shape, np.float32)).compile()
small.step(small.init_state(), np.ones((16, 16, 3)))
state, frame = large.init_state(), jax.block_until_ready(jax.numpy.ones(large.frame_shape))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10_000_000, -1))  # lists and marks of 16 million pixels are 100 MB
logits, state, counts = jax.block_until_ready(program(state, large._given, frame))
assert np.allclose(logits, 3) and (np.asarray(counts) == -1).all()
"""
    if platform.system() != "Linux":
        pytest.skip("limits of Linux")
    run(code)


def test_processors(tmp_path):
    """A container's limit on time, of both versions of control groups and of groups around the process' own."""
    bound = processors.count(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    group, v1 = tmp_path / "sys/fs/cgroup/a/b", tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    group.mkdir(parents=True)
    v1.mkdir()
    (tmp_path / "proc/self/cgroup").write_text("3:cpu,cpuacct:/of/the/host\n2:memory:/\n0::/a/b\n")
    for path, text, expected in (
        (group / "cpu.max", "max 100000\n", bound),
        (v1 / "cpu.cfs_period_us", "100000\n", bound),
        (v1 / "cpu.cfs_quota_us", "-1\n", bound),
        (group / "cpu.max", "10000000 100000\n", min(bound, 100)),
        (group.parent / "cpu.max", "50000 100000\n", 1),
        (group.parent / "cpu.max", "nonsense\n", bound),
        (v1 / "cpu.cfs_quota_us", "20000\n", 1),
    ):
        path.write_text(text)
        assert processors.count(tmp_path) == expected
