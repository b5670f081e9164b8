"""Drop-in replacements for ``torch.optim``: the same classes, arguments, state and checkpoints, with the fused step.

``import fusedopt.torch as optim`` works in place of ``import torch.optim as optim``: all other names are torch's.

Beyond torch, every class takes these keyword-only options.

Options:
    state_dtype: dtype of the state arrays (``torch.float32`` or ``"float32"``; also float64, bfloat16, float16, int8);
        None is torch's own, that of the parameter. Per group, as are all options but the last.
    master: the residual of a 16-bit parameter: ``"split16"`` or ``"split8"``, its low-order bits, or ``"float32"``, a
        master weight.
    stochastic_rounding, seed: 16-bit parameters and states are rounded at random, without bias.
    ema_decay: maintains a moving average of the parameters; ``opt.ema_parameters()`` swaps it in.
    l1: soft-thresholds parameters by lr * l1 after the update.
    lazy: takes sparse gradients and updates the rows that they name alone; weight decay, momentum and l1 apply to a row
        when it is named.
    row_steps: with sparse gradients, counts the steps of each row for the bias correction; see docs/sparse.md.
    row_wise (Adagrad): keeps one number for each row of a parameter.
    max_grad_norm: clips the gradients of all groups together to this global norm inside the step, as
        ``torch.nn.utils.clip_grad_norm_`` would; gradients are not written. The norm is ``opt.last_grad_norm``.

State tensors may be replaced, loaded, written to or moved to other memory between steps. Two threads cannot step one
optimizer at the same time: the second one gets a RuntimeError, and its call changes nothing.

Sparse gradients are taken by SparseAdam, by SGD without momentum and by Adagrad, as in torch.

Tensors that the kernels do not take (other sparse ones, complex, differentiable, on the CPU capturable, subclasses of
Tensor, overlapping memory, devices other than the CPU and, with the CUDA build, CUDA's) fall back to torch's own step,
with one ``FallbackWarning`` that says why. Together with one of the options above, or with gradients that are still
scaled, this raises RuntimeError instead.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ._backward import InBackward, step_in_backward
from ._fallback import FallbackWarning
from ._optimizer import CLASSES
from ._state import memory_report

__all__ = ["FallbackWarning", "InBackward", "memory_report", "step_in_backward", *CLASSES]
globals().update(CLASSES)

_LAZY = {
    "Offload": "._offload",
    "ScheduledLR": "._schedule",
    **dict.fromkeys(("convert", "install", "installed", "uninstall"), "._install"),
    **dict.fromkeys(("Callback", "Trainer", "fit"), "..training"),
}
"""Public names whose modules are imported when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name == "functional":
        return importlib.import_module(".functional", __name__)
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "functional", *dir(torch.optim)})
