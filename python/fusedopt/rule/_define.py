"""The decorator :func:`rule`. It checks the signature of a function, traces the function, and creates a rule that both
front ends use like a built-in one."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, NoReturn

import numpy as np

from .. import _core, forms
from ..rules import RULES, Array, Kernel, Options, Rule, State, values_of
from ._lower import Program, lower, spelled, sums_of
from ._symbols import RuleError, Symbol, Trace, place

__all__ = ["Option", "OwnRule", "Scalar", "StateArray", "option", "rule", "scalar", "state"]

_front: Any = importlib.import_module("fusedopt.numpy")  # the stub types public names only
_RESERVED = {
    *("p", "g", "t", "self", "param", "params", "grad", "step", "maximize", "differentiable", "max_grad_norm"),
    *("master", "ema", "stream", "closure", "fused", "foreach", "capturable"),
    *forms.OPTIONS,
}
_MAX_FLAGS = 6
_registered: dict[Any, int] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class StateArray:
    """The declaration of a state array; see :func:`state`."""

    initial: float | str
    non_negative: bool
    quantise: bool

    @property
    def code(self) -> str:
        """The dtype of the codes in int8 forms; empty if the state is not quantised."""
        return "" if not self.quantise else "uint8" if self.non_negative else "int8"


@dataclass(frozen=True)
class Scalar:
    """The declaration of a carried scalar; see :func:`scalar`."""

    initial: float | str


@dataclass(frozen=True)
class Option:
    """The declaration of an option with a range; see :func:`option`."""

    default: Any
    low: float
    high: float
    include_high: bool


def state(initial: float | str = 0.0, *, non_negative: bool = False, quantise: bool = True) -> Any:
    """Declares a state array, as the default of a parameter of the rule's function.

    Args:
        initial: the initial value: a number, the name of an option, or ``"param"`` for a copy of the parameter.
        non_negative: whether the state is never below zero, as a second moment is. Its int8 codes are then unsigned.
        quantise: whether int8 forms may store the state in 8 bits. Use False if small differences matter, as in a copy
            of the parameter. The rule then has no int8 forms.
    """
    return StateArray(initial if isinstance(initial, str) else float(initial), bool(non_negative), bool(quantise))


def scalar(initial: float | str = 0.0) -> Any:
    """Declares a number that every tensor carries from step to step in float64, such as a product of momenta.

    The new value may depend on options, the step and the old value, but not on elements. Other expressions use the new
    value.

    Args:
        initial: the initial value: a number or the name of an option.
    """
    return Scalar(initial if isinstance(initial, str) else float(initial))


def option(default: Any, low: float = 0.0, high: float = math.inf, *, include_high: bool = False) -> Any:
    """Declares an option with its own range. The default range is [0, inf), and [0, 1) for ``betas``.

    Args:
        default: a number or a tuple of numbers.
        low, high: the range is [low, high).
        include_high: whether the range includes ``high``.
    """
    return Option(default, float(max(low, -sys.float_info.max)), float(high), bool(include_high))


def rule(**options: Any) -> Callable[[Callable[..., Any]], OwnRule]:
    """Creates an update rule from a function of symbols; see :mod:`fusedopt.rule`.

    Args:
        options: all options with their defaults: a number, a tuple of numbers, True, False, or :func:`option`. ``lr``
            is required.

    Raises:
        RuleError: the function uses an operation that a rule does not support. The message quotes the line.
    """

    def define(function: Callable[..., Any]) -> OwnRule:
        if not inspect.isfunction(function):
            raise RuleError(f"rule: expected a function, got {function!r:.80}")
        return _define(function, options)

    return define


class _Signature:
    """The checked parameters of a rule's function."""

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        self.function, self.options = function, options
        self.states: dict[str, StateArray] = {}
        self.scalars: dict[str, Scalar] = {}
        parameters = inspect.signature(function).parameters
        plain = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.POSITIONAL_ONLY]
        named = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
        if len(plain) + len(named) != len(parameters):
            self.refuse("*args and **kwargs are no parameters of a rule")
        if len(plain) < 2 or any(p.default is not p.empty for p in plain[:2]):
            self.refuse("expected the parameter and the gradient as the first two parameters, such as p, g")
        for p in plain[2:]:
            if p.name in _RESERVED or p.name.endswith(("_codes", "_scale")) or p.name in options:
                self.refuse(f"{p.name}: a state cannot have this name")
            if isinstance(p.default, StateArray):
                self.states[p.name] = p.default
            elif isinstance(p.default, Scalar):
                self.scalars[p.name] = p.default
            else:
                self.refuse(f"{p.name}: expected state() or scalar() as its default; options follow after a *")
        self.held = [p.name for p in plain[2:]]
        self.uses_t = "t" in named
        self._check_options([name for name in named if name != "t"])
        if len(self.states) > _core.MAX_STATES or len(self.scalars) > 1:
            self.refuse(f"a rule has at most {_core.MAX_STATES} states and one scalar")
        for name, first in self.initial():
            copied = first == "param" and name in self.states
            if isinstance(first, str) and not copied and not isinstance(self.defaults.get(first), float):
                self.refuse(f"{name}: the initial value {first!r} is no option with a number")

    def _check_options(self, named: list[str]) -> None:
        self.defaults: dict[str, Any] = {}
        self.ranges: dict[str, tuple[float, float, bool]] = {}
        if "lr" not in self.options:
            self.refuse("a rule has an option lr")
        for name in self.options.keys() - set(named):
            self.refuse(f"{name}: an option that is no keyword-only parameter of the function")
        for name in named:
            if name not in self.options:
                self.refuse(f"{name}: a parameter that is no option: give it a default in @rule(...)")
        for name, given in self.options.items():
            if name in _RESERVED or name.startswith("_"):
                self.refuse(f"{name}: an option cannot have this name")
            default = given
            if isinstance(given, Option):
                default = given.default
                self.ranges[name] = (given.low, given.high, given.include_high)
            if isinstance(default, bool):
                self.defaults[name] = default
            elif isinstance(default, int | float):
                self.defaults[name] = float(default)
            elif isinstance(default, tuple) and default and all(type(x) in (int, float) for x in default):
                self.defaults[name] = tuple(float(x) for x in default)
            else:
                self.refuse(f"{name}: expected a number, a tuple of numbers, True or False, got {default!r:.80}")
        self.flags = tuple(k for k, v in self.defaults.items() if isinstance(v, bool))
        if len(self.flags) > _MAX_FLAGS:
            self.refuse(f"a rule has at most {_MAX_FLAGS} options that are True or False")

    def initial(self) -> list[tuple[str, float | str]]:
        """The initial value of every state and scalar."""
        return [(k, v.initial) for k, v in self.states.items()] + [(k, v.initial) for k, v in self.scalars.items()]

    def refuse(self, message: str) -> NoReturn:
        code = self.function.__code__
        raise RuleError(message + place(code, code.co_firstlineno))


