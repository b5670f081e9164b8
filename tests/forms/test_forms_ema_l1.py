"""The moving average of the weights and the soft threshold of l1, inside the step, in every form."""

from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import CASES, Case, assert_same, copied, data, join, kept, one_of_each_form, optimizer, train
from fusedopt import forms
from helpers import F32, F64, Array, assert_same_bits

FULL = one_of_each_form()


# ---- the moving average


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_average_is_that_of_the_weights(case: Case) -> None:
    """Close to float64, and bit-identical to a lerp in float32; of the master if there is one."""
    opt, decay = optimizer(case, data(300, case.param, 1), ema_decay=0.95), 0.95
    (p,), state = opt.param_groups[0]["params"], opt.state[0]
    wide = join(p, state.get("master")).astype(F64) if case.param != "float64" else p.copy()
    for step in range(40):
        old = state["ema"].copy()
        opt.step(data(300, case.grad, step))
        x = p if case.param == "float64" else join(p, state.get("master"))
        assert state["ema"].dtype == (F64 if case.param == "float64" else F32)
        w = x.dtype.type(1 - decay)
        exact = old.astype(np.longdouble) + np.longdouble(w) * (x - old).astype(np.longdouble)
        np.testing.assert_allclose(state["ema"], exact.astype(F64), rtol=1e-7, atol=1e-9)
        wide += (1 - decay) * (x - wide)
    np.testing.assert_allclose(state["ema"], wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_average_is_lent_to_the_parameters_and_taken_back(case: Case) -> None:
    params = [data(s, case.param, i) for i, s in enumerate([(65,), (), (3, 4)])]
    opt = optimizer(case, params, ema_decay=0.5)
    train(opt, [[data(s, case.grad, k) for s in ((65,), (), (3, 4))] for k in range(3)])
    before = copied(opt)
    with opt.ema_parameters():
        for p, state in zip(params, opt.state, strict=True):
            assert_same_bits(p, state["ema"].astype(p.dtype))
    assert_same(kept(opt), before)
    with pytest.raises(ZeroDivisionError), opt.ema_parameters():
        raise ZeroDivisionError
    assert_same(kept(opt), before)
    train(opt, [[data(s, case.grad, 9) for s in ((65,), (), (3, 4))]])


def test_parameters_without_an_average_keep_their_values_in_the_block() -> None:
    p, q = np.ones(3, F32), np.ones(3, F32)
    opt: Any = fusedopt.SGD([{"params": [p], "ema_decay": 0.5}, {"params": [q]}], lr=1.0)
    opt.step([np.ones(3, F32)] * 2)
    with opt.ema_parameters():
        assert (p == 0.5).all()
        assert (q == 0).all()
    assert (p == 0).all()


# ---- l1


def soft(x: Array, shrink: float) -> Array:
    size = np.abs(x) - x.dtype.type(shrink)
    return np.where(size > 0, np.copysign(size, x), 0).astype(x.dtype)


@pytest.mark.parametrize("case", [c for c in CASES if not c.random], ids=str)
def test_l1_shrinks_what_the_plain_step_gives(case: Case) -> None:
    l1, lr, n = 2.0, 0.02, 400
    grad = data(n, case.grad, 2)
    plain, thin = (optimizer(case, data(n, case.param, 1), l1=value) for value in (0.0, l1))
    for opt in (plain, thin):
        opt.step(grad)
    (p,), (q,) = plain.param_groups[0]["params"], thin.param_groups[0]["params"]
    x, y = ((a if case.param == "float64" else join(a, o.state[0].get("master"))) for a, o in ((p, plain), (q, thin)))
    want = soft(x, lr * l1)
    if case.form.master is None:
        want = want.astype(q.dtype)
        assert_same_bits(np.abs(q), np.abs(want))
    elif case.form.master == "split8":
        np.testing.assert_allclose(y, want, rtol=2.0**-16, atol=2.0**-140)
    else:
        assert_same_bits(np.abs(y), np.abs(want))
    assert (q[want == 0] == 0).all()
    assert 0.02 < (q == 0).mean() < 0.9
    assert ((np.sign(q.astype(F64)) == np.sign(p.astype(F64))) | (q == 0)).all()
    assert_same(
        [{k: v for k, v in plain.state[0].items() if k != "master"}],
        [{k: v for k, v in thin.state[0].items() if k != "master"}],
    )


@pytest.mark.parametrize("case", FULL, ids=str)
def test_l1_drives_weights_without_a_gradient_to_exact_zeros(case: Case) -> None:
    opt = optimizer(case, np.full(200, 0.5).astype(forms.numpy_dtype(case.param)), l1=5.0)
    for step in range(80 if case.rule.name != "Lion" else 40):
        # The same gradient in every step would have no variance: rounded states can make it negative, and its root NaN.
        grad = data(200, case.grad, step)
        grad[::2] = 0
        opt.step(grad)
    (p,) = opt.param_groups[0]["params"]
    assert (p[::2] == 0).all()
    assert np.isfinite(p.astype(F64)).all()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_options_that_are_off_change_no_bit(case: Case) -> None:
    """EMA does not change the step; l1=0 and ema_decay=None are the plain step."""
    results = []
    for options in ({}, {"l1": 0.0, "ema_decay": None}, {"ema_decay": 0.9}, {"l1": 1e-300}):
        opt = optimizer(case, data(500, case.param, 1), **options)
        train(opt, [[data(500, case.grad, k)] for k in range(3)])
        results.append([{k: v for k, v in one.items() if k != "ema"} for one in copied(opt)])
    for other in results[1:3]:
        assert_same(other, results[0])
    if case.param == "float64":
        np.testing.assert_allclose(results[3][0]["param"], results[0][0]["param"], rtol=1e-12)


def test_l1_follows_the_learning_rate_and_keeps_nan() -> None:
    p = np.array([1.0, np.nan, np.inf, -np.inf, -1.0])
    opt: Any = fusedopt.SGD(p, lr=lambda step: 0.1 * (step + 1), l1=1.0)
    opt.step(np.zeros(5))
    opt.step(np.zeros(5))
    np.testing.assert_allclose(p, [0.7, np.nan, np.inf, -np.inf, -0.7])
