"""Host memory that a save takes beyond what the run holds, over the size of the state saved.

    python -m benchmarks.save_memory [--parameters=33554432] [--csv=benchmarks/results/save_memory.csv]

The state: random parameters in float32 and two moments of Adam's for each, in arrays of 4 million. On a CPU the state lives in
host memory already; what is counted comes on top of it, as on a machine whose state lives in its accelerators.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from benchmarks import table
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import load_config
from deltajax.training.step import TrainState

_PARAMETERS = flags.DEFINE_integer("parameters", 2**25, "how many", 1)
_SAVES = flags.DEFINE_integer("saves", 3, "one after the other", 1)
ARRAY = 2**22


def memory(key: str) -> int:
    """VmRSS (now) or VmHWM (highest since `reset`) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reset() -> None:
    """Begin to look for the highest anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main(_: list[str]) -> None:
    """Save several times, print and write the table."""
    config = load_config(str(Path(__file__).parents[1] / "experiments" / "first_run.py"))  # of no consequence here
    keys = jax.random.split(jax.random.key(0), max(_PARAMETERS.value // ARRAY, 1))
    draw = jax.jit(lambda key: jax.random.normal(key, (2, ARRAY // 2)))
    params, m, v = ({str(i): draw(jax.random.fold_in(k, n)) for i, k in enumerate(keys)} for n in range(3))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, {}, {"m": m, "v": v}, jax.random.key_data(jax.random.key(0)), zero, zero, zero)
    size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(state)))
    logging.set_verbosity(logging.ERROR)  # Orbax says much
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for number in range(_SAVES.value):
            reset()
            before = memory("VmRSS")
            checkpoints.save(number + 1, state, config, {}, None)
            checkpoints.wait()
            peak = memory("VmHWM") - before
            rows.append(
                {"save": number + 1, "state_MB": size // 10**6, "peak_MB": peak // 10**6, "ratio": f"{peak / size:.2f}"}
            )
            print(rows[-1], flush=True)
        checkpoints.close()
    table.write(rows, table.cpu())


if __name__ == "__main__":
    app.run(main)
