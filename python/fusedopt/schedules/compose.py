"""Schedules made of schedules, and the one that listens to a metric."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Schedule, checked_milestones
from .curves import Constant


@dataclass
class ReduceOnPlateau(Schedule):
    r"""Falls by a factor when a metric has stopped getting better: torch's ``ReduceLROnPlateau``.

    :meth:`observe` tells it the metric, mostly once an epoch; the value does not depend on the step.

    Args:
        value: what it begins with.
        factor: what it is multiplied by, between 0 and 1.
        patience: how many observations without a better one are let pass; at the next the value falls.
        threshold: how much better is better.
        threshold_mode: ``"rel"``, a part of the best so far, or ``"abs"``.
        mode: ``"min"``, less is better, or ``"max"``.
        cooldown: observations after a fall that are not counted.
        min_value: the value falls no lower.
        eps: a fall by no more than this is left out.

    Example:
        >>> from fusedopt.schedules import ReduceOnPlateau
        >>> lr = ReduceOnPlateau(0.1, factor=0.5, patience=0)
        >>> for loss in (1.0, 0.9, 0.9):
        ...     lr.observe(loss)
        >>> lr(3)
        0.05
    """

    value: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    mode: str = "min"
    cooldown: int = 0
    min_value: float = 0.0
    eps: float = 1e-8
    current: float = field(init=False, repr=False)
    best: float = field(init=False, repr=False)
    bad: int = field(init=False, repr=False, default=0)
    cooling: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.current = self.value
        self.best = math.inf if self.mode == "min" else -math.inf

    def _at(self, t: int) -> float:
        return self.current

    def observe(self, metric: float) -> None:
        """Counts this value of the metric; NaN is never better."""
        metric = float(metric)
        sign = 1.0 if self.mode == "min" else -1.0
        margin = self.threshold * (abs(self.best) if self.threshold_mode == "rel" else 1.0)
        if math.isinf(self.best):
            better = sign * metric < sign * self.best
        else:
            better = sign * metric < sign * self.best - margin
        if better:
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad > self.patience:
            lower = max(self.current * self.factor, self.min_value)
            if self.current - lower > self.eps:
                self.current = lower
            self.cooling, self.bad = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """The value in force, the best metric, and what was counted."""
        return {"current": self.current, "best": self.best, "bad": self.bad, "cooling": self.cooling}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            KeyError: for a state of something else.
        """
        kinds = {"current": float, "best": float, "bad": int, "cooling": int}
        for name, value in {name: kind(state_dict[name]) for name, kind in kinds.items()}.items():
            setattr(self, name, value)


class _Several(Schedule):
    """What is made of schedules hands them on what it is told."""

    schedules: tuple[Schedule, ...]

    def observe(self, metric: float) -> None:
        for schedule in self.schedules:
            schedule.observe(metric)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): state for i, s in enumerate(self.schedules) if (state := s.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for key, state in state_dict.items():
            self.schedules[int(key)].load_state_dict(state)


@dataclass(frozen=True)
class Chain(_Several):
    """What :func:`chain` returns.

    Args:
        schedules: the factors.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", _schedules(self.schedules))

    def _at(self, t: int) -> float:
        return math.prod([schedule(t) for schedule in self.schedules])


@dataclass(frozen=True)
class Join(_Several):
    """What :func:`join` returns.

    Args:
        schedules: one after the other.
        milestones: the steps at which the next one begins.
    """

    schedules: tuple[Schedule, ...]
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", _schedules(self.schedules))
        object.__setattr__(self, "milestones", checked_milestones(self.milestones))
        if len(self.milestones) != len(self.schedules) - 1:
            raise ValueError(
                f"milestones: expected {len(self.schedules) - 1}, one between each two schedules, "
                f"got {len(self.milestones)}"
            )

    def _at(self, t: int) -> float:
        i = bisect_right(self.milestones, t)
        return self.schedules[i](t - self.milestones[i - 1] if i else t)


def chain(*schedules: Schedule | float) -> Chain:
    r"""The product of schedules that all count the same steps: torch's ``ChainedScheduler``.

    .. math:: v_t = \prod_i v^{(i)}_t

    One of them carries the value, the others are factors.

    Args:
        schedules: schedules, or numbers.

    Raises:
        TypeError: for anything else.

    Example:
        >>> from fusedopt.schedules import Cosine, LinearWarmup, chain
        >>> lr = chain(LinearWarmup(1.0, 4), Cosine(0.1, 100))
        >>> lr(0), lr(100)
        (0.025, 0.0)
    """
    return Chain(schedules)  # type: ignore[arg-type]  # numbers are turned into schedules there


def join(schedules: Iterable[Schedule | float], milestones: Iterable[int]) -> Join:
    r"""One schedule after the other, each counting from its own beginning: torch's ``SequentialLR``.

    .. math:: v_t = v^{(i)}_{t - m_i}, \quad m_i \le t < m_{i+1}, \quad m_0 = 0

    Args:
        schedules: schedules, or numbers.
        milestones: the steps at which the second, the third ... begin, rising.

    Raises:
        TypeError: for anything else.
        ValueError: for a wrong number of milestones, or milestones that do not rise.

    Example:
        >>> from fusedopt.schedules import Cosine, LinearWarmup, join
        >>> lr = join([LinearWarmup(0.1, 4), Cosine(0.1, 100)], [4])
        >>> lr(0), lr(3), lr(4), lr(104)
        (0.025, 0.1, 0.1, 0.0)
    """
    return Join(tuple(schedules), tuple(milestones))  # type: ignore[arg-type]


def _schedules(values: Iterable[Any]) -> tuple[Schedule, ...]:
    made = tuple(value if isinstance(value, Schedule) else _constant(value) for value in values)
    if not made:
        raise ValueError("schedules: expected one or more")
    return made


def _constant(value: Any) -> Schedule:
    if callable(value):
        raise TypeError(f"schedules: expected schedules or numbers, got {value!r}")
    return Constant(value)
