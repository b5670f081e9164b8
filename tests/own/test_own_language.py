"""What a rule's function may do, and what it is told when it does something else."""

import copy
import importlib
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.bench.own import OwnAdam, OwnNAdam
from fusedopt.rule import (
    OwnRule,
    RuleError,
    exp,
    fma,
    lerp,
    log,
    maximum,
    minimum,
    option,
    rule,
    scalar,
    sign,
    sqrt,
    state,
    where,
)
from helpers import engine


def defined(body: Callable[..., Any], **options: Any) -> OwnRule:
    return rule(**{"lr": 0.1, **options})(body)


def one_step(made: OwnRule, p: Any, g: Any, dtype: Any = np.float64, step: int = 1, **options: Any) -> Any:
    """The parameter after one step of the in-place function."""
    p, g = np.array(p, dtype), np.array(g, dtype)
    states = [np.zeros_like(p) for _ in made._signature.states]
    timed = {"step": step} if made.clock else {}
    made.update_(p, g, *states, **timed, **options)
    return p


X = np.array([-3.0, -1.5, -0.0, 0.0, 0.25, 1.0, 2.0, np.inf, -np.inf, np.nan])
Y = np.array([2.0, -1.5, 0.0, -1.0, 0.5, 3.0, -2.0, np.inf, 1.0, 1.0])

FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "arithmetic": lambda p, g, lr: (p + g) * 2 - g / 3 + (1 - p) * lr - -g,
    "power": lambda p, g, lr: p**3 + g**2 + abs(p) ** 0.5,
    "roots": lambda p, g, lr: sqrt(abs(p) + 1) / sqrt(abs(g)) + 2 * sqrt(p * p),
    "root of a sum": lambda p, g, lr: lr * sqrt(p * p + 3) - sqrt(g * g),
    "subtracted roots": lambda p, g, lr: p - sqrt(g * g) - 3 * sqrt(p * p),
    "divided both ways": lambda p, g, lr: (p - g) / (p + 3) + (2 / (p + 5)) / g + (g / 3) / 7 - (p * g) / 5,
    "bounds": lambda p, g, lr: minimum(maximum(p, g), 1.5) + maximum(-1.0, g) - minimum(2 * p, -g),
    "signs": lambda p, g, lr: sign(p) * abs(g) - abs(-2 * p),
    "fma of constants": lambda p, g, lr: fma(lr, 2.0, p) + fma(3.0, p, g) + fma(p, g, 1.0) - 2 * fma(p, p, p),
    "lerp": lambda p, g, lr: lerp(p, g, 0.25) + lerp(2 * p, 1.0, 0.75) + lerp(p, -g, p),
    "comparisons": lambda p, g, lr: where(p < g, 1.0, p) + where(p >= 0, g, -g) * where(p == g, 2.0, 3.0),
    "conditions": lambda p, g, lr: where((p > 0) & ~(g > 1) | (p != p), p, -3.0) + (g > 0) * p,
    "conditions of both kinds": lambda p, g, lr: where((p > 0) & (lr > 0.05), p, g) - where(lr > 1, p, 2 * g),
    "a condition that is used twice": lambda p, g, lr: where((m := p * g > 0), p, g) + where(m, 1.0, 2.0),
    "exponential": lambda p, g, lr: exp(-abs(p)) + log(abs(g) + 1) * exp(lr),
    "a constant": lambda p, g, lr: 3.0,
    "the gradient": lambda p, g, lr: g,
    "shared factors": lambda p, g, lr: (u := lr * p) + (v := -g) * u - v / (u * u + 1),
    "a long sum": lambda p, g, lr: sum((p - k * g) * (k + p) for k in range(9)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_have_the_values_of_numpy(name: str) -> None:
    body = FUNCTIONS[name]

    def Made(p: Any, g: Any, *, lr: Any) -> Any:
        return body(p, g, lr)

    made = defined(Made)
    want = np.broadcast_to(np.asarray(body(X.copy(), Y.copy(), np.float64(0.1))), X.shape)
    for dtype, tolerance in ((np.float64, 1e-14), (np.float32, 2e-6)):
        seen = []
        for isa in fusedopt.isas():
            with engine(isa, 1):
                seen.append(one_step(made, X, Y, dtype, lr=0.1))
            np.testing.assert_allclose(seen[-1].astype(np.float64), want, tolerance, tolerance)
            assert np.array_equal(seen[0], seen[-1], equal_nan=True)
    p = X.copy()
    made.reference(p, Y, {}, 1, lr=0.1)
    np.testing.assert_allclose(p, want, 1e-15)


def test_numbers_have_the_values_of_python() -> None:
    bodies: list[tuple[Callable[[Any, Any, Any], Any], Callable[[float, float], float]]] = [
        (lambda t, a, b: a**t + t**b, lambda a, b: a**7 + 7**b),
        (lambda t, a, b: a ** (-t) + 2**-a, lambda a, b: a**-7 + 2**-a),
        (lambda t, a, b: exp(a) + log(b) + sqrt(b) - abs(-a), lambda a, b: math.exp(a) + math.log(b) + b**0.5 - a),
        (lambda t, a, b: maximum(a, b) * minimum(t, 3) + sign(-a), lambda a, b: max(a, b) * 3 - 1),
        (lambda t, a, b: where((t > 6) & (a < b), a, -a) / (t - 3), lambda a, b: a / 4),
        (
            lambda t, a, b: where((t == 6) | (a != a), 1.0, fma(a, b, lerp(a, b, 0.25))),
            lambda a, b: a * b + a + (b - a) / 4,
        ),
    ]
    for traced, plain in bodies:
        made = rule(lr=0.3, b=1.7)(with_number(traced))
        np.testing.assert_allclose(one_step(made, [0.0], [0.0], step=7, lr=0.3), plain(0.3, 1.7), 1e-12)


def with_number(traced: Any) -> Any:
    def Made(p: Any, g: Any, *, t: Any, lr: Any, b: Any) -> Any:
        return p + traced(t, lr, b)

    return Made


def test_a_state_exists_only_in_the_variants_that_use_it() -> None:
    assert OwnAdam.states({"amsgrad": False}) == ("exp_avg", "exp_avg_sq")
    assert OwnAdam.states({"amsgrad": True}) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    with pytest.raises(TypeError, match="max_exp_avg_sq: not used with these options"):
        OwnAdam.update_(np.ones(2), np.ones(2), np.zeros(2), np.zeros(2), step=1, max_exp_avg_sq=np.zeros(2))


def test_states_start_as_declared() -> None:
    @rule(lr=0.1, first=0.25)
    def Made(
        p: Any, g: Any, a: Any = state("param"), b: Any = state(2.0), c: Any = state("first"), *, lr: Any, first: Any
    ) -> Any:
        return p - lr * g, a + g, b * 2, c * 2

    w = np.array([1.0, 2.0], np.float32)
    for options in ({}, {"state_dtype": "int8"}):
        opt = Made.numpy(w.copy(), **options)
        state_dict = opt.state[0]
        if options:
            codes, scale = state_dict["a_codes"].astype(np.float32), state_dict["a_scale"]
            np.testing.assert_allclose(codes**2 / 127**2 * scale, w, 1e-2)
            assert state_dict["c_scale"][0] == 0.25
        else:
            np.testing.assert_array_equal(state_dict["a"], w)
            np.testing.assert_array_equal(state_dict["b"], [2, 2])
            np.testing.assert_array_equal(state_dict["c"], [0.25, 0.25])
        opt.step(np.ones(2, np.float32))
    assert Made.numpy(w, first=0.5).state[0]["c"][0] == 0.5


def test_states_may_change_places() -> None:
    @rule(lr=0.1)
    def Made(p: Any, g: Any, a: Any = state(1.0), b: Any = state(2.0), c: Any = state(3.0), *, lr: Any) -> Any:
        return a, b, p, g

    arrays = [np.full(5, v) for v in (9.0, 7.0, 1.0, 2.0, 3.0)]
    Made.update_(*arrays)
    assert [x[0] for x in arrays] == [1.0, 7.0, 2.0, 9.0, 7.0]


def test_a_carried_scalar_is_kept_in_float64_and_in_checkpoints() -> None:
    w, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = OwnNAdam.numpy(w)
    opt.step(g)
    saved = opt.state_dict()
    assert saved["state.0.mu_product"].dtype == np.float64
    other = OwnNAdam.numpy(w.copy())
    other.load_state_dict(saved)
    opt.step(g)
    other.step(g)
    np.testing.assert_array_equal(*(o.param_groups[0]["params"][0] for o in (opt, other)))


def test_options_are_checked() -> None:
    @rule(lr=0.1, betas=(0.9, 0.99), share=option(0.5, 0, 1, include_high=True), shift=option(-1.0, low=-math.inf))
    def Made(p: Any, g: Any, *, lr: Any, betas: Any, share: Any, shift: Any) -> Any:
        return p - lr * g * share * betas[0] + shift

    for options, error in (
        ({"lr": -1.0}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": (0.9,)}, TypeError),
        ({"share": 1.01}, ValueError),
        ({"shift": "x"}, TypeError),
        ({"unknown": 1.0}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            Made.numpy(np.ones(3), **options)
    Made.numpy(np.ones(3), share=1.0, shift=-5.0, lr=lambda step: 0.1 / (step + 1)).step(np.ones(3))


# ---- errors

BROKEN: dict[str, tuple[Callable[..., Any], str]] = {}


def broken(message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        BROKEN[function.__name__] = (function, message)
        return function

    return note


@broken("the value of a symbol is not known here")
def if_on_a_symbol(p: Any, g: Any, *, lr: Any) -> Any:
    if g > 0:  # here
        return p
    return p - lr * g


@broken("lr is a number and known only when a step is made")
def if_on_an_option(p: Any, g: Any, *, lr: Any) -> Any:
    return p - g if lr else p  # here


@broken("nothing to loop over")
def loop_over_a_symbol(p: Any, g: Any, *, lr: Any) -> Any:
    for x in g:  # here
        p = p - x
    return p


@broken("use the functions of fusedopt.rule, not those of math")
def function_of_math(p: Any, g: Any, *, lr: Any) -> Any:
    return p - math.sqrt(g)  # here


@broken("np.tanh is not an operation of a rule")
def function_of_numpy(p: Any, g: Any, *, lr: Any) -> Any:
    return p - np.tanh(g)  # here


@broken(r"\.mean: a symbol has no methods")
def method(p: Any, g: Any, *, lr: Any) -> Any:
    return p - g.mean()  # here


@broken("unknown operation")
def unknown_operator(p: Any, g: Any, *, lr: Any) -> Any:
    return p // g  # here


@broken("not modified in place")
def in_place(p: Any, g: Any, *, lr: Any) -> Any:
    p -= lr * g  # here
    return p


@broken("to whole powers from 1 to 8")
def odd_power(p: Any, g: Any, *, lr: Any) -> Any:
    return p - g**lr  # here


@broken("where expects a condition")
def where_without_condition(p: Any, g: Any, *, lr: Any) -> Any:
    return where(g, p, g)  # here


@broken("expected a symbol or a number, got list")
def list_among_symbols(p: Any, g: Any, *, lr: Any) -> Any:
    return p + [lr]  # noqa: RUF005  # here


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_told_with_its_line(name: str) -> None:
    function, message = BROKEN[name]
    with pytest.raises(RuleError, match=message) as error:
        defined(function)
    assert f'File "{__file__}", line ' in str(error.value)
    assert str(error.value).rstrip().endswith("# here")
    source = Path(__file__).read_text().splitlines()
    line = int(re.findall(r"line (\d+)", str(error.value))[0])
    assert source[line - 1].strip() in str(error.value)


def _signature_error(source: str, options: str = "lr=0.1") -> str:
    names: dict[str, Any] = {"state": state, "scalar": scalar, "rule": rule, "option": option}
    text = f"@rule({options})\n{source}"
    with pytest.raises(RuleError) as error:
        exec(compile(text, "<test>", "exec"), names)
    assert 'File "<test>", line' in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("def R(p, g, m=state(), *, lr): return p", "lr=0.1", "to return the parameter, m, got 1"),
        ("def R(p, g, m=state(), *, lr): return p, m", "lr=0.1", "m: a state that is neither read nor changed"),
        ("def R(p, g, m=state(), *, lr): return p - m, m", "lr=0.1", "m: a state that never changes"),
        ("def R(p, g, m=state(), *, lr): return p - m, None", "lr=0.1", "m: expected a symbol as its new value"),
        ("def R(p, g, *, lr): return p > g", "lr=0.1", "its new value is a condition"),
        ("def R(p, g, s=scalar(), *, lr): return p, s + g", "lr=0.1", "not on elements"),
        ("def R(p, g, s=scalar(), *, lr): return p, s", "lr=0.1", "s: a scalar that never changes"),
        ("def R(p, g, step=state(), *, lr): return p, g", "lr=0.1", "step: a state cannot have this name"),
        ("def R(p, g, m=0.0, *, lr): return p, g", "lr=0.1", r"m: expected state\(\) or scalar\(\)"),
        ("def R(p, g): return p", "", "a rule has an option lr"),
        ("def R(p, g, *, lr, x): return p", "lr=0.1", "x: a parameter that is no option"),
        ("def R(p, g, *, lr): return p", "lr=0.1, x=1.0", "x: an option that is no keyword-only parameter"),
        ("def R(p, g, *, lr, seed): return p", "lr=0.1, seed=1.0", "seed: an option cannot have this name"),
        ("def R(p, g, *, lr, x): return p", "lr=0.1, x='a'", "x: expected a number, a tuple of numbers"),
        ("def R(p, *, lr): return p", "lr=0.1", "as the first two parameters"),
        ("def R(p, g, m=state('rate'), *, lr): return p, g", "lr=0.1", "the initial value 'rate' is no option"),
        ("def Adam(p, g, *, lr): return p - g", "lr=0.1", "Adam: a built-in rule has this name"),
        ("def R(p, g, a=scalar(), b=scalar(), *, lr): return p, a + 1, b + 1", "lr=0.1", "4 states and one scalar"),
        (f"def R(p, g, *, lr, {', '.join(f'f{i}' for i in range(7))}): return p - g",
         "lr=0.1, " + ", ".join(f"f{i}=True" for i in range(7)), "at most 6 options that are True or False"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_signature_is_told(source: str, options: str, message: str) -> None:
    assert re.search(message, _signature_error(source, options))


def test_limits_are_told_when_the_rule_is_first_used() -> None:
    @rule(lr=0.1)
    def Made(p: Any, g: Any, *, t: Any, lr: Any) -> Any:
        for k in range(6):
            p = p + where(t > k, g, 2 * g)
        return p

    with pytest.raises(RuleError, match=r"at most 4 different conditions(.|\n)*line"):
        Made.numpy(np.ones(3))

    @rule(lr=0.1)
    def Other(p: Any, g: Any, a: Any = scalar(), *, lr: Any) -> Any:
        return p - lr * g * a, a + 1

    with pytest.raises(RuleError, match="a carried scalar is used beside its new value"):
        Other.numpy(np.ones(3))


# ---- objects

MODULE = """
from fusedopt.rule import rule, state, lerp
@rule(lr={lr})
def Kept(p, g, m=state(), *, lr):
    m = lerp(m, g, 0.1)
    return p - lr * m, m
"""


def test_rules_and_their_optimizers_are_pickled_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_rules.py").write_text(MODULE.format(lr=0.1))
    module = importlib.import_module("kept_rules")
    try:
        assert pickle.loads(pickle.dumps(module.Kept)) is module.Kept
        assert copy.deepcopy(module.Kept) is module.Kept
        opt = module.Kept.numpy(np.ones(3, np.float32))
        opt.step(np.ones(3, np.float32))
        for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
            assert type(other) is module.Kept.numpy
            other.step(np.ones(3, np.float32))
            assert other.state[0]["step"] == 2
        assert opt.state[0]["step"] == 1
        old = module.Kept
        (tmp_path / "kept_rules.py").write_text(MODULE.format(lr=0.25) + "\n")
        importlib.invalidate_caches()
        exec(compile(MODULE.format(lr=0.25), "<cell>", "exec"), module.__dict__)  # as a notebook's cell, run again
        assert module.Kept is not old
        assert module.Kept.numpy(np.ones(1)).param_groups[0]["lr"] == 0.25
        assert opt.param_groups[0]["lr"] == 0.1
        opt.step(np.ones(3, np.float32))
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(old)
    finally:
        del sys.modules["kept_rules"]


def test_the_same_program_is_registered_once() -> None:
    def made() -> OwnRule:
        @rule(lr=0.1)
        def Again(p: Any, g: Any, *, lr: Any) -> Any:
            return p - lr * g * 3

        return Again

    assert made().kernel({}).index == made().kernel({}).index


def test_repr_shows_the_program() -> None:
    text = repr(OwnAdam)
    assert text.startswith("OwnAdam(lr=0.001, betas=(0.9, 0.999)")
    lines = text.split("\n  decoupled_weight_decay:")[0].splitlines()
    assert len(lines) == 5  # four instructions
    assert "    exp_avg = lerp(exp_avg, g, (1 - betas[0]))" in lines
    assert "mu_product = (mu_product * " in repr(OwnNAdam)


def test_int8_states_have_the_code_that_the_rule_declares() -> None:
    """Though another rule's state of this name has another one."""

    @rule(lr=0.1)
    def Made(p: Any, g: Any, exp_avg: Any = state(non_negative=True), *, lr: Any) -> Any:
        return p - lr * g, exp_avg + g * g

    opt = Made.numpy(np.ones(64, np.float32), state_dtype="int8")
    opt.step(np.full(64, 0.5, np.float32))
    assert opt.state[0]["exp_avg_codes"].dtype == np.uint8
    assert fusedopt.Adam(np.ones(64, np.float32), state_dtype="int8").state[0]["exp_avg_codes"].dtype == np.int8

    @rule(lr=0.1)
    def Exact(p: Any, g: Any, exp_avg: Any = state(quantise=False), *, lr: Any) -> Any:
        return p - lr * g, exp_avg + g * g

    with pytest.raises(ValueError, match="state_dtype='int8' does not go with exp_avg"):
        Exact.numpy(np.ones(64, np.float32), state_dtype="int8")
