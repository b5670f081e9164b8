"""``install`` puts the fused classes in the place of torch.optim's, ``convert`` does so for one live optimizer.

Both are reached as ``fusedopt.torch.install`` and so on. ``install`` works where an optimizer is made, in the class's
``__new__``: a name that was imported before (``from torch.optim import Adam``) is served, too, and
``isinstance(opt, torch.optim.Adam)`` stays true. Classes that somebody derived from torch's are left alone.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from . import torch as _torch
from .rules import RULES

__all__ = ["convert", "install", "installed", "uninstall"]

ours: Any = _torch  # its stub names this module in turn, and has no private names
_THEIRS: dict[type[Optimizer], type[Optimizer]] = {
    getattr(torch.optim, name): getattr(ours, name) for name in RULES if hasattr(torch.optim, name)
}
"""torch's class -> ours."""
_CASTABLE = ("state_dtype", "seed")  # options of ours that a way back can leave behind
_active = False


def installed() -> bool:
    """Whether torch.optim's classes make fused optimizers at present."""
    return _active


def install() -> None:
    """From now on ``torch.optim.Adam(...)`` and its siblings return the classes of ``fusedopt.torch``.

    Optimizers that exist are not changed (see ``convert``); neither are classes derived from torch's. Calling it again
    does nothing.

    Example:
        >>> import torch, fusedopt.torch
        >>> fusedopt.torch.install()
        >>> type(torch.optim.Adam([torch.ones(1, requires_grad=True)])).__module__
        'fusedopt.torch'
        >>> fusedopt.torch.uninstall()
    """
    global _active
    for theirs, mine in _THEIRS.items():
        if "__new__" not in vars(theirs):
            theirs.__new__ = _maker(theirs, mine)  # type: ignore[method-assign]
    _active = True


def uninstall() -> None:
    """Undoes ``install``: torch.optim's classes make torch's optimizers again. Those that were made meanwhile stay."""
    global _active
    # The __new__ stays, and hands on: Python's object.__new__ refuses arguments for ever once a class has had its own.
    _active = False


def _maker(theirs: type[Optimizer], mine: type[Optimizer]) -> Callable[..., Any]:
    def __new__(cls: type[Optimizer], *args: Any, **kwargs: Any) -> Any:
        # Without arguments it is pickle or copy that asks, for an object of exactly this class.
        return object.__new__(mine if _active and cls is theirs and (args or kwargs) else cls)

    __new__.__signature__ = inspect.signature(theirs.__init__)  # type: ignore[attr-defined]
    return __new__


def convert(optimizer: Optimizer, *, back: bool = False, max_grad_norm: float | None = None) -> Optimizer:
    """Turns a live optimizer of torch.optim into ours in place, or one of ours into torch's (``back=True``).

    The object stays the same one, with its groups, state and hooks, so schedulers, scalers and wrappers that hold it
    need not know. It may happen between any two steps.

    Arguments:
        optimizer: of a class that both sides have, or a wrapper that keeps one in its ``optimizer`` (Accelerate's);
            ``fused=False`` in a group goes on asking for torch's own step.
        back: from ours to torch's. A state kept in another dtype is cast to its parameter's.
        max_grad_norm: as for the classes of ``fusedopt.torch``.

    Raises:
        TypeError: for any other class, one derived from torch's included.
        ValueError: if an option of ours is set that torch's class does not have.
        RuntimeError: if ``optimizer.step`` was replaced by something that cannot be followed to the class's own step.

    Example:
        >>> import torch
        >>> from fusedopt.torch import convert
        >>> opt = torch.optim.Adam([torch.ones(3, requires_grad=True)])
        >>> convert(opt) is opt
        True
    """
    table = {mine: theirs for theirs, mine in _THEIRS.items()} if back else _THEIRS
    holders = [optimizer]
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # a wrapper, such as Accelerate's
        optimizer = inner
        holders.append(optimizer)
    old = type(optimizer)
    if old not in table and old not in table.values():
        side = "fusedopt.torch's" if back else "torch.optim's"
        names = ", ".join(sorted(cls.__name__ for cls in table))
        raise TypeError(f"optimizer: expected one of {side} {names}, got {old.__module__}.{old.__qualname__}")
    norm = ours._checked_norm(max_grad_norm)
    if back and norm is not None:
        raise ValueError("max_grad_norm: torch's class does not have it; expected None with back=True")
    new = table.get(old, old)
    if new is not old:
        if back:
            _check_options(optimizer)
        for cls in (old, new):
            if not getattr(cls.step, "hooked", False):  # torch does it at the first construction
                cls.step = Optimizer.profile_hook_step(cls.step)  # type: ignore[method-assign,assignment]
                cls.step.hooked = True  # type: ignore[attr-defined]
        changes = [change for holder in holders for change in _redirections(holder, optimizer, old, new)]
        if back:
            _drop_options(optimizer)
        optimizer.__class__ = new
        for change in changes:
            change()
        if not back:
            for key, default in ours.NEW_OPTIONS.items():
                optimizer.defaults.setdefault(key, default)
            optimizer.__setstate__({})
    if norm is not None:
        optimizer.max_grad_norm = norm  # type: ignore[attr-defined]
    return holders[0]


