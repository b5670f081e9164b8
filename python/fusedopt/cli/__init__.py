"""The command line: ``fusedopt info``, ``bench``, ``run``, ``train`` and ``compare``."""

from .arguments import main

__all__ = ["main"]
