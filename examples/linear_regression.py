"""Fits y = 3x + 2 with noise by gradient descent, stochastic gradient descent and mini-batches, in NumPy.

The three differ only in the number of rows per step. Run: ``python examples/linear_regression.py [--quick]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import fusedopt
from fusedopt import plots
from fusedopt.losses import half_mse
from fusedopt.schedules import InverseTime

ROWS, SEED = 1000, 0


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(SEED)
    x = rng.uniform(-1, 1, ROWS)
    return x, 3 * x + 2 + 0.5 * rng.standard_normal(ROWS)


def train(batch: int, epochs: int, lr: float) -> tuple[np.ndarray, list[float]]:
    """Slope and intercept; after each epoch, the loss on all rows minus its minimum."""
    x, y = data()
    line, losses = np.zeros(2), []
    least = half_mse(np.polyval(np.polyfit(x, y, 1), x), y)[0]
    # The learning rate decays to average out the noise of small batches; a full batch has none.
    rate = InverseTime(lr, 1.0, decay_steps=2 * ROWS // batch) if batch < ROWS else lr
    optimizer = fusedopt.SGD(line, lr=rate)
    rng = np.random.default_rng(SEED)
    for _ in range(epochs):
        order = rng.permutation(ROWS)
        for rows in (order[i : i + batch] for i in range(0, ROWS, batch)):
            _, delta = half_mse(line[0] * x[rows] + line[1], y[rows])
            optimizer.step(np.array([delta @ x[rows], delta.sum()]))
        losses.append(half_mse(line[0] * x + line[1], y)[0] - least)
    return line, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 10 if args.quick else 30

    x, y = data()
    slope, intercept = np.polyfit(x, y, 1)
    print(f"{'least squares, closed form':>35}: y = {slope:.4f} x + {intercept:.4f}")
    histories, line = {}, np.zeros(2)
    for name, batch, lr in (
        ("gradient descent, all rows per step", ROWS, 1.0),
        ("stochastic, 1 row per step", 1, 0.1),
        ("mini-batches of 32 rows", 32, 0.5),
    ):
        line, losses = train(batch, epochs, lr)
        histories[name] = {"loss": losses}
        print(f"{name:>35}: y = {line[0]:.4f} x + {line[1]:.4f}, loss {losses[-1]:.1e} above the minimum")
    title, what = "y = 3x + 2, by gradient descent with three batch sizes", "loss above the minimum,"
    plots.compare(histories, "loss", args.output / "linear-regression-losses.png", title=title, ylabel=what)
    plots.fit(x, y, lambda grid: line[0] * grid + line[1], args.output / "linear-regression-fit.png")


if __name__ == "__main__":
    main()
