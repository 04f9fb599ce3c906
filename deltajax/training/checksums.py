"""Checksums of arrays that do not depend on how the arrays are sharded.

A checkpoint may be read on another mesh, and by another number of processes, than it was written by.
So a checksum is a sum over the whole array, to which every shard contributes its part.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt64

_LANE_BYTES = 8
_SLAB_BYTES = 2**22  # one task of a thread
_MASK = 2**64 - 1

Sums = UInt64[np.ndarray, "leaves"]


def partial_sums(tree: Any) -> Sums:
    """Sum the shards of a tree's arrays that belong to this process.

    The last axis of an array is read as 64-bit lanes, which are added up modulo 2^64, each row with
    an odd weight of its own. So a change of any single bit changes the sum, and any other damage
    changes it with a probability of 1 - 2^-64, unless it only moves lanes within one row.

    Args:
      tree: JAX arrays. Of several replicas of a shard one is read.
    """
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        tasks = [
            [pool.submit(_slab, *slab) for shard in _shards(leaf) for slab in _slabs(leaf, shard)]
            for leaf in jax.tree.leaves(tree)
        ]
        return np.array([sum(task.result() for task in leaf) & _MASK for leaf in tasks], np.uint64)


def checksums(tree: Any, sums: Sums) -> dict[str, str]:
    """Return the checksum of each array by its path: type, shape, and the sums over all processes.

    With several processes this is a collective operation.

    Args:
      sums: of `partial_sums` of the same tree.
    """
    if jax.process_count() > 1:
        parts = multihost_utils.process_allgather(sums.view(np.uint32))  # JAX has no 64-bit integers by default
        sums = np.asarray(parts).view(np.uint64).sum(axis=0, dtype=np.uint64)
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)} {total:016x}"
        for (path, x), total in zip(leaves, sums.tolist(), strict=True)
    }


def mismatch(tree: Any, sums: Sums, stored: dict[str, str]) -> str | None:
    """Return which array is not the one that was stored, or None if all are.

    Args:
      sums: of `partial_sums` of the same tree.
      stored: `checksums` of a tree that contains this one.
    """
    for name, checksum in checksums(tree, sums).items():
        if stored.get(name) != checksum:
            return f"{name} has checksum {checksum}, saved was {stored.get(name, 'no such array')}"
    return None


def _shards(leaf: Any) -> Iterator[Any]:
    return (shard for shard in leaf.addressable_shards if shard.replica_id == 0)


def _slabs(leaf: Any, shard: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of a shard: rows of 64-bit lanes, and the number of each row in the whole array."""
    shape, index = (leaf.shape, shard.index) if leaf.shape else ((1,), (slice(None),))
    spans = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    data = np.ascontiguousarray(np.asarray(shard.data)).reshape([len(span) for span in spans])
    if not data.size:
        return
    rows: Any = np.zeros((), np.uint64)
    for size, span in zip(shape[:-1], spans, strict=False):
        rows = rows[..., None] * np.uint64(size) + np.arange(span.start, span.stop, dtype=np.uint64)
    lanes, numbers = _lanes(data.reshape(-1, data.shape[-1]), spans[-1].start), rows.reshape(-1)
    if len(shape) == 1:
        per_lane = _LANE_BYTES // data.dtype.itemsize
        lanes = lanes.reshape(-1, 1)
        numbers = np.arange(len(lanes), dtype=np.uint64) + np.uint64(spans[0].start // per_lane)
    step = max(1, _SLAB_BYTES // (lanes.shape[1] * _LANE_BYTES))
    for start in range(0, len(lanes), step):
        yield lanes[start : start + step], numbers[start : start + step]


def _lanes(rows: np.ndarray, start: int) -> np.ndarray:
    """View rows, which begin at an element of the whole rows, as 64-bit lanes of the whole rows."""
    size = rows.dtype.itemsize
    per_lane = _LANE_BYTES // size
    before, after = start % per_lane, -(start + rows.shape[1]) % per_lane
    data = rows.view(np.uint8)
    if before or after:
        data = np.pad(data, ((0, 0), (before * size, after * size)))
    return data.view(np.uint64)


def _slab(lanes: np.ndarray, numbers: np.ndarray) -> int:
    return int(np.add.reduce(np.add.reduce(lanes, axis=1) * _weights(numbers)))


def _weights(numbers: np.ndarray) -> np.ndarray:
    """Return a pseudo-random odd weight for every row (the finaliser of splitmix64)."""
    x = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
