"""Shapes of the benchmark's tensors, real networks included, lookups in tables, and formats with their sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Shapes = tuple[tuple[int, ...], ...]

WORDS = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
BYTES: dict[str, float] = {**WORDS, "int8": 1 + 4 / 64}  # codes, and one scale per block of 64


@dataclass(frozen=True)
class Format:
    """How a parameter, its gradient and its array states are stored."""

    param: str
    grad: str
    state: str

    def __str__(self) -> str:
        grad = "" if self.grad == self.param else f" + {self.grad} grad"
        return self.param + grad + ("" if self.state == self.param else f" + {self.state} state")

    def bytes(self, states: int) -> float:
        """Memory traffic per parameter: the gradient is read, everything else is read and written."""
        return 2 * BYTES[self.param] + BYTES[self.grad] + 2 * states * BYTES[self.state]


FORMATS = (
    *(Format(word, word, word) for word in WORDS),
    *(Format("f32", word, "f32") for word in ("bf16", "f16")),
    *(Format(word, word, "f32") for word in ("bf16", "f16")),
    *(Format("f32", "f32", word) for word in ("bf16", "f16")),
)
F32 = FORMATS[1]


def count(shapes: Iterable[tuple[int, ...]]) -> int:
    """Total number of elements."""
    return sum(math.prod(shape) for shape in shapes)


def human(n: int) -> str:
    """33554432 -> 32M, 1000 -> 1000."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if n >= 1 << power and n % (1 << power) == 0:
            return f"{n >> power}{unit}"
    return str(n) if n < 10_000 else f"{n / 1e6:.1f}M" if n >= 1_000_000 else f"{n / 1e3:.0f}K"


def mlp(*widths: int) -> Shapes:
    """Weights and biases of a multilayer perceptron."""
    return tuple(s for i, o in itertools.pairwise(widths) for s in ((o, i), (o,)))


def resnet50() -> Shapes:
    """ResNet-50 for 1,000 classes: 161 tensors, 25,557,032 parameters."""

    def conv(out: int, into: int, k: int) -> Shapes:
        return ((out, into, k, k), (out,), (out,))  # the batch norm's weight and bias follow

    shapes, width = list(conv(64, 3, 7)), 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(planes, width, 1) + conv(planes, planes, 3) + conv(4 * planes, planes, 1)
            if block == 0:
                shapes += conv(4 * planes, width, 1)
            width = 4 * planes
    return (*shapes, (1000, 2048), (1000,))


def gpt2(width: int = 768, layers: int = 12) -> Shapes:
    """GPT-2 small, head tied to the embedding: 148 tensors, 124,439,808 parameters."""
    norm: Shapes = ((width,), (width,))
    attention: Shapes = ((width, 3 * width), (3 * width,), (width, width), (width,))
    feed_forward: Shapes = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *(norm + attention + norm + feed_forward) * layers, *norm)


def llama(width: int = 2048, layers: int = 16, heads: int = 512, inner: int = 8192, words: int = 128_256) -> Shapes:
    """Llama 3.2 1B, head tied to the embedding: 146 tensors, 1,235,814,400 parameters."""
    attention: Shapes = ((width, width), (heads, width), (heads, width), (width, width))
    feed_forward: Shapes = ((inner, width), (inner, width), (width, inner))
    return ((words, width), *(attention + feed_forward + ((width,), (width,))) * layers, (width,))


MANY: Shapes = ((64,),) * 1000


@cache
def draw(rows: int, lookups: int, exponent: float, seed: int) -> NDArray[np.int64]:
    """Rows that are looked up. With an exponent the shares of rows are 1, 2 ** -exponent, ..., in random order."""
    make = np.random.default_rng(seed)
    if not exponent:
        return make.integers(0, rows, lookups)
    share = np.cumsum(np.arange(1, rows + 1) ** -exponent)
    ranks = np.minimum(np.searchsorted(share, make.random(lookups) * share[-1]), rows - 1)
    found: NDArray[np.int64] = np.random.default_rng(0).permutation(rows)[ranks]
    return found


def distinct(rows: int, lookups: int, exponent: float) -> int:
    """The number of rows that one step updates."""
    return len(np.unique(draw(rows, lookups, exponent, 0)))
