"""Factorises a matrix of ratings: each user and each item is a row of a table, and a rating the product of two rows.

The data are made here: 200,000 users, 50,000 items, drawn by Zipf's law, so that few items are rated often and most
hardly ever. A batch touches few rows of both tables, and the optimizer updates these alone. The program trains the same
model with torch.optim.SparseAdam, with fusedopt.torch.SparseAdam, and in NumPy alone with fusedopt.Adam and
fusedopt.Rows. It prints loss and time of each, and draws both.
Run: ``python examples/ratings.py [--quick]``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedopt

WIDTH, BATCH, LR = 32, 8192, 0.01
Array = NDArray[Any]


def zipf(rng: np.random.Generator, n: int, rows: int) -> Array:
    """Rows with a share of 1 / rank."""
    share = np.cumsum(1 / np.arange(1, rows + 1))
    ranks: Array = np.searchsorted(share, rng.random(n) * share[-1])
    return np.minimum(ranks, rows - 1, out=ranks)


def ratings(users: int, items: int, n: int) -> tuple[Array, Array, Array]:
    """User, item, rating: products of hidden rows of 8 numbers, with noise of 0.1."""
    rng = np.random.default_rng(0)
    hidden = [rng.standard_normal((rows, 8)).astype(np.float32) / np.float32(8**0.5) for rows in (users, items)]
    user, item = zipf(rng, n, users), zipf(rng, n, items)
    exact = (hidden[0][user] * hidden[1][item]).sum(axis=1)
    return user, item, exact + 0.1 * rng.standard_normal(n).astype(np.float32)


def tables(users: int, items: int) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((rows, WIDTH)).astype(np.float32) * np.float32(0.3) for rows in (users, items)]


Step = Callable[[Array, Array, Array], tuple[float, float]]
"""Trains on a batch; returns its loss and the seconds of the optimizer's step."""


def with_torch(start: list[Array], optimizers: Any) -> Step:
    import torch

    user, item = (
        torch.nn.Embedding(len(table), WIDTH, sparse=True, _weight=torch.from_numpy(table.copy())) for table in start
    )
    opt = optimizers.SparseAdam([user.weight, item.weight], lr=LR)

    def step(users: Array, items: Array, rating: Array) -> tuple[float, float]:
        opt.zero_grad()
        predicted = (user(torch.from_numpy(users)) * item(torch.from_numpy(items))).sum(dim=1)
        loss = (predicted - torch.from_numpy(rating)).square().mean()
        loss.backward()
        began = time.perf_counter()
        opt.step()
        return loss.item(), time.perf_counter() - began

    return step


def with_numpy(start: list[Array]) -> Step:
    user, item = (t.copy() for t in start)
    opt = fusedopt.Adam([user, item], lr=LR)

    def step(users: Array, items: Array, rating: Array) -> tuple[float, float]:
        a, b = user[users], item[items]
        error = (a * b).sum(axis=1) - rating
        scale = (2 / len(rating) * error)[:, None].astype(np.float32)
        began = time.perf_counter()
        opt.step([fusedopt.Rows(users, scale * b), fusedopt.Rows(items, scale * a)])
        return float((error**2).mean()), time.perf_counter() - began

    return step


def train(step: Step, data: tuple[Array, Array, Array], steps: int) -> tuple[list[float], list[float]]:
    """Losses, smoothed over ten steps, and the seconds of each step of the optimizer."""
    losses, seconds = [], []
    for k in range(steps):
        batch = slice(k * BATCH % len(data[0]), k * BATCH % len(data[0]) + BATCH)
        loss, spent = step(*(column[batch] for column in data))
        losses.append(loss)
        seconds.append(spent)
    return np.convolve(losses, np.ones(10) / 10, "valid").tolist(), seconds


def draw(results: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (losses, _) in results.items():
        left.plot(losses, label=name)
    left.set(xlabel="step", ylabel="mean squared error", yscale="log")
    left.legend()
    right.barh(list(results), [1e3 * float(np.median(seconds)) for _, seconds in results.values()])
    right.set(xlabel="milliseconds of the optimizer's step (median)")
    right.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller tables, fewer steps")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the picture")
    args = parser.parse_args()
    users, items, steps = (20_000, 5_000, 60) if args.quick else (200_000, 50_000, 600)
    data, start = ratings(users, items, 60 * BATCH), tables(users, items)

    import torch

    import fusedopt.torch

    checks: Any = torch.sparse.check_sparse_tensor_invariants
    checks.disable()  # torch asks its users to decide
    makers: dict[str, Callable[[], Step]] = {
        "torch.optim.SparseAdam": lambda: with_torch(start, torch.optim),
        "fusedopt.torch.SparseAdam": lambda: with_torch(start, fusedopt.torch),
        "NumPy, fusedopt.Adam": lambda: with_numpy(start),
    }
    results = {}
    print(f"{'':28s}{'first loss':>12s}{'last loss':>12s}{'ms a step':>12s}")
    for name, make in makers.items():
        results[name] = losses, seconds = train(make(), data, steps)
        print(f"{name:28s}{losses[0]:12.4f}{losses[-1]:12.4f}{1e3 * float(np.median(seconds)):12.3f}")
    path = args.output / "ratings.png"
    draw(results, path)
    print(f"{path} shows both.")


if __name__ == "__main__":
    main()
