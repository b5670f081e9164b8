"""The fallback: torch's own step for the parameters that the kernels do not update. _eligibility.py decides which."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..rules import Rule
from ._eligibility import options_without_fallback


class FallbackWarning(UserWarning):
    """A tensor takes torch's own, slower path, for the reason given."""

    __module__ = "fusedopt.torch"


def unwrapped_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step method of a torch class, without the wrappers of torch: profiler and hooks, dynamo's ``disable``.

    A wrapper that a user puts around it stays, even where ``functools.wraps`` copied the attributes of torch's.
    """
    while (inner := getattr(step, "__wrapped__", None)) is not None:
        hooks = getattr(step, "__code__", None) is _HOOKS
        if not (hooks or getattr(step, "_torchdynamo_orig_callable", None) is inner):
            break
        step = inner
    return step


_HOOKS = Optimizer.profile_hook_step(lambda self: None).__code__


class Fallback:
    """The parameters of one optimizer that take torch's own step.

    Attributes:
        places: reason -> these parameters, each with the index of its group. Empty: the kernels update everything.
        warned: the reasons that the user has been told.
    """

    def __init__(self, rule: Rule, plain_step: Callable[..., Any] | None, warned: set[str]) -> None:
        self.places: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self.warned = warned
        self._rule = rule
        self._plain_step = plain_step

    def add(self, reason: str, group: int, p: torch.Tensor) -> None:
        """Leaves a parameter to torch's own step."""
        self.places.setdefault(reason, []).append((group, p))

    def remove(self, params: list[torch.Tensor]) -> None:
        """Forgets these parameters."""
        gone = set(map(id, params))
        left = {reason: [(g, p) for g, p in places if id(p) not in gone] for reason, places in self.places.items()}
        self.places = {reason: places for reason, places in left.items() if places}

    def announce(self, groups: list[dict[str, Any]], max_norm: float, scaled: bool) -> None:
        """Warns of each reason why torch's own step is needed, once.

        Raises:
            RuntimeError: if it is needed and lacks an option that is in use.
        """
        for reason, left in self.places.items():
            in_use = {g for g, p in left if p.grad is not None}
            if not in_use:
                continue
            options = options_without_fallback(
                self._rule, self._plain_step is not None, [groups[g] for g in in_use], max_norm, scaled
            )
            if options:
                step = "the unfused step" if self._rule.own else "torch's own step"
                raise RuntimeError(f"{' and '.join(options)}: {step}, needed here ({reason}), does not have it")
            if reason not in self.warned and not reason.startswith("fused=False"):
                self.warned.add(reason)
                step = "the rule's function, not fused," if self._rule.own else "torch's own step"
                warnings.warn(f"{reason}: {step} updates it", FallbackWarning, stacklevel=_caller_level())

    def step(self, optimizer: Optimizer) -> None:
        """Does torch's own step for those of the parameters that have gradients."""
        groups = optimizer.param_groups
        ids: list[set[int]] = [set() for _ in groups]
        for places in self.places.values():
            for g, p in places:
                if p.grad is not None:
                    ids[g].add(id(p))
        if not any(ids):
            return
        # In the order of the groups, not of the reasons: one may read what the step of another has written.
        left = [[p for p in group["params"] if id(p) in ids[g]] if ids[g] else [] for g, group in enumerate(groups)]
        assert self._plain_step is not None
        attributes: Any = vars(optimizer)  # of GradScaler, dealt with before; torch's step must not act on them again
        scaled = {k: attributes.pop(k) for k in ("grad_scale", "found_inf") if k in attributes}
        try:
            optimizer.param_groups = [_for_torch(group, left[g]) for g, group in enumerate(groups) if left[g]]
            self._plain_step(optimizer)
        finally:
            optimizer.param_groups = groups
            attributes.update(scaled)


def _for_torch(group: dict[str, Any], params: list[torch.Tensor]) -> dict[str, Any]:
    """A group of these parameters alone, without ``fused=True`` on the CPU.

    torch's fused step assumes dense tensors of one layout and writes outside of any other tensor.
    """
    plain = group.get("fused") and any(p.device.type == "cpu" for p in params)
    return {**group, "params": params, **({"fused": False} if plain else {})}


def _caller_level() -> int:
    """The stack level of the nearest caller outside of torch and this package, for a warning."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level
