"""Draws the paths of optimizers over Beale's function of two parameters, in NumPy; its minimum is 0, at (3, 0.5).

The gradient is large at the start and small near the minimum.
Run: ``python examples/loss_surface.py [--quick]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt
from fusedopt import plots

START = (0.7, -1.2)
TERMS = ((1.5, 1), (2.25, 2), (2.625, 3))  # the sum of the squares of c - x + x y^k


def beale(x: Any, y: Any) -> Any:
    return sum((c - x + x * y**k) ** 2 for c, k in TERMS)


def gradient(w: np.ndarray) -> np.ndarray:
    x, y = w
    terms = [(c - x + x * y**k, y**k - 1, k * x * y ** (k - 1)) for c, k in TERMS]
    return np.array([sum(2 * t * dx for t, dx, _ in terms), sum(2 * t * dy for t, _, dy in terms)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    steps = 100 if args.quick else 400

    paths = {}
    for name, options in {
        "SGD": {"lr": 0.005},
        "SGD, momentum 0.9": {"lr": 0.005, "momentum": 0.9},
        "Adagrad": {"lr": 0.3},
        "RMSprop": {"lr": 0.02},
        "Adam": {"lr": 0.1},
        "Lion": {"lr": 0.01},
    }.items():
        w = np.array(START)
        optimizer = getattr(fusedopt, name.split(",")[0])(w, **options)
        path = [w.copy()]
        for _ in range(steps):
            optimizer.step(gradient(w))
            path.append(w.copy())
        paths[name] = path
        print(f"{name:>20}: after {steps} steps at ({w[0]:.3f}, {w[1]:.3f}), loss {beale(*w):.2e}")
    title, picture = "Minimising Beale's function", args.output / "loss-surface.png"
    plots.surface(beale, paths, picture, xlim=(-0.5, 4.2), ylim=(-1.4, 1.4), minimum=(3, 0.5), title=title)


if __name__ == "__main__":
    main()
