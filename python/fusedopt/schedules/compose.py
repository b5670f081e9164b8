"""Compositions of schedules, and the schedule that depends on a metric."""

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
    r"""Multiplies the value by a factor when a metric has stopped improving: torch's ``ReduceLROnPlateau``.

    Pass the metric to :meth:`observe`, usually once per epoch. The value does not depend on the step.

    Args:
        value: initial value, >= 0.
        factor: multiplier, in (0, 1).
        patience: observations without improvement that are tolerated; the next one reduces the value.
        threshold: minimum improvement, >= 0.
        threshold_mode: ``"rel"``, relative to the best value so far, or ``"abs"``.
        mode: ``"min"`` if lower is better, or ``"max"``.
        cooldown: observations after a reduction that are not counted.
        min_value: lower bound of the value.
        eps: reductions of at most this size are skipped.

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
        """Records a value of the metric. NaN is never an improvement."""
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
        """The current value, the best metric, and the counters."""
        return {"current": self.current, "best": self.best, "bad": self.bad, "cooling": self.cooling}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state from :meth:`state_dict`.

        Raises:
            KeyError: an entry is missing.
        """
        kinds = {"current": float, "best": float, "bad": int, "cooling": int}
        for name, value in {name: kind(state_dict[name]) for name, kind in kinds.items()}.items():
            setattr(self, name, value)


class _Several(Schedule):
    """Base class: passes metrics and states on to its schedules."""

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
        schedules: the schedules, in order.
        milestones: the steps at which the next schedule begins.
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
    r"""The product of schedules: torch's ``ChainedScheduler``.

    .. math:: v_t = \prod_i v^{(i)}_t

    Args:
        schedules: schedules or numbers.

    Raises:
        TypeError: an argument is neither.

    Example:
        >>> from fusedopt.schedules import Cosine, LinearWarmup, chain
        >>> lr = chain(LinearWarmup(1.0, 4), Cosine(0.1, 100))
        >>> lr(0), lr(100)
        (0.025, 0.0)
    """
    return Chain(schedules)  # type: ignore[arg-type]  # converts numbers to schedules


def join(schedules: Iterable[Schedule | float], milestones: Iterable[int]) -> Join:
    r"""One schedule after the other, each with its steps counted from its start: torch's ``SequentialLR``.

    .. math:: v_t = v^{(i)}_{t - m_i}, \quad m_i \le t < m_{i+1}, \quad m_0 = 0

    Args:
        schedules: schedules or numbers.
        milestones: the steps at which the second, third, ... schedule begins; strictly increasing.

    Raises:
        TypeError: a schedule is neither, or a milestone is not an integer.
        ValueError: the number of milestones is wrong, or they do not increase.

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
