"""The models of ``fusedopt train``: scikit-learn pipelines from the columns of a table to predictions, and their files.

A skops file contains only data and is checked before use. A joblib file is a pickle: loading it can run code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from sklearn.compose import (  # type: ignore[import-untyped, unused-ignore]
    ColumnTransformer,
    TransformedTargetRegressor,
)
from sklearn.impute import SimpleImputer  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import Pipeline  # type: ignore[import-untyped, unused-ignore]
from sklearn.preprocessing import (  # type: ignore[import-untyped, unused-ignore]
    FunctionTransformer,
    OneHotEncoder,
    StandardScaler,
)

from .. import columns, estimators, schedules
from ..data import Table
from ..rules import RULES

FORMATS = ("skops", "joblib")
MAX_CATEGORIES = 1000
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
"""Option -> function from the learning rate and the number of steps to the schedule."""

# The types in our model files besides scikit-learn's own. No others are loaded.
_PARTS: tuple[str, ...] = ("_fit.Fit", "_fit.Progress", "_network.Network", "_rates.Rate", "_linear.LinearClassifier")
_PARTS += ("_linear.LinearRegressor", "_mlp.MLPClassifier", "_mlp.MLPRegressor")
_TRUSTED = frozenset(
    [f"fusedopt.{name}" for name in RULES]
    + [f"fusedopt.estimators.{name}" for name in _PARTS]
    + [f"{one.__module__}.{one.__qualname__}" for one in vars(schedules).values() if isinstance(one, type)]
    + [f"fusedopt.columns.{one.__name__}" for one in (columns.numbers, columns.dates, columns.categories)]
    + ["numpy.dtype", "numpy.random.mtrand.RandomState"]
)


# ---- pipelines


def preprocessing(table: Table, max_categories: int = MAX_CATEGORIES) -> Any:
    """Transformer of a table: numbers are scaled to mean 0 and variance 1, categories are one-hot encoded.

    A missing number or date becomes the median, a missing category the most frequent one. Each column keeps at most
    ``max_categories`` outputs: its less frequent categories share one, as do categories not seen in training.
    """
    if table.pixels:
        return "passthrough"
    scaled = [("impute", SimpleImputer(strategy="median")), ("scale", StandardScaler())]
    if isinstance(table.x, np.ndarray):
        return Pipeline(scaled)
    comma = [column.name for column in table.columns if column.how == "comma"]
    formats = {column.name: column.how for column in table.columns if column.kind == "date" and column.how}
    # With a limit the encoder counts the rows of every category, which takes seconds for a million rows.
    limited = any(table.x[name].nunique() > max_categories for name in table.of_kind("category"))
    encode = OneHotEncoder(
        max_categories=max_categories if limited else None,
        handle_unknown="infrequent_if_exist" if limited else "ignore",
    )
    parts = {
        "number": [("convert", FunctionTransformer(columns.numbers, kw_args={"comma": comma})), *scaled],
        "date": [("convert", FunctionTransformer(columns.dates, kw_args={"formats": formats})), *scaled],
        "category": [
            ("convert", FunctionTransformer(columns.categories)),
            ("impute", SimpleImputer(strategy="most_frequent", missing_values=None)),
            ("encode", encode),
        ],
    }
    used = {kind: table.of_kind(kind) for kind in parts}
    return ColumnTransformer([(kind, Pipeline(steps), used[kind]) for kind, steps in parts.items() if used[kind]])


def build(args: argparse.Namespace, table: Table, rows: int, optimizer: str, lr: float) -> Pipeline:
    """Preprocessing and the model that the arguments describe; ``rows`` is the number of training rows."""
    batch = min(args.batch_size, rows)
    held_out = int(np.ceil(0.1 * rows)) if args.early_stopping else 0
    steps = args.epochs * -(-(rows - held_out) // batch)
    bar = not args.quiet and importlib.util.find_spec("tqdm") is not None
    common: dict[str, Any] = {
        "solver": optimizer, "batch_size": batch, "max_iter": args.epochs, "tol": 1e-4 if args.early_stopping else None,
        "early_stopping": args.early_stopping, "random_state": args.seed, "alpha": args.l2, "l1": args.l1,
        "learning_rate": SCHEDULES[args.schedule](lr, steps), "max_grad_norm": args.max_grad_norm,
        "ema_decay": args.ema_decay, "checkpoint": None if args.checkpoint is None else str(args.checkpoint),
        "progress": bar,
    }  # fmt: skip
    classify = table.task == "classification"
    model: Any
    if args.model == "mlp":
        common |= {"hidden_layer_sizes": tuple(args.hidden), "activation": args.activation, "dropout": args.dropout}
        made = estimators.MLPClassifier if classify else estimators.MLPRegressor
        model = made(**common, batch_norm=args.batch_norm)
    elif classify:
        model = estimators.LinearClassifier(loss={"log": "log_loss", "hinge": "hinge"}[args.loss], **common)
    else:
        model = estimators.LinearRegressor(loss="squared_error", **common)
    if not classify:
        model = TransformedTargetRegressor(model, transformer=StandardScaler())
    return Pipeline([("prepare", preprocessing(table, args.max_categories)), ("model", model)])


def fitted(pipeline: Pipeline) -> Any:
    """The fusedopt estimator inside the pipeline."""
    model = pipeline[-1]
    return getattr(model, "regressor_", model)


def scores(pipeline: Pipeline, x: Any) -> Any:
    """The score of the second of two classes for each row."""
    if hasattr(pipeline, "predict_proba"):
        return pipeline.predict_proba(x)[:, 1]
    return pipeline.decision_function(x)


def columns_of(pipeline: Pipeline) -> dict[str, list[str]] | None:
    """Kind -> columns that the model uses from a DataFrame; None if it takes an array."""
    prepare = pipeline[0]
    if not isinstance(prepare, ColumnTransformer):
        return None
    return {kind: list(names) for kind, _, names in prepare.transformers_ if kind in columns.USED}


# ---- files


def save(pipeline: Pipeline, path: Path) -> None:
    """Writes the model in the format of the suffix."""
    if path.suffix == ".joblib":
        joblib.dump(pipeline, path)
    else:
        import skops.io  # imported late: it imports all of scikit-learn, which imports torch

        skops.io.dump(pipeline, path)


def load(path: str | os.PathLike[str]) -> Pipeline:
    """Reads a model written by :func:`save`.

    Loading a ``.joblib`` file can run code: load only files that you trust. Loading a ``.skops`` file cannot; it raises
    an error if the file contains a type that is not part of these models.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or does not contain a model of ``fusedopt train``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model: there is no file {str(path)!r}")
    if path.suffix not in (".skops", ".joblib"):
        raise ValueError(f"model: expected a .skops or .joblib file, got {str(path)!r}")
    try:
        if path.suffix == ".joblib":
            print(f"{path}: loading a joblib file can run code; use only files you trust", file=sys.stderr)
            model = joblib.load(path)
        else:
            import skops.io

            if foreign := sorted(set(skops.io.get_untrusted_types(file=path)) - _TRUSTED):
                raise ValueError(f"it contains {', '.join(foreign)}, which are not part of a model of fusedopt train")
            model = skops.io.load(path, trusted=sorted(_TRUSTED))
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"model: {path} cannot be loaded: {e}") from None
    if not isinstance(model, Pipeline) or not isinstance(fitted(model), estimators._base.Estimator):
        raise ValueError(f"model: {path} does not contain a model of fusedopt train")
    return model