def _redirections(
    holder: Optimizer, optimizer: Optimizer, old: type[Optimizer], new: type[Optimizer]
) -> list[Callable[[], None]]:
    """What has to be done so that functions kept in ``holder``, a scheduler's wrapper of ``step`` above all, lead to
    the step of the new class. Raises RuntimeError where they do not lead to that of the old one."""
    before, after = old.step, new.step
    changes: list[Callable[[], None]] = []

    def turned(value: Any) -> Any:
        """The replacement of a value that is the old step; None for any other."""
        if value is before:
            return after
        if isinstance(value, types.MethodType) and value.__self__ is optimizer and value.__func__ is before:
            return types.MethodType(after, optimizer)
        return None

    def follow(value: Any, seen: set[int]) -> bool:
        if isinstance(value, types.MethodType):
            value = value.__func__
        if id(value) in seen or not isinstance(value, types.FunctionType):
            return False
        seen.add(id(value))
        found = False
        for cell in value.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            other = turned(held)
            if other is not None:
                changes.append(partial(setattr, cell, "cell_contents", other))
            found |= other is not None or follow(held, seen)
        return found

    for name, value in vars(holder).items():
        other = turned(value)
        if other is not None:
            changes.append(partial(setattr, holder, name, other))
        elif not follow(value, set()) and name == "step":
            raise RuntimeError(
                f"optimizer.step: it was replaced by {value!r}, which does not lead to {old.__name__}.step; "
                "convert before that is done"
            )
    return changes


def _check_options(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for key, default in ours.NEW_OPTIONS.items():
            if key not in _CASTABLE and group.get(key, default) != default:
                raise ValueError(f"{key}: torch's class does not have it; set it to {default!r} before converting back")


def _drop_options(optimizer: Optimizer) -> None:
    """Leaves what torch's own class would have made."""
    for group in optimizer.param_groups:
        if group.get("state_dtype"):
            names = optimizer._rule.states(group)  # type: ignore[attr-defined]
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                ours.recode(p, state, names, ours.form_of(p, {**group, **ours.NEW_OPTIONS}))
                state.pop("stream", None)
                for name in names:
                    if isinstance(state.get(name), torch.Tensor):
                        state[name] = state[name].to(p.dtype)
        for key in ours.NEW_OPTIONS:
            group.pop(key, None)
    for key in ours.NEW_OPTIONS:
        optimizer.defaults.pop(key, None)
    probe: Any = object.__new__(ours.SGD)
    probe._reset()
    for key in vars(probe):
        vars(optimizer).pop(key, None)
