"""Every rule, option set and format against its float64 reference: single steps with tight, 20 free steps with loose
tolerances; steps dominated by eps, denormals, NaN and infinity. Tolerances: helpers.check_step."""

from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    F32,
    F64,
    FORMATS,
    Options,
    apply,
    cast_state,
    check_rule,
    check_step,
    filled,
    fused,
    label,
    new_state,
    normal,
    option_sets,
    problem,
    rule_options,
    two_option_sets,
)

CASES = [pytest.param(rule, options, id=f"{rule.name}-{label(options)}") for rule, options in rule_options()]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_steps_agree_with_the_float64_reference(rule: Any, options: Options, fmt: str) -> None:
    check_rule(fused(rule), rule, FORMATS[fmt], options)


@pytest.mark.parametrize(("rule", "options"), CASES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_twenty_steps_agree_with_the_float64_reference(rule: Any, options: Options, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    start = normal(rng, 101, dtype)
    param, want = start.copy(), start.astype(F64)
    state, want_state = new_state(rule, options, 101, dtype), new_state(rule, options, 101, F64)
    for step in range(1, 21):
        grad = normal(rng, 101, dtype)
        apply(rule, param, grad, state, step, options)
        rule.reference(want, grad.astype(F64), want_state, step, **filled(rule, options))
    moved = np.abs(want - start).max()
    assert moved > 1e-4  # the parameters have moved
    np.testing.assert_allclose(param, want, rtol=0, atol=(20 * np.finfo(dtype).eps) * (1 + moved) * 8)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_the_shape_does_not_matter(rule: Any, shape: tuple[int, ...]) -> None:
    for options in two_option_sets(rule):
        check_step(fused(rule), rule, options, problem(rule, options, FORMATS["f32"], shape))


EPS_RULES = [rule for rule in RULES.values() if "eps" in rule.defaults]


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-30])
@pytest.mark.parametrize("rule", EPS_RULES, ids=label)
def test_steps_decided_by_eps_agree_in_float64(rule: Any, value: float) -> None:
    """g far below eps, near it, and g = 0 with the smallest eps: a misplaced eps is off by orders of magnitude."""
    for options in option_sets(rule):
        for eps in (1e-30, 1e-20, 1e-10):
            chosen = {**options, "eps": eps, "weight_decay": 0.0}
            now = problem(rule, chosen, FORMATS["f64"], 3, warm=0)
            now.param[:] = (0.0, 1e-12, -1.0)
            for _ in range(4):
                now = check_step(fused(rule), rule, chosen, now._replace(grad=np.array([value, -value, value])))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-30])
@pytest.mark.parametrize("rule", EPS_RULES, ids=label)
def test_steps_decided_by_eps_agree_in_float32(rule: Any, value: float) -> None:
    """The square of 1e-20 is a float32 denormal of few bits: a fifth is close, a misplaced eps or a flushed denormal is
    off by orders. (1e-30 with eps = 1e-30 is left to float64: in float32 its square is zero.)"""
    for eps in (1e-30, 1e-20, 1e-10):
        if value == eps == 1e-30:
            continue
        options = {"eps": eps, "weight_decay": 0.0} if "weight_decay" in rule.defaults else {"eps": eps}
        param, want = np.zeros(19, F32), np.zeros(19)
        grad = np.full(19, value, F32)
        state, want_state = new_state(rule, options, 19, F32), new_state(rule, options, 19, F64)
        apply(rule, param, grad, state, 1, options)
        rule.reference(want, grad.astype(F64), want_state, 1, **filled(rule, options))
        np.testing.assert_allclose(param, want, rtol=0.2, atol=1e-44, err_msg=f"eps={eps}")


@pytest.mark.parametrize("isa", fusedopt.isas())
@pytest.mark.parametrize("fmt", ["f64", "f32"])
def test_denormals_are_read_and_written(fmt: str, isa: str) -> None:
    fusedopt.set_isa(isa)
    dtype = FORMATS[fmt].param
    tiny = np.finfo(dtype).smallest_subnormal
    for n in (1, 3, 64, 67):
        param, grad = np.full(n, 8 * tiny, dtype), np.full(n, 3 * tiny, dtype)
        fusedopt.sgd_(param, grad, lr=1.0)
        assert (param == 5 * tiny).all()
        buffer = np.full(n, 6 * tiny, dtype)
        fusedopt.sgd_(param, grad, buffer, lr=1.0, momentum=0.5)
        assert (buffer == 6 * tiny).all()
        assert (param == -tiny).all()


def test_denormals_of_float16_and_bfloat16_are_read_and_written() -> None:
    for name in ("f16", "bf16"):
        if name not in FORMATS:
            continue
        dtype = FORMATS[name].param
        for isa in fusedopt.isas():
            fusedopt.set_isa(isa)
            param = np.arange(1, 40, dtype=np.uint16).view(dtype)  # the smallest 39 numbers
            grad = np.ones(39, np.uint16).view(dtype)
            fusedopt.sgd_(param, grad, lr=1.0)
            np.testing.assert_array_equal(param.view(np.uint16), np.arange(39))


