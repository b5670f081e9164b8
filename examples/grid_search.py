"""Searches hyperparameters of a network with scikit-learn's GridSearchCV: optimizer, learning rate, width.

The estimators follow scikit-learn's conventions, so they work in its searches, pipelines and cross-validation.
Run: ``python examples/grid_search.py [--quick]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import GridSearchCV, train_test_split  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped, unused-ignore]
from sklearn.preprocessing import MinMaxScaler  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.estimators import MLPClassifier

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smaller grid, fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=SEED, stratify=y)
    solvers = ["sgd", "adam"] if args.quick else ["sgd", "rmsprop", "adam", "lion"]
    rates = [1e-3, 1e-1] if args.quick else [1e-4, 1e-3, 1e-2, 1e-1]
    grid: dict[str, list[Any]] = {
        "mlpclassifier__solver": solvers,
        "mlpclassifier__learning_rate_init": rates,
        "mlpclassifier__hidden_layer_sizes": [(32,)] if args.quick else [(32,), (128,)],
    }
    network = MLPClassifier(batch_size=32, max_iter=3 if args.quick else 15, tol=None, random_state=SEED)
    search = GridSearchCV(make_pipeline(MinMaxScaler(), network), grid, cv=2 if args.quick else 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(x_train, y_train)
    best = {name.removeprefix("mlpclassifier__"): value for name, value in search.best_params_.items()}
    print(f"best of {len(search.cv_results_['params'])}: {best}")
    print(f"{search.best_score_:.2%} accuracy in cross-validation, {search.score(x_test, y_test):.2%} on test rows")

    def mean(solver: str, rate: float) -> float:
        """The score with the best width."""
        results = zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
        return max(
            float(score)
            for params, score in results
            if params["mlpclassifier__solver"] == solver and params["mlpclassifier__learning_rate_init"] == rate
        )

    table = np.array([[mean(solver, rate) for rate in rates] for solver in solvers])
    names, title = [f"{rate:g}" for rate in rates], "Cross-validation accuracy, by optimizer and learning rate"
    plots.grid(table, solvers, names, args.output / "grid-search.png", title=title, xlabel="learning rate")


if __name__ == "__main__":
    main()
