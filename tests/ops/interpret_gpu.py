"""A process that compares the GPU kernels, in Mosaic GPU's interpreter, with the float64 reference, case by case.

Of its own because of NPROC: a warpgroup that waits holds a thread of XLA's pool, which else has one for each processor, so that
on two processors the warpgroup waited for may find none.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from delta_rule_cases import compare, draw
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import worker
from pallas_kernels import gpu, gpu_blocks


def handle(job: dict) -> dict:
    """One case. A race raises, and so does reading what was never written: it is nan.

    blocks: how the work is cut; segment: tokens of a document; scale: of queries; gates: all of them; size: of queries, and of
    keys its inverse; zeros: every third token has beta 0.

    Raises:
      AssertionError: an error above 1e-2, of a gradient above `gradients`.
    """
    blocks, segment, scale, gates, size, zeros, gradients = (
        job.pop(name) for name in ("blocks", "segment", "scale", "gates", "size", "zeros", "gradients")
    )
    arguments = draw(1, **job, dtype="bfloat16")
    if gates is not None:
        arguments["g"] = jnp.full_like(arguments["g"], gates)
    if zeros:
        arguments["beta"] = arguments["beta"].at[:, ::3].set(0)
    arguments["q"], arguments["k"] = arguments["q"] * size, arguments["k"] / size
    asked = mock.patch.object(gpu.Blocks, "for_shape", lambda *_: gpu.Blocks(**blocks))
    with (
        asked if blocks else contextlib.nullcontext(),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        segments = jnp.asarray(np.arange(job["t"]) // segment)[None] if segment else None
        scale = jnp.float32(scale) if scale else None  # an array, known when it runs
        compare(arguments, "pallas_gpu", 1e-2, gradients, segment_ids=segments, scale=scale)
    return {}


def inverse(cosine: float, beta: float) -> dict:
    """The error of a block's (I + A)^-1, relative to its largest entry."""
    k = draw(1, 1, 64, 1, 1, 1, 64, 64, None, beta, cosine, dtype="bfloat16")["k"][:, :, 0]
    rows = jnp.full((1, 1, 1, 1, 64), beta, jnp.float32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        inverses, _ = gpu_blocks.inverses_and_scores(k, k, rows, jnp.ones_like(rows))
    parts = np.asarray(inverses[0, 0, 0], np.float64)
    keys = np.asarray(k[0, :, 0], np.float64)
    exact = np.linalg.inv(np.eye(64) + beta * np.tril(keys @ keys.T, -1))
    return {"off_by": float(np.abs(parts[:, :64] + parts[:, 64:] - exact).max() / np.abs(exact).max())}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # for all threads: each warpgroup runs in one
    worker.serve(lambda job: inverse(**job) if "segment" not in job else handle(job))
