"""The TPU compiler, in a process of its own: libtpu reads its settings when it is loaded."""

import os
import subprocess
import sys

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_LOG_DIR": "disabled",
}


def run_program(source: str, topology: str) -> None:
    """Run Python source that is given the topology as its argument; fails with what it said."""
    command = [sys.executable, "-c", source, topology]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **SETTINGS})
    assert done.returncode == 0, done.stderr[-2000:]
