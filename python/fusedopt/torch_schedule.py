"""The module that pickles of 0.1.0 name for a scheduler; it is in ``torch/_schedule.py``."""

from .torch._schedule import ScheduledLR

__all__ = ["ScheduledLR"]
