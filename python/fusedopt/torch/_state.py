"""How the torch front end keeps weights and states in the forms of forms.py: tensors made, checked and turned from one
form into another, checkpoints loaded, bytes counted. No step here."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from . import _core, forms

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDE = (torch.float32, torch.float64)
INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "float32": torch.float32}
NEW_OPTIONS: dict[str, Any] = {**forms.OPTIONS, "max_grad_norm": None}


class Keep:
    """A state tensor on its way through torch's ``load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def form_of(p: torch.Tensor, group: dict[str, Any], state: str | None = None) -> forms.Form:
    """The form that a group's options ask for; ``state``: dtype of the states that are there, whatever is asked for."""
    name = NAMES.get(p.dtype, "")
    return forms.form_of(name, group, name, state)


def like(p: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def flat(t: torch.Tensor) -> Any:
    """A dense tensor as a flat NumPy array, in the order of memory."""
    return t.detach().as_strided((t.numel(),), (1,)).numpy()


@cache
def _refused(index: int) -> str:
    try:
        return _core.device_refusal("cuda", index)
    except _core.DeviceOutOfMemoryError:  # torch may hold memory for later; and what is raised is not cached
        torch.cuda.empty_cache()
        return _core.device_refusal("cuda", index)


def refused(device: torch.device) -> str:
    """Why no kernels of ours work there; empty where they do."""
    if device.type == "cpu":
        return ""
    return _refused(device.index or 0) if device.type == "cuda" else "no kernels serve it"


def on_device(device: torch.device) -> bool:
    """Do kernels of ours work there, other than the CPU's?"""
    return not (_core.device_refusal("cpu") if device.type == "cpu" else refused(device))


def capturing(device: torch.device) -> bool:
    """Is a graph being captured on a device with kernels of ours?"""
    return on_device(device) and _core.device_capturing(torch.Tensor, device.index or 0)


def recode(p: torch.Tensor, state: dict[str, Any], names: tuple[str, ...], form: forms.Form) -> None:
    """Turns states of whatever form into this one; those that have it stay as they are, to the bit."""
    if p.device.type != "cpu":
        before = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        after = dict(before)
        recode(p.detach().cpu(), after, names, form)
        for k in before.keys() - after.keys():
            del state[k]
        state.update({k: v.to(p.device) for k, v in after.items() if v is not before.get(k)})
        return
    for name in names:
        codes = state.pop(f"{name}_codes", None)
        if codes is not None:
            if form.quantised and codes.stride() == like(p, codes.dtype).stride():
                state[f"{name}_codes"] = codes
                continue
            numbers = torch.empty_like(codes, dtype=torch.float32)
            flat(numbers)[:] = forms.dequantise(flat(codes), state.pop(f"{name}_scale").numpy())
            state[name] = numbers.to(DTYPES[form.state] if not form.quantised else torch.float32)
        if form.quantised and state.get(name) is not None:
            numbers = like(p, torch.float32).copy_(state.pop(name))
            kind = forms.code(name) or ""
            made, scale = forms.quantise(flat(numbers), kind)
            state[f"{name}_codes"] = like(p, INTEGERS[kind])
            flat(state[f"{name}_codes"])[:] = made
            state[f"{name}_scale"] = torch.from_numpy(scale)


def recode_master(p: torch.Tensor, state: dict[str, Any], form: forms.Form) -> None:
    """The same for what is kept beside the weight, which must be loaded before."""
    master = state.get("master")
    if master is None or not form.master:
        state.pop("master", None)
        return
    wanted = INTEGERS[forms.MASTERS[form.master][1]]
    if master.dtype == wanted:
        return
    if p.device.type != "cpu":
        moved: dict[str, Any] = {"master": master.cpu()}
        recode_master(p.detach().cpu(), moved, form)
        state["master"] = moved["master"].to(p.device)
        return
    state["master"] = like(p, wanted)
    if p.dtype == torch.bfloat16:
        rest, here = like(p, master.dtype).copy_(master), like(p, p.dtype).copy_(p.detach())
        weight = flat(here.view(torch.int16)).view(np.uint16)
        flat(state["master"])[:] = forms.split(forms.join(weight, flat(rest)), form.master, weight)
    else:
        state["master"].copy_(p.detach())


def dtype_of(name: str, p: torch.Tensor, form: forms.Form) -> torch.dtype | None:
    """What an array of our forms must be; None for the plain states, which may be of several types."""
    if name == "master":
        return INTEGERS[forms.MASTERS[form.master or ""][1]]
    if name == "ema":
        return torch.float64 if p.dtype == torch.float64 else torch.float32
    if name.endswith("_codes"):
        return INTEGERS[forms.code(forms.plain_name(name)) or ""]
    return torch.float32 if name.endswith("_scale") else None


def before_load(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last of the load hooks: keeps options of ours, and turns the state into the form that they ask for."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    targets: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
    for new, group in zip(groups, self.param_groups, strict=False):
        for key in NEW_OPTIONS:
            ours = key in forms.OURS and (group[key] is not None or key == "master")
            if ours or key not in new:
                new[key] = group[key]
        if "fused" in group and new.get("fused") in (None, False):
            new["fused"] = group["fused"]  # how to compute is ours to say, not the checkpoint's
        for key, p in zip(new["params"], group["params"], strict=False):
            targets[key] = (p, {**group, **new})

    def convert(entry: dict[str, Any], p: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        explicit = group["state_dtype"]
        coded = any(k.endswith("_codes") for k in entry)
        form = form_of(p, group, "int8" if coded and not explicit else None)
        held = {
            k: v.detach().to(device=None if k == "step" else p.device, copy=True) if isinstance(v, torch.Tensor) else v
            for k, v in entry.items()
        }
        if not refused(p.device) and p.dtype in NAMES:
            recode(p, held, self._rule.states(group), form)
            recode_master(p, held, form)
        for k, v in held.items():
            if k == "step" or not isinstance(v, torch.Tensor):
                continue
            if k in self._rule.scalars:  # torch's cast would round it to 16 bits
                held[k] = v if p.dtype in WIDE else Keep(v)
            elif k in ("master", "ema") or k.endswith(("_codes", "_scale")):
                held[k] = Keep(v)
            elif explicit and k in self._rule.states(group) and v.is_floating_point() and form.state in DTYPES:
                held[k] = Keep(v.to(DTYPES[form.state]))
        return held

    state = {
        key: convert(entry, *targets[key]) if key in targets else entry for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": state}


def memory_report(optimizer: Optimizer) -> dict[str, float]:
    """Bytes per parameter, by kind: weight, gradient, master, ema, each state (codes and scales together), other.

    ``parameters`` is their number, ``total`` the sum of the rest. A gradient that is not there costs nothing.
    """
    bytes_: dict[str, float] = {"weight": 0, "gradient": 0}
    n = 0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        n += p.numel()
        bytes_["weight"] += p.numel() * p.element_size()
        if p.grad is not None and p.grad.layout == torch.strided:
            bytes_["gradient"] += p.grad.numel() * p.grad.element_size()
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                kind = forms.plain_name(name) if value.ndim or p.ndim == 0 else "other"
                bytes_[kind] = bytes_.get(kind, 0) + value.numel() * value.element_size()
    report = {kind: size / max(n, 1) for kind, size in bytes_.items()}
    return {"parameters": n, **report, "total": sum(report.values())}
