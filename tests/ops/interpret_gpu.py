"""A process that compares the GPU kernels, in Mosaic GPU's interpreter, with the float64 reference, case by case.

Of its own because of NPROC: a warpgroup that waits holds a thread of XLA's pool, which else has one for each processor, so that
on two processors the warpgroup waited for may find none.
"""

import jax
import jax.numpy as jnp
import numpy as np
from delta_rule_cases import compare, draw
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import worker
from pallas_kernels import gpu


def handle(job: dict) -> dict:
    """One case. A race raises, and so does reading what was never written: it is nan.

    Raises:
      AssertionError: an error above 1e-2, of a gradient above 2e-2.
    """
    blocks, segment, scale = job.pop("blocks"), job.pop("segment"), job.pop("scale")
    if blocks:
        gpu.Blocks.for_shape = lambda *_: gpu.Blocks(**blocks)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        segments = jnp.asarray(np.arange(job["t"]) // segment)[None] if segment else None
        scale = jnp.float32(scale) if scale else None  # an array, known when it runs
        compare(draw(1, **job, dtype="bfloat16"), "pallas_gpu", 1e-2, 2e-2, segment_ids=segments, scale=scale)
    return {}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # for all threads: each warpgroup runs in one
    worker.serve(handle)
