"""Drop-in replacements for ``torch.optim``: the same classes, arguments, state and checkpoints, with the fused step.

``import fusedopt.torch as optim`` works in place of ``import torch.optim as optim``: what is not ours is torch's.

Beyond torch, every class takes, keyword-only:
    state_dtype: dtype of the state arrays (``torch.float32`` or ``"float32"``; also float64, bfloat16, float16); None
        is torch's own, that of the parameter. Per group.
    max_grad_norm: clips the gradients of all groups together to this global norm inside the step, as
        ``torch.nn.utils.clip_grad_norm_`` would; gradients are not written. The norm is ``opt.last_grad_norm``.

State tensors may be replaced, loaded or written to between steps. One that is set to other memory in place
(``state.data = ...``, ``share_memory_()``) is noticed at the next step if it has 1,024 elements or more, else
within 16.

What the kernels do not do (sparse, complex, differentiable, capturable, subclasses of Tensor, overlapping memory, other
devices than the CPU) goes through torch's own step for the tensors concerned, with one ``FallbackWarning`` that says
why; together with an option of ours, or with gradients still scaled, it raises RuntimeError instead.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from . import _core
from ._make import compile_function, option_dict, option_signature, rule_doc
from .config import get_num_threads
from .rules import RULES, Rule

__all__ = ["FallbackWarning"]

_EXCHANGE = True  # read tensors by DLPack's exchange API where this torch has it (2.10 and later)
_OURS, _IDLE, _FOREIGN = range(3)  # updated here; without a gradient so far; left to torch
_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FORMATS = {tuple(f) for f in _core.formats()}
_WIDE = (torch.float32, torch.float64)
_NEW_OPTIONS = ("state_dtype", "max_grad_norm")


class FallbackWarning(UserWarning):
    """A tensor takes torch's own, slower path, for the reason given."""


