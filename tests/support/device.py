"""The simulated device: CUDA kernels as host code, with fibres as threads. No tests here.

While it is open, CPU tensors count as tensors on the device.
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
    """Opens the simulated library as the library of device kernels."""
    _core.set_device_library(str(path))
    try:
        _core.device_refusal("cuda")  # opens it
        if path == LIBRARY:
            ctypes.CDLL(str(LIBRARY)).fusedopt_forget()
        yield
    finally:
        _core.set_device_library("")


_modes: set[str] = set()  # that hold now


def _simulate(modes: set[str]) -> None:
    _modes.clear()
    _modes.update(modes)
    flags = [ctypes.c_bool(mode in _modes) for mode in ("capturing", "failing", "full")]
    ctypes.CDLL(str(LIBRARY)).fusedopt_simulate(*flags)


@contextmanager
def _meanwhile(mode: str) -> Iterator[None]:
    _simulate(_modes | {mode})
    try:
        yield
    finally:
        _simulate(_modes - {mode})


def capture() -> AbstractContextManager[None]:
    """Records launches, which then run at each ``replay``."""
    return _meanwhile("capturing")


def replay() -> None:
    ctypes.CDLL(str(LIBRARY)).fusedopt_replay()


def failing() -> AbstractContextManager[None]:
    """Launches and copies fail."""
    return _meanwhile("failing")


def full() -> AbstractContextManager[None]:
    """The device has no memory left."""
    return _meanwhile("full")


def some_freed() -> None:
    """Within ``full``: memory is available again."""
    _simulate(_modes - {"full"})


def asked() -> list[str]:
    """Calls since the last query: launches and synchronisations by stream, memory, contexts."""
    log = ctypes.CDLL(str(LIBRARY)).fusedopt_log
    log.restype = ctypes.c_char_p
    lines: str = log().decode()
    return lines.splitlines()


@contextmanager
def placed(devices: dict[torch.Tensor, int]) -> Iterator[None]:
    """Assigns tensors to devices other than 0, or to the host (-1)."""
    place = ctypes.CDLL(str(LIBRARY)).fusedopt_place
    place.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    place(None, 0, 0)
    for tensor, device in devices.items():
        place(tensor.data_ptr(), tensor.untyped_storage().nbytes(), device)
    try:
        yield
    finally:
        place(None, 0, 0)
