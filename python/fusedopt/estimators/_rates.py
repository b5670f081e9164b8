"""The optimizer that ``solver`` selects, and the learning rate of every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import numpy as numpy_front
from ..numpy import Optimizer
from ..rules import RULES

_SMALLEST_ADAPTIVE = 1e-6  # lower bound, as in scikit-learn
_BY_LOWER = {name.lower(): name for name in RULES}


def make_optimizer(
    solver: Any,
    params: Any,
    lr: float,
    *,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float | None,
) -> Optimizer:
    """The optimizer over ``params``; ``solver`` is the name of a rule or a function that returns an optimizer."""
    if callable(solver):
        opt = solver(params)
        if not isinstance(opt, Optimizer):
            raise TypeError(f"solver: expected a function that returns an optimizer of fusedopt, got {opt!r:.80}")
        if len(opt.state) != 1 or opt.param_groups[0]["params"][0] is not params:
            raise ValueError("solver: expected an optimizer over exactly the array passed to the function")
        if max_grad_norm is not None:
            opt.max_grad_norm = max_grad_norm
        return opt
    rule = RULES[_BY_LOWER[solver]]
    options: dict[str, Any] = {"lr": lr, "max_grad_norm": max_grad_norm}
    if "nesterov" in rule.defaults:
        options.update(momentum=momentum, nesterov=nesterov and momentum > 0)
    elif "betas" in rule.defaults and "eps" in rule.defaults:
        options.update(betas=(*betas, *rule.defaults["betas"][2:]), eps=eps)
    made: Optimizer = getattr(numpy_front, rule.name)(params, **options)
    return made


def solver_names() -> tuple[str, ...]:
    """The names that ``solver`` accepts."""
    return tuple(_BY_LOWER)


class Rate:
    """The learning rate: one of scikit-learn's strings, or a schedule, any function of the step, counted from 0.

    ``invscaling`` divides the initial rate by a power of the number of steps (``per_step``, as in SGDRegressor) or of
    samples so far (as in MLPClassifier). ``optimal`` is 1 / (alpha (t0 + step)). ``adaptive`` divides the rate by 5
    when the fit stops improving. A schedule with ``observe`` receives the training loss of every epoch, or the
    validation score if its ``mode`` is ``"max"``.
    """

    def __init__(
        self,
        how: Any,
        first: float,
        power_t: float = 0.5,
        *,
        alpha: float = 0.0,
        per_step: bool = False,
        follows_solver: bool = False,
    ):
        self.how = copy.deepcopy(how) if callable(how) else how
        self.current = first
        self.first, self.power_t, self.alpha, self.per_step = first, power_t, alpha, per_step
        self._keep = follows_solver and how == "constant"  # an optimizer returned by a function keeps its own rate

    def rates(self, opt: Optimizer, first: int, steps: int) -> list[float]:
        """The learning rates of some steps, from ``first``."""
        count = range(first, first + steps)
        how: Any = opt.param_groups[0]["lr"] if self._keep else self.how
        if callable(how):
            return [float(how(step)) for step in count]
        if self._keep:
            return [float(how)] * steps
        if how == "optimal":
            alpha, start = self.alpha, 1.0 / (self.alpha * self.first)
            return [1.0 / (alpha * (start + step)) for step in count]
        if how == "invscaling" and self.per_step:
            rate, power = self.first, self.power_t
            return [float(rate / (step + 1) ** power) for step in count]
        return [self.current] * steps

    def apply(self, opt: Optimizer, step: int) -> float:
        """Sets the optimizer's learning rate for this step, and returns it."""
        (lr,) = self.rates(opt, step, 1)
        if not self._keep:
            opt.param_groups[0]["lr"] = lr
        return lr

    def count(self, samples: int) -> None:
        """Called after each epoch; ``samples`` is one more than the number of samples so far."""
        if self.how == "invscaling":
            self.current = self.first / float(samples) ** self.power_t

    def observe(self, loss: float, score: float | None) -> None:
        """Passes the loss or score of an epoch to a schedule that has ``observe``."""
        observe: Callable[[float], None] | None = getattr(self.how, "observe", None)
        if observe is not None:
            highest = getattr(self.how, "mode", "min") == "max"
            if highest and score is None:
                raise ValueError("learning_rate: mode='max' needs the validation score: set early_stopping=True")
            observe(score if highest and score is not None else loss)

    def no_better(self) -> bool:
        """Called when the fit stops improving. Returns False, to continue, if it lowered an adaptive rate."""
        if self.how != "adaptive" or self.current <= _SMALLEST_ADAPTIVE:
            return True
        self.current /= 5.0
        return False

    def state_dict(self) -> dict[str, Any]:
        """The state to store in a checkpoint."""
        inner = self.how.state_dict() if hasattr(self.how, "state_dict") else {}
        return {"current": self.current, "schedule": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the state from :meth:`state_dict`."""
        self.current = float(state["current"])
        if state["schedule"]:
            self.how.load_state_dict(state["schedule"])


_CURVATURE = {"log_loss": 0.25, "squared_hinge": 2.0, "modified_huber": 2.0, "squared_epsilon_insensitive": 2.0}


def highest_rate(loss: str, mean_square: float) -> float:
    """The largest stable rate for full batches, 1 / L; L bounds the curvature for rows of this mean squared norm."""
    return float(1.0 / (_CURVATURE.get(loss, 1.0) * max(mean_square, np.finfo(np.float64).tiny)))


def first_optimal_rate(loss: str, alpha: float) -> float:
    """The initial rate of ``optimal``: Bottou's heuristic, as in scikit-learn."""
    typical = math.sqrt(1.0 / math.sqrt(alpha))
    slope = {"log_loss": 1.0 / (math.exp(-typical) + 1.0), "squared_hinge": 2 * (1 + typical)}.get(loss, 1.0)
    if loss == "modified_huber":
        slope = 4.0 if typical > 1 else 2 * (1 + typical)
    return float(typical / max(1.0, slope))
