"""The engine of one optimizer: sorts its parameters into those for the kernels and those for the fallback, hands them
to the compiled plan, and reports what happened. Groups, hooks and checkpoints are the optimizer's, in _optimizer.py.

Other files get the engine of an optimizer from ``engine_of`` and use its public methods.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .. import _core, forms
from ..config import get_num_threads
from ..rules import Rule, check_max_grad_norm
from ._device import PLAIN, capturing, has_device_kernels, readable_scalar
from ._eligibility import device_reason, group_reason, state_reason, tensor_reason
from ._fallback import Fallback
from ._sparse import dense_reason, is_sparse, sparse_reason
from ._state import DTYPES, INTEGERS, create_state, form_of

EXCHANGE = True  # read tensors by DLPack's exchange API where this torch has it (2.10 and later)
_KERNEL, _IDLE, _FALLBACK = range(3)  # how the plan treats a parameter; idle: it has had no gradient so far
_numbers = itertools.count(1)

optimizers: weakref.WeakValueDictionary[str, Optimizer] = weakref.WeakValueDictionary()
"""Every optimizer by the number of its engine, for torch.compile's operator."""

Created = list[tuple[torch.Tensor, list[str]]]
"""Parameters with the names of the state created for them."""


def engine_of(optimizer: Any) -> Engine:
    """The engine of an optimizer of ours."""
    engine: Engine = optimizer._engine
    return engine


def remove_engine(optimizer: Any) -> None:
    """Leaves an optimizer of ours as one of torch's, before or after its class is changed."""
    vars(optimizer).pop("_engine", None)


