"""Fused optimizer steps: one pass over memory, bit-identical results on every machine.

In-place functions (``fusedopt.adam_``) and optimizer classes (``fusedopt.Adam``) for NumPy arrays; drop-in
``torch.optim`` classes in ``fusedopt.torch``. Importing this package imports NumPy only.
"""

if __spec__ is not None and type(__spec__.loader).__name__ == "zipimporter":
    raise ImportError("fusedopt contains compiled code and cannot be imported from a zip archive: install or unpack it")

from . import losses
from ._core import __version__
from .config import config, get_isa, get_num_threads, isas, set_isa, set_num_threads, show_config
from .numpy import *  # noqa: F403
from .numpy import __all__ as _made

__all__ = [
    "__version__",
    "config",
    "get_isa",
    "get_num_threads",
    "isas",
    "losses",
    "set_isa",
    "set_num_threads",
    "show_config",
    *_made,
]
