"""Options and step counts that the in-place functions refuse, and numeric types that they accept."""

import inspect
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    FORMATS,
    apply,
    assert_same_problem,
    function,
    label,
    problem,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


def numbers_of(rule: Any) -> list[str]:
    return [
        k
        for k, v in rule.defaults.items()
        if isinstance(v, float) and k in inspect.signature(function(rule)).parameters
    ]


@every_rule
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf], ids=str)
def test_negative_and_non_finite_hyperparameters_are_refused(rule: Any, value: float) -> None:
    for name in numbers_of(rule):
        now = problem(rule, {}, FORMATS["f64"], 3)
        before = now.copy()
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            apply(rule, now.param, now.grad, now.state, now.step, {name: value})
        assert_same_problem(now, before)


@every_rule
def test_betas_out_of_range_are_refused(rule: Any) -> None:
    right = rule.defaults.get("betas", ())
    wrong = [(*right[:i], x, *right[i + 1 :]) for i in range(len(right)) for x in (-0.1, 1.0, np.nan, np.inf)]
    for betas in [*wrong, right[1:], (*right, 0.9)] if right else []:
        now = problem(rule, {}, FORMATS["f64"], 3)
        before = now.copy()
        with pytest.raises((ValueError, TypeError), match=r"\bbetas?[12]?\b"):
            apply(rule, now.param, now.grad, now.state, now.step, {"betas": betas})
        assert_same_problem(now, before)


@every_rule
def test_hyperparameters_of_a_wrong_type_are_refused(rule: Any) -> None:
    for name in [*numbers_of(rule), *(["betas"] if "betas" in rule.defaults else [])]:
        for value in ("fast", None, [1.0], 1j, np.ones(2)):
            now = problem(rule, {}, FORMATS["f64"], 3)
            before = now.copy()
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                apply(rule, now.param, now.grad, now.state, now.step, {name: value})
            assert_same_problem(now, before)


@every_rule
@pytest.mark.parametrize("step", [0, -1, -(2**40)])
def test_a_step_below_one_is_refused(rule: Any, step: int) -> None:
    if "step" in inspect.signature(function(rule)).parameters:
        now = problem(rule, {}, FORMATS["f64"], 3)
        before = now.copy()
        with pytest.raises(ValueError, match=r"\bstep\b"):
            apply(rule, now.param, now.grad, now.state, step, {})
        assert_same_problem(now, before)
        with pytest.raises(TypeError, match=r"\bstep\b"):
            apply(rule, now.param, now.grad, now.state, "first", {})  # type: ignore[arg-type]
        assert_same_problem(now, before)


@every_rule
def test_unknown_and_positional_hyperparameters_are_refused(rule: Any) -> None:
    now = problem(rule, {}, FORMATS["f64"], 3)
    before = now.copy()
    with pytest.raises(TypeError, match="learning_rate"):
        apply(rule, now.param, now.grad, now.state, now.step, {"learning_rate": 0.1})
    assert_same_problem(now, before)
    kinds = {p.name: p.kind for p in inspect.signature(function(rule)).parameters.values()}
    for name in rule.defaults:
        if name in kinds:
            assert kinds[name] is inspect.Parameter.KEYWORD_ONLY, name


def test_nesterov_needs_momentum_and_no_dampening() -> None:
    param, grad, buffer = np.zeros(3), np.ones(3), np.zeros(3)
    for options in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.5}):
        with pytest.raises(ValueError, match="nesterov"):
            fusedopt.sgd_(param, grad, buffer, nesterov=True, **options)
    assert (param == 0).all()


def test_numpy_numbers_are_numbers() -> None:
    one, other = np.zeros(3), np.zeros(3)
    fusedopt.sgd_(one, np.ones(3), lr=0.5, weight_decay=0)
    fusedopt.sgd_(other, np.ones(3), lr=np.float32(0.5), weight_decay=np.int64(0))
    np.testing.assert_array_equal(one, other)
    states = [np.zeros(3) for _ in range(2)]
    fusedopt.adam_(one, np.ones(3), *states, step=np.int64(1), betas=[0.9, 0.99])  # type: ignore[arg-type]
