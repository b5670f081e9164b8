"""What ``fusedopt train`` and ``fusedopt compare`` do: data, a pipeline of scikit-learn's, results in a folder.

The arguments are parsed in ``arguments.py``; data come from ``data.py``, models from ``estimators``, metrics from
scikit-learn, pictures from ``plots``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from sklearn import metrics  # type: ignore[import-untyped, unused-ignore]
from sklearn.compose import (  # type: ignore[import-untyped, unused-ignore]
    ColumnTransformer,
    TransformedTargetRegressor,
)
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.impute import SimpleImputer  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import Pipeline, make_pipeline  # type: ignore[import-untyped, unused-ignore]
from sklearn.preprocessing import OneHotEncoder, StandardScaler  # type: ignore[import-untyped, unused-ignore]

from .. import plots, schedules
from ..data import Table, load
from ..rules import RULES

OPTIMIZERS = {name.lower(): name for name in RULES}
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SCHEDULES: dict[str, Callable[[float, int], schedules.Schedule]] = {
    "constant": lambda lr, steps: schedules.Constant(lr),
    "linear": lambda lr, steps: schedules.Linear(lr, 0.0, steps),
    "polynomial": lambda lr, steps: schedules.Polynomial(lr, steps, power=2.0),
    "exponential": lambda lr, steps: schedules.Exponential(lr, 0.01 ** (1 / steps)),
    "step": lambda lr, steps: schedules.Step(lr, -(-steps // 3)),
    "cosine": lambda lr, steps: schedules.Cosine(lr, steps),
    "restarts": lambda lr, steps: schedules.CosineRestarts(lr, -(-steps // 7), mult=2),
    "onecycle": lambda lr, steps: schedules.OneCycle(lr, steps),
    "plateau": lambda lr, steps: schedules.ReduceOnPlateau(lr, factor=0.3, patience=2),
    "wsd": lambda lr, steps: schedules.WarmupStableDecay(lr, steps, warmup=steps // 20, decay=steps // 5),
}
"""By the name of the option: the schedule from the learning rate over all steps."""

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def split(table: Table, test_size: float, seed: int) -> Arrays:
    """The training rows, the test rows, their targets; classes in equal parts. A test part of the data's own is kept.

    Raises:
        ValueError: for one class only, or a class with a single row.
    """
    if table.task == "classification":
        classes, counts = np.unique(table.y, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"data: expected two or more classes, got {classes[0]!r} alone")
        if counts.min() < 2:
            raise ValueError(f"data: expected two or more rows of each class, got one of {classes[counts.argmin()]!r}")
    if table.test is not None:
        return table.x, table.test[0], table.y, table.test[1]
    stratify = table.y if table.task == "classification" else None
    parts: list[Any] = train_test_split(table.x, table.y, test_size=test_size, random_state=seed, stratify=stratify)
    return parts[0], parts[1], parts[2], parts[3]


def preprocessing(table: Table) -> Any:
    """Numbers: the median where one is missing, then mean 0 and variance 1. Texts: the most frequent, then one-hot."""
    if table.pixels:
        return "passthrough"
    numbers = [i for i in range(table.x.shape[1]) if i not in table.texts]
    return ColumnTransformer([
        ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
        (
            "texts",
            make_pipeline(
                SimpleImputer(strategy="most_frequent", missing_values=None),
                OneHotEncoder(handle_unknown="ignore", sparse_output=False),
            ),
            table.texts,
        ),
    ])  # fmt: skip


def build(args: argparse.Namespace, table: Table, rows: int, optimizer: str, lr: float) -> Pipeline:
    """Preprocessing and the model that the arguments describe, for so many training rows."""
    from ..estimators import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor

    batch = min(args.batch_size, rows)
    held_out = int(np.ceil(0.1 * rows)) if args.early_stopping else 0
    steps = args.epochs * -(-(rows - held_out) // batch)
    bar = not args.quiet and importlib.util.find_spec("tqdm") is not None
    common: dict[str, Any] = {
        "solver": optimizer, "batch_size": batch, "max_iter": args.epochs, "tol": 1e-4 if args.early_stopping else None,
        "early_stopping": args.early_stopping, "random_state": args.seed, "alpha": args.l2, "l1": args.l1,
        "learning_rate": SCHEDULES[args.schedule](lr, steps), "max_grad_norm": args.max_grad_norm,
        "ema_decay": args.ema_decay, "checkpoint": args.checkpoint, "progress": bar,
    }  # fmt: skip
    classify = table.task == "classification"
    if args.model == "mlp":
        common |= {"hidden_layer_sizes": tuple(args.hidden), "activation": args.activation, "dropout": args.dropout}
        model = (MLPClassifier if classify else MLPRegressor)(**common, batch_norm=args.batch_norm)
    else:
        loss = {"log": "log_loss", "hinge": "hinge"}[args.loss] if classify else "squared_error"
        model = (LinearClassifier if classify else LinearRegressor)(loss=loss, **common)
    if not classify:
        model = TransformedTargetRegressor(model, transformer=StandardScaler())
    return Pipeline([("prepare", preprocessing(table)), ("model", model)])


def fitted(pipeline: Pipeline) -> Any:
    """The estimator of ours inside the pipeline."""
    model = pipeline[-1]
    return getattr(model, "regressor_", model)


def evaluate(pipeline: Pipeline, x: Any, y: Any, task: str) -> dict[str, float]:
    """scikit-learn's metrics; with more than two classes precision, recall, F1 and AUC are means over the classes."""
    predicted = pipeline.predict(x)
    if task == "regression":
        return {
            "mse": float(metrics.mean_squared_error(y, predicted)),
            "mae": float(metrics.mean_absolute_error(y, predicted)),
            "r2": float(metrics.r2_score(y, predicted)),
        }
    classes = pipeline.classes_
    binary = {"average": "binary", "pos_label": classes[1]} if len(classes) == 2 else {"average": "macro"}
    found = {"accuracy": float(metrics.accuracy_score(y, predicted))}
    for name in ("precision", "recall", "f1"):
        found[name] = float(getattr(metrics, f"{name}_score")(y, predicted, zero_division=0, **binary))
    if len(classes) == 2:
        found["auc"] = float(metrics.roc_auc_score(y == classes[1], scores(pipeline, x)))
    elif hasattr(pipeline, "predict_proba") and set(np.unique(y)) == set(classes):
        found["auc"] = float(metrics.roc_auc_score(y, pipeline.predict_proba(x), multi_class="ovr"))
    return found


