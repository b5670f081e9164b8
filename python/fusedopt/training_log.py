"""The module that pickles of 0.1.0 name for what a Trainer holds; it is in ``training/``."""

from .training import Callback
from .training.log import CSV, JSONLines, _NoBar

__all__ = ["CSV", "Callback", "JSONLines", "_NoBar"]
