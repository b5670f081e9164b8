"""The command line: ``fusedopt info``, ``bench``, ``run``, ``train``, ``compare`` and ``predict``."""

from .arguments import main

__all__ = ["main"]
