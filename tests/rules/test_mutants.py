"""Tests of the tests: deliberately wrong steps, which helpers.check_rule and the bit comparison must catch.

A wrong step is the reference rule with one mistake, computed in float64 and rounded to storage, so that only the
mistake can be caught. The same wrapper without a mistake passes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fusedopt.rules import RULES
from helpers import (
    BF16,
    F32,
    F64,
    FORMATS,
    Apply,
    Array,
    Options,
    State,
    assert_near,
    assert_same_bits,
    check_rule,
    filled,
    is_scalar_state,
    label,
    moved,
    option_sets,
    rule_options,
    two_option_sets,
)

Step = Callable[[Array, Array, State, int, Options], None]
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


def exact(rule: Any) -> Step:
    def step(param: Array, grad: Array, state: State, number: int, options: Options) -> None:
        with np.errstate(all="ignore"):
            rule.reference(param, grad, state, number, **filled(rule, options))

    return step


def in_storage(rule: Any, step: Step) -> Apply:
    """Wraps a float64 step for arrays of any format."""

    def apply(param: Array, grad: Array, state: State, number: int, options: Options) -> None:
        wide_param = param.astype(F64)
        wide_state = {k: v if is_scalar_state(rule, k) else v.astype(F64) for k, v in state.items()}
        step(wide_param, grad.astype(F64), wide_state, number, options)
        param[...] = wide_param
        for name, array in state.items():
            array[...] = wide_state[name]

    return apply


def caught(rule: Any, wrong: Step, options: Options, formats: tuple[str, ...] = ("f64", "f32")) -> None:
    for fmt in formats:
        with pytest.raises(AssertionError):
            check_rule(in_storage(rule, wrong), rule, FORMATS[fmt], options)


@pytest.mark.parametrize("fmt", FORMATS)
@every_rule
def test_the_right_step_passes(rule: Any, fmt: str) -> None:
    for options in two_option_sets(rule):
        check_rule(in_storage(rule, exact(rule)), rule, FORMATS[fmt], options)


@every_rule
def test_every_ignored_option_is_caught(rule: Any) -> None:
    """Each option (weight decay, momentum, nesterov, ...) once replaced by its default."""
    for name in moved(rule):
        if name == "lr":
            continue
        options = next(o for o in option_sets(rule)[1:] if name in o)
        default = rule.defaults[name]

        def ignores(
            p: Array, g: Array, s: State, n: int, o: Options, name: str = name, default: Any = default, rule: Any = rule
        ) -> None:
            kept = dict(s)
            missing = set(rule.states({**filled(rule, o), name: default})) - set(s)
            kept.update({k: np.zeros_like(p) for k in missing})
            exact(rule)(p, g, kept, n, {**o, name: default})

        caught(rule, ignores, options, ("f64",) if name == "eps" else ("f64", "f32"))


@every_rule
def test_a_stale_lr_is_caught(rule: Any) -> None:
    last: dict[str, float] = {}

    def stale(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        lr = o["lr"] if n == 1 else last["lr"]
        last["lr"] = o["lr"]
        exact(rule)(p, g, s, n, {**o, "lr": lr})

    caught(rule, stale, {})


@every_rule
def test_a_wrong_step_number_is_caught(rule: Any) -> None:
    """Missing bias correction (a very large step count), and counts that start at zero or run ahead."""
    options = {"lr_decay": 0.01} if "lr_decay" in rule.defaults else {}
    if "step" not in rule.scalars:
        pytest.skip("the rule does not look at the step")
    probe = [np.ones(1), np.ones(1)]
    for number, p in zip((1, 2), probe, strict=True):
        state = {
            k: np.full((), 0.5) if is_scalar_state(rule, k) else np.full(1, 0.5)
            for k in rule.states(filled(rule, options))
        }
        state.update({k: np.full((), 0.5) for k in rule.scalars if k != "step"})
        rule.reference(p, np.ones(1), state, number, **filled(rule, options))
    if probe[0] == probe[1]:
        pytest.skip("the rule does not look at the step")
    caught(rule, lambda p, g, s, n, o: exact(rule)(p, g, s, n + 100_000, o), options)
    caught(rule, lambda p, g, s, n, o: exact(rule)(p, g, s, n + 1, o), options)


@every_rule
def test_a_tail_off_by_one_is_caught(rule: Any) -> None:
    def cut(p: Array, g: Array, s: State, n: int, o: Options, part: slice) -> None:
        state = {k: v if is_scalar_state(rule, k) else v[part] for k, v in s.items()}
        exact(rule)(p[part], g[part], state, n, o)

    def multiple_of(width: int) -> Step:
        return lambda p, g, s, n, o: cut(p, g, s, n, o, slice(0, len(p) // width * width))

    caught(rule, lambda p, g, s, n, o: cut(p, g, s, n, o, slice(0, -1)), {})  # the last element left out
    caught(rule, lambda p, g, s, n, o: cut(p, g, s, n, o, slice(1, None)), {})  # the first
    for width in (2, 4, 8, 16):
        caught(rule, multiple_of(width), {})  # no tail at all


@every_rule
def test_a_written_gradient_is_caught(rule: Any) -> None:
    def writes(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        exact(rule)(p, g, s, n, o)

    def outer(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        in_storage(rule, writes)(p, g, s, n, o)
        g[-1] = 0

    with pytest.raises(AssertionError, match="gradient was written"):
        check_rule(outer, rule, FORMATS["f32"], {})


@every_rule
def test_a_state_that_is_not_stored_is_caught(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    for name in rule.states(filled(rule, options)):

        def forgets(p: Array, g: Array, s: State, n: int, o: Options, name: str = name) -> None:
            exact(rule)(p, g, {**s, name: s[name].copy()}, n, o)

        caught(rule, forgets, options)


@every_rule
def test_an_element_taken_from_its_neighbour_is_caught(rule: Any) -> None:
    caught(rule, lambda p, g, s, n, o: exact(rule)(p, np.roll(g, 1), s, n, o), {})


# ---- mistakes specific to a rule


def adam(*, eps_inside: bool = False, eps_before_correction: bool = False, coupled: bool = True) -> Step:
    """A hand-written Adam with optional mistakes."""

    def step(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        o = filled(RULES["Adam"], o)
        beta1, beta2 = o["betas"]
        if coupled:
            g = g + o["weight_decay"] * p
        else:
            p *= 1 - o["lr"] * o["weight_decay"]
        m, v = s["exp_avg"], s["exp_avg_sq"]
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        root = np.sqrt(v / (1 - beta2**n) + (o["eps"] if eps_inside else 0.0))
        if eps_before_correction:
            denominator = (np.sqrt(v) + o["eps"]) / np.sqrt(1 - beta2**n)
        else:
            denominator = root + (0.0 if eps_inside else o["eps"])
        p -= o["lr"] / (1 - beta1**n) * m / denominator

    return step


def test_adam_by_hand_passes() -> None:
    for fmt in ("f64", "f32"):
        check_rule(in_storage(RULES["Adam"], adam()), RULES["Adam"], FORMATS[fmt], {"weight_decay": 0.1})


@pytest.mark.parametrize("mistake", ["eps_inside", "eps_before_correction"])
def test_a_misplaced_eps_is_caught(mistake: str) -> None:
    with pytest.warns() if False else np.errstate(all="ignore"):
        caught(RULES["Adam"], adam(**{mistake: True}), {})


def test_decoupled_weight_decay_in_adam_is_caught() -> None:
    caught(RULES["Adam"], adam(coupled=False), {"weight_decay": 0.1})


def test_coupled_weight_decay_in_adamw_is_caught() -> None:
    caught(RULES["AdamW"], adam(coupled=True), {"weight_decay": 0.1})


def test_eps_inside_the_root_is_caught_in_rmsprop_and_adagrad() -> None:
    def rmsprop(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        o = filled(RULES["RMSprop"], o)
        s["square_avg"] += (1 - o["alpha"]) * (g * g - s["square_avg"])
        p -= o["lr"] * g / np.sqrt(s["square_avg"] + o["eps"])

    def adagrad(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        o = filled(RULES["Adagrad"], o)
        s["sum"] += g * g
        p -= o["lr"] * g / np.sqrt(s["sum"] + o["eps"])

    caught(RULES["RMSprop"], rmsprop, {})
    caught(RULES["Adagrad"], adagrad, {})


def test_dampening_in_the_first_step_of_sgd_is_caught() -> None:
    """The first step must copy the gradient without dampening."""

    def dampens(p: Array, g: Array, s: State, n: int, o: Options) -> None:
        o = filled(RULES["SGD"], o)
        s["momentum_buffer"] *= o["momentum"]
        s["momentum_buffer"] += (1 - o["dampening"]) * g
        p -= o["lr"] * s["momentum_buffer"]

    caught(RULES["SGD"], dampens, {"momentum": 0.9, "dampening": 0.3})


# ---- the comparisons themselves


@pytest.mark.parametrize("dtype", [F64, F32, np.dtype(np.float16), BF16], ids=str)
def test_one_wrong_bit_is_caught(dtype: np.dtype[Any] | None) -> None:
    if dtype is None:
        pytest.skip("no ml_dtypes")
    right = np.linspace(-2, 2, 9).astype(dtype)
    assert_same_bits(right, right.copy())
    for i in range(9):
        wrong = right.copy()
        wrong.view(f"u{dtype.itemsize}")[i] ^= 1
        with pytest.raises(AssertionError, match=rf"1 of 9 differ, first at \({i},\)"):
            assert_same_bits(wrong, right)
    zero = np.zeros(3, dtype)
    with pytest.raises(AssertionError):
        assert_same_bits(-zero, zero)
    nan = np.full(3, np.nan, dtype)
    assert_same_bits(-nan, nan)  # a payload or a sign of NaN is no difference
    with pytest.raises(AssertionError):
        assert_same_bits(nan, zero)
    with pytest.raises(AssertionError):
        assert_same_bits(zero[:2], zero)


def test_distances_in_ulps_are_measured() -> None:
    want = np.array([1.0, 1e-40, 3e38, 0.0])
    for wrong_by, passes in ((0, True), (1, True), (4, True), (8, False)):
        got = want.astype(F32)
        for _ in range(wrong_by):
            got = np.nextafter(got, F32.type(np.inf))
        if passes:
            assert_near(got, want, want, F32, 5, "")
        else:
            with pytest.raises(AssertionError, match="4 of 4 are off"):
                assert_near(got, want, want, F32, 5, "")
    with pytest.raises(AssertionError):
        assert_near(np.array([np.inf], F32), np.array([1.0]), np.ones(1), F32, 5, "")
    with pytest.raises(AssertionError):
        assert_near(np.array([np.nan], F32), np.array([1.0]), np.ones(1), F32, 5, "")
    with pytest.raises(AssertionError):
        assert_near(np.array([1.0], F32), np.array([np.nan]), np.ones(1), F32, 5, "")
    with pytest.raises(AssertionError):
        assert_near(np.array([3e38], F32), np.array([1e39]), np.full(1, 1e39), F32, 5, "")


def test_there_is_a_case_for_every_rule_and_option() -> None:
    """Every option of every rule has another value in some option set."""
    seen = {(rule.name, name) for rule, options in rule_options() for name in options}
    for rule in RULES.values():
        assert {(rule.name, name) for name in moved(rule)} <= seen
        assert moved(rule), rule.name
