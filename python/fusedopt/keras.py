"""Keras 3 optimizers on the torch backend: ``model.compile(fusedopt.keras.Adam())``.

Names, arguments and defaults are those of Keras's classes. The update follows the rule, as in torch, where Keras
differs: ``epsilon`` is added to the bias-corrected root, RMSprop's outside the root, and SGD's learning rate multiplies
the velocity. Schedules, clipping, accumulation, moving averages, loss scaling and saving are Keras's code. AdamW and
Lion apply weight decay within the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import keras  # type: ignore[import-untyped,import-not-found,unused-ignore]
import torch

from ._make import compile_function
from .rules import RULES, Rule
from .torch._engine import engine_of
from .torch._optimizer import CLASSES

if keras.backend.backend() != "torch":
    raise ImportError(
        f"fusedopt.keras: expected Keras on its torch backend (KERAS_BACKEND=torch), got {keras.backend.backend()}"
    )

__all__: list[str] = []  # filled below
_Optimizer: Any = keras.optimizers.Optimizer
_BASE = {
    p.name: p.default
    for p in inspect.signature(_Optimizer.__init__).parameters.values()
    if p.name not in ("self", "learning_rate", "kwargs")
}


class _Face(_Optimizer):  # type: ignore[misc]
    """Base class: Keras variables for the state, one fused step for all of them."""

    _rule: ClassVar[Rule]
    _names: ClassVar[dict[str, tuple[str, int]]]
    """Keras argument -> the rule's option, and the index into it or -1."""

    def _begin(self, learning_rate: Any, options: dict[str, Any], rest: dict[str, Any]) -> None:
        super().__init__(learning_rate=learning_rate, **rest)
        self._values = options
        self._inner: Any = None
        self._params: list[torch.Tensor] = []
        rule = self._rule
        known = {**rule.defaults, **self._options(), "weight_decay": rest.get("weight_decay") or 0.0}
        if "weight_decay" not in rule.defaults:
            del known["weight_decay"]
        rule.check(known)

    def _options(self) -> dict[str, Any]:
        """The rule's options, without learning rate and weight decay."""
        out: dict[str, Any] = {}
        for word, (option, index) in self._names.items():
            value = self._values[word]
            if index < 0:
                out[option] = value
            else:
                pair = list(out.get(option, self._rule.defaults[option]))
                pair[index] = value
                out[option] = tuple(pair)
        return out

    @property
    def _decays(self) -> bool:
        """Whether weight decay is part of the kernel; else Keras applies it before the step."""
        return self._rule.decoupled

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state of the variables."""
        if self.built:
            return
        super().build(variables)
        rule, options = self._rule, self._options()
        filled = {**rule.defaults, **options}
        self._state: dict[str, list[Any]] = {}
        for name in rule.scalars:
            first = keras.initializers.Constant(rule.first(name, filled))
            self._state[name] = [
                self.add_variable(shape=(), initializer=first, dtype="float32", name=f"{name}_{i}")
                for i in range(len(variables))
            ]
        for name in rule.states(filled):
            first = keras.initializers.Constant(rule.first(name, filled))
            self._state[name] = self.add_optimizer_variables(variables, name, initializer=first)

    def _follow(self, lr: float) -> None:
        """Creates or updates the fusedopt.torch optimizer over the variables' tensors."""
        params = [v.value for v in self._trainable_variables]
        inner = self._inner
        if inner is None or any(a is not b for a, b in zip(self._params, params, strict=True)):  # loaded, or moved
            self._params = params
            decay = float(self.weight_decay or 0.0) if self._decays else 0.0
            groups: dict[float, list[torch.Tensor]] = {}
            for variable, p in zip(self._trainable_variables, params, strict=True):
                groups.setdefault(decay if decay and self._use_weight_decay(variable) else 0.0, []).append(p)
            extra = {"weight_decay": 0.0} if "weight_decay" in self._rule.defaults else {}
            make: Any = CLASSES[self._rule.name]
            inner = self._inner = make(
                [{"params": ps, **({"weight_decay": wd} if extra else {})} for wd, ps in groups.items()],
                lr=lr, **self._options(), **extra,
            )  # fmt: skip
            for i, p in enumerate(params):
                entry = {
                    name: variables[i].value for name, variables in self._state.items() if variables[i] is not None
                }
                if entry:
                    inner.state[p] = entry
        for group in inner.param_groups:
            group["lr"] = lr

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        with torch.no_grad():
            self._follow(float(keras.ops.convert_to_numpy(learning_rate)))
            kept = [p.grad for p in self._params]
            try:
                for p in self._params:
                    p.grad = None
                for variable, grad in zip(trainable_variables, grads, strict=True):
                    variable.value.grad = grad
                engine_of(self._inner).run(self._inner)
            finally:
                for p, was in zip(self._params, kept, strict=True):
                    p.grad = was

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        self._backend_update_step([gradient], [variable], learning_rate)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        if not self._decays:
            super()._apply_weight_decay(variables)

    def get_config(self) -> dict[str, Any]:
        """The constructor arguments of this optimizer."""
        return {**super().get_config(), **self._values}


def _words(rule: Rule) -> dict[str, tuple[str, int]]:
    """The rule's options under Keras's names, without those of the base class; Keras has no maximize."""
    out: dict[str, tuple[str, int]] = {}
    names = {"eps": "epsilon", **rule.keras_names}
    for option, default in rule.defaults.items():
        if option in ("lr", "weight_decay", "maximize", "decoupled_weight_decay"):
            continue
        if isinstance(default, tuple):
            out |= {f"{option.removesuffix('s')}_{i + 1}": (option, i) for i in range(len(default))}
        else:
            out[names.get(option, option)] = (option, -1)
    return out


def _make_class(rule: Rule, name: str) -> type:
    theirs = getattr(keras.optimizers, name, None)
    defaults = {}
    if theirs is not None:
        defaults = {p.name: p.default for p in inspect.signature(theirs.__init__).parameters.values()}
    words = _words(rule)
    head = {"learning_rate": defaults.get("learning_rate", rule.defaults["lr"])}
    for word, (option, index) in words.items():
        head[word] = defaults.get(word, rule.defaults[option] if index < 0 else rule.defaults[option][index])
    base = {**_BASE, "weight_decay": defaults.get("weight_decay")}
    signature = ", ".join(f"{k}={v!r}" for k, v in {**head, **base}.items())
    own = "{" + ", ".join(f"{w!r}: {w}" for w in words) + "}"
    rest = "{" + ", ".join(f"{b!r}: {b}" for b in base) + "}"
    call = f"self._begin(learning_rate, {own}, {rest})"
    init = compile_function(rule, f"fusedopt.keras.{name}.__init__", f"self, {signature}", call, {})
    doc = (
        f"{(inspect.getdoc(type(rule)) or '').splitlines()[0]}\n\n"
        f"Arguments {f'as ``keras.optimizers.{name}``' if theirs else 'in the words of Keras'}; update as "
        f"``fusedopt.torch.{rule.name}``."
    )
    body = {"__init__": init, "__doc__": doc, "__module__": __name__, "_rule": rule, "_names": words}
    cls: type = keras.saving.register_keras_serializable(package="fusedopt")(type(name, (_Face,), body))
    return cls


for _rule in RULES.values():
    _name = {"NAdam": "Nadam"}.get(_rule.name, _rule.name)
    globals()[_name] = _make_class(_rule, _name)
    __all__.append(_name)
