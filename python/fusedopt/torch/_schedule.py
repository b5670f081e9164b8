"""``fusedopt.torch.ScheduledLR``: a torch scheduler whose values come from functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..schedules import Schedule

Timed = Callable[[int], float]


class ScheduledLR(LRScheduler):
    """Sets learning rate, momentum and weight decay of an optimizer, torch's or ours, from functions of the step.

    .. math:: lr_t = s(t)

    Like any torch scheduler it is stepped after the optimizer, once a step or once an epoch: t counts its steps from 0.

    Args:
        optimizer: the optimizer whose ``param_groups`` it writes to.
        lr: the learning rate: a schedule (see :mod:`fusedopt.schedules`) or another function of t, or a sequence with
            one for each parameter group.
        momentum: the ``momentum``, or the first of ``betas``, likewise.
        weight_decay: the ``weight_decay``, likewise.
        last_epoch: as in torch's schedulers.

    Raises:
        TypeError: if a value is not a function.
        ValueError: for a wrong number of functions, or an option that the optimizer does not have.

    Example:
        >>> import torch, fusedopt.torch
        >>> from fusedopt.schedules import Cosine
        >>> opt = fusedopt.torch.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9)
        >>> scheduler = fusedopt.torch.ScheduledLR(opt, lr=Cosine(0.1, steps=100))
        >>> for _ in range(100):
        ...     opt.step()
        ...     scheduler.step()
        >>> opt.param_groups[0]["lr"]
        0.0
    """

    __module__ = "fusedopt.torch"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Timed | Sequence[Timed],
        momentum: Timed | Sequence[Timed] | None = None,
        weight_decay: Timed | Sequence[Timed] | None = None,
        last_epoch: int = -1,
    ) -> None:
        groups = optimizer.param_groups
        wanted = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._timed = {k: _one_for_each(k, v, len(groups)) for k, v in wanted.items() if v is not None}
        for name in self._timed:
            if any(name not in group and not (name == "momentum" and "betas" in group) for group in groups):
                raise ValueError(f"{name}: {type(optimizer).__name__} has no such option")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates of this step, one for each group."""
        return [schedule(self.last_epoch) for schedule in self._timed["lr"]]

    def step(self, epoch: int | None = None) -> None:
        """Advances to the next step and writes its values into the optimizer's groups."""
        super().step(epoch)
        for name in ("momentum", "weight_decay"):
            for group, schedule in zip(self.optimizer.param_groups, self._timed.get(name, ()), strict=False):
                value = schedule(self.last_epoch)
                if name not in group:
                    group["betas"] = (value, *group["betas"][1:])
                elif isinstance(group[name], torch.Tensor):
                    group[name].fill_(value)
                else:
                    group[name] = value

    def observe(self, metric: float) -> None:
        """Passes a metric's value to the schedules that use it, such as :class:`fusedopt.schedules.ReduceOnPlateau`."""
        for schedule in self._schedules().values():
            schedule.observe(metric)

    def state_dict(self) -> dict[str, Any]:
        """The step and the state of the schedules, as numbers; the schedules themselves are not saved."""
        state = {k: v for k, v in super().state_dict().items() if k != "_timed"}
        return {**state, "schedules": {key: schedule.state_dict() for key, schedule in self._schedules().items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, for the same schedules."""
        state = dict(state_dict)
        given, own = state.pop("schedules"), self._schedules()
        if set(given) != set(own):
            raise ValueError(f"state_dict: expected schedules {sorted(own)}, got {sorted(given)}")
        for key, schedule in own.items():
            schedule.load_state_dict(given[key])
        super().load_state_dict(state)

    def _schedules(self) -> dict[str, Schedule]:
        """Every schedule once, by the first place where it is used."""
        places = [(f"{k}.{i}", s) for k, each in self._timed.items() for i, s in enumerate(each)]
        first = {id(s): (key, s) for key, s in reversed(places) if isinstance(s, Schedule)}
        return dict(first.values())


def _one_for_each(name: str, value: Timed | Sequence[Timed], groups: int) -> list[Timed]:
    each = [value] * groups if callable(value) else list(value) if isinstance(value, list | tuple) else None
    if each is None or not all(map(callable, each)):
        raise TypeError(f"{name}: expected a function of the step, or one for each group, got {value!r}")
    if len(each) != groups:
        raise ValueError(f"{name}: expected one for each of {groups} groups, got {len(each)}")
    return each
