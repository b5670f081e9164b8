"""Lowers a traced rule to a program for the core. The program contains numbers, which are computed once per step, and
instructions, each of which combines several operations in one loop over a tile. cpp/cpu/program.h documents the format.

Combining operations does not change results: no operation is reordered, and factors of 1 and -1 are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from .. import _core
from ._symbols import RuleError, Symbol

__all__ = ["Program", "lower", "spelled", "sums_of"]

NumberTuple = tuple[str, int, int, int, float]

_codes = cache(_core.instructions)
_MIRRORED = {"lt": "gt", "le": "ge", "eq": "eq", "ne": "ne"}
_REDUCTIONS = ("tensor_sum", "tensor_square_sum")
_ONE = 0  # index of the constant 1


@dataclass
class _Operand:
    """A vector times a constant, or a constant. A constant is a sign times at most one number."""

    vector: Symbol | None
    number: Symbol | None = None
    sign: int = 1
    root: bool = False  # take the square root of the vector times the constant

    @property
    def constant(self) -> bool:
        return self.vector is None


@dataclass
class _Step:
    """An instruction before register allocation."""

    name: str
    result: Symbol
    operands: list[_Operand]
    scale: _Operand = field(default_factory=lambda: _Operand(None))
    to: int = -1
    source: list[int] = field(default_factory=list)


@dataclass
class Program:
    """The arguments of :func:`_core.add_program`, and the program as text."""

    numbers: list[NumberTuple]
    carry: list[NumberTuple]
    conditions: list[int]
    passes: list[list[bool]]
    """For each pass before the update: for each of its sums, whether it is a sum of squares."""
    variants: list[Any]
    text: str

    def key(self) -> Any:
        """A key that is equal for equal programs."""
        return repr((self.numbers, self.carry, self.conditions, self.passes, self.variants))


class _Numbers:
    """The numbers of a program; each is computed from earlier ones."""

    def __init__(self, given: dict[int, int], begin: int) -> None:
        self.index = dict(given)  # id of a symbol -> index of its number
        self.list: list[NumberTuple] = []
        self.begin = begin

    def place(self, symbol: Symbol) -> int:
        found = self.index.get(id(symbol))
        if found is not None:
            return found
        if symbol.op == "carried":
            raise RuleError(
                f"{symbol.name}: a carried scalar is used beside its new value: compute with the new value alone"
            )
        a, b, c = [*(self.place(x) for x in symbol.args), 0, 0, 0][:3]
        found = self.begin + len(self.list)
        if found >= _core.MAX_NUMBERS:
            raise RuleError(f"a rule computes at most {_core.MAX_NUMBERS} numbers from its options")
        self.list.append((symbol.op, a, b, c, symbol.value))
        self.index[id(symbol)] = found
        return found


def lower(
    outputs: Sequence[tuple[int, Symbol]],
    inputs: dict[int, int],
    given: dict[int, int],
    begin: int,
    carried: tuple[Symbol, Symbol] | None,
    names: Sequence[str],
) -> Program:
    """Lowers one trace to a program.

    Args:
        outputs: (register, new value) of the parameter and of each state.
        inputs: id of a symbol -> register, for the parameter, the gradient and each state.
        given: id of a symbol -> index of its number, for options, the step and the carried scalar.
        begin: the number of these indices.
        carried: the carried scalar before and after the step.
        names: the names of the input registers.
    """
    carry: list[NumberTuple] = []
    if carried is not None:
        old, new = carried
        before = _Numbers(given, begin)
        if before.place(new) < begin:  # the new value is an input number: copy it by negating twice
            before.list = [("neg", before.place(new), 0, 0, 0.0), ("neg", begin, 0, 0, 0.0)]
        carry = before.list
        given = {**{k: v for k, v in given.items() if k != id(old)}, id(new): given[id(old)]}
    sums = sums_of([value for _, value in outputs])
    if len(sums) > _core.MAX_SUMS:
        raise RuleError(f"a rule has at most {_core.MAX_SUMS} sums over a tensor")
    given = {**given, **{id(s): begin - _core.MAX_SUMS + i for i, s in enumerate(sums)}}
    stages = [_stage(s) for s in sums]
    passes = [[s for s, stage in zip(sums, stages, strict=True) if stage == k] for k in sorted(set(stages))]
    numbers = _Numbers(given, begin)
    conditions = list(_conditions([*(value for _, value in outputs), *(s.args[0] for s in sums)]))
    if len(conditions) > _core.MAX_CONDITIONS:
        raise RuleError(f"where: a rule has at most {_core.MAX_CONDITIONS} different conditions on its options")
    chosen = [numbers.place(c) for c in conditions]
    variants, texts = [], []
    for sums_of_pass in [*passes, None]:
        for truths in product((False, True), repeat=len(conditions)):
            truth = dict(zip(map(id, conditions), truths[::-1], strict=True))
            if sums_of_pass is None:
                code = _Code(outputs, [], inputs, numbers, truth, names)
            else:
                code = _Code([], [s.args[0] for s in sums_of_pass], inputs, numbers, truth, names)
            variants.append(code.tuple())
            if not any(truths):
                texts.append(code.text(sums_of_pass or []))
    squares = [[s.op == "tensor_square_sum" for s in sums_of_pass] for sums_of_pass in passes]
    return Program(numbers.list, carry, chosen, squares, variants, "\n".join(texts))


def sums_of(values: Sequence[Symbol]) -> list[Symbol]:
    """The sums over a tensor on which the values depend, in a valid order of computation."""
    found: dict[int, Symbol] = {}
    seen: set[int] = set()
    stack = list(values)
    while stack:
        s = stack.pop()
        if id(s) not in seen:
            seen.add(id(s))
            stack += s.args
            if s.op in _REDUCTIONS:
                found[id(s)] = s
    return sorted(found.values(), key=lambda s: (_stage(s), s.number))


def _stage(s: Symbol) -> int:
    """The number of passes over the tensor that this value requires."""
    stages: dict[int, int] = {}
    for x in s.trace.symbols[: s.number + 1]:  # arguments come first
        below = max((stages[id(a)] for a in x.args), default=0)
        stages[id(x)] = below + (x.op in _REDUCTIONS)
    return stages[id(s)]


def _conditions(values: Sequence[Symbol]) -> Iterator[Symbol]:
    """The conditions on numbers only that select elements in ``where``."""
    seen: set[int] = set()
    stack = list(values)[::-1]
    while stack:
        s = stack.pop()
        if id(s) in seen:
            continue
        seen.add(id(s))
        if s.element:
            if s.op == "where" and not s.args[0].element and id(s.args[0]) not in seen:
                seen.add(id(s.args[0]))
                yield s.args[0]
            stack += [a for a in s.args if a.element]


class _Code:
    """The instructions for given values of the conditions."""

    def __init__(
        self,
        outputs: Sequence[tuple[int, Symbol]],
        wanted: Sequence[Symbol],
        inputs: dict[int, int],
        numbers: _Numbers,
        truth: dict[int, bool],
        names: Sequence[str],
    ) -> None:
        self.inputs, self.numbers, self.truth, self.names = inputs, numbers, truth, names
        self.known: dict[int, Symbol] = {}
        self.outputs = [(r, _element(self.resolved(v))) for r, v in outputs]
        self.wanted = [_element(self.resolved(v)) for v in wanted]
        self.uses = self._count_uses()
        self.constants: list[tuple[int, int]] = [(-1, 1)]
        self.symbols: list[Symbol | None] = [None]  # the constants' symbols, for the text
        self.done: dict[int, _Step] = {}
        self.steps: list[_Step] = []
        for value in (*(v for _, v in self.outputs), *self.wanted):
            self._need(value)
        self.steps.sort(key=lambda step: -1 if step.result.op == "fill" else step.result.number)
        self._copies()
        self._allocate()

    def resolved(self, s: Symbol) -> Symbol:
        """The symbol after substitution of the conditions; a number if no element remains in it."""
        found = self.known.get(id(s), s) if s.element else s
        if not s.element or id(s) in self.known:
            return found
        if s.op == "where" and id(s.args[0]) in self.truth:
            found = self.resolved(s.args[1] if self.truth[id(s.args[0])] else s.args[2])
        elif s.args and s.op not in ("fill", "copy"):
            args = tuple(self.resolved(a) for a in s.args)
            if not any(a.element for a in args):
                found = s.trace.symbol(s.op, args, condition=s.condition)
        self.known[id(s)] = found
        return found

    def args(self, s: Symbol) -> list[Symbol]:
        return [self.resolved(a) for a in s.args]

    def _count_uses(self) -> dict[int, int]:
        uses: dict[int, int] = {}
        seen: set[int] = set()
        stack = [*(v for _, v in self.outputs), *self.wanted]
        for v in stack:
            uses[id(v)] = uses.get(id(v), 0) + 1
        while stack:
            s = stack.pop()
            if id(s) in seen or not s.element:
                continue
            seen.add(id(s))
            for a in self.args(s):
                uses[id(a)] = uses.get(id(a), 0) + 1
                stack.append(a)
        return uses

    def single(self, s: Symbol) -> bool:
        """Whether the symbol is used once and is not an input, so that it need not be stored."""
        return self.uses[id(s)] == 1 and id(s) not in self.inputs

    # --- instruction selection ---

    def _need(self, s: Symbol) -> None:
        """Emits the instructions that compute an element, unless they exist."""
        if id(s) in self.inputs or id(s) in self.done:
            return
        step = self._instruction(s)
        self.done[id(s)] = step
        for o in step.operands:
            if o.vector is not None:
                self._need(o.vector)
        self.steps.append(step)

    def scaled(self, s: Symbol) -> tuple[Symbol, _Operand]:
        """Splits an element into a vector and the sign and factor that an operand can hold."""
        sign, number = 1, None
        while True:
            args = self.args(s)
            if s.op == "neg" and args[0].element:
                sign, s = -sign, args[0]
            elif s.op == "mul" and number is None and (args[0].element != args[1].element):
                number, s = (args[1], args[0]) if args[0].element else (args[0], args[1])
                if number.op == "neg":
                    sign, number = -sign, self.resolved(number.args[0])
            else:
                return s, _Operand(s, number, sign)

    def operand(self, s: Symbol) -> _Operand:
        if not s.element:
            return _Operand(None, s)
        return self.scaled(s)[1]

    def rooted(self, s: Symbol) -> _Operand:
        """The operand, including a square root if the symbol is one."""
        if s.element and s.op == "sqrt" and self.single(s):
            inner = self.operand(self.args(s)[0])
            return _Operand(inner.vector, inner.number, inner.sign, root=True)
        return self.operand(s)

    def vector(self, s: Symbol) -> _Operand:
        """The symbol as a vector operand."""
        return self.operand(_element(s))

    def _instruction(self, s: Symbol) -> _Step:
        args = self.args(s)
        if self._factor(s):
            inner, scale = self.scaled(s)
            factor = _Operand(None, scale.number, scale.sign)
            if self._alone(next(a for a in args if a.element), inner):
                if inner.op in ("fma", "lerp", "maximum", "minimum", "abs", "sign", "exp", "log"):
                    step = self._instruction(inner)
                    return _Step(step.name, s, step.operands, factor)
                if inner.op in ("add", "sub", "mul", "div", "sqrt"):
                    name, operands = self._inner(inner)
                    return _Step(name, s, [_Operand(None), *operands], factor)
            return _Step("same", s, [_Operand(None), scale])
        if s.op in ("add", "sub", "mul", "div", "sqrt"):
            return self._pair(s)
        if s.op == "fma":
            return self._fma(s, args)
        if s.op == "lerp":
            a, b, w = self.vector(args[0]), self.vector(args[1]), self.operand(args[2])
            return _Step("lerp k" if w.constant else "lerp v", s, [a, b, w])
        if s.op in ("maximum", "minimum"):
            a, b = self.operand(args[0]), self.operand(args[1])
            return _Step(f"{s.op} {_kinds(a, b)}", s, [a, b])
        if s.op in ("abs", "sign", "exp", "log"):
            return _Step(s.op, s, [self.operand(args[0])])
        if s.op == "where":
            return self._select(s, args)
        if s.op == "fill":  # x < x is always false
            any_input = _Operand(_input(s, self.inputs))
            return _Step("lt vkk", s, [any_input, any_input, self.operand(args[0]), self.operand(args[0])])
        if s.op in ("and", "or", "not", "lt", "le", "eq", "ne"):
            return self._mask(s, args)
        raise AssertionError(s.op)

    def _inner(self, s: Symbol) -> tuple[str, list[_Operand]]:
        """The inner operation of a pair, including a square root of its result or of its first operand."""
        tail = ""
        if s.op == "sqrt":
            inside = self.args(s)[0]
            if inside.op not in ("add", "sub", "mul", "div") or not self.single(inside) or self._factor(inside):
                return "same root of first", [replace(self.operand(inside), root=True)]
            s, tail = inside, " root of result"
        if self._factor(s):
            return "same" + tail, [self.operand(s)]
        a, b = self.args(s)
        x, y = self.operand(a), self.operand(b)
        if s.op == "sub":
            y = replace(y, sign=-y.sign)
        if not tail:
            if self.rooted(a).root:
                x = self.rooted(a)
            elif s.op in ("add", "mul") and self.rooted(b).root:
                x, y = self.rooted(b), x
        if s.op != "div" and x.constant:
            x, y = y, x
        name = {"sub": "add"}.get(s.op, s.op)
        return f"{name} {_kinds(x, y)}" + (" root of first" if x.root else tail), [x, y]

    def _factor(self, s: Symbol) -> bool:
        """Whether the symbol is a vector times a constant."""
        args = self.args(s)
        return s.op == "neg" or (s.op == "mul" and args[0].element != args[1].element)

    def _compound(self, s: Symbol) -> tuple[Symbol, _Operand] | None:
        """The operand as an inner operation with its factor; None if its value must be stored."""
        if not s.element:
            return None
        inner, scale = self.scaled(s)
        fits = inner.op in ("add", "sub", "div", "sqrt") or (inner.op == "mul" and not self._factor(inner))
        return (inner, scale) if fits and self._alone(s, inner) else None

    def _alone(self, outer: Symbol, inner: Symbol) -> bool:
        """Whether ``outer``, ``inner`` and the factors and signs between them have no other use."""
        while self.single(outer):
            if outer is inner:
                return True
            outer = next(a for a in self.args(outer) if a.element)
        return False

    def _weight(self, found: tuple[Symbol, _Operand] | None) -> int:
        """The number of operations that a pair combines if this is its inner one."""
        if found is None:
            return -1
        name, operands = self._inner(found[0])
        return 1 + ("root" in name) + sum(o.number is not None for o in operands) + (found[1].number is not None)

    def _pair(self, s: Symbol) -> _Step:
        args = self.args(s)
        if s.op == "sqrt":
            name, operands = self._inner(s)
            return _Step(name, s, [_Operand(None), *operands])
        a, b = args
        left, right = self._compound(a), self._compound(b)
        if left is None and right is None:
            name, operands = self._inner(s)
            return _Step(name, s, [_Operand(None), *operands])
        on_right = self._weight(right) >= self._weight(left)
        inner, scale = (right if on_right else left) or (a, _Operand(None))
        other = self.operand(a if on_right else b)
        sign = scale.sign
        if s.op == "sub":
            if on_right:
                sign = -sign
            else:
                other = _Operand(other.vector, other.number, -other.sign)
        outer = {"add": "plus", "sub": "plus", "mul": "times", "div": "over" if on_right else "by"}[s.op]
        name, operands = self._inner(inner)
        return _Step(f"{name} {outer} {_kinds(other)}", s, [other, *operands], _Operand(None, scale.number, sign))

    def _fma(self, s: Symbol, args: list[Symbol]) -> _Step:
        a, b, c = args
        x, y = self.rooted(a), self.rooted(b)
        if x.constant or (y.root and not x.root):
            a, b, x = b, a, y
        if x.constant:
            x = self.vector(a)
        y, z = self.operand(b), self.operand(c)
        return _Step(f"fma{' root of first' * x.root} {_kinds(y, z)}", s, [x, y, z])

    def _select(self, s: Symbol, args: list[Symbol]) -> _Step:
        condition, yes, no = args[0], self.operand(args[1]), self.operand(args[2])
        if condition.op in _MIRRORED and condition.element:
            name = condition.op
            x, y = (self.operand(a) for a in self.args(condition))
            if x.constant:
                name, x, y = _MIRRORED[name], y, x
        else:
            name, x, y = "ne", self.operand(condition), _Operand(None, condition.trace.symbol("literal"))
        return _Step(f"{name} {_kinds(y, yes, no)}", s, [x, y, yes, no])

    def _mask(self, s: Symbol, args: list[Symbol]) -> _Step:
        """A condition as the number 1 or 0."""
        one, zero = (s.trace.symbol("literal", value=v) for v in (1.0, 0.0))
        if s.op == "not":
            return _Step("add vk", s, [_Operand(None), _Operand(args[0], None, -1), _Operand(None, one)])
        if s.op in ("and", "or"):
            a, b = self.operand(args[0]), self.operand(args[1])
            name = "minimum" if s.op == "and" else "maximum"
            return _Step(f"{name} {_kinds(a, b)}", s, [a, b])
        name = s.op
        x, y = self.operand(args[0]), self.operand(args[1])
        if x.constant:
            name, x, y = _MIRRORED[name], y, x
        return _Step(f"{name} {_kinds(y)}kk", s, [x, y, _Operand(None, one), _Operand(None, zero)])

    # --- register allocation ---

    def _copies(self) -> None:
        """Adds a copy for every output that is an input, or that has been an output before."""
        taken: set[int] = set()
        for i, (register, value) in enumerate(self.outputs):
            same = self.inputs.get(id(value)) == register
            if same or (id(value) not in self.inputs and id(value) not in taken):
                taken.add(id(value))
                continue
            copy = value.trace.symbol("copy", (value,), name=str(register), element=True)
            self.outputs[i] = (register, copy)
            self.steps.append(_Step("same", copy, [_Operand(None), _Operand(value)]))

    def _allocate(self) -> None:
        n_inputs = len(self.inputs)
        home = {id(v): r for r, v in self.outputs}
        kept = {*home, *map(id, self.wanted)}
        last: dict[int, int] = {}  # id of a value -> index of the last step that reads it
        for i, step in enumerate(self.steps):
            for o in step.operands:
                if o.vector is not None:
                    last[id(o.vector)] = i
        ends = {r: last.get(k, -1) for k, r in self.inputs.items()}  # input register -> last step that reads it
        at = dict(self.inputs)
        free: list[int] = []
        self.n_registers = n_inputs
        moves: list[tuple[int, int]] = []
        for i, step in enumerate(self.steps):
            step.source = [at[id(o.vector)] if o.vector is not None else 0 for o in step.operands]
            for o in step.operands:  # a register whose last reader is this step may hold its result
                if o.vector is not None and last[id(o.vector)] == i:
                    register = at[id(o.vector)]
                    if register >= n_inputs and register not in free and id(o.vector) not in kept:
                        free.append(register)
            want = home.get(id(step.result))
            if want is not None and ends.get(want, -1) <= i:
                step.to = want
            else:
                if free:
                    step.to = free.pop()
                else:
                    step.to = self.n_registers
                    self.n_registers += 1
                if want is not None:
                    moves.append((want, step.to))
            at[id(step.result)] = step.to
        self.results = [at[id(v)] for v in self.wanted]
        for want, register in moves:
            copy = _Step("same", self.steps[-1].result, [_Operand(None), _Operand(self.steps[-1].result)])
            copy.to, copy.source = want, [0, register]
            self.steps.append(copy)

    # --- results ---

    def _constant(self, o: _Operand) -> int:
        if o.number is None and o.sign == 1:
            return _ONE
        if o.number is None:
            trace = [*(v for _, v in self.outputs), *self.wanted][0].trace
            key = (self.numbers.place(trace.symbol("literal", value=1.0)), o.sign)
        else:
            key = (self.numbers.place(o.number), o.sign)
        if key not in self.constants:
            if len(self.constants) == _core.MAX_CONSTANTS:
                raise RuleError(f"a rule uses at most {_core.MAX_CONSTANTS - 1} different numbers on elements")
            self.constants.append(key)
            self.symbols.append(o.number)
        return self.constants.index(key)

    def tuple(self) -> Any:
        """The arguments for :func:`_core.add_program`."""
        if self.n_registers > _core.MAX_REGISTERS or len(self.steps) > _core.MAX_INSTRUCTIONS:
            raise RuleError("the rule is too long for one program")
        rows = []
        for step in self.steps:
            places = [self._constant(o) for o in step.operands] + [0] * (4 - len(step.operands))
            source = step.source + [step.source[-1]] * (4 - len(step.source))
            rows.append((_codes()[step.name], step.to, source, [*places, self._constant(step.scale)]))
        return rows, list(self.constants), self.n_registers, self.results

    def text(self, sums: Sequence[Symbol]) -> str:
        """The instructions, one per line, and the sums of the pass."""
        lines = [self._line(step) for step in self.steps]
        for s, register in zip(sums, self.results, strict=True):
            name = self._name(register)
            lines.append(
                f"{spelled(s)} = sum({name} * {name})" if s.op == "tensor_square_sum" else f"{spelled(s)} = sum({name})"
            )
        return "\n".join(lines)

    def _name(self, register: int) -> str:
        return self.names[register] if register < len(self.names) else f"r{register - len(self.names) + 1}"

    def _line(self, step: _Step) -> str:
        def written(o: _Operand, register: int) -> str:
            number = "" if o.number is None else spelled(o.number)
            if o.constant:
                return f"{'-' * (o.sign < 0)}{number or '1'}"
            text = f"{'-' * (o.sign < 0)}{number}{' ' * bool(number)}{self._name(register)}"
            return f"sqrt({text})" if o.root else text

        operands = [written(o, r) for o, r in zip(step.operands, step.source, strict=True)]
        factor = written(step.scale, 0) if step.scale.number is not None or step.scale.sign < 0 else ""
        return f"{self._name(step.to)} = {_spelled_step(step.name, operands, factor)}"


def _element(s: Symbol) -> Symbol:
    """Converts a number to a vector; returns a vector unchanged."""
    return s if s.element else s.trace.symbol("fill", (s,), element=True)


def _kinds(*operands: _Operand) -> str:
    return "".join("k" if o.constant else "v" for o in operands)


def _input(s: Symbol, inputs: dict[int, int]) -> Symbol:
    return next(x for x in s.trace.symbols if inputs.get(id(x)) == 0)


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}


def spelled(s: Symbol) -> str:
    """The formula of a number."""
    if s.op == "literal":
        return f"{s.value:g}"
    if s.op in _REDUCTIONS:
        return f"s{1 + [id(x) for x in s.trace.symbols if x.op in _REDUCTIONS].index(id(s))}"
    if not s.args:
        return s.name
    texts = [spelled(a) for a in s.args]
    if s.op in _SIGNS:
        return f"({texts[0]} {_SIGNS[s.op]} {texts[1]})"
    return f"-{texts[0]}" if s.op == "neg" else f"{s.op}({', '.join(texts)})"


def _spelled_step(name: str, operands: list[str], factor: str) -> str:
    words = name.split()
    if words[0] in ("fma", "lerp", "maximum", "minimum", "abs", "sign", "exp", "log"):
        text = f"{words[0]}({', '.join(operands)})"
        return f"{factor} {text}" if factor else text
    if words[0] in ("lt", "le", "gt", "ge", "eq", "ne"):
        sign = {**_SIGNS, "gt": ">", "ge": ">="}[words[0]]
        return f"where({operands[0]} {sign} {operands[1]}, {operands[2]}, {operands[3]})"
    x, y, *rest = operands
    text = y if words[0] == "same" else f"{y} {_SIGNS[words[0]]} {rest[0]}"
    if "root of result" in name:
        text = f"sqrt({text})"
    elif "root of first" in name and words[0] == "same":
        text = y
    outer = next((w for w in words if w in ("plus", "times", "over", "by")), None)
    if (factor or outer) and " " in text:
        text = f"({text})"
    text = f"{factor} {text}" if factor else text
    if outer is None:
        return text
    return {"plus": f"{x} + {text}", "times": f"{x} * {text}", "over": f"{x} / ({text})", "by": f"{text} / {x}"}[outer]
