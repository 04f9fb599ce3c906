"""Registers, spills, shared memory and instructions of the delta product's GPU kernels on Hopper; needs no GPU.

    pip install --no-deps --target=build/cuda jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 \
        nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvdisasm==13.5.37
    python -m benchmarks.gpu_machine_code [--toolchain=build/cuda] [--csv=benchmarks/results/gpu_machine_code.csv]

The kernels of a gradient (B1 T8192, bfloat16) go through Mosaic GPU, LLVM and ptxas to code for sm_90a. The compiler asks a
driver for nothing but the device's compute capability: a stub, built with `cc`, answers. "issue cycles" are the stall
counts that ptxas wrote into the instructions, added up: over one pass through the code (its loops once), for the scans over
one block of rows (the loop of the warpgroup that goes from state to state). It is the least that the instructions of a warp
take to issue: no wait for memory, barriers or tensor cores is in it; "serial" of them while no wgmma of the warp is under way.
"barriers" and "wgmmas" are those on the same way. These are facts about code, not times.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import table
from deltajax import children
from deltajax.ops import delta_product

H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
SHAPES = (  # R, H, K = V, gate
    (1, 16, 128, "scalar"), (4, 16, 128, "none"), (1, 32, 64, "scalar"), (1, 8, 256, "scalar"), (1, 16, 128, "channel"),
    (1, 8, 256, "channel"), (4, 8, 256, "none"), (2, 16, 128, "channel"), (4, 8, 256, "channel"),
)  # fmt: skip
SHARED_BYTES, REGISTERS = 227 * 1024, 65536  # of an SM

_TOOLCHAIN = flags.DEFINE_string("toolchain", "build/cuda", "the --target of the pip command")

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "none"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
"""

COMPILE = """
import ctypes, sys
module = open(sys.argv[2], "rb").read()
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
compile(module, len(module))
"""


