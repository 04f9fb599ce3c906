"""Clips of a handwritten digit that moves or turns; the class is the motion. Nothing is downloaded (scikit-learn's digits).

A frame by itself says nothing of the motion, so a "frame" of the network is a few successive pictures stacked as channels.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_digits

from deltajax.data.generated import ENDLESS, SPLITS, Generated
from deltajax.data.loader import Dataset
from deltajax.errors import check_integers, check_number, check_types
from deltajax.fields import CHANGEABLE

MOTIONS = ("up", "down", "left", "right", "clockwise", "counterclockwise")
_STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_TURNS = {"clockwise": 1, "counterclockwise": -1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Moving digits.

    Attributes:
      size: height and width of the frames, >= 24; the digit covers 16 x 16 pixels.
      frames: T, frames of a clip.
      stack: successive pictures in one frame, its channels.
      speed: pixels, or twelfths of a right angle, from picture to picture.
      noise: standard deviation of noise, the same in all pictures of a clip: a background that stands still.
      flicker: standard deviation of noise, anew in every picture, as of a camera's sensor.
      batch_size: clips per global batch.
      seed: of the clips of every split, and of their order.
      train_examples: size of the training set; None: never the same clip twice.
      validation_examples: of digits that are in no training clip.
    """

    size: int = 32
    frames: int = 6
    stack: int = 2
    speed: float = 1.5
    noise: float = 0.05
    flicker: float = 0.0
    batch_size: int = dataclasses.field(default=16, metadata=CHANGEABLE)
    seed: int = 0
    train_examples: int | None = None
    validation_examples: int = dataclasses.field(default=240, metadata=CHANGEABLE)

    def __post_init__(self):
        """Check every field."""
        check_types(self)
        check_integers(self, 1, "stack", "batch_size", "train_examples", "validation_examples")
        check_integers(self, 0, "seed")
        check_integers(self, 24, "size")
        check_integers(self, 2, "frames")
        check_number(self, "speed", 0)
        for name in ("noise", "flicker"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
        path = self.speed * (self.frames + self.stack - 2)
        if path > self.size - 16:
            raise ValueError(
                f"speed must be <= {(self.size - 16) / (self.frames + self.stack - 2):g} for the digit to stay in the picture, "
                f"got {self.speed}"
            )


def load(config: Config) -> Dataset:
    """Training clips from four fifths of the digits, validation clips from the others."""
    images = load_digits().images.astype(np.float32) / 16
    held_out = np.arange(len(images)) % 5 == 0

    def source(split: str, digits: np.ndarray, size: int) -> Generated:
        return Generated(functools.partial(_clip, config, digits), size, (config.seed, SPLITS.index(split)))

    return Dataset(
        train=source("train", images[~held_out], config.train_examples or ENDLESS),
        validation=source("validation", images[held_out], config.validation_examples),
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=len(MOTIONS),
        unit="clips",
        chance=1 / len(MOTIONS),
    )


def _clip(config: Config, digits: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """frames [T, H, W, stack] in about [0, 1], targets [], weights []."""
    label = int(rng.integers(len(MOTIONS)))
    digit = digits[rng.integers(len(digits))]
    pictures = motion(digit, MOTIONS[label], config.size, config.frames + config.stack - 1, config.speed, rng)
    pictures += config.noise * rng.standard_normal((config.size, config.size)).astype(np.float32)
    if config.flicker:
        pictures += config.flicker * rng.standard_normal(pictures.shape).astype(np.float32)
    stacked = np.stack([pictures[i : i + config.frames] for i in range(config.stack)], axis=-1)
    return {"frames": stacked, "targets": np.int32(label), "weights": np.float32(1)}


def motion(
    digit: Float[np.ndarray, "8 8"], name: str, size: int, length: int, speed: float, rng: np.random.Generator
) -> Float[np.ndarray, "length size size"]:
    """Pictures of a digit, twice as large, that moves or turns; it stays inside. The place is drawn from `rng`."""
    t = np.arange(length, dtype=np.float32)
    step = np.array(_STEPS.get(name, (0, 0)), np.float32) * speed
    path = np.abs(step) * (length - 1)
    low = 8 + np.where(step < 0, path, 0)
    high = size - 8 - np.where(step > 0, path, 0)
    start = low + rng.random(2) * (high - low)
    centres = start + t[:, None] * step
    first = rng.random() * 2 * np.pi if name in _TURNS else 0.0
    angles = first + t * _TURNS.get(name, 0) * speed * np.pi / 24
    grid = np.arange(size, dtype=np.float32) + 0.5
    row, column = grid[:, None] - centres[:, :1, None], grid - centres[:, 1:, None]
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    # Rows point down: turned clockwise by an angle, a picture shows at (row, column) what was at the place turned back.
    y, x = cos * row - sin * column, sin * row + cos * column
    return _bilinear(digit, y / 2 + 3.5, x / 2 + 3.5).astype(np.float32)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values between pixels; zero outside."""
    padded = np.pad(image, 2)
    y, x = (np.clip(v + 2, 0, n - 1.001) for v, n in ((y, padded.shape[0]), (x, padded.shape[1])))
    i, j = y.astype(int), x.astype(int)
    v, u = y - i, x - j
    upper = padded[i, j] * (1 - u) + padded[i, j + 1] * u
    lower = padded[i + 1, j] * (1 - u) + padded[i + 1, j + 1] * u
    return upper * (1 - v) + lower * v
