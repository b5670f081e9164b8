"""``fusedopt train`` and ``fusedopt compare``: load a table, fit, evaluate, and save the results in a folder.

The arguments are parsed in ``arguments.py``; tables come from ``data.py``, pipelines and their files from
``models.py``, metrics from scikit-learn, plots from ``plots``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics  # type: ignore[import-untyped, unused-ignore]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from sklearn.pipeline import Pipeline  # type: ignore[import-untyped, unused-ignore]

from .. import plots
from ..columns import Column
from ..data import Table, load
from ..rules import RULES
from . import models
from .models import build, fitted, scores

OPTIMIZERS = {name.lower(): name for name in RULES}
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INTERRUPTED = 130  # exit status after Ctrl-C

_DEFAULTS = {
    "hidden": [100], "activation": "relu", "dropout": 0.0, "batch_norm": False, "loss": "log", "test_size": 0.2,
    "max_categories": models.MAX_CATEGORIES,
}  # fmt: skip
_OUTPUTS = (
    "model.skops", "model.joblib", "metrics.json", "history.csv", "history.png", "predictions.png", "confusion.png",
    "roc.png", "compare.json", "compare.png",
)  # fmt: skip

Parts = tuple[Any, Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]


def split(table: Table, test_size: float, seed: int) -> Parts:
    """Training rows, test rows and their targets, stratified by class. A test part that the data provide is used as is.

    Raises:
        ValueError: there is only one class, or a class has a single row.
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


def evaluate(pipeline: Pipeline, x: Any, y: Any, predicted: Any, task: str) -> dict[str, float]:
    """scikit-learn's metrics; for more than two classes, precision, recall, F1 and AUC are means over the classes."""
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


