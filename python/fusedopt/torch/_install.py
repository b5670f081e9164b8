"""``install`` replaces the classes of torch.optim by the fused ones, ``convert`` replaces that of one live optimizer.

``install`` acts in the ``__new__`` of torch's classes, when an optimizer is constructed. So it also works for a name
that was imported before (``from torch.optim import Adam``), and ``isinstance(opt, torch.optim.Adam)`` stays true.
Classes derived from torch's are left alone.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ..rules import check_max_grad_norm
from ._engine import remove_engine
from ._fallback import FallbackWarning, unwrapped_step
from ._optimizer import CLASSES
from ._state import NEW_OPTIONS, form_of, recode

__all__ = ["REPLACED", "convert", "install", "installed", "uninstall"]

REPLACED: dict[type[Optimizer], type[Optimizer]] = {
    getattr(torch.optim, name): cls for name, cls in CLASSES.items() if hasattr(torch.optim, name)
}
"""torch's class -> ours."""
_CASTABLE = ("state_dtype", "seed")  # our options that can be dropped on the way back
_active = False


def installed() -> bool:
    """Whether ``install`` is in effect."""
    return _active


def install() -> None:
    """From now on ``torch.optim.Adam(...)`` and its siblings return the classes of ``fusedopt.torch``, and
    the functions of ``torch.optim.functional`` (torch 2.15) are those of ``fusedopt.torch.functional``.

    Optimizers that exist are not changed (see ``convert``); neither are classes derived from torch's, nor functions
    that were imported by their names before. Calling it again does nothing.

    Example:
        >>> import torch, fusedopt.torch
        >>> fusedopt.torch.install()
        >>> type(torch.optim.Adam([torch.ones(1, requires_grad=True)])).__module__
        'fusedopt.torch'
        >>> fusedopt.torch.uninstall()
    """
    global _active
    for theirs, mine in REPLACED.items():
        if "__new__" not in vars(theirs):
            theirs.__new__ = _maker(theirs, mine)  # type: ignore[method-assign]
    _active = True
    _set_functions(True)


def uninstall() -> None:
    """Undoes ``install``. Optimizers that were constructed in between keep their class."""
    global _active
    # __new__ stays in place, without effect: object.__new__ refuses arguments for good once a class has had its own.
    _active = False
    _set_functions(False)


_torch_functions: dict[str, Any] = {}


def _set_functions(ours: bool) -> None:
    """Puts our functions into ``torch.optim.functional``, or torch's back, where this torch has the module."""
    module = getattr(torch.optim, "functional", None)
    if module is None:
        return
    from . import functional

    for name in functional.__all__:
        mine = getattr(functional, name)
        if ours and getattr(module, name) is not mine:
            _torch_functions[name] = getattr(module, name)
            setattr(module, name, mine)
        elif not ours and getattr(module, name) is mine:
            setattr(module, name, _torch_functions[name])


def _maker(theirs: type[Optimizer], mine: type[Optimizer]) -> Callable[..., Any]:
    plain_step: Any = vars(mine)["_plain_step"]

    def __new__(cls: type[Optimizer], *args: Any, **kwargs: Any) -> Any:
        # A call without arguments comes from pickle or copy, which need an object of exactly this class.
        if not (_active and cls is theirs and (args or kwargs)):
            return object.__new__(cls)
        step: Any = theirs.step
        if unwrapped_step(step) is not plain_step:
            warnings.warn(
                f"torch.optim.{theirs.__name__}.step was replaced by {step!r}: its optimizers stay torch's own",
                FallbackWarning,
                stacklevel=2,
            )
            return object.__new__(cls)
        return object.__new__(mine)

    __new__.__signature__ = inspect.signature(theirs.__init__)  # type: ignore[attr-defined]
    return __new__


def convert(optimizer: Optimizer, *, back: bool = False, max_grad_norm: float | None = None) -> Optimizer:
    """Turns a live optimizer of torch.optim into ours in place, or one of ours into torch's (``back=True``).

    The object stays the same, with its groups, state and hooks, so schedulers, scalers and wrappers that hold it keep
    working. It can be done between any two steps.

    Arguments:
        optimizer: of a class that both have, or a wrapper with such an optimizer as its attribute ``optimizer``
            (Accelerate's). ``fused=False`` in a group still selects torch's own step.
        back: from ours to torch's. State of another dtype is cast to that of its parameter.
        max_grad_norm: as for the classes of ``fusedopt.torch``.

    Raises:
        TypeError: for any other class, including those derived from torch's.
        ValueError: if an option is set that torch's class does not have.
        RuntimeError: if ``optimizer.step`` was replaced by a function that does not lead to the class's own step.

    Example:
        >>> import torch
        >>> from fusedopt.torch import convert
        >>> opt = torch.optim.Adam([torch.ones(3, requires_grad=True)])
        >>> convert(opt) is opt
        True
    """
    table = {mine: theirs for theirs, mine in REPLACED.items()} if back else REPLACED
    holders = [optimizer]
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # a wrapper, such as Accelerate's
        optimizer = inner
        holders.append(optimizer)
    old = type(optimizer)
    if old not in table and old not in table.values():
        side = "fusedopt.torch's" if back else "torch.optim's"
        names = ", ".join(sorted(cls.__name__ for cls in table))
        raise TypeError(f"optimizer: expected one of {side} {names}, got {old.__module__}.{old.__qualname__}")
    norm = check_max_grad_norm(max_grad_norm)
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
            for key, default in NEW_OPTIONS.items():
                optimizer.defaults.setdefault(key, default)
            optimizer.__setstate__({})
    if norm is not None:
        optimizer.max_grad_norm = norm  # type: ignore[attr-defined]
    return holders[0]


def _redirections(
    holder: Optimizer, optimizer: Optimizer, old: type[Optimizer], new: type[Optimizer]
) -> list[Callable[[], None]]:
    """The changes after which functions stored in ``holder``, such as a scheduler's wrapper of ``step``, call the step
    of the new class. Raises RuntimeError if one does not call that of the old class."""
    before, after = old.step, new.step
    changes: list[Callable[[], None]] = []

    def turned(value: Any) -> Any:
        """The replacement if the value is the old step; else None."""
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
        for key, default in NEW_OPTIONS.items():
            if key not in _CASTABLE and group.get(key, default) != default:
                raise ValueError(f"{key}: torch's class does not have it; set it to {default!r} before converting back")


def _drop_options(optimizer: Optimizer) -> None:
    """Removes our options and attributes, and casts state to what torch's own class would have made."""
    for group in optimizer.param_groups:
        if group.get("state_dtype"):
            kernel = optimizer._rule.kernel(group)  # type: ignore[attr-defined]
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                recode(p, state, kernel, form_of(p, {**group, **NEW_OPTIONS}))
                state.pop("stream", None)
                for name in kernel.states:
                    if isinstance(state.get(name), torch.Tensor):
                        state[name] = state[name].to(p.dtype)
        for key in NEW_OPTIONS:
            group.pop(key, None)
    for key in NEW_OPTIONS:
        optimizer.defaults.pop(key, None)
    remove_engine(optimizer)