def scores(pipeline: Pipeline, x: Any) -> Any:
    """Of two classes, how much each row belongs to the second."""
    if hasattr(pipeline, "predict_proba"):
        return pipeline.predict_proba(x)[:, 1]
    return pipeline.decision_function(x)


def train(args: argparse.Namespace) -> dict[str, float]:
    """``fusedopt train``: fits, evaluates on the held-out part, saves model, history, metrics and pictures."""
    table = load(args.data, target=args.target, task=args.task)
    x_train, x_test, y_train, y_test = split(table, args.test_size, args.seed)
    lr = args.lr if args.lr is not None else RULES[OPTIMIZERS[args.optimizer]].defaults["lr"]
    pipeline = build(args, table, len(x_train), args.optimizer, lr)
    _announce(args, table, x_train, x_test)
    _fit(pipeline, x_train, y_train)
    found = evaluate(pipeline, x_test, y_test, table.task)
    history = {name: np.asarray(values, float) for name, values in fitted(pipeline).history_.items()}
    print(f"{len(history['loss'])} epochs, loss {history['loss'][-1]:.4g}")
    print("\n".join(f"{name:>10} {value:.4f}" for name, value in found.items()))
    folder: Path = args.output
    folder.mkdir(parents=True, exist_ok=True)
    joblib.dump(pipeline, folder / "model.joblib")
    (folder / "metrics.json").write_text(json.dumps({"settings": _settings(args), "metrics": found}, indent=2) + "\n")
    _write_history(history, folder / "history.csv")
    plots.history(history, folder / "history.png", title=f"{args.model} on {Path(args.data).name}, {args.optimizer}")
    if table.task == "regression":
        plots.predictions(y_test, pipeline.predict(x_test), folder / "predictions.png")
    else:
        plots.confusion_matrix(y_test, pipeline.predict(x_test), folder / "confusion.png", labels=pipeline.classes_)
        if len(pipeline.classes_) == 2:
            truth = y_test == pipeline.classes_[1]
            plots.roc({args.model: (truth, scores(pipeline, x_test))}, folder / "roc.png")
    print(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return found


def compare(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """``fusedopt compare``: one model with every optimizer, each with the rate that ends lowest, and their curves."""
    table = load(args.data, target=args.target, task=args.task)
    x_train, x_test, y_train, y_test = split(table, args.test_size, args.seed)
    score = "r2" if table.task == "regression" else "accuracy"
    rates = args.lrs or RATES
    quiet = argparse.Namespace(**{**vars(args), "quiet": True, "checkpoint": None})
    results: dict[str, dict[str, float]] = {}
    histories: dict[str, Mapping[str, Any]] = {}
    _announce(args, table, x_train, x_test)
    print("each optimizer with the learning rate, of " + ", ".join(f"{r:g}" for r in rates) + ", that ends lowest")
    print(f"{'optimizer':>10} {'lr':>8} {'last loss':>10} {score:>9} {'seconds':>8}")
    for name in args.optimizers:
        best = None
        for lr in rates:
            pipeline = build(quiet, table, len(x_train), name, lr)
            start = time.perf_counter()
            try:
                _fit(pipeline, x_train, y_train)
            except ValueError as e:
                if "diverges" not in str(e) and "finite" not in str(e):
                    raise
                continue
            last = float(fitted(pipeline).history_["loss"][-1])
            if best is None or last < best[0]:
                best = last, lr, pipeline, time.perf_counter() - start
        if best is None:
            print(f"{name:>10} diverges at every rate")
            continue
        last, lr, pipeline, seconds = best
        found = evaluate(pipeline, x_test, y_test, table.task)
        results[name] = {"lr": lr, "loss": last, "seconds": seconds, **found}
        histories[f"{OPTIMIZERS[name]}, lr {lr:g}"] = fitted(pipeline).history_
        print(f"{name:>10} {lr:8g} {last:10.4g} {found[score]:9.4f} {seconds:8.2f}")
    if not results:
        raise ValueError("every optimizer diverges at every rate: try smaller --lrs")
    folder: Path = args.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps({"settings": _settings(args), "results": results}, indent=2) + "\n")
    title = f"{args.model} on {Path(args.data).name}: every optimizer at its best rate"
    plots.compare(histories, "loss", folder / "compare.png", title=title, ylabel="training loss")
    print(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return results


def _fit(pipeline: Pipeline, x: Any, y: Any) -> None:
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # a fit that diverges says so itself
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs were asked for
        pipeline.fit(x, y)


def _announce(args: argparse.Namespace, table: Table, x_train: Any, x_test: Any) -> None:
    columns = f"{table.x.shape[1]} columns" + (f", {len(table.texts)} of them texts" if table.texts else "")
    print(f"{args.data}: {table.task}, {columns}, {len(x_train)} rows to train on, {len(x_test)} to test with")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "run"}


def _write_history(history: Mapping[str, Any], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        columns = {name: values for name, values in history.items() if len(values) == len(history["loss"])}
        writer.writerow(["epoch", *columns])
        writer.writerows([epoch, *row] for epoch, row in enumerate(zip(*columns.values(), strict=True), 1))
