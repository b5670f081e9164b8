"""Schedules: functions of the step that return a learning rate, momentum or weight decay.

A schedule is called with the step, counted from 0, and returns a float. All but :class:`ReduceOnPlateau` are immutable
and picklable, and compare equal if their arguments do. The same object is accepted as ``lr=`` of a NumPy optimizer, by
``fusedopt.torch.ScheduledLR`` (a torch scheduler) and by ``fusedopt.plots.schedule``.

In the formulas t is the step and T is ``steps``. After its last step a schedule keeps its final value.
"""

from .base import Schedule
from .compose import Chain, Join, ReduceOnPlateau, chain, join
from .curves import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    ExponentialWarmup,
    InverseTime,
    Linear,
    LinearWarmup,
    MultiStep,
    OneCycle,
    Polynomial,
    Step,
    WarmupStableDecay,
)

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "ExponentialWarmup",
    "InverseTime",
    "Join",
    "Linear",
    "LinearWarmup",
    "MultiStep",
    "OneCycle",
    "Polynomial",
    "ReduceOnPlateau",
    "Schedule",
    "Step",
    "WarmupStableDecay",
    "chain",
    "join",
]
