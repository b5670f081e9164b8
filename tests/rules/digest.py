"""Prints one digest of all results: every rule in every form, instruction set and thread count, losses, and layers.

Two builds that print the same digest compute the same bits: ``python tests/rules/digest.py``. NaN counts as one value.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np

import fusedopt
from form_cases import CASES, Case, data, gradients, kept, optimizer, stepped_by_rows
from fusedopt import losses

SHAPES: list[Any] = [(), (1,), (7,), (64,), (65,), (33, 70), (4097,), (100_003,)]


def put(digest: Any, x: Any) -> None:
    """Adds a number or an array; NaN as zero after a mark of where they are."""
    a = np.ascontiguousarray(x)
    if a.dtype.kind == "f" or a.dtype.name == "bfloat16":
        gone = np.isnan(a.astype(np.float64))
        if gone.any():
            digest.update(np.packbits(gone).tobytes())
            a = np.where(gone, a.dtype.type(0), a)
    digest.update(a.tobytes())


@cache
def parameters(dtype: str) -> list[Any]:
    strided = data((40, 30), dtype, 99)[::2, ::-1]
    return [*(data(shape, dtype, 7 + i) for i, shape in enumerate(SHAPES)), strided.copy(order="F")]


@cache
def rows(dtype: str) -> list[list[Any]]:
    case = next(c for c in CASES if c.grad == dtype)
    return gradients(case, [p.shape for p in parameters("float32")])


def of_case(case: Case) -> bytes:
    """Three steps over tensors of many lengths, dense and strided, clipped, with an average of the weights and l1; and
    three by rows."""
    digest = hashlib.sha256()
    for options in ({}, {"max_grad_norm": 1.0, "ema_decay": 0.9, "l1": 0.01, "maximize": True}):
        opt = optimizer(case, [p.copy(order="K") for p in parameters(case.param)], **options)
        for row in rows(case.grad):
            opt.step(row)
        for entry in kept(opt):
            for name in sorted(entry):
                put(digest, entry[name])
    for entry in kept(stepped_by_rows(case)):
        for name in sorted(entry):
            put(digest, entry[name])
    return digest.digest()


def of_losses() -> bytes:
    digest = hashlib.sha256()
    rng = np.random.default_rng(3)
    for dtype in (np.float64, np.float32):
        logits = rng.standard_normal((300, 70)).astype(dtype)
        labels = rng.integers(0, 70, 300)
        for value in losses.softmax_cross_entropy(logits, labels, label_smoothing=0.1):
            put(digest, value)
        for name in ("mse", "mae", "huber", "binary_cross_entropy", "poisson"):
            for value in getattr(losses, name)(logits, np.abs(logits[::-1]) % 1):
                put(digest, value)
    return digest.digest()


def main() -> None:
    whole = hashlib.sha256()
    first: dict[str, bytes] = {}
    for isa in fusedopt.isas():
        fusedopt.set_isa(isa)
        for threads in (1, 2, 5):
            fusedopt.set_num_threads(threads)
            for case in CASES:
                found = of_case(case)
                if first.setdefault(str(case), found) != found:
                    print(f"{case}: other bits on {isa} with {threads} threads")
                whole.update(found)
            whole.update(of_losses())
    print(f"{len(CASES)} cases, {len(fusedopt.isas())} instruction sets: {whole.hexdigest()}")


if __name__ == "__main__":
    main()
