"""A softmax network with ten hidden units on MNIST (784-10-10) if you have its files, else on digits (64-10-10).

Run: ``python examples/mnist.py [--data FOLDER] [--quick]``; the folder contains train-images-idx3-ubyte and the three
other files, gzipped or not.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import accuracy_score  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.data import load
from fusedopt.estimators import MLPClassifier

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with MNIST's files")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    table = load(args.data or "digits")
    if table.test is not None:  # MNIST has 10,000 test images
        x_train, y_train, (x_test, y_test) = table.x, table.y, table.test
    else:
        x_train, x_test, y_train, y_test = train_test_split(
            table.x, table.y, test_size=0.2, random_state=SEED, stratify=table.y
        )
    model = MLPClassifier(
        (10,), solver="adam", learning_rate_init=3e-3, batch_size=32, max_iter=5 if args.quick else 40, tol=None,
        random_state=SEED,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x_train, y_train)
    predicted = model.predict(x_test)
    shape = "-".join(map(str, [x_train.shape[1], 10, len(model.classes_)]))
    print(
        f"{shape} on {args.data or 'digits'}: {len(x_train)} rows, {model.n_iter_} epochs, loss {model.loss_:.4f}, "
        f"{accuracy_score(y_test, predicted):.2%} of {len(x_test)} correct"
    )
    plots.history(model.history_, args.output / "mnist-history.png", title=f"A softmax network, {shape}")
    plots.confusion_matrix(y_test, predicted, args.output / "mnist-confusion.png", title="Confusion of digits")


if __name__ == "__main__":
    main()