def train(args: argparse.Namespace) -> int:
    """``fusedopt train``: fits, evaluates on the test rows, saves model, history, metrics and plots."""
    with _output(args, Path("train-output")) as folder:
        table, (x_train, x_test, y_train, y_test) = _prepare(args)
        if args.lr is None:
            args.lr = RULES[OPTIMIZERS[args.optimizer]].defaults["lr"]
        pipeline = build(args, table, len(x_train), args.optimizer, args.lr)
        with _stage(args, "fitting"):
            cut = _fit(pipeline, x_train, y_train)
        history = {name: np.asarray(values, float) for name, values in fitted(pipeline).history_.items()}
        epochs = len(history.get("loss", ()))
        if not epochs:
            print("fusedopt train: interrupted in the first epoch; nothing was saved", file=sys.stderr)
            return INTERRUPTED
        with _stage(args, "evaluating"):
            predicted = pipeline.predict(x_test)
            found = evaluate(pipeline, x_test, y_test, predicted, table.task)
        print(f"{epochs} epochs, loss {history['loss'][-1]:.4g}" + (", interrupted" if cut else ""))
        print("\n".join(f"{name:>10} {value:.4f}" for name, value in found.items()))
        with _stage(args, "saving"):
            _clear(folder)
            models.save(pipeline, folder / f"model.{args.format}")
            _write_json(
                folder / "metrics.json",
                {
                    "settings": _settings(args, table),
                    "columns": [asdict(column) for column in table.columns],
                    "metrics": found,
                    "epochs": epochs,
                    "interrupted": cut,
                },
            )
            _write_history(history, folder / "history.csv")
            title = f"{args.model} on {Path(args.data).name}, {args.optimizer}" + (" (interrupted)" if cut else "")
            plots.history(history, folder / "history.png", title=title)
            if table.task == "regression":
                plots.predictions(y_test, predicted, folder / "predictions.png")
            else:
                plots.confusion_matrix(y_test, predicted, folder / "confusion.png", labels=pipeline.classes_)
                if len(pipeline.classes_) == 2:
                    truth = y_test == pipeline.classes_[1]
                    plots.roc({args.model: (truth, scores(pipeline, x_test))}, folder / "roc.png")
        print(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    if cut:
        more = f"; the same command resumes from {args.checkpoint}" if args.checkpoint else ""
        print(
            f"fusedopt train: interrupted after {epochs} of {args.epochs} epochs; "
            f"the model at that point is saved in {folder}{more}",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


def compare(args: argparse.Namespace) -> int:
    """``fusedopt compare``: trains one model with every optimizer, each at its best learning rate; plots the losses."""
    with _output(args, Path("compare-output")) as folder:
        table, parts = _prepare(args)
        score = "r2" if table.task == "regression" else "accuracy"
        rates = args.lrs or RATES
        print("each optimizer at the learning rate with the lowest last loss, of " + ", ".join(f"{r:g}" for r in rates))
        print(f"{'optimizer':>10} {'lr':>8} {'last loss':>10} {score:>9} {'seconds':>8}")
        results: dict[str, dict[str, float]] = {}
        histories: dict[str, Mapping[str, Any]] = {}
        cut = False
        with _fits(args, len(args.optimizers) * len(rates)) as bar:
            for name in args.optimizers:
                best, cut = _best_rate(args, table, parts, name, rates, bar)
                if cut:
                    break
                if best is None:
                    bar.write(f"{name:>10} diverges at every rate")
                    continue
                last, lr, pipeline, seconds = best
                found = evaluate(pipeline, parts[1], parts[3], pipeline.predict(parts[1]), table.task)
                results[name] = {"lr": lr, "loss": last, "seconds": seconds, **found}
                histories[f"{OPTIMIZERS[name]}, lr {lr:g}"] = fitted(pipeline).history_
                bar.write(f"{name:>10} {lr:8g} {last:10.4g} {found[score]:9.4f} {seconds:8.2f}")
        if not results:
            if cut:
                print("fusedopt compare: interrupted before the first result; nothing was saved", file=sys.stderr)
                return INTERRUPTED
            raise ValueError("every optimizer diverges at every learning rate: try smaller --lrs")
        _clear(folder)
        settings = {"settings": _settings(args, table), "results": results, "interrupted": cut}
        _write_json(folder / "compare.json", settings)
        title = f"{args.model} on {Path(args.data).name}: every optimizer at its best rate"
        plots.compare(histories, "loss", folder / "compare.png", title=title, ylabel="training loss")
        print(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    if cut:
        done = f"{len(results)} of {len(args.optimizers)} optimizers"
        print(f"fusedopt compare: interrupted; {done} are saved in {folder}", file=sys.stderr)
        return INTERRUPTED
    return 0


Best = tuple[float, float, Pipeline, float]


def _best_rate(
    args: argparse.Namespace, table: Table, parts: Parts, optimizer: str, rates: Any, bar: Any
) -> tuple[Best | None, bool]:
    """Last loss, learning rate, model and seconds of the best fit; and whether Ctrl-C interrupted one."""
    quiet = argparse.Namespace(**{**vars(args), "quiet": True, "checkpoint": None})
    best: Best | None = None
    for lr in rates:
        pipeline = build(quiet, table, len(parts[0]), optimizer, lr)
        start = time.perf_counter()
        try:
            if _fit(pipeline, parts[0], parts[2]):
                return None, True
        except ValueError as e:
            if "diverges" not in str(e) and "finite" not in str(e):
                raise
            continue
        finally:
            bar.update(1)
        last = float(fitted(pipeline).history_["loss"][-1])
        if best is None or last < best[0]:
            best = last, lr, pipeline, time.perf_counter() - start
    return best, False


def _prepare(args: argparse.Namespace) -> tuple[Table, Parts]:
    """Loads the table, checks the options, splits the rows, and prints how the columns are interpreted."""
    with _stage(args, "reading"):
        table = load(
            args.data, target=args.target, task=args.task, separator=args.separator, header=not args.no_header,
            drop=args.drop or (), progress=not args.quiet,
        )  # fmt: skip
    _check_options_apply(args, table)
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    parts = split(table, args.test_size, args.seed)
    if table.columns:
        print(describe(table.columns) + "\n")
        if not args.no_header and all(_looks_like_number(name) for name in table.names):
            print("The first row is used as column names; give --no-header if it is data.")
        counts = {c: table.x[c].nunique() for c in table.of_kind("category")}
        for name in (c for c, n in counts.items() if n > args.max_categories):
            print(
                f"{name}: of {counts[name]:,} categories the {args.max_categories - 1:,} most frequent are kept, "
                "the rest are merged (--max-categories)"
            )
    if table.why:
        other = "regression" if table.task == "classification" else "classification"
        print(f"target: {table.why}; give --task {other} if they are not")
    inputs = f"{table.x.shape[1]} columns"
    print(f"{args.data}: {table.task}, {inputs}, {len(parts[0]):,} training rows, {len(parts[1]):,} test rows")
    return table, parts


def describe(columns: list[Column], limit: int = 60) -> str:
    """A text table of the columns: name, kind, missing values, example."""
    shown = [*columns[: limit - 1], columns[-1]] if len(columns) > limit else columns
    rows = [("column", "kind", "missing", "example", "")]
    rows += [(_cut(c.name), c.kind, f"{c.missing:,}" if c.missing else "", _cut(c.example), c.note) for c in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    if len(columns) > limit:
        lines.insert(limit, f"... {len(columns) - limit:,} more")
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int = 28) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _looks_like_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _check_options_apply(args: argparse.Namespace, table: Table) -> None:
    """Raises ValueError for options without effect, such as options of a network given for a linear model."""
    unused = {
        "--model linear": ("hidden", "activation", "dropout", "batch_norm") if args.model == "linear" else (),
        "--model mlp": ("loss",) if args.model == "mlp" else (),
        "regression": ("loss",) if table.task == "regression" else (),
        "data with a separate test part": ("test_size",) if table.test is not None else (),
        "data without categorical columns": () if table.of_kind("category") else ("max_categories",),
    }
    for why, names in unused.items():
        if wrong := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]:
            raise ValueError(f"{', '.join(wrong)}: does not apply to {why}")


def _fit(pipeline: Pipeline, x: Any, y: Any) -> bool:
    """Fits the pipeline. Returns whether Ctrl-C ended the fit early."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # a fit that diverges raises an error
        warnings.simplefilter("ignore", ConvergenceWarning)  # --epochs is the limit on purpose
        warnings.filterwarnings("ignore", "Training interrupted by user")
        pipeline.fit(x, y)
    return bool(fitted(pipeline).interrupted_)


# ---- progress


@contextlib.contextmanager
def _stage(args: argparse.Namespace, what: str) -> Iterator[None]:
    """Prints the name of the stage to stderr if it takes longer than two seconds."""
    timer = threading.Timer(2.0, lambda: print(f"fusedopt {args.command}: {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    if not args.quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _NoBar:
    """Stand-in for tqdm's progress bar; only prints lines."""

    def update(self, n: int) -> None: ...

    def write(self, line: str) -> None:
        print(line, flush=True)


@contextlib.contextmanager
def _fits(args: argparse.Namespace, total: int) -> Iterator[Any]:
    """A progress bar over fits, shown after two seconds."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, unit="fit", file=sys.stderr, delay=2, leave=False, disable=args.quiet) as bar:
        yield bar


# ---- the folder of results


@contextlib.contextmanager
def _output(args: argparse.Namespace, default: Path) -> Iterator[Path]:
    """The folder of results, created and checked for write access first; removed at the end if it is still empty.

    Raises:
        FileExistsError: the folder given with --output is not empty. The default folder gets a number instead.
        OSError: the folder is not writable.
    """
    folder: Path = args.output or default
    if args.output is None:
        number = 2
        while _occupied(folder):
            folder, number = default.with_name(f"{default.name}-{number}"), number + 1
    elif _occupied(folder) and not args.overwrite and not _is_interrupted(args, folder):
        raise FileExistsError(f"output: {folder} is not empty; give another folder, or use --overwrite")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise OSError(f"output: nothing can be written in {folder} ({e.strerror})") from None
    try:
        yield folder
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # it is not empty
                one.rmdir()


def _occupied(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _is_interrupted(args: argparse.Namespace, folder: Path) -> bool:
    """Whether the folder has the results of an interrupted fit whose checkpoint this one resumes from."""
    if getattr(args, "checkpoint", None) is None or not args.checkpoint.exists():
        return False
    try:
        return bool(json.loads((folder / "metrics.json").read_text())["interrupted"])
    except (OSError, ValueError, KeyError):
        return False


def _clear(folder: Path) -> None:
    """Removes the results of an earlier run, so that they do not mix with those of this run."""
    for name in _OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def _settings(args: argparse.Namespace, table: Table) -> dict[str, Any]:
    """The options that applied to this run."""
    found = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if v is not None}
    for name in ("hidden", "activation", "dropout", "batch_norm") if args.model == "linear" else ("loss",):
        del found[name]
    return found | {"task": table.task}


def _write_json(path: Path, value: Any) -> None:
    """Writes strictly valid JSON: a number that is not finite becomes null."""
    path.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_history(history: Mapping[str, Any], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        columns = {name: values for name, values in history.items() if len(values) == len(history["loss"])}
        writer.writerow(["epoch", *columns])
        writer.writerows([epoch, *row] for epoch, row in enumerate(zip(*columns.values(), strict=True), 1))