class _Variant:
    """A trace of the function for one combination of its boolean options."""

    def __init__(self, signature: _Signature, flags: dict[str, bool]) -> None:
        self.signature = signature
        trace = Trace()
        self.param = trace.symbol("input", name="p", element=True)
        self.grad = trace.symbol("input", name="g", element=True)
        self.before = {name: trace.symbol("input", name=name, element=True) for name in signature.states}
        self.carried = {name: trace.symbol("carried", name=name) for name in signature.scalars}
        self.t = trace.symbol("t", name="t")
        self.options: dict[str, Any] = {}
        for name, default in signature.defaults.items():
            if isinstance(default, bool):
                self.options[name] = flags[name]
            elif isinstance(default, tuple):
                items = (trace.symbol("option", name=f"{name}[{i}]") for i in range(len(default)))
                self.options[name] = tuple(items)
            else:
                self.options[name] = trace.symbol("option", name=name)
        self.trace = trace
        held = {**self.before, **self.carried}
        order = signature.held
        named = {**self.options, **({"t": self.t} if signature.uses_t else {})}
        results = signature.function(self.param, self.grad, *(held[k] for k in order), **named)
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != 1 + len(order):
            wanted = ", ".join(["the parameter", *order])
            signature.refuse(f"expected the function to return {wanted}, got {len(results)} values")
        self.after = dict(zip(["", *order], results, strict=True))
        self._check(order)
        read = {id(a) for s in trace.symbols for a in s.args}
        self.states = tuple(k for k in self.before if self.after[k] is not self.before[k] or id(self.before[k]) in read)
        self.reads_t = id(self.t) in read
        self.reduces = bool(sums_of(list(self.after.values())))

    def _check(self, order: list[str]) -> None:
        refuse = self.signature.refuse
        for name, value in self.after.items():
            label = name or "the parameter"
            if not isinstance(value, Symbol) and not isinstance(value, bool) and isinstance(value, int | float):
                value = self.after[name] = self.trace.lift(value)
            if not isinstance(value, Symbol):
                refuse(f"{label}: expected a symbol as its new value, got {type(value).__name__}")
            if value.condition:
                refuse(f"{label}: its new value is a condition: use where(condition, 1.0, 0.0)")
            if name in self.carried and value.element:
                refuse(f"{name}: a carried scalar depends on options, the step and itself alone, not on elements")
            if name in self.carried and sums_of([value]):
                refuse(f"{name}: a carried scalar does not depend on sums over a tensor")
            if name not in self.carried and not value.element:
                self.after[name] = self.trace.symbol("fill", (value,), element=True)

    def program(self, states: tuple[str, ...], hyper: list[tuple[str, int]]) -> Program:
        """The program that the core runs."""
        given = {}
        for i, (name, item) in enumerate(hyper):
            value = self.options[name]
            given[id(value if item < 0 else value[item])] = i
        given[id(self.t)] = len(hyper)
        carried = None
        for name, symbol in self.carried.items():
            given[id(symbol)] = len(hyper) + 1
            carried = (symbol, self.after[name])
        inputs = {id(self.param): 0, id(self.grad): 1}
        inputs.update({id(self.before[k]): 2 + i for i, k in enumerate(states)})
        given[id(self.trace.symbol("length", name="length"))] = len(hyper) + 2
        outputs = [(0, self.after[""]), *((2 + i, self.after[k]) for i, k in enumerate(states))]
        return lower(outputs, inputs, given, len(hyper) + 3 + _core.MAX_SUMS, carried, ("p", "g", *states))


