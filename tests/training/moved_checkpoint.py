"""The last checkpoint of WORKDIR on eight devices laid out in several ways: `moved_checkpoint.py WORKDIR COPY`.

Restores it on each mesh, saves it from the last one to COPY, restores that on the first; every array must keep every bit.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from training_runs import TINY

from deltajax.training import loop
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import Mesh, load_config

MESHES = (Mesh(data=1, fsdp=2, sequence=2, tensor=2), Mesh(data=4, fsdp=2), Mesh(data=1, fsdp=8))
config = load_config(TINY)


def restored(workdir: str, mesh: Mesh, devices=None):
    """(step, state, progress), laid out over the mesh."""
    laid_out = dataclasses.replace(config, mesh=mesh)
    step = loop.make_step(laid_out, devices)
    at, state, progress = Checkpoints(Path(workdir), read_only=True).restore(step.abstract, laid_out)
    jax.tree.map(lambda x, wanted: x.sharding.is_equivalent_to(wanted.sharding, x.ndim) or 1 / 0, state, step.abstract)
    return at, state, progress


def check_same(ours, theirs):
    """Step, every array, how to go on with the data."""
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    assert ours[2]["iterator"] == theirs[2]["iterator"]


one = restored(sys.argv[1], Mesh(), jax.devices()[:1])
for mesh in MESHES:
    moved = restored(sys.argv[1], mesh)
    check_same(moved, one)
checkpoints = Checkpoints(Path(sys.argv[2]))
checkpoints.save(moved[0], moved[1], config, {"iterator": moved[2]["iterator"]}, None)
checkpoints.close()
check_same(restored(sys.argv[2], MESHES[0]), one)
print("same")
