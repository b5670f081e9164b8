"""Base class of schedules, and the checks of their arguments. No schedules here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

SHAPES: dict[str, Callable[[float], float]] = {  # from 1 to 0 as x goes from 0 to 1
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}

_COUNTS = {
    "steps": 1, "step_size": 1, "decay_steps": 1, "mult": 1, "warmup": 0, "decay": 0, "patience": 0, "cooldown": 0,
}  # fmt: skip
_POSITIVE = ("gamma", "power", "div_factor", "final_div_factor")
_BELOW = {"pct_start": 1.0, "factor": 1.0}
_CHOICES = {
    "shape": tuple(SHAPES),
    "anneal": ("cosine", "linear"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
}


def _checked(name: str, value: Any) -> Any:
    """The argument as int, float or str, checked by its name, which means the same in every schedule."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}: expected one of {', '.join(_CHOICES[name])}, got {value!r}")
        return value
    if name in _COUNTS:
        try:
            count = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {value!r}") from None
        if isinstance(value, bool) or count < _COUNTS[name]:
            raise ValueError(f"{name}: expected {_COUNTS[name]} or more, got {value!r}")
        return count
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    low, high = (name in _POSITIVE or name == "factor"), _BELOW.get(name, math.inf)
    if not 0 <= number < math.inf or (low and number == 0) or number > high or (name == "factor" and number == 1):
        kind = "a positive number" if low else "a number, 0 or more"
        raise ValueError(f"{name}: expected {kind}{'' if high == math.inf else f', up to {high:g}'}, got {value!r}")
    return number


class Schedule:
    """Base class: a function of the step, ``schedule(step) -> float``, with steps counted from 0.

    Schedules that depend on a metric receive it through :meth:`observe` and have a state. The others have no state and
    ignore it.
    """

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if one.type in ("float", "int", "str") and one.init:
                object.__setattr__(self, one.name, _checked(one.name, getattr(self, one.name)))

    def __call__(self, step: int) -> float:
        """The value at this step, counted from 0.

        Raises:
            TypeError: the step is not an integer.
            ValueError: the step is negative.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        return self._at(step)

    def _at(self, t: int) -> float:
        raise NotImplementedError

    def observe(self, metric: float) -> None:
        """Passes a new value of the metric to the schedule, which ignores it unless it depends on one."""

    def state_dict(self) -> dict[str, Any]:
        """The state that :meth:`observe` changes, as numbers."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state from :meth:`state_dict`."""


def checked_milestones(values: Any) -> tuple[int, ...]:
    """Strictly increasing steps above 0, as a tuple."""
    try:
        steps = tuple(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"milestones: expected integers, got {values!r}") from None
    if any(b <= a for a, b in zip((0, *steps), steps, strict=False)):
        raise ValueError(f"milestones: expected steps above 0 that rise, got {values!r}")
    return steps
