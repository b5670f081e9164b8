"""The state of parameters as torch tensors: created, converted between the forms of forms.py, loaded from checkpoints,
measured. No step here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from .. import _core, forms
from ..rules import Kernel, Rule
from ._device import device_refusal

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDE = (torch.float32, torch.float64)
_LARGE = 1 << 21  # elements from which memory is given huge pages
INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "float32": torch.float32}
NEW_OPTIONS: dict[str, Any] = {**forms.OPTIONS, "lazy": False, "max_grad_norm": None}


Copies = dict[tuple[int, torch.device], torch.Tensor]
"""The copies that a load has made, by the identity of the checkpoint's tensor and the device."""


class Keep:
    """Hides a state tensor from torch's ``load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def form_of(p: torch.Tensor, group: dict[str, Any], state: str | None = None) -> forms.Form:
    """The form that a group's options ask for; ``state``: the dtype of existing states, which overrides the options."""
    name = NAMES.get(p.dtype, "")
    return forms.form_of(name, group, name, state)


def like(p: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A new tensor with the shape, strides and device of ``p``."""
    t = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    use_huge_pages(t, used=False)
    return t


def use_huge_pages(t: torch.Tensor, used: bool) -> None:
    """Asks for huge pages under a large dense tensor on the CPU, whose memory is new or in use."""
    if t.numel() >= _LARGE and t.device.type == "cpu":
        _core.use_huge_pages(t.data_ptr(), t.numel() * t.element_size(), used)


def flat(t: torch.Tensor) -> Any:
    """A dense tensor as a flat NumPy array in memory order, without a copy."""
    return t.detach().as_strided((t.numel(),), (1,)).numpy()


class Recipe:
    """Creates the state of the parameters of one dtype in one group, and knows its names.

    Attributes:
        form: the form that the group's options select.
        names: the state arrays of the rule.
        row_sum: the state that has one number for each row; or None.
        ema: whether there is a moving average of the parameter.
        layouts: the plan's numbers of the layouts, by (quantised, random, counting by row).
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, p: torch.Tensor, group: dict[str, Any]) -> None:
        self.rule = rule
        self.form = form = form_of(p, group)
        self.names = names = rule.states(group)
        self.ema = group["ema_decay"] is not None
        self.layouts: dict[tuple[bool, bool, bool], int] = {}
        # "stream" is the name in checkpoints for the number of the tensor's random sequence.
        self._beside = forms.array_names((), form, self.ema) + ("stream",) * form.random
        self._kernel = rule.kernel(group)
        self._row_steps = group["row_steps"]
        self.row_sum = rule.row_wise if group["row_wise"] else None
        copied = {name for name in names if rule.starts_as_param(name)}
        self._first = {n: None if n in copied else rule.first(n, optimizer.defaults) for n in (*rule.scalars, *names)}
        self._zeros = not form.quantised and not self._beside and not copied and not any(self._first.values())
        step = ("step",) * form.random
        self._complete = {*rule.scalars, *step, *forms.array_names(names, form, self.ema), *self._beside}

    def create(
        self, optimizer: Optimizer, p: torch.Tensor, sparse: bool = False
    ) -> tuple[dict[str, Any], int, list[str]]:
        """Creates the state of a parameter that is missing: torch's, and that of our options. Call it under no_grad().

        Args:
            sparse: whether the parameter's gradient is; ``row_steps`` counts for such alone.

        Returns:
            The state; the steps done so far, where no tensor counts them; the names of what was created.
        """
        if self.row_sum or (self._row_steps and sparse):
            return self._create_rows(optimizer, p, sparse)
        return self._create_all(optimizer, p)

    def _create_rows(
        self, optimizer: Optimizer, p: torch.Tensor, sparse: bool
    ) -> tuple[dict[str, Any], int, list[str]]:
        """The same, with numbers for each row of the parameter."""
        state = optimizer.state[p]
        row_sum, begun = self.row_sum, bool(state)
        if row_sum and state.get(row_sum) is not None:
            state[row_sum] = row_means(p, state[row_sum])  # row_wise was set in the middle of a run
        _, done, created = self._create_all(optimizer, p)
        if row_sum and state.get(row_sum) is None:
            first = self.rule.first(row_sum, optimizer.defaults)
            state[row_sum] = row_state(p, first)
            created.append(row_sum)
        if sparse and self._row_steps and state.get("row_steps") is None:
            before = float(state["step"]) if begun and "step" in state else float(done)
            state["row_steps"] = torch.full((len(p),), before, dtype=torch.float32, device=p.device)
            created.append("row_steps")
        return state, done, created

    def _create_all(self, optimizer: Optimizer, p: torch.Tensor) -> tuple[dict[str, Any], int, list[str]]:
        if not self._complete:
            return {}, 0, []
        state = optimizer.state[p]
        if not state and self._zeros:
            for name in self.rule.scalars:
                state[name] = self._scalar(name, 0.0, p)
            dtype = DTYPES[self.form.state]
            for name in self.names:
                state[name] = torch.zeros_like(p, dtype=dtype) if p.numel() < _LARGE else like(p, dtype).zero_()
            return state, 0, list(state)
        complete = all(state.get(name) is not None for name in self._complete)
        if complete and not any(_misplaced(state.get(name), p) for name in (*self.rule.scalars, "step")):
            return state, int(bool(self.names)), []
        return self._create(optimizer, p, state)

    def _create(
        self, optimizer: Optimizer, p: torch.Tensor, state: dict[str, Any]
    ) -> tuple[dict[str, Any], int, list[str]]:
        form, rule, names = self.form, self.rule, self.names
        begun = any(state.get(k) is not None for n in (*names, *rule.scalars) for k in (n, f"{n}_codes"))
        if names and form.quantised and begun and f"{names[0]}_codes" not in state:
            recode(p, state, self._kernel, form)  # state_dtype was set in the middle of a run
        missing = [] if begun else [*rule.scalars, *names]
        created = [*rule.scalars, *forms.array_names(names, form, False)] if missing else []
        for name in (*rule.scalars, "step"):  # the kernels count on the device of the parameter
            value: Any = state.get(name)
            if _misplaced(value, p):
                tensor = isinstance(value, torch.Tensor)
                state[name] = value.to(p.device) if tensor else self._scalar(name, float(value), p)
        for name in missing:
            first = self._first[name]
            if first is None:  # it starts as a copy of the parameter
                state[name] = like(p, torch.float32 if form.quantised else DTYPES[form.state]).copy_(p)
                if form.quantised:
                    recode(p, state, self._kernel, form)
            elif name in rule.scalars:
                state[name] = self._scalar(name, first, p)
            elif form.quantised:
                dtype = INTEGERS[self._kernel.code(name)]
                state[f"{name}_codes"] = like(p, dtype).fill_(torch.iinfo(dtype).max if first else 0)
                blocks = (forms.blocks(p.numel()),)
                state[f"{name}_scale"] = torch.full(blocks, first, dtype=torch.float32, device=p.device)
            else:
                state[name] = like(p, DTYPES[form.state]).fill_(first)
        if form.random and "step" not in rule.scalars and (missing or "step" not in state):
            # The step selects the random numbers, so a checkpoint has to hold it.
            state["step"] = self._scalar("step", float(begun), p)
            created.append("step")
        for name in self._beside:
            if name in state:
                continue
            if name == "stream":
                order = (q for g in optimizer.param_groups for q in g["params"])
                state[name] = next(i for i, q in enumerate(order) if q is p)
            else:
                own = dtype_of(name, p, form, self._kernel)
                state[name] = like(p, own).copy_(p) if own in WIDE else like(p, own).zero_()
            created.append(name)
        return state, 0 if missing or not names else 1, created

    def _scalar(self, name: str, value: float, p: torch.Tensor) -> torch.Tensor:
        wide = torch.get_default_dtype() == torch.float64 or (self.rule.wide and name != "step")
        return torch.full((), value, dtype=torch.float64 if wide else torch.float32, device=p.device)


