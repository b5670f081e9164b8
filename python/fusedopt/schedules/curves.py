"""Schedules that depend on the step alone; t is the step, T is ``steps``. Values are >= 0."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass

from .base import SHAPES, Schedule, checked_milestones


@dataclass(frozen=True)
class Constant(Schedule):
    r"""A constant value.

    .. math:: v_t = v

    Args:
        value: v >= 0.
    """

    value: float

    def _at(self, t: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    r"""Linear interpolation: torch's ``LinearLR``.

    .. math:: v_t = a + (b - a) \min(t, T) / T

    Args:
        start: a, the value at step 0.
        end: b, the value from step T on.
        steps: T.
    """

    start: float
    end: float
    steps: int

    def _at(self, t: int) -> float:
        return self.end if t >= self.steps else self.start + (self.end - self.start) * (t / self.steps)


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    r"""Linear warm-up: v / T at step 0, v from step T - 1 on.

    .. math:: v_t = v \min(1, (t + 1) / T)

    Args:
        value: v, the final value.
        steps: T; for Adam, :math:`2 / (1 - \beta_2)` is a good choice.

    Jerry Ma and Denis Yarats, "On the adequacy of untuned warmup for adaptive optimization", AAAI 2021.
    """

    value: float
    steps: int

    def _at(self, t: int) -> float:
        return self.value if t + 1 >= self.steps else self.value * ((t + 1) / self.steps)


@dataclass(frozen=True)
class ExponentialWarmup(Schedule):
    r"""Exponential warm-up: 63% of the value after T steps, 95% after 3 T.

    .. math:: v_t = v (1 - e^{-(t + 1) / T})

    Args:
        value: v, the limit.
        steps: T; for Adam, :math:`1 / (1 - \beta_2)` is a good choice.

    Jerry Ma and Denis Yarats, "On the adequacy of untuned warmup for adaptive optimization", AAAI 2021.
    """

    value: float
    steps: int

    def _at(self, t: int) -> float:
        return -self.value * math.expm1(-(t + 1) / self.steps)


@dataclass(frozen=True)
class Step(Schedule):
    r"""Multiplies the value by a factor every s steps: torch's ``StepLR``.

    .. math:: v_t = v \gamma^{\lfloor t / s \rfloor}

    Args:
        value: v, the value at step 0.
        step_size: s.
        gamma: :math:`\gamma`, the factor.
    """

    value: float
    step_size: int
    gamma: float = 0.1

    def _at(self, t: int) -> float:
        return float(self.value * self.gamma ** (t // self.step_size))


@dataclass(frozen=True)
class MultiStep(Schedule):
    r"""Multiplies the value by a factor at given steps: torch's ``MultiStepLR``.

    .. math:: v_t = v \gamma^{|\{m \le t\}|}

    Args:
        value: v, the value at step 0.
        milestones: the steps m at which the value changes; strictly increasing.
        gamma: :math:`\gamma`, the factor.
    """

    value: float
    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", checked_milestones(self.milestones))

    def _at(self, t: int) -> float:
        return float(self.value * self.gamma ** bisect_right(self.milestones, t))


@dataclass(frozen=True)
class Exponential(Schedule):
    r"""Exponential decay: torch's ``ExponentialLR``.

    .. math:: v_t = v \gamma^t

    Args:
        value: v, the value at step 0.
        gamma: :math:`\gamma`, the factor; :math:`0.5^{1/h}` halves the value every h steps.
    """

    value: float
    gamma: float

    def _at(self, t: int) -> float:
        return float(self.value * self.gamma**t)


@dataclass(frozen=True)
class InverseTime(Schedule):
    r"""Inverse-time decay: Keras's ``InverseTimeDecay``.

    .. math:: v_t = v / (1 + k t / s)

    Args:
        value: v, the value at step 0.
        decay_rate: k >= 0.
        decay_steps: s, the number of steps after which the value is :math:`v / (1 + k)`.
    """

    value: float
    decay_rate: float
    decay_steps: int = 1

    def _at(self, t: int) -> float:
        return self.value / (1 + self.decay_rate * t / self.decay_steps)


@dataclass(frozen=True)
class Polynomial(Schedule):
    r"""Polynomial decay: torch's ``PolynomialLR`` if the end is 0.

    .. math:: v_t = b + (v - b) (1 - \min(t, T) / T)^p

    Args:
        value: v, the value at step 0.
        steps: T.
        power: p; 1 is linear.
        end: b, the value from step T on.
    """

    value: float
    steps: int
    power: float = 1.0
    end: float = 0.0

    def _at(self, t: int) -> float:
        return float(self.end + (self.value - self.end) * (1 - min(t, self.steps) / self.steps) ** self.power)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Cosine decay: torch's ``CosineAnnealingLR`` up to step T; stays at the end value afterwards.

    .. math:: v_t = b + (v - b) (1 + \cos(\pi \min(t, T) / T)) / 2

    Args:
        value: v, the value at step 0.
        steps: T.
        end: b, the value from step T on.

    Ilya Loshchilov and Frank Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.
    """

    value: float
    steps: int
    end: float = 0.0

    def _at(self, t: int) -> float:
        return self.end + (self.value - self.end) * SHAPES["cosine"](min(t, self.steps) / self.steps)


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    r"""Cosine decay with warm restarts: torch's ``CosineAnnealingWarmRestarts``.

    .. math:: v_t = b + (v - b) (1 + \cos(\pi t_i / T_i)) / 2, \quad T_{i+1} = m T_i

    where :math:`t_i` is the number of steps since the last restart.

    Args:
        value: v, the value at every restart.
        steps: :math:`T_0`, the length of the first period.
        mult: m >= 1, ratio of the lengths of successive periods.
        end: b, the limit before a restart.

    Ilya Loshchilov and Frank Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.
    """

    value: float
    steps: int
    mult: int = 1
    end: float = 0.0

    def _at(self, t: int) -> float:
        length = self.steps
        if self.mult == 1:
            t %= length
        while t >= length:
            t, length = t - length, length * self.mult
        return self.end + (self.value - self.end) * SHAPES["cosine"](t / length)