class Engine:
    """Updates the parameters of one optimizer.

    It holds no reference to the optimizer, which its methods take: a cycle would keep parameters alive.

    Attributes:
        plan: the compiled plan of the last step; None if the next step has to look at everything again.
        fallback: the parameters that take torch's own step.
        home: the device, other than the CPU, where all parameters are and kernels of ours run; or None.
        shards: the local side of the optimizer where parameters are DTensors; or None.
        norm: the norm of all gradients in the last step, if it clipped.
        skipped: whether the last step was skipped because of ``found_inf``; on a device a tensor, read when asked for.
        number: names the optimizer to torch.compile's operator; a string, since a compiler takes an int for a variable.
        traced_params, traced_views: what _compile.py has derived from the groups.
    """

    def __init__(self, rule: Rule, plain_step: Callable[..., Any] | None, warned: set[str]) -> None:
        self.rule = rule
        self.plan: Any = None
        self.fallback = Fallback(rule, plain_step, warned)
        self.home: torch.device | None = None
        self.shards: Any = None
        self.norm: torch.Tensor | None = None
        self.skipped: bool | torch.Tensor = False
        self.number = str(next(_numbers))
        self.traced_params: list[torch.Tensor] | None = None
        self.traced_views: dict[tuple[int, ...], Any] = {}
        self._built = 0
        self._running = threading.Lock()  # held from the first look at a tensor to the last write

    # --- for the other files of this package ---

    def groups_changed(self) -> None:
        """Forgets what was derived from the groups; the next step looks at every parameter again."""
        self.plan = self.traced_params = None
        self.traced_views = {}

    def run(self, optimizer: Optimizer) -> None:
        """Does one update with the gradients that are there, without hooks, profiler or closure."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError("step() of this optimizer is already running in another thread")
        try:
            if self.plan is None and self.shards is None:
                self.home = None if self.rule.own else _find_home(optimizer.param_groups)
            home = self.home
            if home is not None and home.type == "cuda" and home.index != torch.cuda.current_device():
                with torch.cuda.device(home):  # restores the device without making a context, unlike CUDA's own call
                    self._update(optimizer, home)
            else:
                self._update(optimizer, home)
        finally:
            self._running.release()

    def twin(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> tuple[Optimizer, Engine]:
        """An optimizer of the same class over these groups, without clipping and state, and its engine.

        The two share their warnings: what one has said, the other does not repeat.
        """
        other: Any = object.__new__(type(optimizer))
        other.__setstate__(
            {
                "defaults": {**optimizer.defaults, "max_grad_norm": None},
                "state": defaultdict(dict),
                "param_groups": [{**group, "max_grad_norm": None} for group in groups],
            }
        )
        engine = engine_of(other)
        engine.fallback.warned = self.fallback.warned
        return other, engine

    @property
    def plans_built(self) -> int:
        """Counts the plans built so far: while it stays the same, no state has been created by a kernel's step and no
        parameter has changed sides between kernels and fallback."""
        return self._built if self.shards is None else int(self.shards.engine.plans_built)

    def updated_by(self, optimizer: Optimizer) -> dict[str | None, int]:
        """How many of the parameters that have gradients are updated by the kernels (None), and by torch's own step for
        which reason."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        has_grad = {p: p.grad is not None for p in params}
        engine = self
        if self.shards is not None:
            engine, has_grad = self.shards.engine, {self.shards.local[p]: given for p, given in has_grad.items()}
        counts: dict[str | None, int] = {None: sum(has_grad.values())}
        for reason, left in engine.fallback.places.items():
            counts[reason] = sum(has_grad[p] for _, p in left)
            counts[None] -= counts[reason]
        return counts

    # --- one update ---

    def _update(self, optimizer: Optimizer, home: torch.device | None) -> None:
        unscale, found_inf, scale = 1.0, None, None
        if home is not None and home.type != "cpu" and "capturable" in optimizer.defaults:
            _check_capture(optimizer)
        self.skipped = False
        given = vars(optimizer)
        if "found_inf" in given or "grad_scale" in given:  # GradScaler's fused protocol
            found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
            readable = home is not None and all(readable_scalar(x, home) for x in (found_inf, scale))
            if readable and not self.fallback.places:
                self.skipped = False if found_inf is None else found_inf  # the kernels read both; nothing waits
            else:
                self.skipped = found_inf is not None and float(found_inf) != 0
                if self.skipped:
                    return
                unscale = 1.0 if scale is None else 1.0 / float(scale)
                found_inf = scale = None
        groups = optimizer.param_groups
        max_norm = _max_norm(groups)
        plan = self.plan
        if plan is None and self._sharded(groups):
            if found_inf is not None and float(found_inf):
                return
            norm = self.shards.step(self, optimizer, unscale if scale is None else 1.0 / float(scale), max_norm)
            if max_norm:
                self.norm = norm.to(_norm_dtype(groups))
            return
        norm = torch.zeros((), dtype=_norm_dtype(groups), device=home) if max_norm and home is not None else None
        scaling = (unscale, max_norm, get_num_threads(), found_inf, scale, norm)
        if plan is not None and self.fallback.places:
            self.fallback.announce(groups, max_norm, unscale != 1.0 or scale is not None)
        try:
            if plan is None or not plan.step(optimizer.state, groups, *scaling):
                plan = self._replan(optimizer, scaling)
        except _core.DeviceOutOfMemoryError:  # raised before anything is launched, with one device
            if home is None or capturing(home):
                raise
            torch.cuda.empty_cache()  # torch may hold memory in its cache
            plan = self._replan(optimizer, scaling)
        if plan is None:
            return
        if max_norm:
            self.norm = torch.tensor(plan.norm, dtype=_norm_dtype(groups), device="cpu") if norm is None else norm
        if self.fallback.places and not bool(self.skipped):
            self.fallback.step(optimizer)

    def _sharded(self, groups: list[dict[str, Any]]) -> bool:
        """Whether parameters are DTensors, whose local parts ``shards`` then updates."""
        if self.shards is None and "torch.distributed.tensor" in sys.modules:
            from ._dtensor import Shards, any_dtensor

            if any_dtensor(groups):
                if self.rule.reduces:
                    raise RuntimeError(
                        f"{self.rule.name} needs sums over whole tensors, and of a DTensor this process has only a part"
                    )
                self.shards = Shards()
        return self.shards is not None

    def _replan(self, optimizer: Optimizer, scaling: tuple[Any, ...]) -> Any:
        """Builds a new plan, creates missing state, and does the update; None if the step is skipped."""
        created: Created = []
        banned: dict[torch.Tensor, str] = {}
        groups, state = optimizer.param_groups, optimizer.state
        unscale, max_norm, _, found_inf, scale, _ = scaling
        try:
            for _ in range(3):
                self.plan = plan = self._build(optimizer, created, banned)
                self.fallback.announce(groups, max_norm, unscale != 1.0 or scale is not None)
                if created and any(capturing(d) for d in {p.device for p, _ in created}):
                    raise RuntimeError(
                        "a step that creates state cannot be captured, since every replay would create it anew: do one "
                        "step before the capture"
                    )
                if created and found_inf is not None and float(found_inf):  # a skipped step leaves no state
                    self.plan = None
                    _remove_state(state, created)
                    return None
                clash = plan.conflicts()
                if not clash and plan.step(state, groups, *scaling):
                    return plan
                for g, i in clash:
                    banned[groups[g]["params"][i]] = "its memory overlaps that of another parameter or state"
                _remove_state(state, created)
            raise RuntimeError("the parameters or their state change while step() looks at them")
        except BaseException:
            self.plan = None
            self.fallback.places = {}
            _remove_state(state, created)
            raise

    def _build(self, optimizer: Optimizer, created: Created, banned: dict[torch.Tensor, str]) -> Any:
        """A plan for the parameters as they are now. State that is missing is created and noted in ``created``;
        ``banned`` has a reason for parameters that must take the fallback."""
        rule = self.rule
        dtypes = (*DTYPES.values(), *(INTEGERS[k] for k in ("int16", "int8", "uint8")))
        plan = _core.TorchPlan(optimizer.state, PLAIN, dtypes, torch.Tensor.is_neg, _bump_versions, EXCHANGE)
        self._built += 1
        self.fallback.places = {}
        for g, group in enumerate(optimizer.param_groups):
            kernel = rule.kernel(group)
            hyper = [
                (None, -1, float(rule.defaults[key])) if key is not None and key not in group else (key, index, value)
                for key, index, value in kernel.sources
            ]
            ema = group["ema_decay"] is not None
            hyper += [("l1", -1, 0.0), ("ema_decay" if ema else None, -1, 0.0), ("seed", -1, 0.0)]
            same = ["fused", "differentiable", "capturable", "lazy", "state_dtype", "master", "stochastic_rounding"]
            plan.add_group(
                group, kernel.index, hyper,
                [k for k in (*rule.chooses, "ema_decay") if k in group],
                [k for k in same if k in group],
                forms.MASTERS[group["master"]][0] if group["master"] else 0,
                bool(group["stochastic_rounding"]),
                forms.explicit(group),
            )  # fmt: skip
            for_all = group_reason(group)
            for p in group["params"]:
                grad = p.grad
                reason = for_all or banned.get(p)
                if grad is None:
                    plan.add_param(p, _FALLBACK if reason else _IDLE)
                    if reason:
                        self.fallback.add(reason, g, p)
                    continue
                sparse = is_sparse(grad)
                if not reason and sparse:
                    reason = sparse_reason(plan, rule, p, grad, group)
                elif not reason:
                    reason = dense_reason(rule) or device_reason(rule, p) or tensor_reason(plan, p, grad, group)
                if not reason:
                    done, new = create_state(optimizer, rule, p, group)
                    if new:
                        created.append((p, new))
                    reason = state_reason(plan, rule, p, grad, optimizer.state.get(p, {}), group)
                if reason:
                    plan.add_param(p, _FALLBACK)
                    self.fallback.add(reason, g, p)
                    continue
                state = optimizer.state.get(p, {})
                quantised = kernel.states != () and f"{kernel.states[0]}_codes" in state
                arrays = [state[f"{name}_codes" if quantised else name] for name in kernel.states]
                scales = [state[f"{name}_scale"] for name in kernel.states] if quantised else []
                step = state["step"] if "step" in rule.scalars or "stream" in state else None
                carry = next((state[name] for name in rule.scalars if name != "step"), None)
                master = state["master"] if form_of(p, group).master else None
                plan.add_param(
                    p, _KERNEL, state or None, arrays, step, carry, done,
                    master, state["ema"] if ema else None, scales, state.get("stream", 0), sparse,
                )  # fmt: skip
        plan.finish()
        return plan


