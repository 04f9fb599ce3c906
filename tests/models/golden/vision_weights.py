"""Weights that can be made anywhere, by name and shape: nothing but outputs has to be stored. Also runs without deltajax."""

import zlib

import numpy as np


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array drawn from a generator seeded by the name, small enough that no network amplifies rounding."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def images(size: int) -> np.ndarray:
    """Two images [2, size, size, 3]."""
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
