"""Logistic regression and a linear SVM on the breast cancer data set: one estimator, two losses; AUC and F1.

Run: ``python examples/classification.py [--quick]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped, unused-ignore]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped, unused-ignore]

from fusedopt import plots
from fusedopt.estimators import LinearClassifier
from fusedopt.schedules import Cosine

SEED, BATCH = 0, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 10 if args.quick else 50

    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=SEED, stratify=y)
    steps = epochs * -(-len(x_train) // BATCH)
    curves = {}
    for name, loss in (("logistic regression", "log_loss"), ("linear SVM", "hinge")):
        linear = LinearClassifier(
            loss, solver="adam", learning_rate=Cosine(0.03, steps), alpha=1e-3, batch_size=BATCH, max_iter=epochs,
            tol=None, random_state=SEED,
        )  # fmt: skip
        model = make_pipeline(StandardScaler(), linear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x_train, y_train)
        score, predicted = model.decision_function(x_test), model.predict(x_test)
        curves[name] = (y_test, score)
        print(
            f"{name:>20}: AUC {roc_auc_score(y_test, score):.4f}, F1 {f1_score(y_test, predicted):.4f}, "
            f"{accuracy_score(y_test, predicted):.2%} of {len(y_test)} correct"
        )
        plots.confusion_matrix(y_test, predicted, args.output / f"{name.replace(' ', '-').lower()}.png", title=name)
    plots.roc(curves, args.output / "classification-roc.png", title="Breast cancer, test rows")


if __name__ == "__main__":
    main()
