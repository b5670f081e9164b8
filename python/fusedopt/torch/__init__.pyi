# Made by python/make_stubs.py from the rules: do not edit, run `make stubs`.

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from ..training import Callback as Callback
from ..training import Trainer as Trainer
from ..training import fit as fit
from . import functional as functional
from ._backward import InBackward as InBackward
from ._backward import step_in_backward as step_in_backward
from ._fallback import FallbackWarning as FallbackWarning
from ._install import convert as convert
from ._install import install as install
from ._install import installed as installed
from ._install import uninstall as uninstall
from ._offload import Offload as Offload
from ._schedule import ScheduledLR as ScheduledLR
from ._state import memory_report as memory_report

__all__ = [
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FallbackWarning",
    "InBackward",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SparseAdam",
    "memory_report",
    "step_in_backward",
]

class _Fused(Optimizer):
    @property
    def last_grad_norm(self) -> torch.Tensor | None: ...
    @property
    def last_step_skipped(self) -> bool: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None: ...
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def ema_parameters(self) -> AbstractContextManager[None]: ...

class SGD(_Fused, torch.optim.SGD):
    """Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    The rule is class SGD in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class Adagrad(_Fused, torch.optim.Adagrad):
    """AdaGrad: divides each element's step by the root of its sum of squared gradients.

    The rule is class Adagrad in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        row_wise: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class RMSprop(_Fused, torch.optim.RMSprop):
    """RMSprop: divides the gradient by its running root mean square; centered: by its standard deviation.

    The rule is class RMSprop in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class Adam(_Fused, torch.optim.Adam):
    """Adam: bias-corrected first and second moments of the gradient.

    The rule is class Adam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class AdamW(_Fused, torch.optim.AdamW):
    """AdamW: Adam with decoupled weight decay.

    The rule is class AdamW in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class NAdam(_Fused, torch.optim.NAdam):
    """NAdam: Adam with Nesterov momentum, which warms up.

    The rule is class NAdam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class RAdam(_Fused, torch.optim.RAdam):
    """RAdam: Adam with a rectified adaptive learning rate, used once its variance is bounded.

    The rule is class RAdam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class Adamax(_Fused, torch.optim.Adamax):
    """Adamax: Adam with the infinity norm in place of the second moment.

    The rule is class Adamax in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class Adadelta(_Fused, torch.optim.Adadelta):
    """Adadelta: scales the gradient by the ratio of the running RMS of updates to that of gradients.

    The rule is class Adadelta in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class Lion(_Fused):
    """Lion: steps by the sign of interpolated momentum; one state, decoupled weight decay.

    The rule is class Lion in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class AdEMAMix(_Fused):
    """AdEMAMix: AdamW with a second, slower average of the gradient.

    The rule is class AdEMAMix in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

class SparseAdam(_Fused, torch.optim.SparseAdam):
    """Adam over the rows that a sparse gradient names; other rows and their moments stay as they are.

    The rule is class SparseAdam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        maximize: bool = False,
        *,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        lazy: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def __getattr__(name: str) -> Any: ...  # torch.optim's
