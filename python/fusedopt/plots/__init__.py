"""Pictures of benchmark results and of training, with matplotlib's object interface: no window, no global state.

Every function takes what it draws and an optional path, and returns the Figure. matplotlib is imported when a picture
is asked for.
"""

from .benchmarks import bandwidth, save_all, sizes, speedups
from .training import losses, schedule

__all__ = ["bandwidth", "losses", "save_all", "schedule", "sizes", "speedups"]