def row_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of a state that has one number for each row of a parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def row_state(p: torch.Tensor, value: float) -> torch.Tensor:
    """Such a state in which every number has this value."""
    return torch.full(forms.row_shape(p.shape), value, dtype=row_dtype(p), device=p.device)


def row_means(p: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A state of the shape of its parameter as one number for each row, the mean; one that is so already as it is."""
    shape = forms.row_shape(p.shape)
    if state.shape != p.shape or p.shape == shape:
        return state
    wide = state.detach().to(row_dtype(p))
    return wide.mean(dim=tuple(range(1, p.ndim)), keepdim=True) if p.numel() else wide.new_zeros(shape)


def create_state(optimizer: Optimizer, rule: Rule, p: torch.Tensor, group: dict[str, Any]) -> None:
    """Creates the state of one parameter that is missing."""
    with torch.no_grad():
        Recipe(optimizer, rule, p, group).create(optimizer, p)


def _misplaced(value: Any, p: torch.Tensor) -> bool:
    """Whether this scalar is on another device than its parameter, or a number, in which torch's SparseAdam counts."""
    return value.device != p.device if isinstance(value, torch.Tensor) else isinstance(value, int | float)


def recode(p: torch.Tensor, state: dict[str, Any], kernel: Kernel, form: forms.Form) -> None:
    """Converts states of any form into this one in place; states that already have it keep their bits."""
    if p.device.type != "cpu":
        before = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        after = dict(before)
        recode(p.detach().cpu(), after, kernel, form)
        for k in before.keys() - after.keys():
            del state[k]
        state.update({k: v.to(p.device) for k, v in after.items() if v is not before.get(k)})
        return
    for name in kernel.states:
        codes = state.pop(f"{name}_codes", None)
        if codes is not None:
            _check_codes(name, codes, state.get(f"{name}_scale"), p)
            if form.quantised and codes.stride() == like(p, codes.dtype).stride():
                state[f"{name}_codes"] = codes
                continue
            numbers = torch.empty_like(codes, dtype=torch.float32)
            flat(numbers)[:] = forms.dequantise(flat(codes), state.pop(f"{name}_scale").numpy())
            state[name] = numbers.to(DTYPES[form.state] if not form.quantised else torch.float32)
        if form.quantised and state.get(name) is not None:
            numbers = like(p, torch.float32).copy_(state.pop(name))
            kind = kernel.code(name)
            made, scale = forms.quantise(flat(numbers), kind)
            state[f"{name}_codes"] = like(p, INTEGERS[kind])
            flat(state[f"{name}_codes"])[:] = made
            state[f"{name}_scale"] = torch.from_numpy(scale)


def _check_codes(name: str, codes: Any, scale: Any, p: torch.Tensor) -> None:
    blocks = (forms.blocks(p.numel()),)
    for part, value, shape in (("codes", codes, tuple(p.shape)), ("scale", scale, blocks)):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if got != shape:
            raise ValueError(f"state '{name}_{part}': expected shape {shape}, got {'nothing' if got is None else got}")


def recode_master(p: torch.Tensor, state: dict[str, Any], form: forms.Form) -> None:
    """Converts the residual likewise. The weight must have been loaded before."""
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
        residual, param = like(p, master.dtype).copy_(master), like(p, p.dtype).copy_(p.detach())
        weight = flat(param.view(torch.int16)).view(np.uint16)
        flat(state["master"])[:] = forms.split(forms.join(weight, flat(residual)), form.master, weight)
    else:
        state["master"].copy_(p.detach())


def dtype_of(name: str, p: torch.Tensor, form: forms.Form, kernel: Kernel) -> torch.dtype | None:
    """The dtype that a state array must have in this form; None for plain states, which may have one of several."""
    if name == "master":
        return INTEGERS[forms.MASTERS[form.master or ""][1]]
    if name == "ema":
        return torch.float64 if p.dtype == torch.float64 else torch.float32
    if name.endswith("_codes"):
        return INTEGERS[kernel.code(forms.plain_name(name))]
    return torch.float32 if name.endswith("_scale") else None


def convert_for_load(rule: Rule, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load hook, to be called last: keeps our options, and converts the state into the form that they ask for."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    targets: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
    for g, (new, group) in enumerate(zip(groups, optimizer.param_groups, strict=False)):
        known_late = {key for key, value in rule.defaults.items() if isinstance(value, bool)}  # torch sets these itself
        known_late |= {"momentum"} if rule.name == "RMSprop" else set()
        missing = [key for key in rule.defaults if key not in new and key not in known_late]
        if missing:
            raise ValueError(
                f"state_dict: expected a checkpoint of {rule.name}, but group {g} lacks {', '.join(map(repr, missing))}"
            )
        for key in NEW_OPTIONS:
            ours = key in forms.OURS and (group[key] is not None or key == "master")
            if ours or key not in new:
                new[key] = group[key]
        if "fused" in group and new.get("fused") in (None, False):
            new["fused"] = group["fused"]  # how to compute is this optimizer's choice, not the checkpoint's
        for key, p in zip(new["params"], group["params"], strict=False):
            targets[key] = (p, {**group, **new})
    copies: Copies = {}
    state = {
        key: _converted(rule, entry, *targets[key], copies) if key in targets else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": state}


def _copied(v: Any, device: torch.device | None, copies: Copies) -> Any:
    """A copy of a tensor, on the given device if there is one. A tensor that a checkpoint holds several times is copied
    once, so that the loaded state shares it, too, as in torch."""
    if not isinstance(v, torch.Tensor):
        return v
    device = v.device if device is None else device
    found = copies.get((id(v), device))
    if found is None:
        found = copies[id(v), device] = v.detach().to(device=device, copy=True)
    return found


def _converted(
    rule: Rule, entry: dict[str, Any], p: torch.Tensor, group: dict[str, Any], copies: Copies
) -> dict[str, Any]:
    """A checkpoint's state of one parameter, copied, in the form that the group asks for."""
    explicit = group["state_dtype"]
    coded = any(k.endswith("_codes") for k in entry)
    form = form_of(p, group, "int8" if coded and not explicit else None)
    out = {k: _copied(v, None if k == "step" else p.device, copies) for k, v in entry.items()}
    if not device_refusal(p.device) and p.dtype in NAMES:
        recode(p, out, rule.kernel(group), form)
        recode_master(p, out, form)
    for k, v in out.items():
        if k == "step" or not isinstance(v, torch.Tensor):
            continue
        if k in rule.scalars:  # torch's cast would round it to 16 bits
            out[k] = v if p.dtype in WIDE and not rule.wide else Keep(v)
        elif group["row_wise"] and k == rule.row_wise:
            out[k] = Keep(row_means(p, v).to(row_dtype(p)))
        elif k in ("master", "ema", "row_steps") or k.endswith(("_codes", "_scale")):
            out[k] = Keep(v)
        elif explicit and k in rule.states(group) and v.is_floating_point() and form.state in DTYPES:
            out[k] = Keep(v.to(DTYPES[form.state]))
    return out


def memory_report(optimizer: Optimizer) -> dict[str, float]:
    """Bytes per parameter, by kind: weight, gradient, master, ema, each state (codes and scales together), other.

    ``parameters`` is the number of parameters, ``total`` the sum over all kinds. A missing gradient counts 0 bytes, a
    sparse one its indices and values.
    """
    bytes_: dict[str, float] = {"weight": 0, "gradient": 0}
    n = 0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        n += p.numel()
        bytes_["weight"] += p.numel() * p.element_size()
        grad: Any = p.grad
        sparse = grad is not None and grad.layout == torch.sparse_coo
        for part in () if grad is None else (grad._indices(), grad._values()) if sparse else (grad,):
            if part.layout == torch.strided:
                bytes_["gradient"] += part.numel() * part.element_size()
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                kind = forms.plain_name(name) if value.ndim or p.ndim == 0 else "other"
                bytes_[kind] = bytes_.get(kind, 0) + value.numel() * value.element_size()
    report = {kind: size / max(n, 1) for kind, size in bytes_.items()}
    return {"parameters": n, **report, "total": sum(report.values())}
