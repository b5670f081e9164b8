"""Decides which sparse gradients (COO, one sparse dimension) the kernels take. Parameters that are refused here take
torch's own step, which may refuse them, too. The update by rows is in cpp/step/rows.h."""

from __future__ import annotations

from typing import Any

import torch

from .. import forms
from ..rules import SPARSE_RULES, Rule
from ._device import PLAIN
from ._state import NAMES, form_of


def is_sparse(grad: torch.Tensor) -> bool:
    """Whether this is a sparse gradient that kernels may take; ``sparse_reason`` says whether they do."""
    return type(grad) in PLAIN and grad.layout == torch.sparse_coo


def dense_reason(rule: Rule, p: torch.Tensor, group: dict[str, Any]) -> str | None:
    """Why no kernel takes a dense gradient with this rule; None if one does."""
    if rule.name in SPARSE_RULES:
        return f"{rule.name} is for sparse gradients, and one is dense"
    return _row_wise_reason(p, group)


def _row_wise_reason(p: torch.Tensor, group: dict[str, Any]) -> str | None:
    """Why no kernel updates a parameter with one number for each row; None if one does, or if it need not."""
    if not group["row_wise"]:
        return None
    if p.ndim == 0:
        return "a parameter has no dimensions, and so no rows"
    if p.device.type != "cpu":
        return f"a parameter is on {p.device.type}"
    if type(p) in PLAIN and p.layout == torch.strided and p.numel() and not p[0].is_contiguous():
        return "a parameter has rows that are not contiguous"
    return None


def sparse_reason(plan: Any, rule: Rule, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> str | None:
    """Why the kernels do not take this sparse gradient, or its parameter; None if they do."""
    if not _takes_sparse(rule, group):
        return "a gradient is sparse"
    if reason := _row_wise_reason(p, group):
        return reason
    if group.get("capturable"):
        return "capturable=True is not done by the fused kernels of the CPU"
    if p.device.type != "cpu" or grad.device.type != "cpu":
        return f"a gradient is sparse and on {grad.device.type}"
    if type(p) not in PLAIN:
        return f"a parameter is a {type(p).__name__}, a subclass of Tensor"
    if p.layout != torch.strided:
        return "a parameter is sparse"
    if grad.sparse_dim() != 1:
        return f"a gradient has {grad.sparse_dim()} sparse dimensions"
    for name, t in (("parameter", p), ("gradient", grad)):
        if t.dtype not in NAMES:
            return f"a {name} has dtype {t.dtype}"
    if grad.shape != p.shape:
        return "a gradient has another shape than its parameter"
    values = grad._values()
    for name, t in (("parameter", p), ("gradient", values)):
        trouble = plan.trouble(t, t is p)
        if trouble == "has no memory" and t is p:
            raise RuntimeError(f"a parameter of shape {tuple(p.shape)} has no memory")
        if trouble:
            return f"a {name} {trouble}"
    if plan.meet(p, values):
        return "a gradient shares memory with its parameter"
    if not p.numel() or p[0].is_contiguous():
        return _coded_reason(rule, p, group)
    return "a parameter with a sparse gradient has rows that are not contiguous"


def _takes_sparse(rule: Rule, group: dict[str, Any]) -> bool:
    """Whether sparse gradients update the rows that they name alone: with ``lazy``, or in torch's class.

    A rule with sums over a tensor needs all of it.
    """
    if rule.name in SPARSE_RULES or group["lazy"]:
        return not rule.reduces
    return rule.name in ("SGD", "Adagrad") and not group.get("momentum") and not group["weight_decay"]


def _coded_reason(rule: Rule, p: torch.Tensor, group: dict[str, Any]) -> str | None:
    width = p[0].numel() if len(p) else 0
    if form_of(p, group).quantised and rule.states(group) and width % forms.BLOCK:
        return (
            f"a parameter with a sparse gradient has int8 states and rows of {width} elements, no whole number of "
            f"blocks of {forms.BLOCK}"
        )
    return None
