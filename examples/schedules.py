"""Polynomial decay and reduce-on-plateau against a constant learning rate, on the same network and data.

A large constant learning rate is fast at first but oscillates about the minimum; a decaying one converges.
Run: ``python examples/schedules.py [--quick]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.estimators import MLPClassifier
from fusedopt.schedules import Constant, Polynomial, ReduceOnPlateau, Schedule

SEED, BATCH, LR = 0, 8, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 8 if args.quick else 40

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.2, random_state=SEED, stratify=y
    )
    steps = epochs * -(-len(x_train) // BATCH)
    schedules: dict[str, Schedule] = {
        "constant": Constant(LR),
        "polynomial decay, power 2": Polynomial(LR, steps, power=2.0),
        "reduce on plateau": ReduceOnPlateau(LR, factor=0.3, patience=1),
    }
    histories = {}
    for name, schedule in schedules.items():
        model = MLPClassifier(
            (64,), solver="sgd", learning_rate=schedule, batch_size=BATCH, alpha=0.05, max_iter=epochs, tol=None,
            random_state=SEED,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x_train, y_train)
        histories[name] = model.history_
        print(
            f"{name:>26}: lr {model.history_['lr'][0]:.4f} to {model.history_['lr'][-1]:.6f}, "
            f"loss {model.loss_:.4f}, {model.score(x_test, y_test):.2%} of the test digits correct"
        )
    plots.compare(histories, "loss", args.output / "schedules-losses.png", title="Schedules compared")
    rates = args.output / "schedules.png"
    plots.compare(histories, "lr", rates, title="Schedules", ylabel="learning rate", log=False)


if __name__ == "__main__":
    main()
