"""The compiled core, as cpp/bindings/ exports it. Written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

__version__: str

def kernels() -> dict[str, tuple[int, tuple[str, ...], tuple[str, ...], bool, tuple[str, ...]]]:
    """Of the built-in rules: name -> (index, hyperparameter names, state names, carries a scalar, dtypes of codes)."""

BLOCK: int

def formats() -> dict[str, list[tuple[str, str, str, str, bool, bool]]]:
    """Built-in kernel -> the combinations that exist: (param, grad, state, master, noisy, noisy_state)."""

def formats_of(kernel: int) -> list[tuple[str, str, str, str, bool, bool]]:
    """Those of one kernel, by its index."""

def masters() -> dict[str, tuple[int, str]]:
    """Name of a master -> (its number, the dtype of the residual)."""

def isas() -> tuple[str, ...]:
    """Instruction sets this processor can run, best last."""

def isa() -> str:
    """The instruction set in use."""

def use_huge_pages(at: int, bytes: int, used: bool) -> None:
    """Asks for huge pages under memory at this address, which is new or in use; does nothing outside of Linux."""

def use_isa(name: str | None) -> bool:
    """Forces an instruction set; None takes the best. False if it is not usable here."""

def default_threads() -> int:
    """Threads of a step when nothing is set."""

def clip_factor(max_norm: float, norm: float) -> float:
    """What gradients of this norm are multiplied by to clip them to max_norm."""

def set_device_library(path: str) -> None:
    """Says where the library of a device's kernels is; "" for none."""

def device_formats() -> dict[str, list[tuple[str, str, str, str, bool, bool]]]:
    """As formats(), of the library that has been set."""

def device_refusal(type: str, index: int = -1) -> str:
    """Why no device library serves tensors on "cuda" or "cpu", and on this device; empty if one does."""

def device_capturing(type: type, index: int) -> bool:
    """Is a graph captured on the current stream of tensors of this type?"""

class DeviceOutOfMemoryError(RuntimeError):
    """The device is out of memory, and no step has begun: once some is free the call can be repeated."""

def torch_team() -> str:
    """What runs the steps beside torch: 'openmp', its own runtime, or 'pool', ours."""

def update(
    kernel: int,
    hyper: Sequence[float],
    maximize: bool,
    names: tuple[str, ...],
    all_names: tuple[str, ...],
    arrays: tuple[Any, ...],
    step: Any,
    threads: int,
    row_steps: bool = False,
    row_sum: bool = False,
) -> None:
    """Updates the arrays of an in-place function, of which ``names`` are those that the kernel uses."""

class Pair:
    """A gradient that names rows: their indices, and a row of values for each."""

    def __init__(self, indices: Any, values: Any) -> None: ...

class Extras:
    """What a group has beyond its rule's own arrays, and how it rounds."""

    def __init__(
        self,
        *,
        master: int = 0,
        noisy: bool = False,
        noisy_state: bool = False,
        quantised: bool = False,
        ema: bool = False,
        l1: float = 0.0,
        ema_weight: float = 0.0,
        seed: int = 0,
        streams: list[int] = ...,
        row_steps: bool = False,
        row_sum: bool = False,
    ) -> None: ...

MAX_STATES: int
MAX_CONSTANTS: int
MAX_CONDITIONS: int
MAX_REGISTERS: int
MAX_INSTRUCTIONS: int
MAX_NUMBERS: int
MAX_SUMS: int

def instructions() -> dict[str, int]:
    """The interpreter's instructions: name -> code."""

def add_program(
    name: str,
    hyper: Sequence[str],
    states: Sequence[str],
    codes: Sequence[str],
    numbers: Sequence[tuple[str, int, int, int, float]],
    carry: Sequence[tuple[str, int, int, int, float]],
    conditions: Sequence[int],
    passes: Sequence[Sequence[bool]],
    variants: Sequence[Any],
) -> int:
    """Registers a traced rule; returns the index of its kernels."""

def element_losses() -> dict[str, int]:
    """The losses of single elements: name -> index."""

def element_loss(
    loss: int,
    prediction: Any,
    target: Any,
    weight: Any,
    value: Any,
    gradient: Any,
    parameter: float,
    scale: float,
    threads: int,
) -> float:
    """Writes values and scaled gradients; returns the sum of the values."""

