"""Decides which parameters the kernels update: why a tensor takes torch's own step instead, and which options that step
does not have. _fallback.py then does it."""

from __future__ import annotations

from typing import Any

import torch

from .. import forms
from ..rules import Rule
from ._device import PLAIN, device_refusal, has_device_kernels
from ._state import NAMES, WIDE, dtype_of, form_of, row_dtype


def group_reason(group: dict[str, Any]) -> str | None:
    """Why no parameter of this group is updated by the kernels; None if its options allow it."""
    if group.get("fused") is False:
        return "fused=False asks for torch's own step"
    if group.get("differentiable"):
        return "differentiable=True is not done by the fused kernels"
    if not all(0 <= float(beta) < 1 for beta in group.get("betas", ())):
        return f"betas={tuple(map(float, group['betas']))} are not in [0, 1)"
    return None


def device_reason(rule: Rule, p: torch.Tensor) -> str | None:
    """Why the rule has no kernels on the parameter's device though others may have; None if it has."""
    if rule.own and has_device_kernels(p.device):
        return f"a parameter is on {p.device.type}; a rule of your own has kernels for the CPU only"
    return None


def takes_parameter(p: torch.Tensor) -> bool:
    """Whether kernels take parameters of this type, layout, device and dtype."""
    return type(p) in PLAIN and p.layout == torch.strided and not device_refusal(p.device) and p.dtype in NAMES


def tensor_reason(plan: Any, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> str | None:
    """Why the kernels do not take this parameter or its gradient; None if they do."""
    if group.get("capturable") and not has_device_kernels(p.device):
        return "capturable=True is not done by the fused kernels of the CPU"
    for name, t in (("parameter", p), ("gradient", grad)):
        if type(t) not in PLAIN:
            return f"a {name} is a {type(t).__name__}, a subclass of Tensor"
        if t.layout != torch.strided:
            return f"a {name} is sparse"
        refusal = device_refusal(t.device)
        if refusal:
            return f"a {name} is on {t.device.type}; {refusal}"
        if t.dtype not in NAMES:
            return f"a {name} has dtype {t.dtype}"
    for name, t in (("parameter", p), ("gradient", grad)):
        trouble = plan.trouble(t, t is p)
        if trouble == "has no memory" and t is p:  # torch would write to it all the same
            raise RuntimeError(f"a parameter of shape {tuple(p.shape)} has no memory")
        if trouble:
            return f"a {name} {trouble}"
    if p.device != grad.device:
        return "a gradient is on another device than its parameter"
    if p.shape != grad.shape:
        return "a gradient has another shape than its parameter"
    if plan.meet(p, grad):
        return "a gradient shares memory with its parameter"
    return None


def state_reason(
    plan: Any, rule: Rule, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> str | None:
    """Why the kernels do not take this parameter with the state it has; None if they do.

    Raises:
        ValueError: for state of a wrong shape or dtype, which torch's own step could not use either.
        RuntimeError: for state without memory.
    """
    s: Any
    kernel = rule.kernel(group)
    names = kernel.states
    form = form_of(p, group, "int8" if names and f"{names[0]}_codes" in state else None)
    for name in forms.array_names(names, form, group["ema_decay"] is not None):
        s = state.get(name)
        if not isinstance(s, torch.Tensor) or s.device != p.device or type(s) not in PLAIN:
            return f"state {name!r} is missing, or no plain tensor beside its parameter"
        shape: tuple[int, ...] = (forms.blocks(p.numel()),) if name.endswith("_scale") else tuple(p.shape)
        if s.shape != shape:
            raise ValueError(f"state {name!r}: expected shape {tuple(shape)}, got {tuple(s.shape)}")
        dtype = dtype_of(name, p, form, kernel)
        if dtype is not None and s.dtype != dtype:
            raise ValueError(f"state {name!r}: expected {dtype}, got {s.dtype}")
        trouble = plan.trouble(s, True)
        if trouble == "has no memory":
            raise RuntimeError(f"state {name!r} of shape {tuple(shape)} has no memory")
        if trouble:
            return f"state {name!r} {trouble}"
    of_rows: dict[str, tuple[int, ...]] = {}
    if group["row_steps"] and grad.is_sparse:
        of_rows["row_steps"] = (len(p),)
    if group["row_wise"]:
        of_rows[rule.row_wise] = forms.row_shape(p.shape)
    for name, shape in of_rows.items():
        s = state.get(name)
        if not isinstance(s, torch.Tensor) or s.device != p.device or type(s) not in PLAIN:
            return f"state {name!r} is missing, or no plain tensor beside its parameter"
        dtype = torch.float32 if name == "row_steps" else row_dtype(p)
        if s.shape != shape or s.dtype != dtype:
            raise ValueError(f"state {name!r}: expected {dtype} of shape {shape}, got {s.dtype} of {tuple(s.shape)}")
        if plan.trouble(s, True) or not s.is_contiguous():
            return f"state {name!r} {plan.trouble(s, True) or 'is not contiguous'}"
    for name in dict.fromkeys((*rule.scalars, *(("step",) if form.random else ()))):
        s = state.get(name)
        if type(s) not in PLAIN or s.numel() != 1 or s.device != p.device or s.dtype not in WIDE:
            return f"state {name!r} is not a one-element tensor beside its parameter"
        trouble = plan.trouble(s, True)
        if trouble == "has no memory":
            raise RuntimeError(f"state {name!r} has no memory")
        if trouble:
            return f"state {name!r} {trouble}"
        if name == "step" and s.device.type == "cpu" and not (0 <= float(s) < 2**53 and float(s).is_integer()):
            return f"state 'step' is {float(s)}, which counts no steps"
    if not form.quantised and names:
        dtypes = {state[name].dtype for name in names}
        known = NAMES.get(next(iter(dtypes))) if len(dtypes) == 1 else None
        form = form_of(p, group, known or " and ".join(sorted(map(str, dtypes))))
    if p.dtype not in WIDE and grad.dtype == torch.float32 and has_device_kernels(p.device):
        return f"no kernel on {p.device.type} for a {p.dtype} parameter with a {grad.dtype} gradient"
    if not forms.exists(kernel, NAMES[p.dtype], NAMES[grad.dtype], form):
        master = f" and master={form.master!r}" if form.master else ""
        return f"no kernel for a {p.dtype} parameter with a {grad.dtype} gradient and {form.state} state{master}"
    return None


def options_without_fallback(
    rule: Rule, in_torch: bool, groups: list[dict[str, Any]], max_norm: float, scaled: bool
) -> list[str]:
    """The options in use that torch's own step does not have.

    Args:
        in_torch: whether torch has this optimizer at all.
        groups: those with parameters that need torch's own step.
        scaled: whether the gradients are still multiplied by a scale.
    """
    options = [f"max_grad_norm={max_norm}"] if max_norm else []
    for option, default in forms.OPTIONS.items():
        if option != "seed" and any(group.get(option, default) != default for group in groups):
            options.append(option)
    if scaled:
        options.append("GradScaler's fused protocol")
    if not in_torch:
        options.append(rule.name)
    return options
