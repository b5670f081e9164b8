"""The module that pickles of 0.1.0 name for the wrapper of a state tensor; it is in ``torch/_state.py``."""

from .torch._state import Keep

__all__ = ["Keep"]
