"""Pictures of benchmark results, of training and of trained models; matplotlib's objects, no window, no global state.

Every function takes what it draws and an optional path, and returns the Figure. matplotlib is imported when a picture
is asked for.
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
