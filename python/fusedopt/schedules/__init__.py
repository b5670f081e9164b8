"""Schedules: functions of the step that give a learning rate, a momentum or a weight decay.

A schedule is called with the number of the step, counted from 0, and returns a float. All but
:class:`ReduceOnPlateau` are pure: frozen, picklable, equal when their arguments are. The same object is the ``lr=`` of
a NumPy optimizer, of ``fusedopt.torch.ScheduledLR`` (a torch scheduler) and of ``fusedopt.plots.schedule``.

Below, t is the step and T its length ``steps``; after the last step a schedule stays where it is.
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