@pytest.mark.parametrize("isa", fusedopt.isas())
@pytest.mark.parametrize("fmt", [f for f in ("f16", "bf16") if f in FORMATS])
def test_every_16_bit_pattern_survives_a_step_that_changes_nothing(fmt: str, isa: str) -> None:
    """Load and store of all values. (-0 included, since -0 - 0 is -0; a NaN may change its payload.)"""
    fusedopt.set_isa(isa)
    dtype = FORMATS[fmt].param
    every = np.arange(65536, dtype=np.uint16)
    param = every.copy().view(dtype)
    fusedopt.sgd_(param, np.zeros(65536, dtype), lr=1.0)
    with np.errstate(invalid="ignore"):  # some are signalling NaNs
        is_nan = np.isnan(every.view(dtype))
        assert np.isnan(param[is_nan]).all()
    np.testing.assert_array_equal(param.view(np.uint16)[~is_nan], every[~is_nan])


@pytest.mark.parametrize("isa", fusedopt.isas())
@pytest.mark.parametrize("fmt", [f for f in ("f16", "bf16") if f in FORMATS])
def test_stores_round_to_nearest_even(fmt: str, isa: str) -> None:
    """All values, midpoints between neighbours, and values slightly above and below; overflow to infinity."""
    fusedopt.set_isa(isa)
    dtype = FORMATS[fmt].param
    positive = np.arange(0x7F80 if fmt == "bf16" else 0x7C00, dtype=np.uint16).view(dtype)
    exact = positive.astype(F64)
    middle = (exact[:-1] + exact[1:]) / 2
    last = 2 * exact[-1] - exact[-2]
    middle = np.append(middle, (exact[-1] + last) / 2)
    middle = middle.astype(F32)
    values = np.concatenate([middle, np.nextafter(middle, F32.type(0)), np.nextafter(middle, F32.type(3.4e38))])
    values = np.concatenate([values, -values])
    # The first step of a 16-bit momentum buffer stores the float32 gradient.
    param, state = np.zeros(values.size, F32), np.zeros(values.size, dtype)
    fusedopt.sgd_(param, values, state, lr=0.0, momentum=0.5, first=True)
    with np.errstate(over="ignore"):
        assert (state.view(np.uint16) == values.astype(dtype).view(np.uint16)).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_infinity_flow_as_in_the_reference(rule: Any, fmt: str) -> None:
    for options in two_option_sets(rule):
        for n in (5, 37):
            now = problem(rule, options, FORMATS[fmt], n, warm=0)
            bad = now.grad.copy()
            bad[1], bad[2], bad[3] = np.nan, np.inf, -np.inf
            with np.errstate(invalid="ignore"):
                now = check_step(fused(rule), rule, options, now._replace(grad=bad))
            spoilt = ~np.isfinite(now.param.astype(F64))
            for step in (2, 3):  # inf - inf depends on torch's order of operations, but the result stays non-finite
                apply(rule, now.param, bad, now.state, step, options)
                assert (~np.isfinite(now.param.astype(F64)) >= spoilt).all()
            assert np.isfinite(now.param[[0, *range(4, n)]].astype(F64)).all()  # neighbours are not affected


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_without_weight_decay_the_parameter_is_only_moved(rule: Any) -> None:
    """As in torch: a parameter that is infinite stays so, and its states stay finite (0 * inf is not in the sum)."""
    options = {"weight_decay": 0.0} if "weight_decay" in rule.defaults else {}
    now = problem(rule, options, FORMATS["f64"], 4, warm=0)
    now.param[:3] = np.inf, -np.inf, np.nan
    for _ in range(3):
        now = check_step(fused(rule), rule, options, now)
        np.testing.assert_array_equal(now.param[:3], [np.inf, -np.inf, np.nan])
        assert all(np.isfinite(array).all() for array in now.state.values())


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_eps_does_not_vanish_in_float16(rule: Any) -> None:
    """eps = 1e-8 is zero as a float16; a zero gradient would then give 0 / 0."""
    for fmt in ("f16", "f16+f32state"):
        now = problem(rule, {}, FORMATS[fmt], 33, warm=0)
        before = now.copy()
        for step in (1, 2, 3):
            apply(rule, now.param, np.zeros(33, np.float16), now.state, step, {"weight_decay": 0.0})
        np.testing.assert_array_equal(now.param, before.param)


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_a_late_step_is_right(rule: Any) -> None:
    """Powers of beta and bias corrections at step 1000, and beyond the range of int16 or float32 counts."""
    for options in two_option_sets(rule):
        for step in (1000, 70_000, 2**24 + 1):
            now = problem(rule, options, FORMATS["f64"], 9)
            now = now._replace(step=step, state=cast_state(rule, now.state, F64))
            check_step(fused(rule), rule, options, now, ulps=16)