@dataclass(frozen=True)
class OneCycle(Schedule):
    r"""One-cycle policy: torch's ``OneCycleLR``.

    Rises from :math:`v / d` at step 0 to v at step :math:`p T - 1`, then falls to :math:`v / (d f)` at step T - 1.

    Args:
        value: v, the maximum.
        steps: T, the total number of steps.
        pct_start: p, the fraction of the steps that rise, in [0, 1].
        div_factor: d.
        final_div_factor: f.
        anneal: ``"cosine"`` or ``"linear"``, the shape of each part.
        three_phase: falls to :math:`v / d` in as many steps as the rise, then to the end in the remaining ones.

    The matching momentum falls from 0.95 to 0.85 and rises again:
    ``OneCycle(0.85, T, div_factor=0.85 / 0.95, final_div_factor=1)``.

    Leslie Smith and Nicholay Topin, "Super-convergence", 2018 (arXiv:1708.07120).
    """

    value: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: str = "cosine"
    three_phase: bool = False

    def _at(self, t: int) -> float:
        first = self.value / self.div_factor
        knots = [(0.0, first), (self.pct_start * self.steps - 1, self.value)]
        if self.three_phase:
            knots.append((2 * self.pct_start * self.steps - 2, first))
        knots.append((self.steps - 1.0, first / self.final_div_factor))
        for (begin, a), (end, b) in itertools.pairwise(knots):
            if t <= end:
                fall = SHAPES[self.anneal]((t - begin) / (end - begin) if end > begin else 1.0)
                return b + (a - b) * fall
        return knots[-1][1]


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    r"""Linear warm-up, constant value, decay (WSD).

    .. math:: v_t = v \min(1, (t + 1) / w) \text{ before } T - d, \quad
              v_t = b + (v - b)\, g((t - T + d) / d) \text{ after}

    Args:
        value: v.
        steps: T, the total number of steps.
        warmup: w, the number of warm-up steps, as in :class:`LinearWarmup`; 0 for none.
        decay: d, the number of decay steps at the end.
        end: b, the value from step T on.
        shape: of the decay: ``"linear"`` :math:`g(x) = 1 - x`, ``"sqrt"`` :math:`1 - \sqrt x`, or ``"cosine"``.

    Raises:
        ValueError: warmup + decay > steps.

    Shengding Hu et al., "MiniCPM", 2024 (arXiv:2404.06395); the shapes: Alexander Hägele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations", NeurIPS 2024.
    """

    value: float
    steps: int
    warmup: int
    decay: int
    end: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"steps: expected at least warmup + decay = {self.warmup + self.decay} steps, got {self.steps}"
            )

    def _at(self, t: int) -> float:
        if t >= self.steps:
            return self.end if self.decay else self.value
        if t >= self.steps - self.decay:
            fall = SHAPES[self.shape]((t - self.steps + self.decay) / self.decay)
            return self.end + (self.value - self.end) * fall
        return self.value if t + 1 >= self.warmup else self.value * ((t + 1) / self.warmup)
