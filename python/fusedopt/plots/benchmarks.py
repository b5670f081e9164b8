"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canvas import COLOURS, GRID, INK, OURS, SPARE, PathLike, canvas, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fusedopt.bench import Result

NAMES = {
    "ours": "fusedopt",
    "default": "torch (default)",
    "fused": "torch (fused=True)",
    "foreach": "torch (foreach=True)",
    "compiled": "torch.compile",
}


def _colour(name: str, others: Sequence[str]) -> str:
    spare = [n for n in others if n not in COLOURS]
    return COLOURS.get(name) or SPARE[spare.index(name) % len(SPARE)]


def _labels(axes: Axes, results: Sequence[Result]) -> None:
    axes.set_yticks(range(len(results)), [r.case.label for r in results])
    axes.set_ylim(len(results) - 0.4, -0.6)  # the first row on top


def speedups(
    results: Sequence[Result], path: PathLike | None = None, *, title: str = "One step, against PyTorch"
) -> Figure:
    """Bar chart of the contenders' times relative to fusedopt's, on a log axis; right of 1, fusedopt is faster."""
    rows = [r for r in results if len(_others(r)) > 0]
    others = list(dict.fromkeys(n for r in rows for n in _others(r)))
    figure, axes = canvas(
        title, len(rows), "speedup of fusedopt: ratio of median times, measured turn by turn in one run"
    )
    ratios = [{n: v for n in others if (v := r.ratio(n)) is not None} for r in rows]
    for y, row in enumerate(ratios):
        height = min(0.4, 0.8 / len(row))
        for k, (name, ratio) in enumerate(row.items()):
            at, faster = y + (k - (len(row) - 1) / 2) * height, ratio >= 1
            axes.barh(at, ratio - 1, height * 0.9, left=1, color=_colour(name, others))
            axes.annotate(
                f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x",
                (ratio, at), (4 if faster else -4, 0), textcoords="offset points", va="center",
                ha="left" if faster else "right", fontsize=8, color=INK,
            )  # fmt: skip
    for name in others:
        axes.barh(0, 0, left=1, color=_colour(name, others), label=NAMES.get(name, name))
    least, most = (pick([1.0, *(v for row in ratios for v in row.values())]) for pick in (min, max))
    axes.set_xscale("log")
    axes.set_xlim(least * 0.8, most * 1.35)
    ticks = [t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if least * 0.8 <= t <= most * 1.35]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=GRID)
    axes.axvline(1, color=INK, linewidth=1)
    _labels(axes, rows)
    if others:
        figure.legend(frameon=False, loc="outside lower left", ncols=5, fontsize=9)
    return finish(figure, path)


def bandwidth(results: Sequence[Result], path: PathLike | None = None) -> Figure:
    """GB/s: bars for fusedopt, dots for the other contenders, lines for the ceiling."""
    rows = [r for r in results if r.bandwidth() is not None]
    figure, axes = canvas(
        "Share of the memory bandwidth",
        len(rows),
        "minimum bytes of a step / its time, GB/s; right: share of the ceiling",
    )
    others = list(dict.fromkeys(n for r in rows for n in _others(r)))
    for y, r in enumerate(rows):
        ours, top = r.bandwidth() or 0.0, r.bandwidth("ceiling")
        axes.barh(y, ours, 0.62, color=OURS, label=NAMES["ours"] if y == 0 else None)
        if top is not None:
            ceiling = "a copy on the GPU" if r.case.kind == "gpu" else "mul_ in place"
            label = f"{ceiling}: the ceiling" if y == 0 else None
            axes.plot([top, top], [y - 0.42, y + 0.42], color=INK, linewidth=2, label=label)
            axes.text(1.01, y, f"{ours / top:.0%}", transform=axes.get_yaxis_transform(), va="center", color=INK)
        for name in others:
            if (theirs := r.bandwidth(name)) is not None:
                colour = _colour(name, others)
                axes.plot(theirs, y, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
    for name in others:
        axes.plot([], [], "o", color=_colour(name, others), label=NAMES.get(name, name))
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=GRID)
    _labels(axes, rows)
    if rows:
        figure.legend(frameon=False, loc="outside lower left", ncols=5, fontsize=9)
    return finish(figure, path)


def sizes(results: Sequence[Result], path: PathLike | None = None) -> Figure:
    """Time per parameter by number of parameters, one line per format."""
    figure, axes = canvas("Adam from the L1 cache to main memory", 9, "ns per parameter, fusedopt")
    for form in dict.fromkeys(str(r.case.format) for r in results):
        line = [
            (r.case.elements, (r.seconds() or 0.0) / r.case.elements * 1e9)
            for r in results
            if str(r.case.format) == form
        ]
        axes.plot(*zip(*sorted(line), strict=True), "o-", markersize=4, linewidth=1.6, label=form)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return finish(figure, path)


def _others(result: Result) -> list[str]:
    return [n for n in result.times if n not in ("ours", "ceiling")]


def save_all(results: Sequence[Result], folder: PathLike) -> list[Path]:
    """Saves every plot that the results allow to ``folder``; returns the paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []

    def draw(picture: Any, rows: Sequence[Result], name: str, **how: Any) -> None:
        if rows:
            made.append(target / name)
            picture(rows, made[-1], **how)

    for suite in dict.fromkeys(r.suite for r in results):
        rows = [r for r in results if r.suite == suite]
        if suite == "formats":
            draw(sizes, rows, "formats.png")
            continue
        title = {"training": "Whole iterations of training", "numpy": "One step, against in-place NumPy"}.get(suite)
        draw(speedups, [r for r in rows if _others(r)], f"{suite}-speedup.png", **({"title": title} if title else {}))
        draw(bandwidth, [r for r in rows if r.share is not None], f"{suite}-bandwidth.png")
    return made
