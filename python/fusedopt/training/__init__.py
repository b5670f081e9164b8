"""The training loop for torch models: ``fusedopt.torch.Trainer``, ``fit`` and ``Callback``."""

from .loop import Callback, Trainer, fit

__all__ = ["Callback", "Trainer", "fit"]
