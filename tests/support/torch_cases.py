"""Shared by the torch tests: classes, option sets, parameters and gradients. Comparisons: torch_compare.

Option sets come from three sources: every rule's defaults (so a new rule has some), sets defined here, and PyTorch's
`optim_db` if its test requirements are installed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import fusedopt.torch as optim
from fusedopt.rules import RULES

NAMES = tuple(RULES)
IN_TORCH = tuple(name for name in NAMES if hasattr(torch.optim, name))
TORCH_FUSED = ("SGD", "Adagrad", "Adam", "AdamW")  # the classes with a fused form in torch
SIXTEEN = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *SIXTEEN)

Grads = list[list[torch.Tensor | None]]


def _takes_lr_with_a_dimension() -> bool:
    """Whether torch's AdamW does: that of torch 2.6 fails on a parameter without dimensions."""
    p = torch.nn.Parameter(torch.ones(()))
    p.grad = torch.ones(())
    try:
        torch.optim.AdamW([p], lr=torch.tensor([0.01]), foreach=False).step()
    except RuntimeError:
        return False
    return True


ONE_RATE: Any = [0.01] if _takes_lr_with_a_dimension() else 0.01

# Tensor options are float64, since torch's plain loop loses digits with float32 ones.
MORE: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "dampening": 1.0, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"lr": torch.tensor(0.01, dtype=torch.float64), "momentum": 0.5},
    ],
    "Adagrad": [
        {"lr_decay": 0.5, "weight_decay": 0.1},
        {"initial_accumulator_value": 0.1, "lr": 0.1},
        {"eps": 1e-4, "maximize": True},
    ],
    "RMSprop": [
        {"alpha": 0.9, "eps": 1e-4},
        {"momentum": 0.9},
        {"centered": True, "eps": 1e-3},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
    "Adam": [
        {"betas": (0.0, 0.5), "eps": 1e-4},
        {"amsgrad": True},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
        {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))},
    ],
    "AdamW": [
        {"weight_decay": 0.0},
        {"amsgrad": True, "maximize": True, "lr": torch.tensor(ONE_RATE, dtype=torch.float64)},
    ],
    "NAdam": [{"momentum_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"betas": (0.5, 0.7)}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.9, 0.95)}],
    "Adamax": [{"betas": (0.5, 0.7), "eps": 1e-4}],
    "Adadelta": [{"rho": 0.5, "eps": 1e-3}, {"lr": 0.1, "weight_decay": 0.1}],
    "Lion": [{"betas": (0.5, 0.7)}, {"lr": 0.01, "weight_decay": 0.5}],
}


# Options that came after the oldest torch that is supported: only where this torch has them.
NEWER = ("decoupled_weight_decay",)


def numeric_options(name: str, group: dict[str, Any]) -> dict[str, Any]:
    """The options of the rule's reference, as numbers."""

    def number(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(map(number, value))
        return value.item() if isinstance(value, torch.Tensor) else value

    return {k: number(group[k]) for k in RULES[name].defaults if k in group}


class PlainRule(torch.optim.Optimizer):
    """A rule that torch does not have, as torch would write it: the rule's reference on one tensor after another.

    Computes in the parameter's dtype; in float32 for 16 bits, with one rounding per tensor at the end.
    """

    def __init__(self, name: str, params: Any, **options: Any) -> None:
        self.rule = RULES[name]
        unknown = options.keys() - self.rule.defaults.keys()
        if unknown:
            raise TypeError(f"unexpected options: {sorted(unknown)}")
        super().__init__(params, {**self.rule.defaults, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = numeric_options(self.rule.name, group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for key in self.rule.scalars:
                    state.setdefault(key, torch.tensor(self.rule.first(key, options)))
                for key in self.rule.states(options):
                    state.setdefault(key, torch.full_like(p, self.rule.first(key, options)))
                state.get("step", torch.zeros(())).add_(1)
                tensors = {"param": p, "grad": p.grad} | {k: v for k, v in state.items() if k != "step"}
                wide = torch.promote_types(p.dtype, torch.float32)
                arrays = {k: v.detach().to(wide, copy=True).numpy() for k, v in tensors.items()}
                states = {k: v for k, v in arrays.items() if k in state}
                with np.errstate(all="ignore"):
                    self.rule.reference(arrays["param"], arrays["grad"], states, int(state.get("step", 0)), **options)
                for key, array in arrays.items():
                    if key != "grad":
                        tensors[key].copy_(torch.from_numpy(array))


def plain(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's plain loop over the tensors, the baseline of every comparison."""
    if name not in IN_TORCH:
        return PlainRule(name, params, **options)
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(params, foreach=False, **options)
    return optimizer


def ours(name: str, params: Any, **options: Any) -> Any:
    return getattr(optim, name)(params, **options)


def accepts(name: str, option: str) -> bool:
    """Whether the constructor of that class takes the option."""
    return option in inspect.signature(getattr(optim, name).__init__).parameters


@functools.cache
def optim_db() -> dict[str, Any]:
    """PyTorch's table of optimizers and their inputs; empty without `expecttest`, which torch's test helpers import."""
    profile = hypothesis.settings.get_current_profile_name()
    try:
        from torch.testing._internal import common_optimizers
    except ImportError:
        return {}
    finally:
        hypothesis.settings.load_profile(profile)  # torch's test helpers load one of their own
    return {info.name: info for info in common_optimizers.optim_db if info.name in NAMES}


optim_db()  # now, and not in the middle of a test


def _generic(name: str) -> Iterator[dict[str, Any]]:
    defaults = RULES[name].defaults
    yield {}
    yield {"lr": 0.1}
    decay = {"weight_decay": 0.1} if "weight_decay" in defaults else {}
    for flags in itertools.product((False, True), repeat=2):
        extra = (decay if flags[0] else {}) | ({"maximize": True} if flags[1] else {})
        if extra:
            yield extra


def _key(options: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"tensor{value.item():g}"
        return "(" + ",".join(map(word, value)) + ")" if isinstance(value, tuple) else f"{value}"

    return "-".join(f"{k}={word(v)}" for k, v in sorted(options.items())) or "default"


@functools.cache
def _sets(name: str) -> dict[str, dict[str, Any]]:
    db = [i.kwargs for i in optim_db()[name].optim_inputs_func("cpu")] if name in optim_db() else []
    sets = itertools.chain(_generic(name), MORE.get(name, []), db)
    return {_key(o): o for o in sets if all(accepts(name, option) for option in NEWER if option in o)}


def option_sets(name: str) -> list[dict[str, Any]]:
    """Every option set of that class, each once; tensors in them are shared, so change none in place."""
    return list(_sets(name).values())


def cases(names: Sequence[str] = NAMES) -> list[Any]:
    """`pytest.param(name, options)` for every class and option set."""
    return [
        pytest.param(name, options, id=f"{name}-{_key(options)}") for name in names for options in option_sets(name)
    ]


def some_cases(names: Sequence[str] = NAMES) -> list[Any]:
    """One option set per class with many options, for tests that do not depend on the options."""
    rich = {
        "SGD": {"momentum": 0.9, "weight_decay": 0.1},
        "RMSprop": {"momentum": 0.5, "centered": True, "eps": 1e-3},
        "Adam": {"amsgrad": True, "weight_decay": 0.1},
    }
    return [pytest.param(name, rich.get(name, {}), id=name) for name in names]


# The shapes of every parameter list: scalar, empty, one element, less than a vector, odd tails, more than a block.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (0,), (3, 5), (4, 0), (2, 3, 4), (257,), (33, 31))
FROZEN, LATE = 2, 4  # indices of a parameter without gradients, and of one without gradients in the first two steps


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: Sequence[int], dtype: torch.dtype, gen: torch.Generator, spread: float = 2.0) -> torch.Tensor:
    """Normal values with magnitudes over `spread` decades, to reveal a wrong eps or order of operations."""
    scale = 10.0 ** (spread * (torch.rand(shape, generator=gen, dtype=torch.float64) - 1.0))
    return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(dtype)


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[Sequence[int]] = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    gen = generator(seed)
    return [torch.nn.Parameter(values(s, torch.float64, gen).to(dtype)) for s in shapes]


def gradients(
    steps: int,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Sequence[int]] = SHAPES,
    seed: int = 1,
    missing: bool = True,
) -> Grads:
    """Gradients by step and parameter; None for frozen, late and occasionally missing ones."""
    gen, out = generator(seed), []
    for step in range(steps):
        row: list[torch.Tensor | None] = [values(s, torch.float64, gen).to(dtype) for s in shapes]
        if missing:
            for i in range(len(row)):
                if i == FROZEN or (i == LATE and step < 2) or (i + step) % 5 == 4:
                    row[i] = None
        out.append(row)
    return out


def simple(n: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
    """One parameter with a gradient."""
    gen = generator(seed)
    p = torch.nn.Parameter(values((n,), torch.float64, gen).to(dtype))
    p.grad = values((n,), torch.float64, gen).to(dtype)
    return p
