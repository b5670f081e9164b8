"""Symbols: the arguments of a rule's function while it is traced. Operators and the functions of ``fusedopt.rule``
record operations on symbols. Any other use raises an error that quotes the line of the user's function.

An *element* represents one element of a tensor (parameter, gradient, state). A *number* has the same value for all
elements: an option, the step, a carried scalar. Equal operations on equal symbols give the same symbol.
"""

from __future__ import annotations

import linecache
import math
import re
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "RuleError",
    "Symbol",
    "Trace",
    "exp",
    "fail",
    "fma",
    "lerp",
    "location",
    "log",
    "maximum",
    "minimum",
    "place",
    "sign",
    "sqrt",
    "tensor_mean",
    "tensor_norm",
    "tensor_sum",
    "where",
]

_PACKAGE = __name__.rpartition(".")[0]


class RuleError(TypeError):
    """A rule's function uses an operation that a rule does not support. The message quotes the line."""

    __module__ = "fusedopt.rule"


def location() -> str:
    """The line of the user's code that is being executed, formatted for a message."""
    frame: Any = sys._getframe(1)
    while frame and re.match(rf"({re.escape(_PACKAGE)}|numpy|torch)\b", frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return place(frame.f_code, frame.f_lineno) if frame else ""


def place(code: CodeType, line: int) -> str:
    """A line of a function, formatted for a message."""
    text = linecache.getline(code.co_filename, line).strip()
    return f'\n  File "{code.co_filename}", line {line}, in {code.co_name}' + (f"\n    {text}" if text else "")


def fail(message: str) -> NoReturn:
    """Raises a RuleError with the line of the user's code."""
    raise RuleError(message + location())


class Trace:
    """One trace of a rule's function: its symbols in order of creation."""

    def __init__(self) -> None:
        self.symbols: list[Symbol] = []
        self._known: dict[Any, Symbol] = {}

    def symbol(
        self, op: str, args: tuple[Symbol, ...] = (), *, name: str = "", value: float = 0.0, **kind: bool
    ) -> Symbol:
        """The symbol of this operation. ``kind`` may contain ``element`` and ``condition``."""
        key = (op, name, value, math.copysign(1, value), *(id(a) for a in args))
        found = self._known.get(key)
        if found is None:
            element = kind.get("element", any(a.element for a in args))
            found = Symbol(self, op, args, name, value, element, kind.get("condition", False), len(self.symbols))
            self._known[key] = found
            self.symbols.append(found)
        return found

    def lift(self, x: Any) -> Symbol:
        """Converts a Python number to a symbol; returns a symbol unchanged."""
        if isinstance(x, Symbol):
            if x.trace is not self:
                fail("a symbol of another rule, or of an earlier trace, is used: a rule's function keeps nothing")
            return x
        if isinstance(x, int | float | np.integer | np.floating):
            try:
                return self.symbol("literal", value=float(x))
            except OverflowError:
                fail(f"{x!r:.40} is too large for a float")
        fail(f"expected a symbol or a number, got {type(x).__name__}")


class Symbol:
    """A value whose computation is recorded."""

    __slots__ = ("args", "condition", "element", "name", "number", "op", "trace", "value")
    __array_priority__ = 1000

    def __init__(
        self,
        trace: Trace,
        op: str,
        args: tuple[Symbol, ...],
        name: str,
        value: float,
        element: bool,
        condition: bool,
        number: int,
    ) -> None:
        self.trace, self.op, self.args, self.name, self.value = trace, op, args, name, value
        self.element, self.condition, self.number = element, condition, number

    # --- operators ---

    def __add__(self, other: Any) -> Symbol:
        return _operate(self.trace, "add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return _operate(self.trace, "add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return _operate(self.trace, "sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _operate(self.trace, "sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return _operate(self.trace, "mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return _operate(self.trace, "mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return _operate(self.trace, "div", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return _operate(self.trace, "div", other, self)

    def __neg__(self) -> Symbol:
        return _operate(self.trace, "neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return _operate(self.trace, "abs", self)

    def __pow__(self, other: Any) -> Symbol:
        if not self.element and not getattr(other, "element", False):
            return _operate(self.trace, "pow", self, other)
        if not isinstance(other, Symbol) and other == 0.5:
            return _operate(self.trace, "sqrt", self)
        if isinstance(other, Symbol) or other not in range(1, 9):
            fail("an element can be raised to whole powers from 1 to 8 and to 0.5; else use exp(y * log(x))")
        out = self
        for _ in range(int(other) - 1):
            out = out * self
        return out

    def __rpow__(self, other: Any) -> Symbol:
        if self.element:
            fail("a number cannot be raised to an element's power: use exp(y * log(x))")
        return _operate(self.trace, "pow", other, self)

    def __lt__(self, other: Any) -> Symbol:
        return _compare("lt", self, other)

    def __le__(self, other: Any) -> Symbol:
        return _compare("le", self, other)

    def __gt__(self, other: Any) -> Symbol:
        return _compare("lt", other, self)

    def __ge__(self, other: Any) -> Symbol:
        return _compare("le", other, self)

    def __eq__(self, other: Any) -> Any:
        return _compare("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return _compare("ne", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Symbol:
        return _combine("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Symbol:
        return _combine("or", self, other)

    __ror__ = __or__

    def __invert__(self) -> Symbol:
        return _combine("not", self)

    # --- unsupported operations, which raise an error ---

    def __bool__(self) -> bool:
        if self.op == "option":
            fail(
                f"{self.name} is a number and known only when a step is made, so Python's if, and, or and not cannot "
                f"ask for it: use where({self.name} != 0, ..., ...), or declare it as True or False"
            )
        fail(
            "the value of a symbol is not known here, so Python's if, and, or, not, min and max do not work: use "
            "where, &, |, ~, minimum, maximum"
        )

    def __iter__(self) -> Any:
        fail("a symbol stands for one element: there is nothing to loop over or to unpack")

    def __len__(self) -> int:
        fail("a symbol stands for one element and has no length")

    def __getitem__(self, index: Any) -> Any:
        fail("a symbol stands for one element and cannot be indexed")

    def _no_value(self, *_: Any) -> Any:
        fail(
            "the value of a symbol is not known here: use the functions of fusedopt.rule, not those of math or float()"
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = __trunc__ = __floor__ = __ceil__ = _no_value

    def _not_in_place(self, other: Any) -> Any:
        fail("a symbol is not modified in place: write x = x + ... instead of x += ...")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __iand__ = __ior__ = _not_in_place

    def _unknown(self, *_: Any) -> Any:
        fail("unknown operation: the operators are + - * / ** < <= > >= == != & | ~ and abs()")

    __matmul__ = __rmatmul__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __xor__ = __rxor__ = _unknown
    __lshift__ = __rshift__ = __divmod__ = __imatmul__ = __ifloordiv__ = __imod__ = __ixor__ = _unknown

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        fail(f"np.{ufunc.__name__} is not an operation of a rule: use the functions of fusedopt.rule")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        fail(f"np.{function.__name__} is not an operation of a rule: use the functions of fusedopt.rule")

    def __array__(self, *_: Any, **__: Any) -> Any:
        fail("a symbol is no array: use the functions of fusedopt.rule")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fail(f"torch.{function.__name__} is not an operation of a rule: use the functions of fusedopt.rule")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        fail(f".{name}: a symbol has no methods: use operators and the functions of fusedopt.rule")

    def __repr__(self) -> str:
        return f"<symbol {self.name or self.op}>"


def _numeric(trace: Trace, x: Any) -> Symbol:
    found = trace.lift(x)
    if found.condition:
        fail("a condition is no number: use where(condition, 1.0, 0.0)")
    return found


def _operate(trace: Trace, op: str, *args: Any) -> Symbol:
    lifted = tuple(trace.lift(a) for a in args)
    if op == "mul":  # a condition times a number, as with arrays
        lifted = tuple(
            where(a, 1.0, 0.0) if a.condition and not b.condition else a
            for a, b in zip(lifted, lifted[::-1], strict=True)
        )
    return trace.symbol(op, tuple(_numeric(trace, a) for a in lifted))


def _compare(op: str, a: Any, b: Any) -> Symbol:
    trace = (a if isinstance(a, Symbol) else b).trace
    return trace.symbol(op, (_numeric(trace, a), _numeric(trace, b)), condition=True)


def _combine(op: str, *args: Any) -> Symbol:
    trace = next(a for a in args if isinstance(a, Symbol)).trace
    lifted = []
    for a in args:
        if isinstance(a, bool | np.bool_):
            a = trace.symbol("eq", (trace.lift(float(a)), trace.lift(1.0)), condition=True)
        a = trace.lift(a)
        if not a.condition:
            fail("&, | and ~ are for conditions, such as (g > 0) & (t > 1)")
        if op == "not" and not a.element:  # in the reference, ~ of a Python bool is an integer
            fail("~ is for conditions on elements: write the opposite comparison, such as t <= 1 for ~(t > 1)")
        lifted.append(a)
    return trace.symbol(op, tuple(lifted), condition=True)


# --- functions of symbols; for the reference and the fallback also of arrays, tensors and numbers ---


def _traced(args: tuple[Any, ...]) -> Trace | None:
    return next((a.trace for a in args if isinstance(a, Symbol)), None)


def _module(args: tuple[Any, ...]) -> Any:
    """torch if an argument is a tensor, NumPy if one is an array, else None."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and any(isinstance(a, torch.Tensor) for a in args):
        return torch
    return np if any(isinstance(a, np.ndarray | np.generic) for a in args) else None


def _tensors(torch: Any, *args: Any) -> list[Any]:
    """Converts numbers to tensors of the dtype of the others, for functions that accept tensors only."""
    like = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype != torch.bool)
    return [a if isinstance(a, torch.Tensor) else torch.tensor(a, dtype=like.dtype, device=like.device) for a in args]


def _unary(op: str, of_array: str, of_number: Callable[[float], float]) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        trace = _traced((x,))
        if trace:
            return _operate(trace, op, x)
        module = _module((x,))
        return getattr(module, of_array)(x) if module else of_number(x)

    return function


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


_sqrt = _unary("sqrt", "sqrt", lambda x: math.sqrt(x) if x >= 0 else math.nan)
_exp = _unary("exp", "exp", lambda x: math.exp(x) if x < 709.7 else math.inf)
_log_of = _unary("log", "log", _log)
_sign = _unary("sign", "sign", lambda x: 1.0 if x > 0 else -1.0 if x < 0 else x)


def sqrt(x: Any) -> Any:
    """The square root; NaN below zero."""
    return _sqrt(x)


def exp(x: Any) -> Any:
    """e to the power of x, within a few units in the last place, with the same bits on every machine."""
    return _exp(x)


def log(x: Any) -> Any:
    """The natural logarithm, within a few units in the last place, with the same bits on every machine."""
    return _log_of(x)


def sign(x: Any) -> Any:
    """The sign: -1, 0 or 1; NaN for NaN."""
    return _sign(x)


def _two(op: str, a: Any, b: Any) -> Any:
    trace = _traced((a, b))
    if trace:
        return _operate(trace, op, a, b)
    module = _module((a, b))
    if module is None:
        if a != a or b != b:
            return math.nan
        return max(a, b) if op == "maximum" else min(a, b)
    return getattr(module, op)(*(_tensors(module, a, b) if module is not np else (a, b)))


def maximum(a: Any, b: Any) -> Any:
    """The larger of two values; NaN if either is NaN."""
    return _two("maximum", a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two values; NaN if either is NaN."""
    return _two("minimum", a, b)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c with a single rounding. The reference and the fallback round twice."""
    trace = _traced((a, b, c))
    return _operate(trace, "fma", a, b, c) if trace else a * b + c


def lerp(a: Any, b: Any, w: Any) -> Any:
    """Linear interpolation a + w (b - a), computed from the nearer end, so that w = 1 gives b exactly."""
    trace = _traced((a, b, w))
    if trace:
        return _operate(trace, "lerp", a, b, w)
    return where(w < 0.5, a + w * (b - a), b - (b - a) * (1 - w))


def where(condition: Any, a: Any, b: Any) -> Any:
    """Elementwise choice: a where the condition holds, else b. A condition that depends on options and ``t`` only is
    evaluated once per step, and the other branch is not computed."""
    if isinstance(condition, bool | np.bool_):
        return a if condition else b
    trace = _traced((condition, a, b))
    if trace:
        if not isinstance(condition, Symbol) or not condition.condition:
            fail("where expects a condition, such as g > 0")
        if condition.trace is not trace:
            trace.lift(condition)
        a, b = trace.lift(a), trace.lift(b)
        if a.condition or b.condition:
            fail("where chooses between numbers: use & and | for conditions")
        return trace.symbol("where", (condition, a, b))
    module = _module((condition, a, b))
    if module is None:
        return a if condition else b
    return module.where(condition, *(_tensors(module, a, b) if module is not np and _module((a, b)) else (a, b)))


# --- reductions over a tensor ---


def _reduced(op: str, x: Any) -> Any:
    """A symbol for a sum over all elements of the tensor."""
    trace: Trace = x.trace
    if x.condition:
        x = where(x, 1.0, 0.0)
    if not x.element:
        fail("a sum over a tensor is one of elements: of numbers it is not defined")
    return trace.symbol(op, (x,), element=False)


def tensor_sum(x: Any) -> Any:
    """The sum of x over all elements of the tensor, in float64; 0 for an empty tensor."""
    if isinstance(x, Symbol):
        return _reduced("tensor_sum", x)
    return x.sum()


def tensor_norm(x: Any) -> Any:
    """The Euclidean norm of x over all elements of the tensor, in float64; 0 for an empty tensor."""
    if isinstance(x, Symbol):
        return sqrt(_reduced("tensor_square_sum", x))
    return sqrt((x * x).sum())


def tensor_mean(x: Any) -> Any:
    """The mean of x over all elements of the tensor, in float64; NaN for an empty tensor. x may be a condition."""
    if isinstance(x, Symbol):
        return _reduced("tensor_sum", x) / x.trace.symbol("length", name="length")
    module = _module((x,))
    return x.mean() if module is np else x.to(module.float64).mean().to(module.get_default_dtype())
