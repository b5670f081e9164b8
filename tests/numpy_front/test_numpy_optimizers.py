"""NumPy optimizers: containers, groups, schedules, clipping, training. Their values are compared with the in-place
functions, which test_reference checks; saving and loading: test_numpy_checkpoints."""

import copy
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    Array,
    Options,
    apply,
    assert_all_same,
    assert_same_bits,
    filled,
    is_scalar_state,
    label,
    moved,
    new_state,
    optimizer,
    option_sets,
    some,
    two_option_sets,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


@every_rule
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_equals_the_function_form(rule: Any, dtype: np.dtype[Any] | None) -> None:
    if dtype is None:
        pytest.skip("no ml_dtypes")
    state_dtype = F32 if dtype.itemsize == 2 else dtype
    for options in option_sets(rule):
        params = some(0, dtype)
        want = [p.copy() for p in params]
        opt = optimizer(rule)(params, **options)
        states = [new_state(rule, options, p.shape, state_dtype) for p in want]
        for step in range(1, 4):
            grads = some(step, dtype)
            kept = [g.copy() for g in grads]
            assert opt.step(grads) is None
            for p, g, state in zip(want, grads, states, strict=True):
                apply(rule, p, g, state, step, options)
            assert_all_same(params, want)
            assert_all_same(grads, kept)
        for got_state, want_state in zip(opt.state, states, strict=True):
            for name, array in want_state.items():
                if not is_scalar_state(rule, name):
                    assert got_state[name].dtype == state_dtype
                    assert_same_bits(got_state[name], array, name)


@every_rule
def test_array_sequence_dict_and_groups_are_the_same_to_it(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    make = optimizer(rule)
    want = [p.copy() for p in some(0)]
    reference = make(want, **options)
    alone, listed, grouped = some(0), some(0), some(0)
    named = dict(zip("abcd", some(0), strict=True))
    ones = [make(p, **options) for p in alone]
    in_tuple, in_dict = make(tuple(listed), **options), make(named, **options)
    in_groups = make([{"params": grouped[:1]}, {"params": grouped[1:], "lr": filled(rule, options)["lr"]}], **options)
    for step in range(3):
        grads = some(10 + step)
        reference.step(grads)
        for opt, g in zip(ones, grads, strict=True):
            opt.step(g)
        in_tuple.step(tuple(grads))
        in_dict.step(dict(zip("abcd", grads, strict=True)) if step else dict(zip("dcba", grads[::-1], strict=True)))
        in_groups.step(grads if step else [grads[:1], grads[1:]])
        for got in (alone, listed, grouped, list(named.values())):
            assert_all_same(got, want)


def test_a_group_has_options_of_its_own() -> None:
    a, b, c = np.ones(3), np.ones(3), np.ones(3)
    opt = fusedopt.SGD([{"params": [a]}, {"params": b, "lr": 0.25}, {"params": [c], "weight_decay": 1.0}], lr=0.5)
    opt.step([np.ones(3), np.ones(3), np.ones(3)])
    np.testing.assert_array_equal([a[0], b[0], c[0]], [0.5, 0.75, 0.0])
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.25, 0.5]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.0, 1.0]


@every_rule
def test_param_groups_are_read_at_every_step(rule: Any) -> None:
    """Options changed between steps apply from the next step on."""
    for name, value in moved(rule).items():
        if isinstance(value, bool) or (name == "dampening"):
            continue
        params, want = some(0), some(0)
        opt = optimizer(rule)(params)
        assert len(opt.param_groups) == 1
        first: Options = {}
        states = [new_state(rule, {name: value}, p.shape, F64) for p in want]
        if states[0].keys() != new_state(rule, first, (), F64).keys():
            continue  # an option that adds states
        for step, options in ((1, first), (2, {name: value}), (3, {name: value})):
            if step == 2:
                opt.param_groups[0][name] = value
            grads = some(step)
            opt.step(grads)
            for p, g, state in zip(want, grads, states, strict=True):
                apply(rule, p, g, state, step, options)
            assert_all_same(params, want)


def test_an_option_that_brings_a_state_may_be_switched_on_later() -> None:
    p, want, buffer = np.ones(3), np.ones(3), np.zeros(3)
    opt = fusedopt.SGD(p, lr=0.5)
    opt.step(np.ones(3))
    opt.param_groups[0]["momentum"] = 0.5
    for _ in range(3):
        opt.step(np.ones(3))
    fusedopt.sgd_(want, np.ones(3), lr=0.5)
    for i in range(3):
        fusedopt.sgd_(want, np.ones(3), buffer, lr=0.5, momentum=0.5, first=i == 0)
    np.testing.assert_array_equal(p, want)


@every_rule
def test_bad_values_in_param_groups_are_refused_before_anything_is_written(rule: Any) -> None:
    params = some(0)
    opt = optimizer(rule)([{"params": params[:2]}, {"params": params[2:]}])
    opt.step(some(1))
    before = [p.copy() for p in params]
    for value in (-1.0, np.nan):
        opt.param_groups[1]["lr"] = value
        with pytest.raises(ValueError, match=r"\blr\b"):
            opt.step(some(2))
        assert_all_same(params, before)


