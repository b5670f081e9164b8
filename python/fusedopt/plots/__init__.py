"""Plots of benchmark results, training and trained models, as matplotlib figures without pyplot's global state.

Every function takes the data and an optional path, saves the figure if a path is given, and returns it. matplotlib is
imported on first use.
"""

from .benchmarks import bandwidth, save_all, sizes, speedups
from .results import confusion_matrix, fit, grid, predictions, roc
from .training import compare, history, losses, schedule, surface

__all__ = [
    "bandwidth",
    "compare",
    "confusion_matrix",
    "fit",
    "grid",
    "history",
    "losses",
    "predictions",
    "roc",
    "save_all",
    "schedule",
    "sizes",
    "speedups",
    "surface",
]
