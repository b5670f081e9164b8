"""The engine of one optimizer: sorts its parameters into those for the kernels and those for the fallback, hands them
to the compiled plan, and reports what happened. Groups, hooks and checkpoints are the optimizer's, in _optimizer.py.

Other files get the engine of an optimizer from ``engine_of`` and use its public methods.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import Counter, defaultdict
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
from ._state import DTYPES, INTEGERS, Recipe, use_huge_pages

EXCHANGE = True  # read tensors by DLPack's exchange API where this torch has it (2.10 and later)
_DONE, _ANEW, _PARAMS = range(3)  # what a step of the plan finds; see torch.cpp
_numbers = itertools.count(1)

optimizers: weakref.WeakValueDictionary[str, Optimizer] = weakref.WeakValueDictionary()
"""Every optimizer by the number of its engine, for torch.compile's operator."""

Created = dict[int, tuple[torch.Tensor, list[str]]]
"""By identity, parameters with the names of the state created for them."""


def engine_of(optimizer: Any) -> Engine:
    """The engine of an optimizer of ours."""
    engine: Engine = optimizer._engine
    return engine


def remove_engine(optimizer: Any) -> None:
    """Leaves an optimizer of ours as one of torch's, before or after its class is changed."""
    engine = vars(optimizer).pop("_engine", None)
    if engine is not None:
        optimizers.pop(engine.number, None)


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
        complete: during a step on shards, what completes the sums of a rule; see _dtensor.py.
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
        self.complete: Callable[[list[int], memoryview], None] | None = None
        self.number = str(next(_numbers))
        self.traced_params: list[torch.Tensor] | None = None
        self.traced_views: dict[tuple[int, ...], Any] = {}
        self._built = 0
        self._recipes: dict[tuple[int, torch.dtype], Recipe] = {}  # of the plan, by group and dtype
        self._running = threading.Lock()  # held from the first look at a tensor to the last write

    # --- for the other files of this package ---

    def groups_changed(self) -> None:
        """Forgets what was derived from the groups; the next step looks at every parameter again."""
        self.plan = self.traced_params = None
        self.traced_views = {}

    def run(self, optimizer: Optimizer) -> None:
        """Does one update with the gradients that are there, without hooks, profiler or closure."""
        if not self._running.acquire(False):
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
        """Counts how often something has been planned: while it stays the same, no state has been created by a kernel's
        step and no parameter has changed sides between kernels and fallback."""
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
        given = optimizer.__dict__
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
        alone = len(groups) == 1 and groups[0]["max_grad_norm"] is None  # a call for a small step is measurable
        max_norm = 0.0 if alone else _max_norm(groups)
        plan = self.plan
        if plan is None and self._sharded(groups):
            if found_inf is not None and float(found_inf):
                return
            norm = self.shards.step(self, optimizer, unscale if scale is None else 1.0 / float(scale), max_norm)
            if max_norm:
                self.norm = norm.to(_norm_dtype(groups))
            return
        norm = torch.zeros((), dtype=_norm_dtype(groups), device=home) if max_norm and home is not None else None
        scaling = (unscale, max_norm, get_num_threads(), found_inf, scale, norm, self.complete)
        places = self.fallback.places
        if plan is not None and places:
            self.fallback.announce(groups, max_norm, unscale != 1.0 or scale is not None)
        try:
            found = _ANEW if plan is None else plan.step(optimizer.state, groups, *scaling)
            if found != _DONE:
                plan = self._replan(optimizer, scaling, found)
            elif not max_norm and not places:
                return
        except _core.DeviceOutOfMemoryError:  # raised before anything is launched, with one device
            if home is None or capturing(home):
                raise
            torch.cuda.empty_cache()  # torch may hold memory in its cache
            plan = self._replan(optimizer, scaling, _ANEW)
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
                if any(group["row_wise"] for group in groups):
                    raise RuntimeError("row_wise: expected False for a DTensor, of whose rows this process has a part")
                self.shards = Shards()
        return self.shards is not None

    def _replan(self, optimizer: Optimizer, scaling: tuple[Any, ...], found: int) -> Any:
        """Plans anew what has changed, creates missing state, and does the update; None if the step is skipped.

        Args:
            found: what the plan's step has found.
        """
        created: Created = {}
        tries: Counter[Any] = Counter()
        groups, state = optimizer.param_groups, optimizer.state
        unscale, max_norm, _, found_inf, scale, _, _ = scaling
        rule = self.rule
        plan = self.plan
        try:
            while found != _DONE:
                if found == _ANEW:
                    tries["anew"] += 1
                    self.plan = plan = self._new_plan(optimizer)
                else:
                    self._plan_params(optimizer, plan, created, tries)
                if self.complete is not None and self.fallback.places:
                    raise RuntimeError(
                        f"{rule.name} needs sums over whole tensors, and only the kernels complete those of a shard: "
                        f"{next(iter(self.fallback.places))}"
                    )
                if max(tries.values(), default=0) > 2:
                    raise RuntimeError("the parameters or their state change while step() looks at them")
                self.fallback.announce(groups, max_norm, unscale != 1.0 or scale is not None)
                if created and any(capturing(d) for d in {p.device for p, _ in created.values()}):
                    raise RuntimeError(
                        "a step that creates state cannot be captured, since every replay would create it anew: do one "
                        "step before the capture"
                    )
                if created and found_inf is not None and float(found_inf):  # a skipped step leaves no state
                    self.plan = None
                    _remove_state(state, created)
                    return None
                found = plan.step(state, groups, *scaling)
        except BaseException:
            self.plan = None
            self.fallback.places = {}
            _remove_state(state, created)
            raise
        return plan

    def _new_plan(self, optimizer: Optimizer) -> Any:
        """A plan for the groups as they are now, in which no parameter has had a gradient."""
        rule = self.rule
        dtypes = (*DTYPES.values(), *(INTEGERS[k] for k in ("int16", "int8", "uint8")))
        plan = _core.TorchPlan(optimizer.state, PLAIN, dtypes, torch.Tensor.is_neg, _bump_versions, EXCHANGE)
        self._built += 1
        self._recipes = {}
        self.fallback.places = {}
        for group in optimizer.param_groups:
            rule.check_rows(group)  # options may have been set by hand
            kernel = rule.kernel(group)
            hyper: list[Any] = [
                (key, index, value if key is None or index >= 0 else float(rule.defaults[key]))
                if key is not None or name not in optimizer.defaults
                else (name, -1, value)  # torch's AdamW is Adam with an option that may be changed like any other
                for name, (key, index, value) in zip(kernel.hyper, kernel.sources, strict=True)
            ]
            ema = group["ema_decay"] is not None
            hyper += [("l1", -1, 0.0), ("ema_decay" if ema else None, -1, 0.0), ("seed", -1, 0.0)]
            same = [
                "fused",
                "differentiable",
                "capturable",
                "lazy",
                "row_steps",
                "row_wise",
                "state_dtype",
                "master",
                "stochastic_rounding",
            ]
            plan.add_group(
                group, kernel.index, hyper,
                [k for k in dict.fromkeys((*rule.chooses, "ema_decay", "weight_decay")) if k in group],
                [k for k in same if k in group],
                forms.MASTERS[group["master"]][0] if group["master"] else 0,
                bool(group["stochastic_rounding"]),
                forms.explicit(group),
            )  # fmt: skip
        return plan

    def _plan_params(self, optimizer: Optimizer, plan: Any, created: Created, tries: Counter[Any]) -> None:
        """Plans the parameters that the plan's step has found to have changed. State that is missing is created and
        noted in ``created``; ``tries`` counts how often a parameter has been planned for this step."""
        groups, stale, conflicts = optimizer.param_groups, plan.stale, set(plan.conflicts)
        self._built += 1
        if self.fallback.places:
            self.fallback.remove([groups[g]["params"][i] for g, i in (*stale, *conflicts)])
        reasons = [group_reason(group) for group in groups]
        with torch.no_grad():
            for place in sorted(conflicts.union(stale)) if conflicts else stale:
                g, i = place
                group = groups[g]
                p = group["params"][i]
                reason = reasons[g]
                if place in conflicts:
                    reason = "its memory overlaps that of another parameter or state"
                elif not reason:
                    tries[place] = tried = tries.get(place, 0) + 1
                    reason = self._plan_param(optimizer, plan, place, group, p, created, tried > 1)
                if reason:
                    if id(p) in created:
                        _remove_state(optimizer.state, {id(p): created.pop(id(p))})
                    plan.leave_param(g, i)
                    self.fallback.add(reason, g, p)

    def _plan_param(
        self,
        optimizer: Optimizer,
        plan: Any,
        place: tuple[int, int],
        group: dict[str, Any],
        p: torch.Tensor,
        created: Created,
        careful: bool,
    ) -> str | None:
        """Plans one parameter for the kernels; why it cannot be done, if so.

        Most parameters are plain, so their state is looked at here only if ``careful``: when the plan has refused it.
        """
        g, i = place
        grad: Any = p.grad
        rule = self.rule
        sparse = is_sparse(grad)
        if sparse:
            reason = sparse_reason(plan, rule, p, grad, group)
        else:
            reason = dense_reason(rule, p, group)
            if not reason and (careful or group.get("capturable") or not plan.takes(p, grad)):
                reason = device_reason(rule, p) or tensor_reason(plan, p, grad, group)
        if reason:
            return reason
        key = (g, p.dtype)
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = Recipe(optimizer, rule, p, group)
        state, done, new = recipe.create(optimizer, p, sparse)
        if sparse:
            for t in (p, *state.values()):
                if isinstance(t, torch.Tensor) and t.is_contiguous():
                    use_huge_pages(t, used=True)
        if new:
            created[id(p)] = (p, new)
        if careful:
            reason = state_reason(plan, rule, p, grad, state, group)
            if reason:
                return reason
        names = recipe.names
        counts = sparse and bool(group["row_steps"])
        variant = bool(names) and f"{names[0]}_codes" in state, "stream" in state, counts
        layout = recipe.layouts.get(variant)
        if layout is None:
            layout = recipe.layouts[variant] = _add_layout(plan, recipe, *variant)
        if plan.set_param(g, i, layout, state, done, sparse):
            return None
        return state_reason(plan, rule, p, grad, state, group) or "its state is not a dict of tensors"


def _add_layout(plan: Any, recipe: Recipe, coded: bool, random: bool, row_steps: bool) -> int:
    """The plan's number for the names under which a state holds what the kernel uses."""
    names, scalars = recipe.names, recipe.rule.scalars
    number: int = plan.add_layout(
        [f"{name}_codes" if coded else name for name in names],
        [f"{name}_scale" for name in names] if coded else [],
        "master" if recipe.form.master else None,
        "ema" if recipe.ema else None,
        "step" if "step" in scalars or random else None,
        next((name for name in scalars if name != "step"), None),
        "stream" if random else None,
        "row_steps" if row_steps else None,
        recipe.row_sum,
    )
    return number


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
    for p, names in created.values():
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
