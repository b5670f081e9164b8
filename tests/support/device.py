"""The simulated device: the kernels of a GPU as host code, over threads that are fibres. No tests here.

While it is open, torch tensors on the CPU count as tensors on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from fusedopt import _core

LIBRARY = Path(_core.__file__).with_name("_simulated.so")
CHUNK = 16384  # elements of a block of threads: kChunk in cpp/device/device.h


@contextmanager
def opened(path: Path = LIBRARY) -> Iterator[None]:
    """The library is what ``_core`` looks for its device's kernels in."""
    _core.set_device_library(str(path))
    try:
        _core.device_refusal("cuda")  # opens it
        yield
    finally:
        _core.set_device_library("")


def _graph(what: int) -> None:
    ctypes.CDLL(str(LIBRARY)).fusedopt_graph(what)


@contextmanager
def _meanwhile(what: int) -> Iterator[None]:
    _graph(what)
    try:
        yield
    finally:
        _graph(1)


def capture() -> AbstractContextManager[None]:
    """What is launched now runs at each ``replay``, and not before."""
    return _meanwhile(0)


def replay() -> None:
    _graph(2)


def failing() -> AbstractContextManager[None]:
    """Nothing can be launched."""
    return _meanwhile(3)


def full() -> AbstractContextManager[None]:
    """The device has no memory left."""
    return _meanwhile(4)


def some_freed() -> None:
    """Within ``full``: no longer."""
    _graph(1)


@contextmanager
def placed(devices: dict[torch.Tensor, int]) -> Iterator[None]:
    """These tensors lie on other devices than 0, or on the host (-1)."""
    place = ctypes.CDLL(str(LIBRARY)).fusedopt_place
    place.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    place(None, 0, 0)
    for tensor, device in devices.items():
        place(tensor.data_ptr(), tensor.untyped_storage().nbytes(), device)
    try:
        yield
    finally:
        place(None, 0, 0)
