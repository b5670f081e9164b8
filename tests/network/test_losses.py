"""Losses: values and gradients against torch, finite differences and float64 NumPy; bit-identical for every instruction
set and thread count; refusals with their messages, nothing written."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt import losses
from helpers import assert_same_bits, engine

Array = np.ndarray[Any, Any]
Loss = Callable[..., tuple[Any, Array]]

# name -> parameter, kind of target
ELEMENT: dict[str, tuple[dict[str, float], str]] = {
    "mse": ({}, "any"),
    "half_mse": ({}, "any"),
    "mae": ({}, "any"),
    "huber": ({"delta": 0.7}, "any"),
    "epsilon_insensitive": ({"epsilon": 0.3}, "any"),
    "squared_epsilon_insensitive": ({"epsilon": 0.3}, "any"),
    "poisson": ({}, "counts"),
    "binary_cross_entropy": ({}, "unit"),
    "hinge": ({}, "signs"),
    "squared_hinge": ({}, "signs"),
    "modified_huber": ({}, "signs"),
    "perceptron": ({}, "signs"),
}
NAMES = list(ELEMENT)
DTYPES = [np.float32, np.float64]


def function(name: str) -> Loss:
    return getattr(losses, name)  # type: ignore[no-any-return]


def pair(name: str, shape: Any, dtype: Any, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    p = (2 * rng.standard_normal(shape)).astype(dtype)
    y: Any = {
        "any": rng.standard_normal(shape),
        "unit": rng.random(shape),
        "signs": rng.choice([-1.0, 1.0], shape),
        "counts": rng.poisson(2.0, shape),
    }[ELEMENT[name][1]]
    return p, np.asarray(y).astype(dtype)


def by_definition(name: str, p: Array, y: Array) -> Array:
    """Each loss by the equation of its docstring, in float64."""
    d, m = p - y, y * p
    eps = ELEMENT[name][0].get("epsilon", 0.0)
    delta = ELEMENT[name][0].get("delta", 0.0)
    table: dict[str, Callable[[], Any]] = {
        "mse": lambda: d**2,
        "half_mse": lambda: d**2 / 2,
        "mae": lambda: abs(d),
        "huber": lambda: np.where(abs(d) <= delta, d**2 / 2, delta * (abs(d) - delta / 2)),
        "epsilon_insensitive": lambda: np.maximum(0, abs(d) - eps),
        "squared_epsilon_insensitive": lambda: np.maximum(0, abs(d) - eps) ** 2,
        "poisson": lambda: np.exp(p) - y * p,
        "binary_cross_entropy": lambda: np.maximum(p, 0) - p * y + np.log1p(np.exp(-abs(p))),
        "hinge": lambda: np.maximum(0, 1 - m),
        "squared_hinge": lambda: np.maximum(0, 1 - m) ** 2,
        "modified_huber": lambda: np.where(m >= -1, np.maximum(0, 1 - m) ** 2, -4 * m),
        "perceptron": lambda: np.maximum(0, -m),
    }
    return np.asarray(table[name]())


def tolerance(dtype: Any) -> float:
    return 3e-6 if dtype == np.float32 else 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 5), (3, 4, 5), (9001,)])
def test_a_value_is_that_of_the_equation(name: str, dtype: Any, shape: Any) -> None:
    p, y = pair(name, shape, dtype)
    want = by_definition(name, p.astype(np.float64), y.astype(np.float64))
    each, _ = function(name)(p, y, reduction="none", **ELEMENT[name][0])
    assert each.dtype == dtype
    np.testing.assert_allclose(each, want, rtol=tolerance(dtype), atol=tolerance(dtype))
    for reduction, total in (("sum", want.sum()), ("mean", want.mean())):
        value, gradient = function(name)(p, y, reduction=reduction, **ELEMENT[name][0])
        assert isinstance(value, float)
        assert value == pytest.approx(total, rel=tolerance(dtype))
        assert (gradient.shape, gradient.dtype) == (p.shape, p.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_the_slope_of_the_value(name: str) -> None:
    p, y = pair(name, 400, np.float64, seed=3)
    _, gradient = function(name)(p, y, reduction="none", **ELEMENT[name][0])
    h = 1e-5
    up, down = (function(name)(p + s, y, reduction="none", **ELEMENT[name][0])[0] for s in (h, -h))
    left, right = (function(name)(p + s, y, reduction="none", **ELEMENT[name][0])[1] for s in (-h, h))
    smooth = abs(left - right) < 1e-2  # no kink in between
    assert smooth.mean() > 0.9
    np.testing.assert_allclose(gradient[smooth], ((up - down) / (2 * h))[smooth], rtol=1e-5, atol=1e-7)
    for reduction, factor in (("sum", 1.0), ("mean", 1 / 400)):
        scaled = function(name)(p, y, reduction=reduction, **ELEMENT[name][0])[1]
        np.testing.assert_allclose(scaled, gradient * factor, rtol=1e-14)


TORCH: dict[str, Callable[[Any, Any, str], Any]] = {
    "mse": lambda p, y, r: _torch().mse_loss(p, y, reduction=r),
    "mae": lambda p, y, r: _torch().l1_loss(p, y, reduction=r),
    "huber": lambda p, y, r: _torch().huber_loss(p, y, delta=0.7, reduction=r),
    "poisson": lambda p, y, r: _torch().poisson_nll_loss(p, y, log_input=True, reduction=r),
    "binary_cross_entropy": lambda p, y, r: _torch().binary_cross_entropy_with_logits(p, y, reduction=r),
    "hinge": lambda p, y, r: _reduced((1 - y * p).clamp(min=0), r),
    "squared_hinge": lambda p, y, r: _reduced((1 - y * p).clamp(min=0) ** 2, r),
}


def _torch() -> Any:
    import torch

    return torch.nn.functional


def _reduced(x: Any, reduction: str) -> Any:
    return {"mean": x.mean, "sum": x.sum, "none": lambda: x}[reduction]()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", list(TORCH))
def test_torch_has_the_same_value_and_gradient(name: str, reduction: str, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    p, y = pair(name, (50, 7), dtype)
    value, gradient = function(name)(p, y, reduction=reduction, **ELEMENT[name][0])
    tp = torch.from_numpy(p.copy()).requires_grad_()
    theirs = TORCH[name](tp, torch.from_numpy(y), reduction)
    theirs.sum().backward()
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=3 * tolerance(dtype), atol=tolerance(dtype))
    np.testing.assert_allclose(gradient, tp.grad.numpy(), rtol=3 * tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_element", [False, True])
def test_a_weight_counts_as_so_many_repetitions(name: str, per_element: bool) -> None:
    p, y = pair(name, (300, 3), np.float64)
    weight = np.random.default_rng(1).integers(0, 4, p.shape if per_element else len(p))
    flat = weight if per_element else np.repeat(weight[:, None], 3, 1)
    repeated = [np.repeat(a.ravel(), flat.ravel()) for a in (p, y)]
    for reduction in ("mean", "sum"):
        value, gradient = function(name)(p, y, sample_weight=weight, reduction=reduction, **ELEMENT[name][0])
        want, _ = function(name)(*repeated, reduction=reduction, **ELEMENT[name][0])
        assert value == pytest.approx(want, rel=1e-13)
        bare = function(name)(p, y, reduction="none", **ELEMENT[name][0])[1]
        np.testing.assert_allclose(gradient, bare * flat / (flat.sum() if reduction == "mean" else 1), rtol=1e-14)


# ---- softmax


def logits_and_labels(n: int, classes: int, dtype: Any, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    soft = rng.random((n, classes)) + 0.01
    return (
        (3 * rng.standard_normal((n, classes))).astype(dtype),
        rng.integers(0, classes, n),
        (soft / soft.sum(1, keepdims=True)).astype(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (50, 10), (3, 63), (7, 64), (5, 1000), (2, 5003), (600, 17)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softmax_cross_entropy_is_torchs(
    dtype: Any, n: int, classes: int, soft: bool, smoothing: float, weighted: bool, reduction: str
) -> None:
    torch = pytest.importorskip("torch")
    x, hard, distribution = logits_and_labels(n, classes, dtype)
    labels = distribution if soft else hard
    weight = np.random.default_rng(2).random(classes).astype(dtype) + dtype(0.1) if weighted else None
    value, gradient = losses.softmax_cross_entropy(
        x, labels, label_smoothing=smoothing, class_weight=weight, reduction=reduction
    )
    tx = torch.from_numpy(x.copy()).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        tx,
        torch.from_numpy(labels),
        weight=None if weight is None else torch.from_numpy(weight),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    theirs.sum().backward()
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=rtol)
    np.testing.assert_allclose(gradient, tx.grad.numpy(), rtol=rtol, atol=rtol * 0.1 * abs(gradient).max())


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_softmax_cross_entropy_is_its_slope(soft: bool) -> None:
    x, hard, distribution = logits_and_labels(6, 9, np.float64)
    how = {
        "label_smoothing": 0.2,
        "class_weight": np.linspace(0.5, 2, 9),
        "sample_weight": np.arange(6),
        "reduction": "mean",
    }
    labels = distribution if soft else hard
    _, gradient = losses.softmax_cross_entropy(x, labels, **how)
    h = 1e-6
    for i, c in itertools.product(range(6), range(9)):
        up, down = x.copy(), x.copy()
        up[i, c] += h
        down[i, c] -= h
        slope = (
            losses.softmax_cross_entropy(up, labels, **how)[0] - losses.softmax_cross_entropy(down, labels, **how)[0]
        )
        assert gradient[i, c] == pytest.approx(slope / (2 * h), abs=1e-8)


def test_a_row_weight_counts_as_so_many_repetitions() -> None:
    x, hard, soft = logits_and_labels(40, 5, np.float64)
    weight = np.random.default_rng(0).integers(0, 4, 40)
    classes = np.linspace(0.2, 3, 5)
    for labels, of_class in itertools.product((hard, soft), (None, classes)):
        value, gradient = losses.softmax_cross_entropy(x, labels, sample_weight=weight, class_weight=of_class)
        rows = np.repeat(np.arange(40), weight)
        want, repeated = losses.softmax_cross_entropy(x[rows], labels[rows], class_weight=of_class)
        assert value == pytest.approx(want, rel=1e-13)
        added = np.zeros_like(gradient)
        np.add.at(added, rows, repeated)
        np.testing.assert_allclose(gradient, added, rtol=1e-12, atol=1e-17)


def test_a_hard_label_is_a_distribution_with_a_one() -> None:
    x, hard, _ = logits_and_labels(30, 6, np.float64)
    one = np.eye(6)[hard]
    got, want = losses.softmax_cross_entropy(x, hard), losses.softmax_cross_entropy(x, one)
    assert got[0] == pytest.approx(want[0], rel=1e-14)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-17)


# ---- extremes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_logits_of_any_size_are_stable(dtype: Any, size: float) -> None:
    x = np.array([[size, -size, 0], [-size, -size, -size]], dtype)
    value, gradient = losses.softmax_cross_entropy(x, np.array([1, 2]), reduction="none")
    np.testing.assert_allclose(value, [2 * size, np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[1, -1, 0], [1 / 3, 1 / 3, -2 / 3]], rtol=1e-6)
    p, y = np.array([size, size, -size, -size], dtype), np.array([1, 0, 1, 0], dtype)
    value, gradient = losses.binary_cross_entropy(p, y, reduction="none")
    np.testing.assert_allclose(value, [0, size, size, 0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0, 1, -1, 0])


def test_a_class_that_is_ruled_out_has_no_slope() -> None:
    x = np.array([[0.0, -np.inf, 1.0]])
    value, gradient = losses.softmax_cross_entropy(x, np.array([2]))
    assert value == pytest.approx(np.log1p(np.exp(-1)))
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_passed_on(name: str) -> None:
    p, y = pair(name, 5, np.float32)
    p[2] = np.nan
    value, gradient = function(name)(p, y, reduction="none", **ELEMENT[name][0])
    assert np.isnan(value).tolist() == [False, False, True, False, False]
    assert np.isnan(gradient)[[0, 1, 3, 4]].sum() == 0
    assert np.isnan(function(name)(p, y, **ELEMENT[name][0])[0])


def test_nan_is_passed_on_by_softmax() -> None:
    x, hard, _ = logits_and_labels(4, 70, np.float32)
    x[1, 3] = np.nan
    value, gradient = losses.softmax_cross_entropy(x, hard, reduction="none")
    assert np.isnan(value).tolist() == [False, True, False, False]
    assert np.isnan(gradient).any(1).tolist() == [False, True, False, False]


def test_nothing_to_average_is_refused_and_nothing_to_add_is_zero() -> None:
    empty = np.empty(0)
    assert losses.mse(empty, empty, reduction="sum")[0] == 0
    with pytest.raises(ValueError, match="at least one element"):
        losses.mse(empty, empty)


# ---- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*NAMES, "softmax", "soft", "penalty"])
def test_bits_do_not_depend_on_instruction_set_threads_or_out(name: str, dtype: Any) -> None:
    def run(out: bool) -> tuple[Any, Array]:
        if name in ELEMENT:
            p, y = pair(name, (203, 601), dtype)
            weight = np.random.default_rng(5).random(203)
            where = np.empty_like(p) if out else None
            return function(name)(p, y, sample_weight=weight, out=where, **ELEMENT[name][0])
        if name == "penalty":
            p, _ = pair("mse", 123_457, dtype)
            value, g = losses.l1_penalty(p, 0.1)
            return value + losses.l2_penalty(p, 0.3, out=g)[0], g
        x, hard, distribution = logits_and_labels(251, 501, dtype)
        where = np.empty_like(x) if out else None
        labels = hard if name == "softmax" else distribution
        return losses.softmax_cross_entropy(x, labels, label_smoothing=0.1 * (name == "soft"), out=where)

    with engine("baseline", 1):
        want = run(False)
    for isa, threads in itertools.product(fusedopt.isas(), (1, 2, 3, 7)):
        with engine(isa, threads):
            value, gradient = run(True)
        assert value == want[0], (isa, threads)
        assert_same_bits(gradient, want[1], f"{isa} {threads}")


# ---- arguments


def test_inputs_of_any_layout_are_taken_and_left_alone() -> None:
    p, y = pair("mse", (40, 30), np.float32)
    want = losses.mse(p, y)
    odd_p, odd_y = np.asfortranarray(p), np.repeat(y, 2, 1)[:, ::2]
    kept = odd_p.copy(), odd_y.copy()
    value, gradient = losses.mse(odd_p, odd_y)
    assert value == want[0]
    assert_same_bits(np.ascontiguousarray(gradient), want[1])
    assert_same_bits(odd_p, kept[0])
    assert_same_bits(odd_y, kept[1])
    packed = np.zeros(5, np.dtype([("a", "i1"), ("x", "f4")]))["x"]  # misaligned
    assert losses.mse(packed, packed)[0] == 0


def test_out_receives_the_gradient() -> None:
    p, y = pair("mae", (4, 5), np.float64)
    out = np.full_like(p, 7.0)
    _, gradient = losses.mae(p, y, out=out)
    assert gradient is out
    assert_same_bits(out, losses.mae(p, y)[1])


X, Y = np.zeros((2, 3)), np.ones((2, 3))
REFUSED: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("prediction: expected a NumPy array of float64 or float32, got list", TypeError, lambda: losses.mse([1.0], Y)),
    ("prediction: expected float64 or float32, got int64", TypeError, lambda: losses.mse(np.arange(6), Y)),
    ("prediction: expected float64 or float32, got <f2", TypeError, lambda: losses.mse(X.astype("f2"), Y)),
    ("prediction: expected float64 or float32, got >f8", TypeError, lambda: losses.mse(X.astype(">f8"), Y)),
    ("prediction: expected a NumPy array", TypeError, lambda: losses.mse(np.ma.masked_array(X), Y)),  # type: ignore[no-untyped-call]
    ("target: expected dtype float64 like prediction, got float32", TypeError, lambda: losses.mse(X, Y.astype("f4"))),
    ("target: expected shape (2, 3), got (2, 2)", ValueError, lambda: losses.mse(X, Y[:, :2])),
    ("out: expected shape (2, 3), got (6,)", ValueError, lambda: losses.mse(X, Y, out=np.empty(6))),
    ("out: expected dtype float64", TypeError, lambda: losses.mse(X, Y, out=np.empty((2, 3), "f4"))),
    ("out: expected a C-contiguous array", ValueError, lambda: losses.mse(X, Y, out=np.empty((3, 2)).T)),
    ("out: shares memory with an input", ValueError, lambda: losses.mse(X, Y, out=X)),
    ("out: expected a NumPy array", TypeError, lambda: losses.mse(X, Y, out=[0.0])),  # type: ignore[arg-type]
    ("reduction: expected 'mean', 'sum' or 'none', got 'avg'", ValueError, lambda: losses.mse(X, Y, reduction="avg")),
    ("sample_weight: expected finite numbers >= 0", ValueError, lambda: losses.mse(X, Y, sample_weight=[1.0, -1.0])),
    ("sample_weight: expected finite", ValueError, lambda: losses.mse(X, Y, sample_weight=[1.0, np.nan])),
    ("sample_weight: expected one for each row or element", ValueError, lambda: losses.mse(X, Y, sample_weight=[1.0])),
    ("sample_weight: expected a positive sum", ValueError, lambda: losses.mse(X, Y, sample_weight=[0, 0])),
    ("sample_weight: expected numbers", TypeError, lambda: losses.mse(X, Y, sample_weight=["a", "b"])),
    ("delta: expected a number > 0, got 0", ValueError, lambda: losses.huber(X, Y, delta=0)),
    ("epsilon: expected a number >= 0, got -1", ValueError, lambda: losses.epsilon_insensitive(X, Y, epsilon=-1)),
    (
        "target: expected numbers in [0, 1], got 2.0 at flat index 4",
        ValueError,
        lambda: losses.binary_cross_entropy(X, np.array([[0, 1, 0.5], [0, 2, 0]])),
    ),
    ("target: expected -1 or 1, got 0.0 at flat index 0", ValueError, lambda: losses.hinge(X, X)),
    ("target: expected -1 or 1, got nan at flat index 0", ValueError, lambda: losses.squared_hinge(X, X * np.nan)),
    ("target: expected numbers >= 0, got -1.0", ValueError, lambda: losses.poisson(X, -Y)),
    ("logits: expected two dimensions, got shape (3,)", ValueError, lambda: _softmax(np.zeros(3), np.array([1]))),
    ("labels: expected integers in [0, 3), got 3 at index 1", ValueError, lambda: _softmax(X, np.array([0, 3]))),
    ("labels: expected integers in [0, 3), got -1 at index 0", ValueError, lambda: _softmax(X, np.array([-1, 0]))),
    ("labels: expected contiguous int64 of shape (2,)", ValueError, lambda: _softmax(X, np.array([1]))),
    ("labels: expected a NumPy array of integers", TypeError, lambda: _softmax(X, [0, 1])),
    ("labels: expected probabilities >= 0", ValueError, lambda: _softmax(X, -Y)),
    ("targets: expected shape (2, 3), got (2, 2)", ValueError, lambda: _softmax(X, Y[:, :2])),
    ("label_smoothing: expected a number in [0, 1], got 2", ValueError, lambda: _softmax(X, Y, label_smoothing=2)),
    ("class_weight: expected shape (3,), got (2,)", ValueError, lambda: _softmax(X, Y, class_weight=[1, 2])),
    (
        "class_weight: expected shape (3,), got (2,)",
        ValueError,
        lambda: _softmax(X, np.array([0, 1]), class_weight=[1, 2]),
    ),
    ("sample_weight: expected shape (2,), got (3,)", ValueError, lambda: _softmax(X, Y, sample_weight=[1, 2, 3])),
    ("alpha: expected a number >= 0, got -1", ValueError, lambda: losses.l2_penalty(X, -1)),
    ("weights: expected float64 or float32, got int64", TypeError, lambda: losses.l1_penalty(np.arange(3), 1)),
]


def _softmax(*args: Any, **kwargs: Any) -> Any:
    return losses.softmax_cross_entropy(*args, **kwargs)


@pytest.mark.parametrize(("message", "kind", "call"), REFUSED, ids=[m for m, _, _ in REFUSED])
def test_what_does_not_fit_is_refused(message: str, kind: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_refusal_writes_nothing() -> None:
    out = np.full((2, 3), 7.0)
    bad = np.array([[1, 1, 1], [1, 1, 0.5]])
    with pytest.raises(ValueError, match="flat index 5"):
        losses.hinge(X, bad, out=out)
    with pytest.raises(ValueError, match="index 1"):
        losses.softmax_cross_entropy(X, np.array([0, 9]), out=out)
    assert (out == 7).all()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: the array is read-only"):
        losses.mse(X, Y, out=out)


# ---- penalties


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_and_their_gradients(dtype: Any) -> None:
    w = np.random.default_rng(0).standard_normal((70, 130)).astype(dtype)
    w[0, :5] = 0
    wide = w.astype(np.float64)
    value, gradient = losses.l1_penalty(w, 0.3)
    assert value == pytest.approx(0.3 * abs(wide).sum(), rel=tolerance(dtype))
    np.testing.assert_allclose(gradient, 0.3 * np.sign(wide), rtol=1e-6)
    value, gradient = losses.l2_penalty(w, 0.3)
    assert value == pytest.approx(0.15 * (wide**2).sum(), rel=tolerance(dtype))
    np.testing.assert_allclose(gradient, 0.3 * wide, rtol=1e-6)
    before = np.ones_like(w)
    _, added = losses.l2_penalty(w, 0.3, out=before)
    assert added is before
    np.testing.assert_allclose(added, 1 + 0.3 * wide, rtol=1e-6, atol=1e-7)


# ---- torch's further options


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_may_be_ignored_and_logits_may_be_sequences(reduction: str, weighted: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((4, 5, 3)), rng.integers(0, 3, (4, 5))
    labels[rng.random((4, 5)) < 0.3] = -100
    x[labels == -100] = np.nan  # what is ignored may be anything
    classes = np.array([0.5, 1.0, 2.0]) if weighted else None
    value, gradient = losses.softmax_cross_entropy(
        x, labels, ignore_index=-100, class_weight=classes, label_smoothing=0.1, reduction=reduction
    )
    t = torch.tensor(np.nan_to_num(x), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        t.movedim(-1, 1), torch.tensor(labels), None if classes is None else torch.tensor(classes), ignore_index=-100,
        label_smoothing=0.1, reduction=reduction,
    )  # fmt: skip
    expected.sum().backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, t.grad.numpy(), rtol=1e-12, atol=1e-14)
    flat, slope = losses.softmax_cross_entropy(
        x.reshape(-1, 3), labels.ravel(), ignore_index=-100, class_weight=classes, label_smoothing=0.1,
        reduction=reduction, out=np.empty((20, 3)),
    )  # fmt: skip
    np.testing.assert_array_equal(np.ravel(value), np.ravel(flat))
    np.testing.assert_array_equal(gradient.reshape(-1, 3), slope)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("pos_weight", [3.0, [0.0, 1.0, 2.5]], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_positives_may_have_a_weight(reduction: str, pos_weight: Any, hard: bool) -> None:
    torch = pytest.importorskip("torch")
    p, y = pair("binary_cross_entropy", (50, 3), np.float64)
    y = y.round() if hard else y
    value, gradient = losses.binary_cross_entropy(p, y, pos_weight=pos_weight, reduction=reduction)
    t = torch.tensor(p, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        t, torch.tensor(y), pos_weight=torch.tensor(pos_weight, dtype=torch.float64), reduction=reduction
    )
    expected.sum().backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, t.grad.numpy(), rtol=1e-11, atol=1e-16)
    rows = np.linspace(0, 2, 50)
    weighted, _ = losses.binary_cross_entropy(p, y, pos_weight=pos_weight, sample_weight=rows)
    each, _ = losses.binary_cross_entropy(p, y, pos_weight=pos_weight, reduction="none")
    assert weighted == pytest.approx((each * rows[:, None]).sum() / (3 * rows.sum()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.softmax_cross_entropy(np.ones((2, 3)), np.array([7, 7]), ignore_index=7), "labels: all are 7"),
        (lambda: losses.softmax_cross_entropy(np.ones((2, 3)), np.ones((2, 3)), ignore_index=7), "ignore_index"),
        (lambda: losses.softmax_cross_entropy(np.ones((2, 4, 3)), np.ones(2, int)), r"labels: expected shape \(2, 4\)"),
        (lambda: losses.binary_cross_entropy(np.ones(3), np.ones(3), pos_weight=[1, 2]), "pos_weight: expected a"),
        (lambda: losses.binary_cross_entropy(np.ones(3), np.ones(3), pos_weight=-1), "pos_weight: expected finite"),
        (lambda: losses.binary_cross_entropy(np.ones(3), 2 * np.ones(3), pos_weight=1), "target: expected prob"),
    ],
)  # fmt: skip
def test_further_options_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_losses_need_no_import_of_their_own() -> None:
    program = "import fusedopt; print(fusedopt.losses.mae.__module__)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "fusedopt.losses"
