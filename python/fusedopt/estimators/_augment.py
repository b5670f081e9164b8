"""Random augmentation of image batches: functions of a batch and a RandomState, based on scipy.ndimage.

A batch has shape (n, features). Each row is an image of ``shape`` in C order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]


@dataclass(frozen=True)
class Shift:
    """Shifts every image by up to ``pixels`` whole pixels along each axis; new pixels are ``fill``."""

    shape: tuple[int, int]
    pixels: int = 1
    fill: float = 0.0

    def __call__(self, batch: Array, random: np.random.RandomState) -> Array:
        images = batch.reshape(len(batch), *self.shape)
        out = np.empty_like(images)
        for image, moved, by in zip(
            images, out, random.randint(-self.pixels, self.pixels + 1, (len(batch), 2)), strict=True
        ):
            ndimage.shift(image, by, moved, order=0, cval=self.fill)
        return np.asarray(out.reshape(batch.shape))


@dataclass(frozen=True)
class Flip:
    """Mirrors each image left to right with this probability; with ``axis=0``, top to bottom."""

    shape: tuple[int, int]
    probability: float = 0.5
    axis: int = 1

    def __call__(self, batch: Array, random: np.random.RandomState) -> Array:
        out = batch.copy().reshape(len(batch), *self.shape)
        chosen = random.random_sample(len(batch)) < self.probability
        out[chosen] = np.flip(out[chosen], self.axis + 1)
        return np.asarray(out.reshape(batch.shape))


@dataclass(frozen=True)
class Rotate:
    """Rotates every image about its centre by up to ``degrees`` in either direction, with linear interpolation."""

    shape: tuple[int, int]
    degrees: float = 10.0
    fill: float = 0.0

    def __call__(self, batch: Array, random: np.random.RandomState) -> Array:
        images = batch.reshape(len(batch), *self.shape)
        out = np.empty_like(images)
        angles = random.uniform(-self.degrees, self.degrees, len(batch))
        for image, turned, angle in zip(images, out, angles, strict=True):
            ndimage.rotate(image, angle, reshape=False, output=turned, order=1, cval=self.fill)
        return np.asarray(out.reshape(batch.shape))


@dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise with this standard deviation, in units of the data."""

    scale: float = 0.1

    def __call__(self, batch: Array, random: np.random.RandomState) -> Array:
        return np.asarray(batch + (self.scale * random.standard_normal(batch.shape)).astype(batch.dtype))


class Compose:
    """Applies several augmentations in order: ``Compose(Shift((8, 8)), Noise(0.05))``."""

    def __init__(self, *changes: Callable[[Array, np.random.RandomState], Array]) -> None:
        self.changes = changes

    def __call__(self, batch: Array, random: np.random.RandomState) -> Array:
        for change in self.changes:
            batch = change(batch, random)
        return batch

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.changes))})"