class OwnRule(Rule):
    """An update rule created by :func:`rule`.

    ``numpy`` and ``torch`` are its optimizer classes, ``update_`` is its in-place function, and ``reference`` evaluates
    the function on float64 arrays. ``repr`` shows the program.
    """

    own = True
    wide = True
    _signature: ClassVar[_Signature]
    _traces: ClassVar[dict[tuple[bool, ...], _Variant]]

    def __init__(self) -> None:
        self._kernels: dict[tuple[bool, ...], Kernel] = {}
        self._made: dict[str, Any] = {}

    # --- the interface of rules for the front ends ---

    @property
    def once(self) -> tuple[str, ...]:
        return ()

    @property
    def all_operands(self) -> tuple[str, ...]:
        return ("param", "grad", *self._signature.states, *self.carried)

    def _key(self, options: Options) -> tuple[bool, ...]:
        return tuple([bool(options.get(flag)) for flag in self._signature.flags])

    def kernel(self, options: Options) -> Kernel:
        """The kernel for these options, created at first use."""
        key = self._key(options)
        found = self._kernels.get(key)
        if found is None:
            with _lock:
                found = self._kernels.setdefault(key, self._make_kernel(key))
        return found

    def states(self, options: Options) -> tuple[str, ...]:
        return self._traces[self._key(options)].states

    @property
    def _hyper(self) -> list[tuple[str, int]]:
        """All numeric options as (name, index in a tuple or -1), with ``lr`` first, as the core expects."""
        found: list[tuple[str, int]] = []
        for name, default in self._signature.defaults.items():
            if isinstance(default, tuple):
                found += [(name, i) for i in range(len(default))]
            elif not isinstance(default, bool):
                found.append((name, -1))
        return sorted(found, key=lambda h: h[0] != "lr")

    def _make_kernel(self, key: tuple[bool, ...]) -> Kernel:
        trace, hyper = self._traces[key], self._hyper
        states = trace.states
        try:
            program = trace.program(states, hyper)
        except RuleError as error:
            self._signature.refuse(str(error))
        codes = tuple(self._signature.states[k].code for k in states)
        what = (self.name, tuple(hyper), states, codes, program.key())
        if what not in _registered:
            names = [name if item < 0 else f"{name}{item + 1}" for name, item in hyper]
            _registered[what] = _core.add_program(
                self.name,
                names,
                states,
                codes,
                program.numbers,
                program.carry,
                program.conditions,
                program.passes,
                program.variants,
            )
        sources = tuple((name, item, 0.0) for name, item in hyper)
        operands = ("param", "grad", *states, *self.carried)
        options = tuple(name for name, _ in hyper)
        return Kernel(self.name, _registered[what], states, operands, sources, values_of(sources), options, codes)

    # --- the public interface ---

    @property
    def numpy(self) -> Any:
        """The optimizer class for NumPy arrays, with the options of :class:`fusedopt.Adam`."""
        return self._class("numpy")

    @property
    def torch(self) -> Any:
        """The optimizer class for torch, with the options of :class:`fusedopt.torch.Adam`."""
        return self._class("torch")

    def _class(self, kind: str) -> Any:
        if kind not in self._made:
            if kind == "numpy":
                made: Any = _front.make_class(self)
            else:
                from ..torch._optimizer import make_class as of_torch
                from ._fallback import plain_step

                made = of_torch(self, plain_step(self))
            made.__module__, made.__qualname__ = type(self).__module__, f"{type(self).__qualname__}.{kind}"
            self._made[kind] = made
        return self._made[kind]

    @property
    def update_(self) -> Callable[..., None]:
        """The in-place function, as :func:`fusedopt.adam_`: ``update_(param, grad, *states, step=..., **options)``."""
        if "update_" not in self._made:
            self._made["update_"] = _front.make_function(self)
        made: Callable[..., None] = self._made["update_"]
        return made

    def call(
        self, p: Any, g: Any, held: Mapping[str, Any], t: Any, options: Options, number: Any = float
    ) -> dict[str, Any]:
        """The function's results for arrays or tensors; "" is the parameter. Names not in ``held`` get None."""
        signature = self._signature
        values: dict[str, Any] = {"t": t} if signature.uses_t else {}
        for name, default in signature.defaults.items():
            value = options[name]
            if isinstance(default, bool):
                values[name] = bool(value)
            elif isinstance(default, tuple):
                values[name] = tuple(number(x) for x in value)
            else:
                values[name] = number(value)
        order = signature.held
        results = signature.function(p, g, *(held.get(k) for k in order), **values)
        return dict(zip(["", *order], results if isinstance(results, tuple) else (results,), strict=True))

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        held = {k: v.astype(np.float64) for k, v in s.items()}
        results = self.call(p.copy(), g.copy(), held, np.float64(t), o, np.float64)
        p[...] = results[""]
        for name in s.keys() & results.keys():
            if name != "step":
                s[name][...] = results[name]

    def __reduce__(self) -> str:
        return type(self).__qualname__

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self._signature.defaults.items())
        lines = [f"{self.name}({options})"]
        for key, trace in self._traces.items():
            flags = [flag for flag, true in zip(self._signature.flags, key, strict=True) if true]
            with _lock:
                program = trace.program(trace.states, self._hyper)
            lines += [f"  {' and '.join(flags)}:"] if flags else []
            for name in trace.carried:
                lines.append(f"    {name} = {spelled(trace.after[name])}")
            lines += [f"    {line}" for line in program.text.splitlines()]
        return "\n".join(lines)


