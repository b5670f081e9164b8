"""Drop-in replacements for ``torch.optim``: the same classes, arguments, state and checkpoints, with the fused step.

``import fusedopt.torch as optim`` works in place of ``import torch.optim as optim``: what is not ours is torch's.

Beyond torch, every class takes, keyword-only:
    state_dtype: dtype of the state arrays (``torch.float32`` or ``"float32"``; also float64, bfloat16, float16, int8);
        None is torch's own, that of the parameter. Per group, as are the next five.
    master: what the step keeps beside a 16-bit parameter: ``"split16"``, ``"split8"``, ``"float32"``.
    stochastic_rounding, seed: 16-bit parameters and states are rounded at random, right on average.
    ema_decay: keeps a moving average of the parameters; ``opt.ema_parameters()`` swaps it in.
    l1: soft-thresholds parameters by lr * l1 after the update.
    max_grad_norm: clips the gradients of all groups together to this global norm inside the step, as
        ``torch.nn.utils.clip_grad_norm_`` would; gradients are not written. The norm is ``opt.last_grad_norm``.

State tensors may be replaced, loaded, written to or set to other memory between steps. Two threads cannot step one
optimizer at the same time: the second one gets a RuntimeError, and nothing is changed for it.

What the kernels do not do (sparse, complex, differentiable, on the CPU capturable, subclasses of Tensor, overlapping
memory, devices other than the CPU and, with the CUDA build, CUDA's) goes through torch's own step for the tensors
concerned, with one ``FallbackWarning`` that says why; together with an option of ours, or with gradients still scaled,
it raises RuntimeError instead.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from . import _core, forms
from ._make import compile_function, option_dict, option_signature, rule_doc
from .config import get_num_threads
from .rules import RULES, Rule
from .torch_backward import InBackward, step_in_backward
from .torch_forms import (
    DTYPES,
    INTEGERS,
    NAMES,
    NEW_OPTIONS,
    WIDE,
    Keep,
    before_load,
    capturing,
    dtype_of,
    form_of,
    like,
    memory_report,
    on_device,
    recode,
    refused,
)

__all__ = ["FallbackWarning", "InBackward", "memory_report", "step_in_backward"]

_EXCHANGE = True  # read tensors by DLPack's exchange API where this torch has it (2.10 and later)
_OURS, _IDLE, _FOREIGN = range(3)  # updated here; without a gradient so far; left to torch
_TYPES = (torch.Tensor, torch.nn.Parameter)
_numbers = itertools.count(1)
_optimizers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # by a number, for torch_compile


class FallbackWarning(UserWarning):
    """A tensor takes torch's own, slower path, for the reason given."""


def _checked(key: str, value: Any) -> Any:
    """The value of one of our options; dtypes as their names."""
    if key == "max_grad_norm":
        return _checked_norm(value)
    if key == "state_dtype" and isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    forms.check({**forms.OPTIONS, key: value})
    return value


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


def _check_capture(opt: Any) -> None:
    """torch's own check that what is captured into a graph can be; it has had two names."""
    now = getattr(opt, "_accelerator_graph_capture_health_check", None)
    (now or opt._cuda_graph_capture_health_check)()


