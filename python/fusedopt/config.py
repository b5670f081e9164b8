"""Settings of the process: instruction set and number of threads; versions of what is installed."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from . import _core

_threads: int | None = None


def isas() -> tuple[str, ...]:
    """The instruction sets that this build and this processor support, best last."""
    return tuple(_core.isas())


def get_isa() -> str:
    """The instruction set in use."""
    return str(_core.isa())


def set_isa(name: str | None) -> None:
    """Selects an instruction set (``"baseline"``, ``"avx2"``, ``"avx512"``); None selects the best.

    Results do not depend on it. The environment variable ``FUSEDOPT_ISA`` sets it at import.

    Raises:
        ValueError: this build or this processor does not support it.
    """
    if not _core.use_isa(name):
        raise ValueError(f"isa: expected one of {', '.join(isas())} on this machine, got {name!r}")


def set_num_threads(n: int | None) -> None:
    """Sets the number of threads of a step; None restores the default (see :func:`get_num_threads`).

    Results do not depend on it.

    Raises:
        ValueError: ``n`` is not a positive integer or None.
    """
    global _threads
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"n: expected a positive integer or None, got {n!r}")
    _threads = n


def get_num_threads() -> int:
    """The number of threads of a step.

    The value of :func:`set_num_threads`, else ``FUSEDOPT_NUM_THREADS``, else ``torch.get_num_threads()`` if torch is
    imported, else ``OMP_NUM_THREADS``, else the number of processors available to the process.
    """
    if _threads is not None:
        return _threads
    torch = sys.modules.get("torch")
    if torch is not None and not _from_environment and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    return int(_core.default_threads())


def _read_environment() -> bool:
    isa = os.environ.get("FUSEDOPT_ISA")
    if isa:
        try:
            set_isa(isa)
        except ValueError as e:
            raise ValueError(f"FUSEDOPT_ISA: {e}") from None
    threads = os.environ.get("FUSEDOPT_NUM_THREADS")
    if threads and not (threads.isdigit() and int(threads) > 0):
        raise ValueError(f"FUSEDOPT_NUM_THREADS: expected a positive integer, got {threads!r}")
    return bool(threads)


_from_environment = _read_environment()
_cuda = next(Path(_core.__file__).parent.glob("_cuda.*"), None)  # loaded when the first tensor on a GPU is used
if _cuda is not None:
    _core.set_device_library(str(_cuda))


def config() -> dict[str, Any]:
    """The settings in use, as a dict; :func:`show_config` prints them."""
    numpy, torch = sys.modules["numpy"], sys.modules.get("torch")
    return {
        "version": _core.__version__,
        "isa": get_isa(),
        "isas": isas(),
        "threads": get_num_threads(),
        "runtime": "pool" if torch is None else f"pool; beside torch: {_core.torch_team()}",
        "cuda": "not built" if _cuda is None else "built",
        "numpy": numpy.__version__,
        "torch": _installed_torch() if torch is None else str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _installed_torch() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch") + " (not imported)"
    except PackageNotFoundError:
        return "not installed"


def show_config() -> None:
    """Prints version, instruction set, threads, and the versions of NumPy and torch."""
    for key, value in config().items():
        print(f"{key:8} {', '.join(value) if isinstance(value, tuple) else value}")