def _combinations(flags: tuple[str, ...]) -> Iterator[dict[str, bool]]:
    for truths in product((False, True), repeat=len(flags)):
        yield dict(zip(flags, truths, strict=True))


def _define(function: Any, options: dict[str, Any]) -> OwnRule:
    signature = _Signature(function, options)
    name = function.__name__
    if name in RULES:
        signature.refuse(f"{name}: a built-in rule has this name, and cannot be replaced")
    traces = {tuple(flags.values()): _Variant(signature, flags) for flags in _combinations(signature.flags)}
    for k in signature.states:
        if not any(k in v.states for v in traces.values()):
            signature.refuse(f"{k}: a state that is neither read nor changed")
        if all(v.after[k] is v.before[k] for v in traces.values()):
            signature.refuse(f"{k}: a state that never changes")
    for k in signature.scalars:
        if all(v.after[k] is v.carried[k] for v in traces.values()):
            signature.refuse(f"{k}: a scalar that never changes")
    timed = bool(signature.scalars) or any(v.reads_t for v in traces.values())
    names = {
        "__doc__": inspect.getdoc(function) or f"{name}, a rule by {function.__module__}.",
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "defaults": {**signature.defaults, "maximize": False},
        "ranges": signature.ranges,
        "variants": {tuple(k for k, v in flags.items() if v): "" for flags in _combinations(signature.flags)},
        "scalars": ("step", *signature.scalars) if timed else (),
        "clock": "step" if timed else None,
        "initial": {k: first for k, first in signature.initial() if first != 0.0},
        "reduces": any(v.reduces for v in traces.values()),
        "_signature": signature,
        "_traces": traces,
    }
    made: Any = type(name, (OwnRule,), names)
    made.function = f"{name}.update_"  # not in the class body: a class that defines it is registered as built-in
    defined: OwnRule = made()
    return defined
