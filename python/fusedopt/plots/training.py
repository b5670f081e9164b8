"""Pictures of training: losses, schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .canvas import COLOURS, CYCLE, GRID, OURS, PathLike, canvas, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses(
    curves: Mapping[str, Sequence[float]], path: PathLike | None = None, *, title: str = "The same losses"
) -> Figure:
    """Training losses by step; later curves are drawn dashed, so that equal ones can be seen to coincide."""
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
    """Schedules over the first so many steps: one, or several by name.

    Args:
        schedules: functions of the step, such as those of :mod:`fusedopt.schedules`.
        steps: how many steps are drawn.
        path: where the picture is saved, if it is.
    """
    several = schedules if isinstance(schedules, Mapping) else {"": schedules}
    figure, axes = canvas(title, 7, f"{ylabel} by step")
    for (name, function), colour in zip(several.items(), _colours(len(several)), strict=True):
        axes.step(range(steps), [function(t) for t in range(steps)], where="post", color=colour, label=name)
    axes.set_xlabel("step")
    axes.grid(color=GRID)
    if len(several) > 1 or "" not in several:
        figure.legend(frameon=False, loc="outside lower left", ncols=4, fontsize=9)
    return finish(figure, path)


def _colours(n: int) -> Sequence[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(n)]