class _Keep:
    """A state tensor on its way through torch's ``load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _dtype_name(value: Any) -> str | None:
    name = _NAMES.get(value, value) if isinstance(value, torch.dtype) else value
    if name is not None and name not in _DTYPES:
        raise ValueError(f"state_dtype: expected one of {', '.join(_DTYPES)} or None, got {value!r}")
    return name


def _checked_norm(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {value!r}")
    return float(value)


def _bump(tensors: list[torch.Tensor]) -> None:
    """Tells autograd that the parameters have changed."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def _outside() -> int:
    """The stack level of the nearest caller that is neither torch nor ours, for a warning."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level


class _Fused(Optimizer):
    """The step that every class here shares; a mixin before the torch class it replaces."""

    _rule: ClassVar[Rule]
    _plain_step: ClassVar[Callable[..., Any] | None]
    """torch's own step, without hooks; None where torch has no such optimizer."""

    last_grad_norm: torch.Tensor | None
    last_step_skipped: bool

    def _begin(self, state_dtype: Any, max_grad_norm: Any) -> None:
        self._options = {"state_dtype": _dtype_name(state_dtype), "max_grad_norm": _checked_norm(max_grad_norm)}
        self._reset()

    def _reset(self) -> None:
        self._plan: Any = None
        self._foreign: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._said: set[str] = self.__dict__.get("_said", set())
        self.last_grad_norm = None
        self.last_step_skipped = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        for entry in state.get("state", {}).values():
            if isinstance(entry, dict):
                entry.update({k: v.tensor for k, v in entry.items() if isinstance(v, _Keep)})
        super().__setstate__(state)
        for group in self.param_groups:
            for key in _NEW_OPTIONS:
                group.setdefault(key, self.defaults.get(key))
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "_options" in self.__dict__:  # torch's constructor is still running, or has just run
            self.defaults.update(self._options)
        if isinstance(param_group, dict):
            for key, check in (("state_dtype", _dtype_name), ("max_grad_norm", _checked_norm)):
                if key in param_group:
                    param_group[key] = check(param_group[key])
            if param_group.get("max_grad_norm", self.defaults["max_grad_norm"]) != self.defaults["max_grad_norm"]:
                raise ValueError("max_grad_norm: one for the optimizer, over all groups; got another for a group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"] if group["state_dtype"] else ():
            name = _NAMES.get(p.dtype)
            if (name, name, group["state_dtype"]) not in _FORMATS:
                self.param_groups.pop()
                raise ValueError(f"state_dtype: {group['state_dtype']} does not go with parameters of {p.dtype}")
        self._plan = None

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to, or None."""
        value: float | None = self.param_groups[0]["max_grad_norm"]
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.defaults["max_grad_norm"] = value = _checked_norm(value)
        for group in self.param_groups:
            group["max_grad_norm"] = value

    # --- the step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; ``closure`` reevaluates the model and returns the loss, which is returned."""
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _torch_optimizer._global_optimizer_pre_hooks
            or _torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ) and type(self).step is _Fused.step:  # torch has wrapped the step of a subclass that has its own
            return _hooked(self) if closure is None else _hooked(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        unscale = 1.0
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
            self.last_step_skipped = found_inf is not None and float(found_inf) != 0
            if self.last_step_skipped:
                return loss
            unscale = 1.0 if scale is None else 1.0 / float(scale)
        else:
            self.last_step_skipped = False
        groups = self.param_groups
        max_norm = groups[0]["max_grad_norm"] or 0.0 if groups else 0.0
        plan = self._plan
        if self._foreign:
            self._refuse_foreign(unscale, max_norm)
        if plan is None or not plan.step(self.state, groups, unscale, max_norm, get_num_threads()):
            plan = self._replan(unscale, max_norm)
        if max_norm:
            wide = any(p.dtype == torch.float64 for group in groups for p in group["params"])
            self.last_grad_norm = torch.tensor(plan.norm, dtype=torch.float64 if wide else torch.float32)
        if self._foreign:
            self._step_foreign()
        return loss

    def _replan(self, unscale: float, max_norm: float) -> Any:
        """Sorts the parameters, creates missing state, and does the step by a new plan."""
        created: list[tuple[torch.Tensor, list[str]]] = []
        banned: dict[torch.Tensor, str] = {}
        try:
            for _ in range(3):
                self._plan = plan = self._build(created, banned)
                self._refuse_foreign(unscale, max_norm)
                clash = plan.conflicts()
                if not clash and plan.step(self.state, self.param_groups, unscale, max_norm, get_num_threads()):
                    return plan
                for g, i in clash:
                    banned[self.param_groups[g]["params"][i]] = "its memory overlaps that of another parameter or state"
                self._take_back(created)
            raise RuntimeError("the parameters or their state change while step() looks at them")
        except BaseException:
            self._plan = None
            self._take_back(created)
            raise

    def _take_back(self, created: list[tuple[torch.Tensor, list[str]]]) -> None:
        """Removes state that no step has filled: an SGD buffer that exists counts as begun."""
        for p, names in created:
            for name in names:
                self.state[p].pop(name, None)
            if not self.state[p]:
                del self.state[p]
        created.clear()

    def _build(self, created: list[tuple[torch.Tensor, list[str]]], banned: dict[torch.Tensor, str]) -> Any:
        rule = self._rule
        plan = _core.TorchPlan(self.state, _TYPES, tuple(_DTYPES.values()), torch.Tensor.is_neg, _bump, _EXCHANGE)
        self._foreign = {}
        for g, group in enumerate(self.param_groups):
            kernel = rule.kernel(group)
            hyper = [
                (None, -1, float(rule.defaults[key])) if key is not None and key not in group else (key, index, value)
                for key, index, value in kernel.sources
            ]
            same = [k for k in ("fused", "state_dtype", "differentiable", "capturable") if k in group]
            plan.add_group(group, kernel.index, hyper, [k for k in rule.chooses if k in group], same)
            general = self._group_reason(group)
            for p in group["params"]:
                grad = p.grad
                reason = general or banned.get(p)
                if grad is None:
                    plan.add_param(p, _IDLE if not reason else _FOREIGN, None, [], None, None, 0)
                    if reason:
                        self._foreign.setdefault(reason, []).append((g, p))
                    continue
                reason = reason or self._reason(plan, p, grad)
                if not reason:
                    done, new = self._fill_state(p, group)
                    if new:
                        created.append((p, new))
                    state = self.state.get(p)
                    reason = self._state_reason(p, grad, state or {}, kernel.states)
                if reason:
                    self._foreign.setdefault(reason, []).append((g, p))
                    plan.add_param(p, _FOREIGN, None, [], None, None, 0)
                    continue
                arrays = [state[name] for name in kernel.states] if state else []
                scalars = [state[name] if state else None for name in rule.scalars]
                step, carry = (*scalars, None, None)[:2]
                plan.add_param(p, _OURS, state, arrays, step, carry, done)
        plan.finish()
        return plan

    def _group_reason(self, group: dict[str, Any]) -> str | None:
        if group.get("fused") is False:
            return "fused=False asks for torch's own step"
        for option in ("differentiable", "capturable"):
            if group.get(option):
                return f"{option}=True is not done by the fused kernels"
        return None

    def _reason(self, plan: Any, p: torch.Tensor, grad: torch.Tensor) -> str | None:
        """Why the kernels do not take this parameter or its gradient; None if they do."""
        for name, t in (("parameter", p), ("gradient", grad)):
            if type(t) not in _TYPES:
                return f"a {name} is a {type(t).__name__}, a subclass of Tensor"
            if t.layout != torch.strided:
                return f"a {name} is sparse"
            if t.device.type != "cpu":
                return f"a {name} is on {t.device.type}; this build runs on the CPU alone"
            if t.dtype not in _NAMES:
                return f"a {name} has dtype {t.dtype}"
        if not plan.plain(p):
            return "elements of a parameter share memory, or it is a lazily negated view"
        if grad.is_neg():
            return "a gradient is a lazily negated view"
        if p.shape != grad.shape:
            return "a gradient has another shape than its parameter"
        return None

    def _state_reason(
        self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], names: tuple[str, ...]
    ) -> str | None:
        for name in names:
            s = state.get(name)
            if isinstance(s, torch.Tensor) and s.shape != p.shape:
                raise ValueError(f"state {name!r}: expected shape {tuple(p.shape)}, got {tuple(s.shape)}")
            if not isinstance(s, torch.Tensor) or s.device.type != "cpu" or type(s) not in _TYPES:
                return f"state {name!r} is missing, or no plain tensor on the CPU"
        for name in self._rule.scalars:
            s = state.get(name)
            if not isinstance(s, torch.Tensor) or s.numel() != 1 or s.device.type != "cpu" or s.dtype not in _WIDE:
                return f"state {name!r} is not a one-element tensor on the CPU"
        dtypes = {state[name].dtype for name in names} or {p.dtype}
        combination = (_NAMES[p.dtype], _NAMES[grad.dtype], _NAMES.get(next(iter(dtypes))))
        if len(dtypes) > 1 or (
            combination not in _FORMATS if names else not any(combination[:2] == f[:2] for f in _FORMATS)
        ):
            states = " and ".join(sorted(str(d) for d in dtypes))
            return f"no kernel for a {p.dtype} parameter with a {grad.dtype} gradient and {states} state"
        return None

    def _fill_state(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[int, list[str]]:
        """Creates the state that torch would; (steps done where no tensor counts them, names created)."""
        rule = self._rule
        names = rule.states(group)
        state = self.state[p] if names or rule.scalars else {}
        if rule.scalars:
            missing = [*rule.scalars, *names] if not state else []
        else:
            missing = [name for name in names if state.get(name) is None]
        dtype = _DTYPES[group["state_dtype"]] if group["state_dtype"] else p.dtype
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        with torch.no_grad():
            for name in missing:
                first = rule.first(name, self.defaults)
                if name in rule.scalars:
                    state[name] = torch.full((), first, dtype=scalar)
                else:
                    state[name] = torch.full_like(p, first, dtype=dtype, memory_format=torch.preserve_format)
        return (0 if missing or not names else 1), missing

    # --- what the kernels do not do ---

    def _refuse_foreign(self, unscale: float, max_norm: float) -> None:
        for reason, places in self._foreign.items():
            in_use = [(g, p) for g, p in places if p.grad is not None]
            options = [f"max_grad_norm={max_norm}"] if max_norm else []
            if any(self.param_groups[g]["state_dtype"] for g, _ in in_use):
                options.append("state_dtype")
            if unscale != 1.0:
                options.append("GradScaler's fused protocol")
            if self._plain_step is None:
                options.append(self._rule.name)
            if in_use and options:
                raise RuntimeError(
                    f"{' and '.join(options)}: torch's own step, needed here ({reason}), does not have it"
                )
            if in_use and reason not in self._said and not reason.startswith("fused=False"):
                self._said.add(reason)
                warnings.warn(f"{reason}: torch's own step updates it", FallbackWarning, stacklevel=_outside())

    def _step_foreign(self) -> None:
        """torch's own step over the parameters left to it."""
        left = {g: [] for g in range(len(self.param_groups))}  # type: dict[int, list[torch.Tensor]]
        for places in self._foreign.values():
            for g, p in places:
                if p.grad is not None:
                    left[g].append(p)
        if not any(left.values()):
            return
        plain = type(self)._plain_step
        assert plain is not None
        groups = self.param_groups
        scaled: dict[str, Any] = {k: self.__dict__.pop(k) for k in ("grad_scale", "found_inf") if k in self.__dict__}
        try:
            self.param_groups = [{**group, "params": left[g]} for g, group in enumerate(groups) if left[g]]
            plain(self)
        finally:
            self.param_groups = groups
            self.__dict__.update(scaled)

    # --- checkpoints ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch's; the state keeps its dtype.

        An explicit ``state_dtype`` of ours beats the checkpoint's. A tensor that the optimizer already holds is not
        written to.
        """
        handle = self.register_load_state_dict_pre_hook(_before_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


def _before_load(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last of the load hooks: keeps options of ours and the state's dtype."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    targets: dict[Any, tuple[torch.Tensor, str | None]] = {}
    for new, group in zip(groups, self.param_groups, strict=False):
        if group["state_dtype"] is not None or "state_dtype" not in new:
            new["state_dtype"] = group["state_dtype"]
        new.setdefault("max_grad_norm", group["max_grad_norm"])
        if "fused" in group and new.get("fused") in (None, False):
            new["fused"] = group["fused"]  # how to compute is ours to say, not the checkpoint's
        for key, p in zip(new["params"], group["params"], strict=False):
            targets[key] = (p, new["state_dtype"])

    def keep(name: str, value: Any, p: torch.Tensor, dtype: str | None) -> Any:
        if name == "step" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if name in self._rule.scalars:  # torch's cast would round it to 16 bits
            return value if p.dtype in _WIDE else _Keep(value.clone())
        return _Keep(value.to(device=p.device, dtype=_DTYPES[dtype] if dtype else None, copy=True))

    state = {
        key: {name: keep(name, value, *targets[key]) for name, value in entry.items()} if key in targets else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": state}


_hooked = Optimizer.profile_hook_step(_Fused._step)
_Fused.step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it: step() runs hooks and profiler itself


_CLASS_DOC = """
    {name} takes torch.optim's arguments, and ``state_dtype`` and ``max_grad_norm``; see :mod:`fusedopt.torch`.

    Example:
        >>> import torch
        >>> from fusedopt.torch import {name}
        >>> model = torch.nn.Linear(10, 1)
        >>> opt = {name}(model.parameters(), lr=0.1)
        >>> model(torch.ones(4, 10)).sum().backward()
        >>> opt.step()
    """


def _make_class(rule: Rule) -> type[Optimizer]:
    theirs: type[Optimizer] | None = getattr(torch.optim, rule.name, None)
    if theirs is None:
        base, init = Optimizer, _own_init(rule)
    else:
        base, init = theirs, theirs.__init__

    def __init__(self: Any, *args: Any, state_dtype: Any = None, max_grad_norm: Any = None, **kwargs: Any) -> None:
        self._begin(state_dtype, max_grad_norm)
        init(self, *args, **kwargs)
        del self._options
        for group in self.param_groups if rule.initial and state_dtype else ():
            for p in group["params"]:  # Adagrad's constructor makes its state
                for name in rule.states(group):
                    if name in self.state.get(p, {}):
                        self.state[p][name] = self.state[p][name].to(_DTYPES[group["state_dtype"]])

    signature = inspect.signature(init)
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in _NEW_OPTIONS]
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    plain = None
    if theirs is not None:  # as it is below torch's hooks, which our own step runs
        step: Any = theirs.step
        plain = step.__wrapped__ if getattr(step, "hooked", False) else step
    return type(
        rule.name,
        (_Fused, base),
        {
            "__init__": __init__,
            "__doc__": rule_doc(rule, _CLASS_DOC).replace("{name}", rule.name),
            "__module__": __name__,
            "_rule": rule,
            "_plain_step": plain,
        },
    )


def _own_init(rule: Rule) -> Callable[..., None]:
    """A constructor in torch's manner for a rule that torch does not have."""

    def begin(self: Any, params: Iterable[Any], options: dict[str, Any]) -> None:
        rule.check({**options, "lr": float(options["lr"])})
        Optimizer.__init__(self, params, {**options, "differentiable": False})

    names = option_signature(rule).split(", maximize")[0]
    return compile_function(
        "__init__",
        f"self, params, {names}, *, maximize=False",
        f"begin(self, params, {option_dict(rule)})",
        {"begin": begin},
    )


for _rule in RULES.values():
    globals()[_rule.name] = _make_class(_rule)
    __all__.append(_rule.name)


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
