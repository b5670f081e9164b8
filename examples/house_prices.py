"""Predicts house prices from area and age, with and without scaling the features.

``houses`` generates the data, since no package ships a table with both columns. Area in square metres and age in years
differ in scale: gradient descent is slow on the raw features and fast on scaled ones.
Run: ``python examples/house_prices.py [--quick]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from sklearn.compose import TransformedTargetRegressor  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import mean_absolute_error, r2_score  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped, unused-ignore]
from sklearn.preprocessing import FunctionTransformer, StandardScaler  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.estimators import LinearRegressor

SEED = 0


def houses(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Area (m2, lognormal about 110) and age (years, 0 to 100), and the price in thousands.

    The price is 40 + 2.8 area - 1.1 age, times lognormal noise of 8%: linear except for the noise.
    """
    rng = np.random.default_rng(SEED)
    area, age = 110 * np.exp(0.35 * rng.standard_normal(rows)), rng.uniform(0, 100, rows)
    price = (40 + 2.8 * area - 1.1 * age) * np.exp(0.08 * rng.standard_normal(rows))
    return np.column_stack([area, age]), price


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 20 if args.quick else 60

    x, y = houses(2000)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=SEED)
    histories = {}
    for name, prepare, lr in (
        ("unscaled", FunctionTransformer(), 1e-4),  # a larger rate diverges
        ("scaled", StandardScaler(), 0.3),
    ):
        # One batch of all training rows: plain gradient descent, so that only the scale matters.
        descent = LinearRegressor(
            learning_rate="constant", eta0=lr, batch_size=len(x_train), momentum=0.0, nesterovs_momentum=False,
            penalty=None, max_iter=epochs, tol=None,
        )  # fmt: skip
        model = TransformedTargetRegressor(make_pipeline(prepare, descent), transformer=StandardScaler())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x_train, y_train)
        predicted = model.predict(x_test)
        histories[f"{name}, lr {lr:g}"] = model.regressor_[-1].history_
        r2, error = r2_score(y_test, predicted), mean_absolute_error(y_test, predicted)
        print(f"{name:>12}, lr {lr:g}: R2 {r2:.4f}, mean absolute error {error:.1f} thousand")
    title = "House prices by gradient descent: unscaled and scaled features"
    plots.compare(histories, "loss", args.output / "house-prices-losses.png", title=title)
    plots.predictions(y_test, predicted, args.output / "house-prices.png", title="House prices in thousands")


if __name__ == "__main__":
    main()
