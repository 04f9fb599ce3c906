"""Losses of single training examples under trained models, as in evaluation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from deltajax import data
from deltajax.training import loop, pretrained


def write(workdirs: Sequence[Path], output: Path) -> None:
    """The mean loss of each training example under those runs that were not trained on it, as a `.npy` file.

    Raises:
      ValueError: no run, runs on different data, or examples that every run was trained on.
      RunError: a run has no checkpoint that can be read.
    """
    if not workdirs:
        raise ValueError("--workdir: the workdir of a training run is missing")
    found = [losses(workdir) for workdir in workdirs]
    if len({(len(scores), fingerprint) for scores, fingerprint in found}) > 1:
        raise ValueError("--workdir: the runs were trained on different data")
    scores = np.stack([scores for scores, _ in found])
    trained_on_by_all = np.flatnonzero(np.isnan(scores).all(0))
    if len(trained_on_by_all):
        raise ValueError(
            f"--workdir: {len(trained_on_by_all)} of {scores.shape[1]} training examples were trained on in every run; "
            "give runs with data.half=even and data.half=odd"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    np.save(output, np.nanmean(scores, axis=0).astype(np.float32))
    print(f"{output}: {scores.shape[1]} losses, mean {np.nanmean(scores):.4f}")


def losses(workdir: Path) -> tuple[Float[np.ndarray, "examples"], str]:
    """Loss of every example of the whole training set, NaN where the run was trained on it; the data's fingerprint."""
    trained = pretrained.load(workdir)
    config = trained.config
    half = getattr(config.data, "half", "all")
    whole = dataclasses.replace(config.data, half="all") if hasattr(config.data, "half") else config.data
    step, dataset = loop.make_step(config), data.load(whole)
    params, stats = jax.device_put((trained.params, trained.stats), (step.shardings.params, step.shardings.stats))
    scores = np.full(len(dataset.train), np.nan, np.float32)
    if half == "all":
        return scores, dataset.fingerprint
    unseen = np.arange(int(half == "even"), len(scores), 2)
    size = dataset.batch_size
    for first in range(0, len(unseen), size):
        chosen = unseen[first : first + size]
        rows: list[Any] = [dataset.train[i] for i in np.resize(chosen, size)]  # repeated to fill the last batch
        batch = step.put({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        scores[chosen] = jax.device_get(step.score(params, stats, batch))[: len(chosen)]
    return scores, dataset.fingerprint
