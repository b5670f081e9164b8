# Made by python/make_stubs.py from the rules: do not edit, run `make stubs`.

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias

from numpy.typing import NDArray

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "adadelta_",
    "adagrad_",
    "adam_",
    "adamax_",
    "adamw_",
    "lion_",
    "nadam_",
    "radam_",
    "rmsprop_",
    "sgd_",
]

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Array: TypeAlias = NDArray[Any] | _SupportsDLPack
_Arrays: TypeAlias = _Array | Sequence[_Array]
_Steps: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
_Params: TypeAlias = NDArray[Any] | Sequence[NDArray[Any]] | Mapping[Any, NDArray[Any]] | Sequence[Mapping[str, Any]]
_Grads: TypeAlias = _Array | Sequence[_Array | Sequence[_Array | None] | None] | Mapping[Any, _Array | None]

class Optimizer:
    """The optimizer objects of the NumPy front end."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: list[dict[str, Any]]
    max_grad_norm: float | None
    last_grad_norm: float | None
    def add_param_group(self, group: Mapping[str, Any]) -> None: ...
    def step(self, grads: _Grads) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...

def sgd_(
    param: _Arrays,
    grad: _Arrays,
    momentum_buffer: _Arrays | None = None,
    *,
    lr: float = 0.001,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """Stochastic gradient descent, with momentum, dampening and Nesterov's look-ahead."""

class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, dampening and Nesterov's look-ahead."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.001,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def adagrad_(
    param: _Arrays,
    grad: _Arrays,
    sum: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.01,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> None:
    """AdaGrad: every coordinate's rate falls with the sum of its squared gradients."""

class Adagrad(Optimizer):
    """AdaGrad: every coordinate's rate falls with the sum of its squared gradients."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.01,
        *,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def rmsprop_(
    param: _Arrays,
    grad: _Arrays,
    square_avg: _Arrays,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    momentum_buffer: _Arrays | None = None,
    grad_avg: _Arrays | None = None,
) -> None:
    """RMSProp: divides by a running root mean square of the gradient; centered: by its standard deviation."""

class RMSprop(Optimizer):
    """RMSProp: divides by a running root mean square of the gradient; centered: by its standard deviation."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.01,
        *,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def adam_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    max_exp_avg_sq: _Arrays | None = None,
) -> None:
    """Adam: steps of both moments of the gradient, corrected for their start at zero."""

class Adam(Optimizer):
    """Adam: steps of both moments of the gradient, corrected for their start at zero."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def adamw_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    maximize: bool = False,
    max_exp_avg_sq: _Arrays | None = None,
) -> None:
    """AdamW: Adam whose weight decay shrinks the weights directly, beside the gradient's step."""

class AdamW(Optimizer):
    """AdamW: Adam whose weight decay shrinks the weights directly, beside the gradient's step."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def nadam_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    *,
    step: _Steps,
    mu_product: _Arrays,
    lr: float = 0.002,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    momentum_decay: float = 0.004,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> None:
    """NAdam: Adam with Nesterov's look-ahead, along a momentum that warms up."""

class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's look-ahead, along a momentum that warms up."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.002,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def radam_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> None:
    """RAdam: Adam whose adaptive rate sets in once its variance is bounded, and is rectified from then on."""

class RAdam(Optimizer):
    """RAdam: Adam whose adaptive rate sets in once its variance is bounded, and is rectified from then on."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def adamax_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_inf: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.002,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Adamax: Adam by the infinity norm."""

class Adamax(Optimizer):
    """Adamax: Adam by the infinity norm."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.002,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def adadelta_(
    param: _Arrays,
    grad: _Arrays,
    square_avg: _Arrays,
    acc_delta: _Arrays,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-06,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Adadelta: scales the gradient by the ratio of past updates to past gradients."""

class Adadelta(Optimizer):
    """Adadelta: scales the gradient by the ratio of past updates to past gradients."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 1.0,
        *,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...

def lion_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    *,
    lr: float = 0.0001,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Lion: steps by the sign of an interpolation between momentum and gradient; one state, decoupled decay."""

class Lion(Optimizer):
    """Lion: steps by the sign of an interpolation between momentum and gradient; one state, decoupled decay."""

    def __init__(
        self,
        params: _Params,
        lr: float | Callable[[int], float] = 0.0001,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None: ...
