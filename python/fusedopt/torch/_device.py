"""Questions about devices: do our kernels run there, is a graph being captured, can kernels read a scalar."""

from __future__ import annotations

from functools import cache

import torch

from .. import _core

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The types of tensors that kernels take; subclasses may mean something else by their memory."""


@cache
def _cuda_refusal(index: int) -> str:
    try:
        return _core.device_refusal("cuda", index)
    except _core.DeviceOutOfMemoryError:  # torch may hold memory in its cache; an exception is not cached here
        torch.cuda.empty_cache()
        return _core.device_refusal("cuda", index)


def device_refusal(device: torch.device) -> str:
    """Why our kernels do not run on this device; empty if they do."""
    if device.type == "cpu":
        return ""
    return _cuda_refusal(device.index or 0) if device.type == "cuda" else "no kernels serve it"


def has_device_kernels(device: torch.device) -> bool:
    """Whether a device library serves this device, in place of the host's kernels."""
    return not (_core.device_refusal("cpu") if device.type == "cpu" else device_refusal(device))


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on this device, and our kernels run there."""
    return has_device_kernels(device) and _core.device_capturing(torch.Tensor, device.index or 0)


def readable_scalar(x: torch.Tensor | None, device: torch.device) -> bool:
    """Whether kernels on this device can read this scalar. None counts as readable: there is nothing to read."""
    return x is None or (type(x) in PLAIN and x.device == device and x.dtype == torch.float32 and x.numel() == 1)