@every_rule
def test_lr_may_be_a_function_of_the_step_counted_from_zero(rule: Any) -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 / (1 + step)

    params, want = some(0), some(0)
    opt = optimizer(rule)(params, lr=schedule)
    states = [new_state(rule, {}, p.shape, F64) for p in want]
    for step in range(1, 5):
        grads = some(step)
        opt.step(grads)
        for p, g, state in zip(want, grads, states, strict=True):
            apply(rule, p, g, state, step, {"lr": 0.1 / step})
        assert_all_same(params, want)
    assert sorted(set(asked)) == [0, 1, 2, 3]
    assert asked == sorted(asked)


def test_a_schedule_per_group() -> None:
    a, b = np.zeros(2), np.zeros(2)
    opt = fusedopt.SGD([{"params": [a], "lr": lambda step: 1.0 + step}, {"params": [b]}], lr=lambda step: 0.5)
    for _ in range(3):
        opt.step([np.ones(2), np.ones(2)])
    np.testing.assert_array_equal([a[0], b[0]], [-6.0, -1.5])


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "fast", None])
def test_a_schedule_that_returns_nonsense_is_refused(value: Any) -> None:
    p = np.ones(3)
    with pytest.raises((TypeError, ValueError), match=r"\blr\b"):
        fusedopt.Adam(p, lr=lambda step: value)
    late = fusedopt.Adam(p, lr=lambda step: value if step else 0.5)
    late.step(np.ones(3))
    before = p.copy()
    with pytest.raises((TypeError, ValueError), match=r"\blr\b"):
        late.step(np.ones(3))
    np.testing.assert_array_equal(p, before)


@every_rule
def test_parameters_without_a_gradient_are_skipped_and_not_counted(rule: Any) -> None:
    params, want = some(0), some(0)
    opt = optimizer(rule)(params)
    states = [new_state(rule, {}, p.shape, F64) for p in want]
    counts = [0] * len(want)
    patterns = [(1, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1)]
    for step, pattern in enumerate(patterns):
        grads = [g if use else None for g, use in zip(some(step), pattern, strict=True)]
        opt.step(grads)
        for i, g in enumerate(grads):
            if g is not None:
                counts[i] += 1
                apply(rule, want[i], g, states[i], counts[i], {})
        assert_all_same(params, want)


def test_a_gradient_in_a_dict_may_be_none() -> None:
    params = {"a": np.ones(2), "b": np.ones(2)}
    opt = fusedopt.SGD(params, lr=0.5)
    opt.step({"a": np.ones(2), "b": None})
    np.testing.assert_array_equal([params["a"][0], params["b"][0]], [0.5, 1.0])


# ---- refusals


@every_rule
def test_unknown_options_are_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        optimizer(rule)(np.ones(3), learning_rate=0.1)
    with pytest.raises((TypeError, ValueError), match="learning_rate"):
        optimizer(rule)([{"params": np.ones(3), "learning_rate": 0.1}])
    for bad in (
        {"lr": -1.0},
        {"lr": np.nan},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": np.nan},
        {"weight_decay": -0.1},
    ):
        if set(bad) <= {*rule.defaults, "max_grad_norm"}:
            with pytest.raises(ValueError, match=next(iter(bad))):
                optimizer(rule)(np.ones(3), **bad)


def frozen() -> Array:
    array = np.ones(3)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "params",
    [
        None,
        1.0,
        "abc",
        [1.0],
        [None],
        [np.ones(3), np.ones(3, int)],
        np.ma.ones(3),
        frozen(),
        [{"lr": 0.1}],
        [np.ones(3)] * 2,
        [{"params": []}, {"params": np.ones(3, complex)}],
        {"a": np.ones(3), "b": np.ones(3, ">f8")},
    ],
    ids=lambda p: repr(p).replace("\n", ""),
)
def test_wrong_parameters_are_refused_at_construction(params: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="param"):
        fusedopt.Adam(params)


@every_rule
def test_wrong_gradients_are_refused_before_anything_is_written(rule: Any) -> None:
    params = some(0)
    opt = optimizer(rule)(params)
    opt.step(some(1))
    before = [p.copy() for p in params]
    state = copy.deepcopy(opt.state_dict())
    good = some(2)
    wrong_last = [*good[:2], np.ones(6), good[3]]
    for bad in (
        good[:3],
        [*good, np.ones(3)],
        wrong_last,
        [*good[:2], params[2], good[3]],
        good[0],
        None,
        {"a": good[0]},
    ):
        with pytest.raises((TypeError, ValueError)):
            opt.step(bad)
        assert_all_same(params, before)
        after = opt.state_dict()
        assert after.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(after[key], value)
    opt.step(good)  # and it goes on


