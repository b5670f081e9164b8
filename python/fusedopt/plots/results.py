"""Plots of a trained model: fit, predictions against true values, confusion matrix, ROC curve, grid of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    GRID,
    INK,
    OURS,
    QUIET,
    SCATTER,
    PathLike,
    canvas,
    density,
    finish,
    legend,
    line_style,
    plain,
    sheet,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fit(
    x: Any,
    y: Any,
    predict: Callable[[np.ndarray[Any, Any]], Any],
    path: PathLike | None = None,
    *,
    title: str = "Fit and data",
    xlabel: str = "x",
    ylabel: str = "y",
) -> Figure:
    """Data with one feature, and the model's predictions over its range.

    Args:
        x: the feature, shape (n,) or (n, 1).
        y: the target, shape (n,).
        predict: maps an array (m, 1) to m predictions, such as ``estimator.predict``.
        path: file to save to; None: not saved.
        title: title of the plot; ``xlabel`` and ``ylabel`` name feature and target.

    Raises:
        ValueError: x has more than one feature, or x and y differ in length.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.size != len(x) or x.size != y.size:
        raise ValueError(f"x, y: expected one feature and as many targets, got shapes {x.shape} and {y.shape}")
    figure, axes = canvas(title, 7, f"{ylabel} by {xlabel}")
    if x.size > SCATTER:
        density(axes, x.ravel(), y.ravel())
    else:
        axes.plot(x.ravel(), y.ravel(), "o", color=QUIET, markersize=4, alpha=0.6, markeredgewidth=0, label="data")
    grid = np.linspace(x.min(), x.max(), 200)
    axes.plot(grid, np.asarray(predict(grid[:, None]), float).ravel(), color=OURS, linewidth=2.4, label="fit")
    axes.set_xlabel(xlabel)
    axes.grid(color=GRID)
    legend(figure)
    return finish(figure, path)


def predictions(
    y_true: Any, y_pred: Any, path: PathLike | None = None, *, title: str = "Predictions against truth"
) -> Figure:
    """Scatter plot of predictions by true value, with the line of equality.

    Args:
        y_true: true values, shape (n,).
        y_pred: predictions, shape (n,).
        path: file to save to; None: not saved.
        title: title of the plot.
    """
    true, predicted = np.asarray(y_true, float).ravel(), np.asarray(y_pred, float).ravel()
    figure = sheet(title, 5.6, 5.8)
    axes = plain(figure.add_subplot(), "prediction by true value")
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, color=INK, linewidth=1, zorder=1)
    if len(true) > SCATTER:
        density(axes, true, predicted)
    else:
        axes.plot(true, predicted, "o", color=OURS, markersize=5, alpha=0.55, markeredgewidth=0)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    axes.set_aspect("equal")
    axes.grid(color=GRID)
    return finish(figure, path)


def confusion_matrix(
    y_true: Any,
    y_pred: Any,
    path: PathLike | None = None,
    *,
    labels: Sequence[Any] | None = None,
    title: str = "Confusion matrix",
) -> Figure:
    """Confusion matrix, drawn by scikit-learn.

    Args:
        y_true: true classes.
        y_pred: predicted classes.
        path: file to save to; None: not saved.
        labels: the classes, in drawing order.
        title: title of the plot.
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # type: ignore[import-untyped, unused-ignore]

    names = np.unique(np.asarray(y_true)) if labels is None else labels
    n, longest = len(names), max((len(str(name)) for name in names), default=0)
    cells = min(max(n, 5), 60)
    figure = sheet(title, 2.4 + 0.42 * cells, 2.2 + 0.46 * cells)
    axes = plain(figure.add_subplot())
    ConfusionMatrixDisplay.from_predictions(
        y_true, y_pred, labels=labels, ax=axes, colorbar=False, include_values=n <= 60,
        xticks_rotation="vertical" if longest > 3 else "horizontal",
        cmap=_shades(), text_kw={"fontsize": 9 if n <= 20 else 7},
    )  # fmt: skip
    if n > 20:
        for text in axes.texts:  # zeros would hide the rest
            text.set_visible(text.get_text() != "0")
    if n > 60:
        every = -(-n // 30)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(0, n, every), [str(name) for name in names[::every]])
    axes.spines[:].set_visible(False)
    return finish(figure, path)


def roc(curves: Any, path: PathLike | None = None, *, title: str = "Receiver operating characteristic") -> Figure:
    """ROC curves: true positive rate by false positive rate, with the area under each curve.

    Args:
        curves: name -> (true classes 0 or 1, scores).
        path: file to save to; None: not saved.
        title: title of the plot.
    """
    from sklearn.metrics import auc, roc_curve  # type: ignore[import-untyped, unused-ignore]

    figure = sheet(title, 5.6, 5.8)
    axes = plain(figure.add_subplot(), "true positive rate by false positive rate")
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    for i, (name, (truth, score)) in enumerate(curves.items()):
        false, true, _ = roc_curve(truth, score)
        axes.plot(false, true, linewidth=2, **line_style(i), label=f"{name}: area {auc(false, true):.4f}")
    axes.set_aspect("equal")
    axes.grid(color=GRID)
    axes.legend(frameon=False, loc="lower right", fontsize=10 if len(curves) < 8 else 7)
    return finish(figure, path)


def grid(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    path: PathLike | None = None,
    *,
    title: str = "Accuracy",
    xlabel: str = "",
) -> Figure:
    """A table of numbers, such as the scores of a grid search; higher is darker.

    Args:
        values: shape (rows, columns).
        rows: labels of the rows.
        columns: labels of the columns; ``xlabel`` is their common name.
        path: file to save to; None: not saved.
        title: title of the plot.
    """
    table = np.asarray(values, float)
    figure = sheet(title, 1.8 + 0.55 * len(rows), 2.6 + 1.1 * len(columns))
    axes = plain(figure.add_subplot())
    least, most = np.nanquantile(table, 0.25), np.nanmax(table)  # the best values differ little
    axes.imshow(table, cmap=_shades(), aspect="auto", vmin=least, vmax=most)
    middle = (least + most) / 2
    for (i, j), value in np.ndenumerate(table):
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", color="white" if value > middle else INK)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(xlabel)
    axes.spines[:].set_visible(False)
    return finish(figure, path)


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ours", ["#ffffff", OURS])