def softmax_loss(
    logits: Any,
    labels: Any,
    targets: Any,
    class_weight: Any,
    weight: Any,
    value: Any,
    gradient: Any,
    smoothing: float,
    scale: float,
    threads: int,
) -> float:
    """Writes values and scaled gradients; returns the sum of the values."""

def penalty(weights: Any, gradient: Any, l1: float, l2: float, scale: float, threads: int) -> float:
    """Adds the scaled gradient of l1 |w| + l2 w^2 / 2; returns its sum."""

def layer_forward(activation: int, z: Any, bias: Any, kept: Any, out: Any, threads: int) -> None:
    """out = activation(z + bias)."""

def layer_backward(activation: int, kept: Any, delta: Any, sums: Any, threads: int) -> None:
    """delta *= the activation's slope; sums = delta's columns."""

def dropout(x: Any, out: Any, probability: float, seed: int, sequence: int, threads: int) -> None:
    """Drops elements, and scales the others up."""

def batch_norm_forward(
    x: Any,
    gain: Any,
    shift: Any,
    mean: Any,
    variance: Any,
    rate: Any,
    normal: Any,
    out: Any,
    eps: float,
    threads: int,
) -> None:
    """Normalises the columns over the rows."""

def batch_norm_backward(
    delta: Any, normal: Any, rate: Any, gain: Any, gain_grad: Any, shift_grad: Any, threads: int
) -> None:
    """The way back of batch_norm_forward."""

def linear_epoch(
    batch: Batch,
    x: Any,
    indices: Any,
    indptr: Any,
    features: int,
    y: Any,
    weight: Any,
    order: Any,
    params: Any,
    grads: Any,
    batch_size: int,
    loss: int,
    parameter: float,
    divisor: float,
    intercepts: bool,
    l1: float,
    l2: float,
    per_row: bool,
    proximal: float,
    rates: Sequence[float],
    max_norm: float,
    mean: Any,
    follow: Sequence[float],
) -> tuple[float, float, int, float, float | None]:
    """One epoch of a linear model; returns loss times weight, weight, steps, the last batch's loss and norm."""

class Batch:
    """Tensors to be updated together, given as arrays."""

    def __init__(self) -> None: ...
    def clear(self) -> None: ...
    def add(
        self,
        kernel: int,
        hyper: Sequence[float],
        maximize: bool,
        names: tuple[str, ...],
        labels: Any,
        operands: list[Any],
        steps: list[int],
        extras: Extras = ...,
    ) -> None: ...
    def check(self, grads: bool) -> None: ...
    def run(self, max_norm: float, threads: int) -> float | None: ...

class TorchPlan:
    """The parameters of a torch optimizer, remembered between steps."""

    def __init__(
        self,
        state: dict[Any, Any],
        types: tuple[type, ...],
        dtypes: tuple[Any, ...],
        is_neg: Callable[[Any], bool],
        bump: Callable[[list[Any]], None],
        exchange: bool,
    ) -> None: ...
    def add_group(
        self,
        options: dict[str, Any],
        kernel: int,
        hyper: list[tuple[str | None, int, float]],
        truths: list[Any],
        same: list[Any],
        master: int,
        noisy: bool,
        noisy_state: bool,
    ) -> None: ...
    def add_layout(
        self,
        states: list[str],
        scales: list[str],
        residual: str | None,
        ema: str | None,
        step: str | None,
        carry: str | None,
        sequence: str | None,
        row_steps: str | None,
        row_sum: str | None,
    ) -> int: ...
    def set_param(self, group: int, index: int, layout: int, state: Any, done: int, sparse: bool) -> bool: ...
    def leave_param(self, group: int, index: int) -> None: ...
    def takes(self, tensor: Any, grad: Any) -> bool: ...
    def trouble(self, tensor: Any, written: bool) -> str: ...
    def meet(self, a: Any, b: Any) -> bool: ...
    @property
    def stale(self) -> list[tuple[int, int]]: ...
    @property
    def conflicts(self) -> list[tuple[int, int]]: ...
    def step(
        self,
        state: dict[Any, Any],
        param_groups: Sequence[dict[str, Any]],
        unscale: float,
        max_norm: float,
        threads: int,
        found_inf: Any = None,
        grad_scale: Any = None,
        norm: Any = None,
        complete: Callable[[list[int], memoryview], None] | None = None,
    ) -> int: ...
    @property
    def norm(self) -> float: ...
