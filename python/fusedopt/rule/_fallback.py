"""The fallback of a user's rule, for parameters without a kernel: evaluates the function on torch tensors, one
operation at a time. This module requires torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..rules import Rule

__all__ = ["plain_step"]


def plain_step(rule: Any) -> Callable[[Any], None]:
    """A function that updates all parameters with gradients of an optimizer of an ``OwnRule``. It calls no hooks."""

    def step(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            differentiable = bool(group.get("differentiable"))
            for p in group["params"]:
                if p.grad is not None:
                    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                        _update(rule, optimizer, p, group)

    return step


def _update(rule: Any, optimizer: Any, p: torch.Tensor, group: dict[str, Any]) -> None:
    g: Any = p.grad
    if g.layout != torch.strided:
        g = g.to_dense()
    if group["maximize"]:
        g = -g
    state, names = optimizer.state[p], rule.states(group)
    if any(name not in state for name in (*rule.scalars, *names)):
        for name in (*rule.scalars, *names):
            state[name] = _initial(rule, name, p, optimizer.defaults)
    t = 1
    if "step" in rule.scalars:
        state["step"] = state["step"] + 1
        t = int(state["step"])
    held = {name: state[name] for name in names}
    held.update({name: float(state[name]) for name in rule.carried})
    results = rule.call(p, g, held, t, group)
    for name in names:
        state[name] = _written(state[name], results[name], group)
    for name in rule.carried:
        state[name].fill_(float(results[name]))
    p.copy_(results[""])


def _initial(rule: Rule, name: str, p: torch.Tensor, defaults: dict[str, Any]) -> torch.Tensor:
    if name in rule.scalars:
        dtype = torch.float32 if name == "step" else torch.float64
        return torch.full((), rule.first(name, defaults), dtype=dtype)
    if rule.starts_as_param(name):
        return p.detach().clone(memory_format=torch.preserve_format)
    return torch.full_like(p.detach(), rule.first(name, defaults), memory_format=torch.preserve_format)


def _written(old: torch.Tensor, new: Any, group: dict[str, Any]) -> torch.Tensor:
    """The new value of a state: the old tensor, updated in place, or a new one if autograd needs the old value."""
    if group.get("differentiable"):
        made: torch.Tensor = new if isinstance(new, torch.Tensor) else torch.full_like(old, new)
        return made
    return old.copy_(new) if isinstance(new, torch.Tensor) else old.fill_(new)
