# Made by python/make_stubs.py from the rules: do not edit, run `make stubs`.

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, SupportsIndex, TypeAlias

from numpy.typing import NDArray

__all__ = [
    "SGD",
    "AdEMAMix",
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
    "Rows",
    "adadelta_",
    "adadelta_rows_",
    "adagrad_",
    "adagrad_rows_",
    "adam_",
    "adam_rows_",
    "adamax_",
    "adamax_rows_",
    "adamw_",
    "adamw_rows_",
    "ademamix_",
    "ademamix_rows_",
    "lion_",
    "lion_rows_",
    "nadam_",
    "nadam_rows_",
    "radam_",
    "radam_rows_",
    "rmsprop_",
    "rmsprop_rows_",
    "sgd_",
    "sgd_rows_",
]

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Array: TypeAlias = NDArray[Any] | _SupportsDLPack
_Arrays: TypeAlias = _Array | Sequence[_Array]
_Steps: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
_Timed: TypeAlias = float | Callable[[int], float]
_Params: TypeAlias = NDArray[Any] | Sequence[NDArray[Any]] | Mapping[Any, NDArray[Any]] | Sequence[Mapping[str, Any]]

class Rows:
    """The gradient of a table of which few rows were used: which rows, and a gradient for each."""

    indices: Any
    values: Any
    def __init__(self, indices: _Array, values: _Array) -> None: ...

_Grad: TypeAlias = _Array | Rows
_Grads: TypeAlias = _Grad | Sequence[_Grad | Sequence[_Grad | None] | None] | Mapping[Any, _Grad | None]

class Optimizer:
    """Base class of the NumPy optimizers."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: list[dict[str, Any]]
    max_grad_norm: float | None
    last_grad_norm: float | None
    def add_param_group(self, group: Mapping[str, Any]) -> None: ...
    def step(self, grads: _Grads) -> None: ...
    def ema_parameters(self) -> AbstractContextManager[None]: ...
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
    """Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    The rule is class SGD in fusedopt/rules.py.
    """

def sgd_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    momentum_buffer: _Arrays | None = None,
    *,
    lr: float = 0.001,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    row_steps: _Arrays | None = None,
) -> None:
    """Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    The rule is class SGD in fusedopt/rules.py.
    """

class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    The rule is class SGD in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.001,
        *,
        momentum: _Timed = 0.0,
        dampening: float = 0.0,
        weight_decay: _Timed = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """AdaGrad: divides each element's step by the root of its sum of squared gradients.

    The rule is class Adagrad in fusedopt/rules.py.
    """

def adagrad_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    sum: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.01,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    row_steps: _Arrays | None = None,
    row_wise: bool = False,
) -> None:
    """AdaGrad: divides each element's step by the root of its sum of squared gradients.

    The rule is class Adagrad in fusedopt/rules.py.
    """

class Adagrad(Optimizer):
    """AdaGrad: divides each element's step by the root of its sum of squared gradients.

    The rule is class Adagrad in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.01,
        *,
        lr_decay: float = 0.0,
        weight_decay: _Timed = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
        row_wise: bool = False,
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
    """RMSprop: divides the gradient by its running root mean square; centered: by its standard deviation.

    The rule is class RMSprop in fusedopt/rules.py.
    """

def rmsprop_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
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
    """RMSprop: divides the gradient by its running root mean square; centered: by its standard deviation.

    The rule is class RMSprop in fusedopt/rules.py.
    """

class RMSprop(Optimizer):
    """RMSprop: divides the gradient by its running root mean square; centered: by its standard deviation.

    The rule is class RMSprop in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.01,
        *,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        momentum: _Timed = 0.0,
        centered: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """Adam: bias-corrected first and second moments of the gradient.

    The rule is class Adam in fusedopt/rules.py.
    """

def adam_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
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
    row_steps: _Arrays | None = None,
) -> None:
    """Adam: bias-corrected first and second moments of the gradient.

    The rule is class Adam in fusedopt/rules.py.
    """

class Adam(Optimizer):
    """Adam: bias-corrected first and second moments of the gradient.

    The rule is class Adam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.001,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """AdamW: Adam with decoupled weight decay.

    The rule is class AdamW in fusedopt/rules.py.
    """

def adamw_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
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
    row_steps: _Arrays | None = None,
) -> None:
    """AdamW: Adam with decoupled weight decay.

    The rule is class AdamW in fusedopt/rules.py.
    """

