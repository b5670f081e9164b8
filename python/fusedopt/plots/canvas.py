"""Shared by all plots: colours, empty figures, saving."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

INK, QUIET, GRID, OURS = "#22252b", "#8b929e", "#eceef2", "#0f8b6d"
COLOURS = {"default": "#f2a541", "fused": "#4c6fbf", "foreach": "#b86bb0", "compiled": "#7d8aa3"}
SPARE = ("#c8553d", "#588b8b", "#9a7aa0", "#b5a642")
CYCLE = (OURS, "#f2a541", "#4c6fbf", "#c8553d", "#b86bb0", "#588b8b", "#22252b", "#b5a642", "#7d8aa3", "#e07fa0")


def sheet(title: str, height: float, width: float = 9.5) -> Figure:
    """An empty figure with a title; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    return figure


def plain(axes: Axes, subtitle: str = "") -> Axes:
    """Axes without frame and ticks, with a subtitle above."""
    axes.set_title(subtitle, loc="left", fontsize=9, color=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d5d8de")
    axes.tick_params(length=0, colors=INK)
    axes.set_axisbelow(True)
    return axes


def canvas(title: str, lines: int, subtitle: str = "") -> tuple[Figure, Axes]:
    """A figure with room for ``lines`` rows, and its axes."""
    figure = sheet(title, 1.9 + 0.46 * lines)
    return figure, plain(figure.add_subplot(), subtitle)


def finish(figure: Figure, path: PathLike | None) -> Figure:
    """Saves the figure if there is a path, and returns it."""
    if path is not None:
        figure.savefig(path, dpi=150, facecolor="white")
    return figure


def legend(figure: Figure, columns: int = 4) -> None:
    """Draws one legend of all axes below the plot, in as many columns as fit."""
    names = [name for axes in figure.axes for name in axes.get_legend_handles_labels()[1]]
    inches = 0.55 + 0.075 * max(map(len, names), default=0)  # a line sample and a name at 9 points
    fit = max(1, min(columns, int(figure.get_figwidth() / inches)))
    figure.legend(frameon=False, loc="outside lower left", ncols=fit, fontsize=9)


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number; no two of the first 30 are equal."""
    return {"color": CYCLE[i % len(CYCLE)], "linestyle": _DASHES[i // len(CYCLE) % len(_DASHES)]}


_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
SCATTER = 20_000  # above this number of points a plot shows their density


def density(axes: Axes, x: Any, y: Any) -> None:
    """Draws many points as a density: the logarithm of their number per cell."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("density", ["#d9ece6", OURS, INK])
    axes.hexbin(x, y, gridsize=80, bins="log", cmap=shades, linewidths=0.1)