def lower(f, *arguments, device=H100):
    """`f` lowered for a GPU that is not there."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))


def gradient(steps: int, heads: int, dim: int, gate: str, length: int = 8192):
    """The gradient of one call, lowered."""
    gates: dict[str, list[tuple[int, ...]]] = {"none": [], "scalar": [(heads,)], "channel": [(heads, dim)]}
    sizes = [(heads, dim), (steps, heads, dim), (steps, heads, dim), (steps, heads), *gates[gate]]
    types = ["bfloat16"] * 4 + ["float32"] * len(gates[gate])
    arguments = [jax.ShapeDtypeStruct((1, length, *size), kind) for size, kind in zip(sizes, types, strict=True)]

    def loss(*arguments):
        o, state = delta_product(*arguments, implementation="pallas_gpu")
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state)

    return lower(jax.grad(loss, argnums=tuple(range(len(arguments)))), *arguments)


def modules(lowered) -> dict[str, bytes]:
    """The Mosaic GPU kernels of a lowered function, by name."""
    found = {}

    def visit(operation):
        for inner in (inner for region in operation.regions for block in region for inner in block):
            if inner.name == "stablehlo.custom_call" and "mosaic_gpu" in str(inner.attributes["call_target_name"]):
                code = inner.attributes["mhlo.backend_config"]["module"].value_bytes
                (name,) = set(re.findall(rb"delta_product_(\w+)_mosaic_gpu", code))
                found[name.decode()] = code
            visit(inner)

    visit(lowered.compiler_ir().operation)
    return found


def machine_code(module: bytes, toolchain: Path) -> dict[str, str]:
    """What ptxas ("ptxas") and nvdisasm ("sass_ctrl") say of one kernel.

    Raises:
      RuntimeError: it did not compile; the message ends with the compiler's.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, toolchain = Path(name), toolchain.resolve()
        (folder / "module").write_bytes(module)
        (folder / "driver.c").write_text(DRIVER)
        driver = ["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "driver.c"]
        subprocess.run(**children.tied(driver), check=True)
        dump = folder / "dump"
        dump.mkdir()
        settings = {
            "LD_LIBRARY_PATH": name,
            "MOSAIC_GPU_CUDA_ROOT": str(toolchain / "nvidia/cu13"),
            "MOSAIC_GPU_RUNTIME_LIB_PATH": str(toolchain / "jax_cuda13_plugin/libmosaic_gpu_runtime.so"),
            "MOSAIC_GPU_NVSHMEM_BC_PATH": "",
            "MOSAIC_GPU_NVSHMEM_SO_PATH": "",
            "MOSAIC_GPU_DUMP_TO": str(dump),
        }
        plugin = toolchain / "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
        # It dies where it would load the code, for want of a driver. What counts is whether there is code.
        command = [sys.executable, "-c", COMPILE, str(plugin), str(folder / "module")]
        tied = children.tied(command)
        done = subprocess.run(**tied, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        files = {kind: "".join(file.read_text() for file in dump.glob(f"*.{kind}")) for kind in ("ptxas", "sass_ctrl")}
        if not all(files.values()):
            raise RuntimeError(f"no machine code: {done.stderr.strip()[-500:]}")
        return files


def facts(files: dict[str, str], shared: int, of_loop: bool) -> dict[str, int]:
    """Figures of one kernel, from `machine_code` and its bytes of shared memory; issue cycles of its longest loop or of all."""
    (registers,) = re.findall(r"Used (\d+) registers", files["ptxas"])
    spills = max(map(int, re.findall(r"(\d+) bytes spill stores", files["ptxas"])))
    lines = files["sass_ctrl"].splitlines()
    labels = {line.split(":")[0].strip(): n for n, line in enumerate(lines) if line.startswith(".L")}
    jumps = ((re.search(r"@!?U?P\d BRA `\((\.L\w+)\)", line), n) for n, line in enumerate(lines))
    loops = [(labels[jump[1]], n) for jump, n in jumps if jump and labels[jump[1]] < n]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0]) if of_loop else (0, len(lines))
    threads = 256 if of_loop else 128  # a scan has two warpgroups
    way = "\n".join(lines[first : last + 1])
    stalls = r":(\d\d) +/\*[0-9a-f]{4,}\*/"
    under_way = "".join(re.findall(r"WARPGROUP\.ARRIVE.*?WARPGROUP\.DEPBAR", way, re.DOTALL))
    issue, hidden = (sum(map(int, re.findall(stalls, text))) for text in (way, under_way))
    return {
        "registers": int(registers),
        "spilled_bytes": spills,
        "shared_bytes": shared,
        "ctas_per_sm": min(SHARED_BYTES // (shared + 1024), REGISTERS // (threads * int(registers))),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", files["sass_ctrl"])),
        "wgmmas": len(re.findall("HGMMA", way)),
        "barriers": len(re.findall(r"BAR\.SYNC", way)),
        "issue_cycles": issue,
        "serial_cycles": issue - hidden,
    }


def measure(steps: int, heads: int, dim: int, gate: str, toolchain: Path) -> list[dict[str, object]]:
    """A row for each kernel of a gradient."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["MOSAIC_GPU_DUMP_TO"] = name  # lowering writes there what shared memory it takes
        found = modules(gradient(steps, heads, dim, gate))
        del os.environ["MOSAIC_GPU_DUMP_TO"]
        shared = {}
        for file in Path(name).glob("*.resources.txt"):
            kernel = re.sub(r"delta_product_(\w+)_\d+", r"\1", file.name.split(".")[0])
            (shared[kernel],) = map(int, re.findall(r"smem_scratch_bytes=(\d+)", file.read_text()))
    about = {"steps": steps, "dim": dim, "gate": gate}
    return [
        {"kernel": kernel, **about, **facts(machine_code(module, toolchain), shared[kernel], "scan" in kernel)}
        for kernel, module in found.items()
    ]


def main(_: list[str]) -> None:
    """Compile, print and write the table."""
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        for row in measure(*shape, Path(_TOOLCHAIN.value)):
            if not rows:
                print(" | ".join(row))
            print(" | ".join(map(str, row.values())), flush=True)
            rows.append(row)
    table.write(rows, f"no GPU: jax {jax.__version__}, nvcc 13.5.37, for sm_90a")


if __name__ == "__main__":
    app.run(main)