class AdamW(Optimizer):
    """AdamW: Adam with decoupled weight decay.

    The rule is class AdamW in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.001,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: _Timed = 0.01,
        amsgrad: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """NAdam: Adam with Nesterov momentum, which warms up.

    The rule is class NAdam in fusedopt/rules.py.
    """

def nadam_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
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
    """NAdam: Adam with Nesterov momentum, which warms up.

    The rule is class NAdam in fusedopt/rules.py.
    """

class NAdam(Optimizer):
    """NAdam: Adam with Nesterov momentum, which warms up.

    The rule is class NAdam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.002,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """RAdam: Adam with a rectified adaptive learning rate, used once its variance is bounded.

    The rule is class RAdam in fusedopt/rules.py.
    """

def radam_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
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
    row_steps: _Arrays | None = None,
) -> None:
    """RAdam: Adam with a rectified adaptive learning rate, used once its variance is bounded.

    The rule is class RAdam in fusedopt/rules.py.
    """

class RAdam(Optimizer):
    """RAdam: Adam with a rectified adaptive learning rate, used once its variance is bounded.

    The rule is class RAdam in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.001,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """Adamax: Adam with the infinity norm in place of the second moment.

    The rule is class Adamax in fusedopt/rules.py.
    """

def adamax_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    exp_avg: _Arrays,
    exp_inf: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.002,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    maximize: bool = False,
    row_steps: _Arrays | None = None,
) -> None:
    """Adamax: Adam with the infinity norm in place of the second moment.

    The rule is class Adamax in fusedopt/rules.py.
    """

class Adamax(Optimizer):
    """Adamax: Adam with the infinity norm in place of the second moment.

    The rule is class Adamax in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.002,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """Adadelta: scales the gradient by the ratio of the running RMS of updates to that of gradients.

    The rule is class Adadelta in fusedopt/rules.py.
    """

def adadelta_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    square_avg: _Arrays,
    acc_delta: _Arrays,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-06,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Adadelta: scales the gradient by the ratio of the running RMS of updates to that of gradients.

    The rule is class Adadelta in fusedopt/rules.py.
    """

class Adadelta(Optimizer):
    """Adadelta: scales the gradient by the ratio of the running RMS of updates to that of gradients.

    The rule is class Adadelta in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 1.0,
        *,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: _Timed = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
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
    """Lion: steps by the sign of interpolated momentum; one state, decoupled weight decay.

    The rule is class Lion in fusedopt/rules.py.
    """

def lion_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    exp_avg: _Arrays,
    *,
    lr: float = 0.0001,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Lion: steps by the sign of interpolated momentum; one state, decoupled weight decay.

    The rule is class Lion in fusedopt/rules.py.
    """

class Lion(Optimizer):
    """Lion: steps by the sign of interpolated momentum; one state, decoupled weight decay.

    The rule is class Lion in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.0001,
        *,
        betas: tuple[_Timed, _Timed] = (0.9, 0.99),
        weight_decay: _Timed = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
    ) -> None: ...

def ademamix_(
    param: _Arrays,
    grad: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    exp_avg_slow: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.001,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """AdEMAMix: AdamW with a second, slower average of the gradient.

    The rule is class AdEMAMix in fusedopt/rules.py.
    """

def ademamix_rows_(
    param: _Arrays,
    indices: _Arrays,
    values: _Arrays,
    exp_avg: _Arrays,
    exp_avg_sq: _Arrays,
    exp_avg_slow: _Arrays,
    *,
    step: _Steps,
    lr: float = 0.001,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    maximize: bool = False,
    row_steps: _Arrays | None = None,
) -> None:
    """AdEMAMix: AdamW with a second, slower average of the gradient.

    The rule is class AdEMAMix in fusedopt/rules.py.
    """

class AdEMAMix(Optimizer):
    """AdEMAMix: AdamW with a second, slower average of the gradient.

    The rule is class AdEMAMix in fusedopt/rules.py.
    """

    def __init__(
        self,
        params: _Params,
        lr: _Timed = 0.001,
        *,
        betas: tuple[_Timed, _Timed, _Timed] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-08,
        weight_decay: _Timed = 0.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: str | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        ema_decay: float | None = None,
        l1: float = 0.0,
        row_steps: bool = False,
    ) -> None: ...