def _find_home(groups: list[dict[str, Any]]) -> torch.device | None:
    places = {p.device for group in groups for p in group["params"]}
    place = places.pop() if len(places) == 1 else None
    return place if place is not None and has_device_kernels(place) else None


def _max_norm(groups: list[dict[str, Any]]) -> float:
    """The norm that gradients are clipped to, which groups can be given by hand; 0 without clipping."""
    first = groups[0]["max_grad_norm"] if groups else None
    for group in groups:
        if group["max_grad_norm"] != first:  # true of NaN, too
            check_max_grad_norm(group["max_grad_norm"])
            raise ValueError(f"max_grad_norm: expected one for all groups, got {first} and {group['max_grad_norm']}")
    return 0.0 if first is None else check_max_grad_norm(first) or 0.0


def _norm_dtype(groups: list[dict[str, Any]]) -> torch.dtype:
    wide = any(p.dtype == torch.float64 for group in groups for p in group["params"])
    return torch.float64 if wide else torch.float32


def _remove_state(state: Any, created: Created) -> None:
    """Removes state that no step has filled: an SGD buffer that exists counts as begun."""
    for p, names in created:
        for name in names:
            state[p].pop(name, None)
        if not state[p]:
            del state[p]
    created.clear()


def _bump_versions(tensors: list[torch.Tensor]) -> None:
    """Tells autograd that these tensors have changed."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def _check_capture(optimizer: Any) -> None:
    """torch's own check that a step which is captured into a graph may be; it has had two names."""
    now = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (now or optimizer._cuda_graph_capture_health_check)()
