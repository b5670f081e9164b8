"""Gradient release: ``backward`` updates every parameter as soon as its gradient is complete, and frees the gradient.
See :func:`step_in_backward`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["InBackward", "step_in_backward"]


class InBackward(Optimizer):
    """What :func:`step_in_backward` returns: an optimizer whose parameters are already updated when ``step`` is called.

    ``param_groups`` are read at every update, so schedulers work. ``state_dict`` and ``load_state_dict`` use the format
    of the optimizer that the factory makes for all parameters together.
    """

    __module__ = "fusedopt.torch"

    def __init__(self, whole: Optimizer, accumulate: int) -> None:
        self._whole = whole
        self._accumulate = accumulate
        self._held = False
        self._single: dict[torch.Tensor, Optimizer] = {}
        self._seen: dict[torch.Tensor, int] = defaultdict(int)
        self._handles: list[Any] = []
        super().__init__(whole.param_groups, whole.defaults)
        self._groups = {p: group for group in whole.param_groups for p in group["params"]}
        self._distribute()
        for p in self._groups:
            self._handles.append(p.register_post_accumulate_grad_hook(self._complete))

    # Each parameter has an optimizer of its own; users see their states merged.

    @property
    def state(self) -> Any:
        """The state of all parameters, as in torch."""
        whole: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for p, single in self._single.items():
            if p in single.state:
                whole[p] = single.state[p]
        return whole

    @state.setter
    def state(self, value: Any) -> None:  # torch's constructor sets an empty one
        pass

    def _distribute(self) -> None:
        self._single = {}
        for p, group in self._groups.items():
            single = type(self._whole)([{**group, "params": [p]}])  # type: ignore[call-arg]
            if p in self._whole.state:
                single.state[p] = self._whole.state[p]
            self._single[p] = single
        self._whole.state.clear()

    def _complete(self, p: torch.Tensor) -> None:
        self._seen[p] += 1
        if not self._held and self._seen[p] % self._accumulate == 0:
            self._update(p)

    def _update(self, p: torch.Tensor) -> None:
        single, group = self._single[p], self._groups[p]
        options = single.param_groups[0]
        for key, value in group.items():
            if key != "params":
                options[key] = value
        _refuse(options)
        single.step()
        p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that still have a gradient, such as one accumulated in :meth:`no_step`; ``backward``
        has updated all others. Calls ``closure`` first, if there is one, and returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self._groups:
            if p.grad is not None and (self._held or self._seen[p] % self._accumulate == 0 or not self._seen[p]):
                self._update(p)
        return loss

    @contextmanager
    def no_step(self) -> Iterator[None]:
        """In this block ``backward`` only accumulates; the next ``backward`` outside, or ``step``, uses the sum."""
        held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = held

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: groups cannot be added after construction, since their parameters need hooks."""
        if "_groups" in self.__dict__:
            raise RuntimeError("add_param_group: call step_in_backward again with all parameters")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer for all parameters."""
        self._whole.state.update(self.state)
        try:
            return self._whole.state_dict()
        finally:
            self._whole.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or a checkpoint of the optimizer for all parameters."""
        self._whole.state.update(self.state)
        self._whole.load_state_dict(state_dict)
        self.param_groups = self._whole.param_groups
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        self._distribute()

    def remove(self) -> None:
        """Removes the hooks: ``backward`` no longer updates parameters."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer in backward holds hooks of its model and cannot be copied: use state_dict()")


def _refuse(options: dict[str, Any]) -> None:
    if options.get("max_grad_norm"):
        raise ValueError(
            "max_grad_norm: a global norm needs all gradients at once, and step_in_backward frees each: clip by value "
            "in a hook, or use an ordinary optimizer"
        )


def step_in_backward(
    model: torch.nn.Module, factory: Callable[[list[torch.nn.Parameter]], Optimizer], *, accumulate: int = 1
) -> InBackward:
    """Lets ``backward`` update each parameter when its gradient is complete, and free the gradient.

    The gradients never exist all at once: at most those that one step of ``backward`` makes are alive. The training
    loop stays as it is: ``step`` and ``zero_grad`` of the returned optimizer can be called and have nothing left to do,
    and schedulers act on its ``param_groups``.

    Args:
        model: its parameters that require a gradient are updated.
        factory: makes an optimizer, ours or torch's, from a list of parameters.
        accumulate: update with the sum over this many ``backward`` calls; or see :meth:`InBackward.no_step`.

    Raises:
        ValueError: ``max_grad_norm``: a global norm needs all gradients; ``accumulate`` below 1; no parameters.
        TypeError: a model in DistributedDataParallel, whose gradients are summed only after they are complete here.

    Two more things do not work: ``clip_grad_norm_`` finds no gradients after ``backward``; GradScaler unscales
    gradients only after they have been used, and raises when its ``step`` finds none. Use bfloat16, which needs no
    scaler.

    Example:
        >>> import torch
        >>> from fusedopt.torch import AdamW, step_in_backward
        >>> model = torch.nn.Linear(10, 1)
        >>> opt = step_in_backward(model, lambda params: AdamW(params, lr=0.1))
        >>> model(torch.ones(4, 10)).sum().backward()
        >>> opt.step()
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate: expected an integer of 1 or more, got {accumulate!r}")
    if torch.distributed.is_available() and isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError("model: DistributedDataParallel sums gradients after step_in_backward would have used them")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model: no parameter requires a gradient")
    whole = factory(params)
    if not isinstance(whole, Optimizer):
        raise TypeError(f"factory: expected it to return an optimizer, got {type(whole).__name__}")
    missing = {id(p) for p in params} - {id(p) for group in whole.param_groups for p in group["params"]}
    if missing:
        raise ValueError(f"factory: the optimizer leaves out {len(missing)} of {len(params)} parameters")
    for group in whole.param_groups:
        _refuse(group)
    return InBackward(whole, accumulate)
