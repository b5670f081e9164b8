"""A baseline, not part of the library: the fastest in-place NumPy code we know.

One preallocated scratch array, every ufunc with ``out``, no temporaries. Constants are 0-d arrays of the same dtype,
since a Python float costs a conversion per call. Adam's bias correction is folded into eps and the step size, which
leaves twelve passes. Runs over whole arrays, over cache-sized blocks (the fastest of a few lengths), or over blocks on
several threads (ufuncs release the GIL).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy import add, divide, multiply, sqrt, subtract

Array = np.ndarray[Any, Any]
Body = Callable[..., None]
BLOCKS = (1 << 14, 1 << 16, 1 << 17, 1 << 18)


def momentum(c: Sequence[Array], t: Array, p: Array, g: Array, m: Array) -> None:
    beta, lr = c
    multiply(m, beta, m)
    add(m, g, m)
    multiply(m, lr, t)
    subtract(p, t, p)


def adagrad(c: Sequence[Array], t: Array, p: Array, g: Array, s: Array) -> None:
    lr, eps = c
    multiply(g, g, t)
    add(s, t, s)
    sqrt(s, t)
    add(t, eps, t)
    divide(g, t, t)
    multiply(t, lr, t)
    subtract(p, t, p)


def rmsprop(c: Sequence[Array], t: Array, p: Array, g: Array, v: Array) -> None:
    alpha, rest, lr, eps = c
    multiply(v, alpha, v)
    multiply(g, g, t)
    multiply(t, rest, t)
    add(v, t, v)
    sqrt(v, t)
    add(t, eps, t)
    divide(g, t, t)
    multiply(t, lr, t)
    subtract(p, t, p)


def adam(c: Sequence[Array], t: Array, p: Array, g: Array, m: Array, v: Array) -> None:
    beta1, rest1, beta2, rest2, lr, eps = c
    multiply(m, beta1, m)
    multiply(g, rest1, t)
    add(m, t, m)
    multiply(v, beta2, v)
    multiply(g, g, t)
    multiply(t, rest2, t)
    add(v, t, v)
    sqrt(v, t)
    add(t, eps, t)
    divide(m, t, t)
    multiply(t, lr, t)
    subtract(p, t, p)


def adamw(c: Sequence[Array], t: Array, p: Array, g: Array, m: Array, v: Array) -> None:
    multiply(p, c[-1], p)
    adam(c[:-1], t, p, g, m, v)


def _adam(step: int, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> list[float]:
    root = math.sqrt(1 - beta2**step)
    return [beta1, 1 - beta1, beta2, 1 - beta2, lr * root / (1 - beta1**step), eps * root]


# Row of the tables -> function, number of states, and constants of a step (with torch's default options).
BODIES: dict[str, tuple[Body, int, Callable[[int], list[float]]]] = {
    "Momentum": (momentum, 1, lambda step: [0.9, 1e-3]),
    "Adagrad": (adagrad, 1, lambda step: [1e-2, 1e-10]),
    "RMSprop": (rmsprop, 1, lambda step: [0.99, 1 - 0.99, 1e-2, 1e-8]),
    "Adam": (adam, 2, _adam),
    "AdamW": (adamw, 2, lambda step: [*_adam(step), 1 - 1e-3 * 0.01]),
}


class Best:
    """One optimizer over lists of arrays; ``block`` None uses whole arrays, 0 measures the best block length."""

    def __init__(self, row: str, params: Iterable[Array], grads: Iterable[Array], block: int | None, threads: int = 1):
        self.body, states, self.constants = BODIES[row]
        self.tensors = [(p, g, *(np.zeros_like(p) for _ in range(states))) for p, g in zip(params, grads, strict=True)]
        self.step_count = 0
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.threads = threads
        self.cut(self.best_block() if block == 0 else block)

    def cut(self, block: int | None) -> None:
        """Creates the views of all blocks, and one scratch array per thread."""
        size = block or max(p.size for p, *_ in self.tensors)
        flat = [[a.reshape(-1) for a in tensor] for tensor in self.tensors]
        views = [tuple(a[i : i + size] for a in t) for t in flat for i in range(0, t[0].size, size)]
        scratch = [np.empty(size, self.tensors[0][0].dtype) for _ in range(self.threads)]
        self.shares = [
            [(t if p.size == size else t[: p.size], p, *rest) for p, *rest in views[k :: self.threads]]
            for k, t in enumerate(scratch)
        ]

    def best_block(self) -> int:
        def seconds(block: int) -> float:
            self.cut(block)
            self.step()
            start = time.perf_counter()
            self.step()
            return time.perf_counter() - start

        return min(BLOCKS, key=seconds)

    def step(self) -> None:
        self.step_count += 1
        dtype = self.tensors[0][0].dtype
        c = [np.array(x, dtype) for x in self.constants(self.step_count)]

        def run(share: list[tuple[Array, ...]]) -> None:
            body = self.body
            for arrays in share:
                body(c, *arrays)

        if self.pool is None:
            run(self.shares[0])
        else:
            list(self.pool.map(run, self.shares))
