"""The optimizer classes: groups, options, hooks, checkpoints. The update itself is the engine's, in _engine.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer
from torch.overrides import TorchFunctionMode

from .. import forms
from .._make import compile_function, option_dict, option_signature, rule_doc
from ..rules import RULES, SPARSE_RULES, Rule, check_max_grad_norm
from ._engine import Engine, optimizers, remove_engine
from ._fallback import unwrapped_step
from ._state import DTYPES, NAMES, NEW_OPTIONS, Keep, convert_for_load, form_of, recode, row_state

__all__ = ["CLASSES", "Fused"]


def _checked(key: str, value: Any) -> Any:
    """The value of one of our options; dtypes as their names."""
    if key == "max_grad_norm":
        return check_max_grad_norm(value)
    if key == "lazy":
        if not isinstance(value, bool):
            raise TypeError(f"lazy: expected True or False, got {value!r}")
        return value
    if key == "state_dtype" and isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    forms.check({**forms.OPTIONS, key: value})
    return value


class Fused(Optimizer):
    """What every class here shares; a mixin before the torch class it replaces."""

    _rule: ClassVar[Rule]
    _plain_step: ClassVar[Callable[..., Any] | None]
    """torch's own step, without hooks; None where torch has no such optimizer."""

    def _begin(self, options: dict[str, Any]) -> None:
        """Checks our options, before torch's constructor gets its own."""
        self._options = {key: _checked(key, options[key]) for key in NEW_OPTIONS}
        self._new_engine()

    def _new_engine(self) -> None:
        before: Engine | None = self.__dict__.get("_engine")
        warned = before.fallback.warned if before else set()
        remove_engine(self)
        self._engine = Engine(self._rule, type(self)._plain_step, warned)
        optimizers[self._engine.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        for entry in state.get("state", {}).values():
            if isinstance(entry, dict):
                entry.update({k: v.tensor for k, v in entry.items() if isinstance(v, Keep)})
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in NEW_OPTIONS.items():
                group.setdefault(key, self.defaults.get(key, default))
        self._new_engine()

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients in the last step, before clipping; None without ``max_grad_norm``."""
        return self._engine.norm

    @property
    def last_step_skipped(self) -> bool:
        """Whether GradScaler found gradients that are not finite in the last step. On a GPU this waits for the step."""
        return bool(self._engine.skipped)

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, as in torch."""
        if "_options" in self.__dict__:  # torch's constructor is still running, or has just run
            self.defaults.update(self._options)
        if isinstance(param_group, dict):
            for key in NEW_OPTIONS:
                if key in param_group:
                    param_group[key] = _checked(key, param_group[key])
            if param_group.get("max_grad_norm", self.defaults["max_grad_norm"]) != self.defaults["max_grad_norm"]:
                raise ValueError("max_grad_norm: one for the optimizer, over all groups; got another for a group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._rule.check_rows(group)
        except ValueError:
            self.param_groups.pop()
            raise
        dtypes = {p.dtype: p for p in group["params"]} if forms.explicit(group) else {}  # torch's own forms all exist
        for dtype, p in dtypes.items():
            reason = dtype in NAMES and forms.refusal(self._rule.kernel(group), NAMES[dtype], form_of(p, group))
            if reason:
                self.param_groups.pop()
                raise ValueError(reason)
        self._engine.groups_changed()

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to, or None."""
        value: float | None = self.param_groups[0]["max_grad_norm"]
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.defaults["max_grad_norm"] = value = check_max_grad_norm(value)
        for group in self.param_groups:
            group["max_grad_norm"] = value

    # --- the step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; ``closure`` reevaluates the model and returns the loss, which is returned."""
        if is_dynamo_compiling():
            from ._compile import step

            return step(self, self._engine, closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _torch_optimizer._global_optimizer_pre_hooks
            or _torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ) and type(self).step is Fused.step:  # torch has wrapped the step of a subclass that has its own
            return _hooked(self) if closure is None else _hooked(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.run(self)
        return loss

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """Sets the parameters to the moving averages of ``ema_decay`` within a ``with`` block.

        A parameter that has not been stepped yet has no average and keeps its value.
        """
        pairs = [(p, p.detach().clone(), s["ema"]) for p, s in self.state.items() if "ema" in s]
        with torch.no_grad():
            for p, _, ema in pairs:
                p.copy_(ema)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, saved, _ in pairs:
                    p.copy_(saved)

    # --- checkpoints ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch's.

        As in torch the state is cast to the parameter's dtype, unless ``state_dtype`` was given here or is among the
        checkpoint's options. A tensor that the optimizer already holds is not written to.
        """
        handle = self.register_load_state_dict_pre_hook(partial(convert_for_load, self._rule))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


_hooked = Optimizer.profile_hook_step(Fused._step)
Fused.step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it: step() runs hooks and profiler itself


_CLASS_DOC = """
    {name} takes torch.optim's arguments, and ``state_dtype``, ``master``, ``stochastic_rounding``, ``seed``,
    ``ema_decay``, ``l1``, ``lazy``, ``row_steps``{row_wise} and ``max_grad_norm``; see :mod:`fusedopt.torch`.

    Example:
        >>> import torch
        >>> from fusedopt.torch import {name}
        >>> model = torch.nn.Linear(10, 1)
        >>> opt = {name}(model.parameters(), lr=0.1)
        >>> model(torch.ones(4, 10)).sum().backward()
        >>> opt.step()
    """


class _RowSums(TorchFunctionMode):
    """While torch's constructor of Adagrad makes its state: no memory for one that is replaced at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.full_like:
            return None
        return func(*args, **(kwargs or {}))


def make_class(rule: Rule, own_step: Callable[..., Any] | None = None) -> type[Optimizer]:
    """The optimizer class of a rule.

    Args:
        own_step: what takes the place of torch's own step for a user's rule.
    """
    theirs: type[Optimizer] | None = None if rule.own else getattr(torch.optim, rule.name, None)
    if theirs is None:
        base, init = Optimizer, _own_init(rule)
    else:
        base, init = theirs, theirs.__init__

    options = {key: default for key, default in NEW_OPTIONS.items() if key not in forms.unused_by(rule)}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._begin({**NEW_OPTIONS, **{key: kwargs.pop(key, default) for key, default in options.items()}})
        with _RowSums() if self._options["row_wise"] else nullcontext():
            init(self, *args, **kwargs)
        del self._options
        for group in self.param_groups if rule.row_wise else ():
            for p in group["params"] if group["row_wise"] or self.defaults["row_wise"] else ():
                first = rule.first(rule.row_wise, self.defaults)
                made = row_state(p, first) if group["row_wise"] else torch.full_like(p, first)
                self.state[p][rule.row_wise] = made
        for group in self.param_groups if rule.initial and self.defaults["state_dtype"] else ():
            for p in group["params"]:  # Adagrad's constructor makes its state
                for name in rule.states(group):
                    if p.dtype not in NAMES or name not in self.state.get(p, {}):
                        continue
                    if group["state_dtype"] == "int8":
                        recode(p, self.state[p], rule.kernel(group), form_of(p, group))
                    else:
                        self.state[p][name] = self.state[p][name].to(DTYPES[group["state_dtype"]])

    signature = inspect.signature(init)
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in options.items()]
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    plain = own_step
    if theirs is not None:  # as it is below torch's hooks, which our own step runs
        plain = unwrapped_step(theirs.step)
    return type(
        rule.name,
        (Fused, base),
        {
            "__init__": __init__,
            "__doc__": rule_doc(rule, _CLASS_DOC)
            .replace("{name}", rule.name)
            .replace("{row_wise}", ", ``row_wise``" if rule.row_wise else ""),
            "__module__": __package__,
            "_rule": rule,
            "_plain_step": plain,
        },
    )


def _own_init(rule: Rule) -> Callable[..., None]:
    """A constructor in torch's manner for a rule that torch does not have."""

    def begin(self: Any, params: Iterable[Any], options: dict[str, Any]) -> None:
        rule.check({**options, "lr": float(options["lr"])})
        Optimizer.__init__(self, params, {**options, "differentiable": False})

    names = option_signature(rule).split(", maximize")[0]
    return compile_function(
        rule,
        f"fusedopt.torch.{rule.name}.__init__",
        f"self, params, {names}, *, maximize=False",
        f"begin(self, params, {option_dict(rule)})",
        {"begin": begin},
    )


CLASSES: dict[str, type[Optimizer]] = {
    rule.name: make_class(rule) for rule in (*RULES.values(), *SPARSE_RULES.values())
}
"""The class of every rule, by its name."""
