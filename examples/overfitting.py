"""A network too large for its data, and five remedies: L1, L2, dropout, batch normalisation, early stopping.

150 training digits, a fifth of them with a wrong label; the others are test digits. The plot shows the test accuracy by
epoch. Run: ``python examples/overfitting.py [--quick]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.estimators import MLPClassifier

SEED = 0


def data() -> tuple[Any, ...]:
    """150 training digits, a fifth of them with a wrong label; the others are test digits."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y, train_size=150, random_state=SEED, stratify=y
    )
    rng = np.random.default_rng(SEED)
    wrong = rng.choice(len(y_train), len(y_train) // 5, replace=False)
    y_train[wrong] = (y_train[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return x_train, y_train, x_test, y_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 8 if args.quick else 100

    x_train, y_train, x_test, y_test = data()
    remedies: dict[str, dict[str, Any]] = {
        "nothing": {},
        "l2": {"alpha": 0.5},
        "l1": {"l1": 0.05},
        "dropout": {"dropout": 0.8},
        "batch normalisation": {"batch_norm": True},
        "early stopping": {"early_stopping": True, "validation_fraction": 0.2, "n_iter_no_change": 20},
    }
    histories = {}
    for name, remedy in remedies.items():
        right: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # With the same seed a fit of n epochs is a prefix of a longer one.
            for n in sorted({1, *range(2, 20, 2), *range(20, epochs + 1, 5)}):
                model = MLPClassifier(
                    (512,), batch_size=25, max_iter=n, tol=None, random_state=SEED, **{"alpha": 0.0, **remedy}
                ).fit(x_train, y_train)
                right += [model.score(x_test, y_test)] * (n - len(right))
        histories[name] = {"score": right}
        print(f"{name:>20}: {model.score(x_train, y_train):.1%} training accuracy, {right[-1]:.1%} test accuracy")
    title = "150 digits, a fifth with wrong labels, a network of 512 units"
    picture = args.output / "overfitting.png"
    plots.compare(histories, "score", picture, title=title, ylabel="test accuracy", log=False)


if __name__ == "__main__":
    main()
