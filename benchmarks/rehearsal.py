"""The paper's language models compiled for TPU pods: do they fit, and what XLA's own estimate says. Needs no TPU.

    pip install libtpu==0.0.52
    python -m benchmarks.rehearsal [--models=deltanet-340m,deltanet-1.3b] [--topologies=v5e:16x16,v6e:16x16] [--csv=FILE]

Each row is `python -m deltajax.rehearse --config=experiments/pod.py:model=...,batch_size=... --topology=...` with one sequence
of 2,048 tokens a chip, but with implementation "chunked", whose cycles the compiler says. tokens_per_second and mfu are upper
estimates: no waiting for other chips. A child process per row.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from benchmarks import table
from deltajax import children

EXPERIMENT = str(Path(__file__).parents[1] / "experiments" / "pod.py")
_MODELS = flags.DEFINE_list("models", ["deltanet-340m", "deltanet-1.3b"], "names of deltajax.models.named")
_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:16x16", "v6e:16x16", "v5p:8x8x8"], "TPU pod slices")

PROGRAM = """
import json, sys, time
from deltajax.training import overrides, rehearsal
from deltajax.training.config import load_config

devices = rehearsal.devices_of(sys.argv[2])
started = time.perf_counter()
config = load_config(sys.argv[1])
chunked = {f"model.mixers.{name}.implementation": "chunked" for name in config.model.mixers}
report, _ = rehearsal.rehearse(overrides.apply(config, chunked), devices)
print(json.dumps({
    "parameters": report.parameters,
    "mesh": " ".join(f"{axis}={size}" for axis, size in report.mesh.items()),
    "tokens_a_step": report.batch,
    "state_GiB": round(report.state / rehearsal.GIB, 3),
    "other_GiB": round(report.temporary / rehearsal.GIB, 3),
    "chip_GiB": round(rehearsal.CHIPS[report.kind].memory / rehearsal.GIB, 2),
    "collectives": " ".join(f"{kind}={size / 1e6:.0f}MB" for kind, (_, size) in sorted(report.collectives.items())),
    "in_background": round(report.background, 2),
    "Mcycles": round(report.cycles / 1e6, 1),
    "seconds": round(report.seconds, 4),
    "tokens_per_second": round(report.per_second),
    "mfu": round(report.mfu, 4),
    "compile_seconds": round(time.perf_counter() - started),
}))
"""


def rehearse(model: str, topology: str) -> dict[str, object]:
    """One row.

    Raises:
      RuntimeError: the step does not compile or does not fit.
    """
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    config = f"{EXPERIMENT}:model={model},batch_size={chips}"
    done = subprocess.run(
        **children.tied([sys.executable, "-c", PROGRAM, config, topology]), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{model} on {topology}: {done.stderr.strip().splitlines()[-1]}")
    return {"model": model, "topology": topology, **json.loads(done.stdout.splitlines()[-1])}


def main(_: list[str]) -> None:
    """Compile, print and write the table after every row."""
    rows = []
    for model in _MODELS.value:
        for topology in _TOPOLOGIES.value:
            rows.append(rehearse(model, topology))
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            table.write(rows, f"libtpu compiler; {table.cpu()}")


if __name__ == "__main__":
    app.run(main)
