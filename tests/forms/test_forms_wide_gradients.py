"""float32 gradients of 16-bit weights, in every form: the bits of 16-bit gradients where these are equal, those of a
float32 weight where the master keeps all of it."""

from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import (
    CASES,
    Case,
    assert_same,
    copied,
    data,
    gradients,
    join,
    kept,
    one_of_each_form,
    optimizer,
    train,
)
from fusedopt import forms
from helpers import F32, Array, assert_same_bits, engine

HALF = [c for c in CASES if c.param in forms.HALVES and c.grad == c.param]
FULL = [c for c in one_of_each_form() if c in HALF]
EXACT = [c for c in HALF if c.form.master in ("split16", "float32") and c.form.state == "float32"]
LENGTHS = [0, 1, 63, 64, 65, 200, 511, 512, 513, 1027, 4099]
MORE: list[dict[str, Any]] = [{}, {"ema_decay": 0.9, "l1": 0.01}]

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def widened(grads: list[list[Array]]) -> list[list[Array]]:
    return [[g.astype(F32) for g in row] for row in grads]


@pytest.mark.parametrize("more", MORE, ids=["plain", "ema-l1"])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_equal_gradients_give_equal_bits(case: Case, more: dict[str, Any]) -> None:
    def built() -> Any:
        return optimizer(case, [data(n, case.param, n) for n in LENGTHS], **more)

    grads, want = gradients(case, LENGTHS), built()
    train(want, grads)
    for i, isa in enumerate(fusedopt.isas()):
        opt = built()
        with engine(isa, 1 + 2 * i):
            train(opt, widened(grads))
        assert_same(kept(opt), copied(want), isa)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_and_strided_arrays_and_clipping(case: Case) -> None:
    shapes = [(300_007,), (60, 70)]
    grads = gradients(case, shapes, specials=False)
    grads = [[a, b.T] for a, b in grads]
    results = []
    for wide in (False, True):
        params = [data(shapes[0], case.param, 1), data((70, 120), case.param, 2)[:, ::2]]
        opt = optimizer(case, params, max_grad_norm=1.0, **MORE[1])
        train(opt, widened(grads) if wide else grads)
        results.append(copied(opt))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_no_bit_of_the_gradient_is_lost(case: Case) -> None:
    """A weight whose master keeps all bits goes where a float32 weight goes."""
    start, grads = data(1000, case.param, 1), [[data(1000, "float32", k)] for k in range(3)]
    narrow, wide = start.copy(), start.astype(F32)
    opt = optimizer(case, [narrow])
    train(opt, grads)
    options = {k: v for k, v in case.options.items() if k != "master"}
    train(getattr(fusedopt, case.rule.name)([wide], **options), grads)
    assert_same_bits(join(narrow, opt.state[0]["master"]), wide)
    if case.rule.name == "Lion":  # it takes signs, which rounding leaves
        return
    rounded = optimizer(case, [start.copy()])
    train(rounded, [[g.astype(start.dtype) for g in row] for row in grads])
    assert (join(rounded.param_groups[0]["params"][0], rounded.state[0]["master"]) != wide).any()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_by_rows(case: Case) -> None:
    """Rows that are named once: sums of rows are rounded to the dtype of the gradient."""
    width = 64 if case.form.quantised else 24
    rows = np.random.default_rng(0).permutation(500)[:200]
    results = []
    for wide in (False, True):
        opt = optimizer(case, [data((500, width), case.param, 0)], **MORE[1])
        for step in range(3):
            values = data((200, width), case.grad, step)
            opt.step([fusedopt.Rows(rows, values.astype(F32) if wide else values)])
        results.append(copied(opt))
    assert_same(results[1], results[0])


def test_other_gradients_are_refused() -> None:
    p = np.ones(3, np.float16)
    for dtype in ("float64", "bfloat16"):
        with pytest.raises(TypeError, match="grad: expected dtype float16 or float32 with"):
            fusedopt.sgd_(p, np.ones(3, forms.numpy_dtype(dtype)), lr=0.1)
