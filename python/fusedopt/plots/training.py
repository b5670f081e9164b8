"""Plots of training: curves by step or epoch, schedules, comparisons of optimizers, paths on a loss surface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import COLOURS, CYCLE, GRID, INK, OURS, PathLike, canvas, finish, legend, line_style, plain, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = Mapping[str, Sequence[float] | np.ndarray[Any, Any]]


def losses(
    curves: Mapping[str, Sequence[float]], path: PathLike | None = None, *, title: str = "The same losses"
) -> Figure:
    """Training losses by step. Later curves are dashed, so that coinciding curves stay visible."""
    figure, axes = canvas(title, 7, "training loss by step")
    styles = ((OURS, "-", 3.2), (COLOURS["default"], (0, (4, 3)), 1.8), (COLOURS["fused"], (0, (1, 3)), 1.8))
    for (name, values), (colour, dashes, width) in zip(curves.items(), styles, strict=False):
        axes.plot(values, color=colour, linestyle=dashes, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(color=GRID)
    axes.legend(frameon=False)
    return finish(figure, path)


def schedule(
    schedules: Callable[[int], float] | Mapping[str, Callable[[int], float]],
    steps: int,
    path: PathLike | None = None,
    *,
    title: str = "Schedule",
    ylabel: str = "learning rate",
) -> Figure:
    """One schedule, or several by name, over the first ``steps`` steps.

    Args:
        schedules: functions of the step, such as those of :mod:`fusedopt.schedules`.
        steps: number of steps to draw.
        path: file to save to; None: not saved.
        title: title of the plot; ``ylabel`` names the value.
    """
    several = schedules if isinstance(schedules, Mapping) else {"": schedules}
    figure, axes = canvas(title, 7, f"{ylabel} by step")
    for i, (name, function) in enumerate(several.items()):
        values = [function(t) for t in range(steps)]
        axes.step(range(steps), values, where="post", label=name, **line_style(i))
    axes.set_xlabel("step")
    axes.grid(color=GRID)
    if "" not in several:
        legend(figure)
    return finish(figure, path)


def history(columns: Columns, path: PathLike | None = None, *, title: str = "Training") -> Figure:
    """The history of one training run: losses, scores and learning rate, one panel each.

    Args:
        columns: name -> list, all of equal length, as in ``trainer.history`` and ``estimator.history_``: ``loss``,
            ``val_loss``; ``score`` and other ``val_...``; ``lr``. The x axis is ``step`` if present, else the epoch.
        path: file to save to; None: not saved.
        title: title of the plot.

    Raises:
        ValueError: there is nothing to draw.
    """
    scores = [name for name in columns if name == "score" or (name.startswith("val_") and name != "val_loss")]
    panels = {"loss": [n for n in ("loss", "val_loss") if n in columns], "score": scores}
    panels["learning rate"] = [name for name in ("lr",) if name in columns]
    shown = {label: names for label, names in panels.items() if names}
    if not shown:
        raise ValueError(f"columns: expected loss, val_loss, score or lr, got {', '.join(columns) or 'none'}")
    figure = sheet(title, 4.2, 1.5 + 4.3 * len(shown))
    for axes, (label, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _curves(axes, label, columns, names)
    return finish(figure, path)


def _curves(axes: Axes, label: str, columns: Columns, names: Sequence[str]) -> None:
    plain(axes, label)
    for i, name in enumerate(names):
        values = np.asarray(columns[name], float)
        at = columns["step"] if "step" in columns else np.arange(1, len(values) + 1)
        marker = "o" if len(values) < 3 else None
        label_of = _NAMES.get(name, name.removeprefix("val_"))
        axes.plot(at, values, marker=marker, label=label_of, **line_style(i))
    axes.set_xlabel("step" if "step" in columns else "epoch")
    axes.grid(color=GRID)
    if len(names) > 1 or label == "score":
        axes.legend(frameon=False, fontsize=9 if len(names) < 8 else 6)
    finite = np.concatenate([np.asarray(columns[name], float) for name in names])
    finite = finite[np.isfinite(finite)]
    if label == "learning rate":
        axes.set_ylim(bottom=0)
    if label == "loss" and len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")


_NAMES = {"loss": "training", "val_loss": "validation", "score": "held-out part"}


def compare(
    histories: Mapping[str, Columns],
    column: str = "loss",
    path: PathLike | None = None,
    *,
    title: str = "Optimizers compared",
    ylabel: str | None = None,
    log: bool = True,
) -> Figure:
    """One column of several histories by epoch, such as the losses of several optimizers.

    Args:
        histories: name -> history; see :func:`history`.
        column: the column to draw; histories without it are skipped.
        path: file to save to; None: not saved.
        title: title of the plot; ``ylabel`` names the column.
        log: use a logarithmic axis if all values are positive.

    Raises:
        ValueError: no history has the column.
    """
    rows = {name: np.asarray(one[column], float) for name, one in histories.items() if column in one}
    if not rows:
        raise ValueError(f"column: none of the histories has {column!r}")
    figure, axes = canvas(title, 8, f"{ylabel or column} by epoch")
    for i, (name, values) in enumerate(rows.items()):
        at = np.arange(1, len(values) + 1)
        axes.plot(at, values, label=name, **line_style(i))
    if log and all((values[np.isfinite(values)] > 0).all() for values in rows.values()):
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.grid(color=GRID)
    legend(figure, 6)
    return finish(figure, path)


def surface(
    function: Callable[[Any, Any], Any],
    paths: Mapping[str, Sequence[Sequence[float]] | np.ndarray[Any, Any]],
    path: PathLike | None = None,
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    minimum: tuple[float, float] | None = None,
    title: str = "Paths on a loss surface",
) -> Figure:
    """Paths of optimizers over the contours of a function of two parameters.

    Args:
        function: function of two arrays; contours are equidistant in the logarithm of its values.
        paths: name -> points of an optimizer, shape (steps, 2).
        path: file to save to; None: not saved.
        xlim: range of the first parameter; ``ylim``: of the second.
        minimum: a point to mark.
        title: title of the plot.
    """
    figure, axes = canvas(title, 9, "contours of the loss, logarithmic; a dot marks the start of each path")
    x, y = np.meshgrid(np.linspace(*xlim, 300), np.linspace(*ylim, 300))
    z = np.asarray(function(x, y), float)
    heights = np.log10(z - z.min() + 1e-3 * (z.max() - z.min()))
    axes.contourf(x, y, heights, levels=24, cmap="Greys", alpha=0.55)
    axes.contour(x, y, heights, levels=24, colors="white", linewidths=0.5)
    for i, (name, points) in enumerate(paths.items()):
        px, py = np.asarray(points, float).T
        colour = CYCLE[i % len(CYCLE)]
        axes.plot(px, py, color=colour, linewidth=1.6, label=name)
        axes.plot(px[0], py[0], "o", color=INK, markersize=5)
        axes.plot(px[-1], py[-1], "o", color=colour, markersize=7, markeredgecolor="white")
    if minimum is not None:
        axes.plot(*minimum, "*", color=INK, markersize=14, label="minimum")
    axes.set_xlim(xlim)
    axes.set_ylim(ylim)
    legend(figure, 6)
    return finish(figure, path)