def _scalar_on(device: torch.device, x: torch.Tensor | None) -> bool:
    """Can kernels on this device read it? None they need not."""
    return x is None or (type(x) in _TYPES and x.device == device and x.dtype == torch.float32 and x.numel() == 1)


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

    def _begin(self, options: dict[str, Any]) -> None:
        self._options = {key: _checked(key, options[key]) for key in NEW_OPTIONS}
        self._reset()

    def _reset(self) -> None:
        self._running = threading.Lock()  # held from the first look at a tensor to the last write
        self._plan: Any = None
        self._shards: Any = None  # of torch_dtensor
        self._foreign: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._said: set[str] = self.__dict__.get("_said", set())
        self._number = str(next(_numbers))  # a compiler takes an int that differs for a variable
        self._every: list[torch.Tensor] | None = None  # torch_compile's
        self._views: dict[tuple[int, ...], Any] = {}
        _optimizers[self._number] = self
        self._place: torch.device | None = None
        self.last_grad_norm = None
        self._skipped: bool | torch.Tensor = False

    @property
    def last_step_skipped(self) -> bool:
        """Did the last step see gradients that GradScaler found not finite? On a GPU, asking waits for the step."""
        return bool(self._skipped)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for entry in state.get("state", {}).values():
            if isinstance(entry, dict):
                entry.update({k: v.tensor for k, v in entry.items() if isinstance(v, Keep)})
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in NEW_OPTIONS.items():
                group.setdefault(key, self.defaults.get(key, default))
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "_options" in self.__dict__:  # torch's constructor is still running, or has just run
            self.defaults.update(self._options)
        if isinstance(param_group, dict):
            for key in NEW_OPTIONS:
                if key in param_group:
                    param_group[key] = _checked(key, param_group[key])
            if param_group.get("max_grad_norm", self.defaults["max_grad_norm"]) != self.defaults["max_grad_norm"]:
                raise ValueError("max_grad_norm: one for the optimizer, over all groups; got another for a group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            reason = p.dtype in NAMES and forms.refusal(self._rule.kernel(group), NAMES[p.dtype], form_of(p, group))
            if reason:
                self.param_groups.pop()
                raise ValueError(reason)
        self._plan = self._every = None
        self._views = {}

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
        if is_dynamo_compiling():
            from .torch_compile import step

            return step(self, closure)
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
        if not self._running.acquire(blocking=False):
            raise RuntimeError("step() of this optimizer is already running in another thread")
        try:
            home = self._home()
            if home is not None and home.type == "cuda" and home.index != torch.cuda.current_device():
                with torch.cuda.device(home):  # unlike CUDA's own way back, torch's makes no new context
                    self._update(home)
            else:
                self._update(home)
        finally:
            self._running.release()
        return loss

    def _update(self, home: torch.device | None) -> None:
        unscale, found_inf, scale = 1.0, None, None
        if home is not None and home.type != "cpu" and "capturable" in self.defaults:
            _check_capture(self)
        self._skipped = False
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
            if home is not None and not self._foreign and all(_scalar_on(home, x) for x in (found_inf, scale)):
                self._skipped = False if found_inf is None else found_inf  # looked at where it is, nobody waits
            else:
                self._skipped = found_inf is not None and float(found_inf) != 0
                if self._skipped:
                    return
                unscale = 1.0 if scale is None else 1.0 / float(scale)
                found_inf = scale = None
        groups = self.param_groups
        max_norm = groups[0]["max_grad_norm"] or 0.0 if groups else 0.0
        plan = self._plan
        if plan is None and self._sharded():
            if found_inf is not None and float(found_inf):
                return
            norm = self._shards.step(unscale if scale is None else 1.0 / float(scale), max_norm)
            if max_norm:
                self.last_grad_norm = norm.to(self._norm_dtype())
            return
        norm = torch.zeros((), dtype=self._norm_dtype(), device=home) if max_norm and home is not None else None
        scaling = (unscale, max_norm, get_num_threads(), found_inf, scale, norm)
        if self._foreign:
            self._refuse_foreign(max_norm, unscale != 1.0 or scale is not None)
        try:
            if plan is None or not plan.step(self.state, groups, *scaling):
                plan = self._replan(scaling)
        except _core.DeviceOutOfMemoryError:  # on one device nothing has been launched by then
            if home is None or capturing(home):
                raise
            torch.cuda.empty_cache()  # torch may hold memory for later
            plan = self._replan(scaling)
        if plan is None:
            return
        if max_norm:
            self.last_grad_norm = torch.tensor(plan.norm, dtype=self._norm_dtype()) if norm is None else norm
        if self._foreign and not self.last_step_skipped:
            self._step_foreign()

    def _home(self) -> torch.device | None:
        """The device with kernels of ours where all parameters lie, if there is one; the CPU has its own way."""
        if self._plan is None and self._shards is None:
            places = {p.device for group in self.param_groups for p in group["params"]}
            self._place = places.pop() if len(places) == 1 else None
            if self._place is not None and not on_device(self._place):
                self._place = None
        return self._place

    def _norm_dtype(self) -> torch.dtype:
        wide = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        return torch.float64 if wide else torch.float32

    def _sharded(self) -> bool:
        """Whether parameters are DTensors, whose local parts are then stepped by ``_shards``."""
        if self._shards is None and "torch.distributed.tensor" in sys.modules:
            from .torch_dtensor import Shards, any_dtensor

            if any_dtensor(self.param_groups):
                self._shards = Shards(self)
        return self._shards is not None

    def _replan(self, scaling: tuple[Any, ...]) -> Any:
        """Sorts the parameters, creates missing state, and does the step by a new plan; None if the step is skipped."""
        created: list[tuple[torch.Tensor, list[str]]] = []
        banned: dict[torch.Tensor, str] = {}
        unscale, max_norm, _, found_inf, scale, _ = scaling
        try:
            for _ in range(3):
                self._plan = plan = self._build(created, banned)
                self._refuse_foreign(max_norm, unscale != 1.0 or scale is not None)
                if created and any(capturing(d) for d in {p.device for p, _ in created}):
                    raise RuntimeError(
                        "a step that creates state cannot be captured, since every replay would create it anew: do one "
                        "step before the capture"
                    )
                if created and found_inf is not None and float(found_inf):  # a step that is skipped leaves no state
                    self._plan = None
                    self._take_back(created)
                    return None
                clash = plan.conflicts()
                if not clash and plan.step(self.state, self.param_groups, *scaling):
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
        dtypes = (*DTYPES.values(), *(INTEGERS[k] for k in ("int16", "int8", "uint8")))
        plan = _core.TorchPlan(self.state, _TYPES, dtypes, torch.Tensor.is_neg, _bump, _EXCHANGE)
        self._foreign = {}
        for g, group in enumerate(self.param_groups):
            kernel = rule.kernel(group)
            hyper = [
                (None, -1, float(rule.defaults[key])) if key is not None and key not in group else (key, index, value)
                for key, index, value in kernel.sources
            ]
            ema = group["ema_decay"] is not None
            hyper += [("l1", -1, 0.0), ("ema_decay" if ema else None, -1, 0.0), ("seed", -1, 0.0)]
            same = ["fused", "differentiable", "capturable", "state_dtype", "master", "stochastic_rounding"]
            plan.add_group(
                group, kernel.index, hyper,
                [k for k in (*rule.chooses, "ema_decay") if k in group],
                [k for k in same if k in group],
                forms.MASTERS[group["master"]][0] if group["master"] else 0,
                bool(group["stochastic_rounding"]),
                forms.explicit(group),
            )  # fmt: skip
            general = self._group_reason(group)
            for p in group["params"]:
                grad = p.grad
                reason = general or banned.get(p)
                if grad is None:
                    plan.add_param(p, _IDLE if not reason else _FOREIGN)
                    if reason:
                        self._foreign.setdefault(reason, []).append((g, p))
                    continue
                reason = reason or self._reason(plan, p, grad, group)
                if not reason:
                    done, new = self._fill_state(p, group)
                    if new:
                        created.append((p, new))
                    state = self.state.get(p)
                    reason = self._state_reason(plan, p, grad, state or {}, group)
                if reason:
                    self._foreign.setdefault(reason, []).append((g, p))
                    plan.add_param(p, _FOREIGN)
                    continue
                state = state or {}
                quantised = kernel.states != () and f"{kernel.states[0]}_codes" in state
                arrays = [state[f"{name}_codes" if quantised else name] for name in kernel.states]
                scales = [state[f"{name}_scale"] for name in kernel.states] if quantised else []
                step = state["step"] if "step" in rule.scalars or "stream" in state else None
                carry = next((state[name] for name in rule.scalars if name != "step"), None)
                master = state["master"] if form_of(p, group).master else None
                plan.add_param(
                    p, _OURS, state or None, arrays, step, carry, done,
                    master, state["ema"] if ema else None, scales, state.get("stream", 0),
                )  # fmt: skip
        plan.finish()
        return plan

    def _group_reason(self, group: dict[str, Any]) -> str | None:
        if group.get("fused") is False:
            return "fused=False asks for torch's own step"
        if group.get("differentiable"):
            return "differentiable=True is not done by the fused kernels"
        return None

    def _reason(self, plan: Any, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> str | None:
        """Why the kernels do not take this parameter or its gradient; None if they do."""
        if group.get("capturable") and not on_device(p.device):
            return "capturable=True is not done by the fused kernels of the CPU"
        for name, t in (("parameter", p), ("gradient", grad)):
            if type(t) not in _TYPES:
                return f"a {name} is a {type(t).__name__}, a subclass of Tensor"
            if t.layout != torch.strided:
                return f"a {name} is sparse"
            refusal = refused(t.device)
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
        return None

    def _state_reason(
        self, plan: Any, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> str | None:
        kernel = self._rule.kernel(group)
        names = kernel.states
        form = form_of(p, group, "int8" if names and f"{names[0]}_codes" in state else None)
        for name in forms.array_names(names, form, group["ema_decay"] is not None):
            s = state.get(name)
            if not isinstance(s, torch.Tensor) or s.device != p.device or type(s) not in _TYPES:
                return f"state {name!r} is missing, or no plain tensor beside its parameter"
            shape = (forms.blocks(p.numel()),) if name.endswith("_scale") else p.shape
            if s.shape != shape:
                raise ValueError(f"state {name!r}: expected shape {tuple(shape)}, got {tuple(s.shape)}")
            dtype = dtype_of(name, p, form)
            if dtype is not None and s.dtype != dtype:
                raise ValueError(f"state {name!r}: expected {dtype}, got {s.dtype}")
            trouble = plan.trouble(s, True)
            if trouble == "has no memory":
                raise RuntimeError(f"state {name!r} of shape {tuple(shape)} has no memory")
            if trouble:
                return f"state {name!r} {trouble}"
        for name in self._rule.scalars:
            s = state.get(name)
            if type(s) not in _TYPES or s.numel() != 1 or s.device != p.device or s.dtype not in WIDE:
                return f"state {name!r} is not a one-element tensor beside its parameter"
        if not form.quantised and names:
            dtypes = {state[name].dtype for name in names}
            known = NAMES.get(next(iter(dtypes))) if len(dtypes) == 1 else None
            form = form_of(p, group, known or " and ".join(sorted(map(str, dtypes))))
        if not forms.exists(kernel, NAMES[p.dtype], NAMES[grad.dtype], form):
            kept = f" and master={form.master!r}" if form.master else ""
            return f"no kernel for a {p.dtype} parameter with a {grad.dtype} gradient and {form.state} state{kept}"
        return None

    def _fill_state(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[int, list[str]]:
        """Creates the state that torch would, and ours; (steps done where no tensor counts them, names created)."""
        rule, form = self._rule, form_of(p, group)
        names = rule.states(group)
        kept = forms.array_names((), form, group["ema_decay"] is not None) + ("stream",) * form.random
        state = self.state[p] if names or rule.scalars or kept else {}
        begun = any(k in state for n in (*names, *rule.scalars) for k in (n, f"{n}_codes") if state.get(k) is not None)
        if names and form.quantised and begun and f"{names[0]}_codes" not in state:
            recode(p, state, names, form)  # the option has been switched on in the middle of a run
        missing = [] if begun else [*rule.scalars, *names]
        new = [*rule.scalars, *forms.array_names(names, form, False)] if missing else []
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        for name in (*rule.scalars, "step"):  # where the kernels count
            held = state.get(name)
            if isinstance(held, torch.Tensor) and held.device != p.device:
                state[name] = held.to(p.device)
        with torch.no_grad():
            for name in missing:
                first = rule.first(name, self.defaults)
                if name in rule.scalars:
                    state[name] = torch.full((), first, dtype=scalar, device=p.device)
                elif form.quantised:
                    kind = INTEGERS[forms.code(name) or ""]
                    state[f"{name}_codes"] = like(p, kind).fill_(torch.iinfo(kind).max if first else 0)
                    blocks = (forms.blocks(p.numel()),)
                    state[f"{name}_scale"] = torch.full(blocks, first, dtype=torch.float32, device=p.device)
                else:
                    state[name] = like(p, DTYPES[form.state]).fill_(first)
            if form.random and "step" not in rule.scalars and (missing or "step" not in state):
                # Random numbers are drawn by the step: it has to come with a checkpoint.
                state["step"] = torch.full((), float(begun), dtype=scalar, device=p.device)
                new.append("step")
            for name in kept:
                if name in state:
                    continue
                if name == "stream":
                    order = (q for g in self.param_groups for q in g["params"])
                    state[name] = next(i for i, q in enumerate(order) if q is p)
                else:
                    dtype = dtype_of(name, p, form)
                    state[name] = like(p, dtype).copy_(p) if dtype in WIDE else like(p, dtype).zero_()
                new.append(name)
        return (0 if missing or not names else 1), new

    # --- what the kernels do not do ---

    def _refuse_foreign(self, max_norm: float, scaled: bool) -> None:
        for reason, places in self._foreign.items():
            in_use = [(g, p) for g, p in places if p.grad is not None]
            options = [f"max_grad_norm={max_norm}"] if max_norm else []
            for option, default in forms.OPTIONS.items():
                if option != "seed" and any(self.param_groups[g][option] != default for g, _ in in_use):
                    options.append(option)
            if scaled:
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

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """Puts the moving averages of ``ema_decay`` into the parameters for the time of a ``with`` block.

        A parameter that has not been stepped yet has no average and keeps its value.
        """
        pairs = [(p, p.detach().clone(), s["ema"]) for p, s in self.state.items() if "ema" in s]
        with torch.no_grad():
            for p, _, ema in pairs:
                p.copy_(ema)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, saved, _ in pairs:
                    p.copy_(saved)

    # --- checkpoints ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch's.

        As in torch the state is cast to the parameter's dtype, unless ``state_dtype`` was given here or is among the
        checkpoint's options. A tensor that the optimizer already holds is not written to.
        """
        handle = self.register_load_state_dict_pre_hook(before_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


_hooked = Optimizer.profile_hook_step(_Fused._step)
_Fused.step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it: step() runs hooks and profiler itself


_CLASS_DOC = """
    {name} takes torch.optim's arguments, and ``state_dtype``, ``master``, ``stochastic_rounding``, ``seed``,
    ``ema_decay``, ``l1`` and ``max_grad_norm``; see :mod:`fusedopt.torch`.

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

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._begin({key: kwargs.pop(key, default) for key, default in NEW_OPTIONS.items()})
        init(self, *args, **kwargs)
        del self._options
        for group in self.param_groups if rule.initial and self.defaults["state_dtype"] else ():
            for p in group["params"]:  # Adagrad's constructor makes its state
                for name in rule.states(group):
                    if p.dtype not in NAMES or name not in self.state.get(p, {}):
                        continue
                    if group["state_dtype"] == "int8":
                        recode(p, self.state[p], (name,), form_of(p, group))
                    else:
                        self.state[p][name] = self.state[p][name].to(DTYPES[group["state_dtype"]])

    signature = inspect.signature(init)
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in NEW_OPTIONS.items()]
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


_ELSEWHERE = {"ScheduledLR": "torch_schedule"} | dict.fromkeys(("Callback", "Trainer", "fit"), "training")
_ELSEWHERE |= dict.fromkeys(("convert", "install", "installed", "uninstall"), "torch_install")
_ELSEWHERE["Offload"] = "torch_offload"
"""What is reached from here and loaded when it is asked for."""


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(f".{_ELSEWHERE[name]}", __package__), name)
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ELSEWHERE, *dir(torch.optim)})
