"""The simulated device: the kernels of a GPU as host code, over threads that are fibres. No tests here.

While it is open, torch tensors on the CPU count as tensors on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusedopt import _core

LIBRARY = Path(_core.__file__).with_name("_simulated.so")
CHUNK = 16384  # elements of a block of threads: kChunk in cpp/device.h


@contextmanager
def opened(path: Path = LIBRARY) -> Iterator[None]:
    """The library is what ``_core`` looks for its device's kernels in."""
    _core.set_device_library(str(path))
    try:
        _core.device_refusal("cuda")  # opens it
        yield
    finally:
        _core.set_device_library("")


class Graph:
    """What is launched within ``capture`` runs at each ``replay``, and not before."""

    def __init__(self) -> None:
        self._act = ctypes.CDLL(str(LIBRARY)).fusedopt_graph

    @contextmanager
    def capture(self) -> Iterator[None]:
        self._act(0)
        try:
            yield
        finally:
            self._act(1)

    def replay(self) -> None:
        self._act(2)