def test_overlap_is_looked_for_at_every_step() -> None:
    """The second gradient begins and ends where the first did, but overlaps the parameter in between."""
    view = np.lib.stride_tricks.as_strided
    base = np.ones(12)
    param, apart, meets = (
        view(base[i:], (2, 2), strides) for i, strides in ((0, (64, 16)), (1, (64, 16)), (1, (24, 56)))
    )
    opt = fusedopt.SGD(param, lr=1.0)
    opt.step(apart)
    before = base.copy()
    with pytest.raises(ValueError, match="grads"):
        opt.step(meets)
    np.testing.assert_array_equal(base, before)


def test_gradient_names_have_to_be_those_of_the_parameters() -> None:
    params = {"a": np.ones(2), "b": np.ones(2)}
    opt = fusedopt.SGD(params, lr=0.5)
    for bad in ({"a": np.ones(2), "c": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}):
        with pytest.raises((TypeError, ValueError, KeyError), match="c"):
            opt.step(bad)
    assert (params["a"] == 1).all()


# ---- clipping


@every_rule
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_explicit_clipping_by_the_global_norm(rule: Any, limit: float) -> None:
    params, want = some(0), some(0)
    opt = optimizer(rule)([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=limit)
    plain = optimizer(rule)(want)
    for step in range(3):
        grads = some(step + 1)
        norm = float(np.sqrt(sum((g * g).sum() for g in grads)))
        kept = [g.copy() for g in grads]
        opt.step(grads)
        plain.step([np.asarray(g * min(1.0, limit / (norm + 1e-6))) for g in grads])  # as torch's clip_grad_norm_
        assert_all_same(grads, kept)
        assert isinstance(opt.last_grad_norm, float)
        assert opt.last_grad_norm == pytest.approx(norm, rel=1e-12)
        for got, expected in zip(params, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


def test_clipping_that_does_not_bite_changes_no_bit() -> None:
    a, b = some(0), some(0)
    clipped, plain = fusedopt.Adam(a, max_grad_norm=1e9), fusedopt.Adam(b)
    assert clipped.last_grad_norm is None
    clipped.step(some(1))
    plain.step(some(1))
    assert plain.last_grad_norm is None
    assert_all_same(a, b)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_norm_neither_overflows_nor_loses_small_gradients(dtype: np.dtype[Any] | None) -> None:
    if dtype is None:
        pytest.skip("no ml_dtypes")
    for value in (60000.0, 1e-4, 0.0, *((1e30, 1e-30) if dtype != F16 else ())):
        p = np.zeros(10_000, dtype)
        opt = fusedopt.SGD(p, lr=1.0, max_grad_norm=1.0)
        grad = np.full(10_000, value, dtype)
        opt.step(grad)
        assert opt.last_grad_norm == pytest.approx(float(grad[0]) * 100, rel=1e-6)


def test_a_norm_that_is_not_finite_flows_as_in_torch() -> None:
    for value in (np.nan, np.inf):
        p = np.zeros(5)
        opt = fusedopt.SGD(p, lr=1.0, max_grad_norm=1.0)
        opt.step(np.array([1.0, value, 1.0, 1.0, 1.0]))
        assert not np.isfinite(opt.last_grad_norm)
        assert np.isnan(p[1])
        finite_part = p[[0, 2, 3, 4]]
        assert np.isnan(finite_part).all() if np.isnan(value) else (finite_part == 0).all()


def test_gradients_that_are_none_do_not_count_in_the_norm() -> None:
    opt = fusedopt.SGD([np.zeros(1), np.zeros(1)], max_grad_norm=1.0)
    opt.step([np.array([3.0]), None])
    assert opt.last_grad_norm == 3.0
    opt.step([np.array([3.0]), np.array([4.0])])
    assert opt.last_grad_norm == 5.0
    opt.step([None, None])
    assert opt.last_grad_norm in (None, 0.0)


@every_rule
def test_repr_names_rule_and_options(rule: Any) -> None:
    text = repr(optimizer(rule)(np.ones(2), lr=0.125))
    assert rule.name in text
    assert "0.125" in text


# ---- it trains


@every_rule
def test_logistic_regression_on_digits_converges(rule: Any) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16.0).astype(F32)
    params = {"w": np.zeros((64, 10), F32), "b": np.zeros(10, F32)}
    lr = {"SGD": 0.5, "Adagrad": 0.1, "Adadelta": 5.0, "RMSprop": 0.01, "RAdam": 0.1, "Lion": 0.01}.get(rule.name, 0.02)
    opt = optimizer(rule)(params, lr=lr)

    def loss_and_grads() -> tuple[float, dict[str, Array]]:
        z = x @ params["w"] + params["b"]
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        p /= p.sum(axis=1, keepdims=True)
        loss = -float(np.log(p[np.arange(len(y)), y]).mean())
        p[np.arange(len(y)), y] -= 1
        p /= F32.type(len(y))
        return loss, {"w": x.T @ p, "b": p.sum(axis=0)}

    first, _ = loss_and_grads()
    for _ in range(120):
        _, grads = loss_and_grads()
        opt.step(grads)
    last, _ = loss_and_grads()
    assert first == pytest.approx(np.log(10), rel=1e-3)
    assert last < 0.5
    accuracy = float(((x @ params["w"] + params["b"]).argmax(axis=1) == y).mean())
    assert accuracy > 0.92
