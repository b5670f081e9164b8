"""The elementwise kernels of networks against NumPy, torch and finite differences; bit-identical everywhere."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.special

import fusedopt
from fusedopt import _core
from helpers import assert_same_bits, engine

Array = np.ndarray[Any, Any]
DTYPES = [np.float32, np.float64]
VALUE: dict[int, Any] = {
    0: lambda x: x,
    1: lambda x: np.maximum(x, 0),
    2: np.tanh,
    3: scipy.special.expit,
    4: lambda x: x * scipy.special.ndtr(x),
}
NAMES = {0: "identity", 1: "relu", 2: "tanh", 3: "logistic", 4: "gelu"}


def some(shape: Any, dtype: Any, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def ulps(got: Array, want: Array) -> float:
    spacing = np.spacing(np.maximum(abs(want).astype(got.dtype), np.finfo(got.dtype).tiny)).astype(np.longdouble)
    return float((abs(got - want.astype(np.longdouble)) / spacing).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", NAMES, ids=NAMES.values())
def test_an_activation_is_exact_to_a_few_ulps(activation: int, dtype: Any) -> None:
    x = np.concatenate([np.linspace(-8, 8, 20001), np.geomspace(1e-30, 1e4, 500), -np.geomspace(1e-30, 8, 500), [0]])
    x = x.astype(dtype)[None]
    out = np.empty_like(x)
    _core.layer_forward(activation, x, None, None, out, 1)
    wide = x.astype(np.longdouble)
    if activation == 2:
        want = np.tanh(wide)
    elif activation == 3:
        want = 1 / (1 + np.exp(-wide))
    elif activation == 4 and dtype == np.float64:  # scipy's ndtr is inaccurate there
        mpmath = pytest.importorskip("mpmath")
        out, wide = out[:, ::100], wide[:, ::100]
        with mpmath.workdps(30):
            exact = [mpmath.mpf(float(v)) * mpmath.ncdf(mpmath.mpf(float(v))) for v in wide[0]]
            want = np.array([[np.longdouble(mpmath.nstr(v, 25)) for v in exact]])
    else:
        want = VALUE[activation](x.astype(np.float64))
    assert ulps(out, want) < (6 if activation == 4 else 3)


def test_an_activation_passes_nan_on_and_saturates() -> None:
    x = np.array([[np.nan, 1e4, -1e4]])
    for activation, want in ((1, [1e4, 0]), (2, [1, -1]), (3, [1, 0]), (4, [1e4, 0])):
        out = np.empty_like(x)
        _core.layer_forward(activation, x, None, None, out, 1)
        assert np.isnan(out[0, 0])
        np.testing.assert_array_equal(out[0, 1:], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (32, 10), (700, 3), (300, 260)])
@pytest.mark.parametrize("activation", NAMES, ids=NAMES.values())
def test_forward_adds_the_bias_and_backward_multiplies_by_the_slope(activation: int, shape: Any, dtype: Any) -> None:
    z, bias, delta = some(shape, dtype), some(shape[1], dtype, 1), some(shape, dtype, 2)
    kept, out = np.empty_like(z), np.empty_like(z)
    _core.layer_forward(activation, z, bias, kept, out, 2)
    x = z.astype(np.float64) + bias
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(kept, x, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(out, VALUE[activation](x), rtol=rtol, atol=rtol)
    in_place = z.copy()
    _core.layer_forward(activation, in_place, bias, None, in_place, 2)
    assert_same_bits(in_place, out)
    h = 1e-6
    slope = (VALUE[activation](x + h) - VALUE[activation](x - h)) / (2 * h)
    got, sums = delta.copy(), np.empty_like(bias)
    _core.layer_backward(activation, kept if activation == 4 else out, got, sums, 2)
    away = abs(x) > 1e-4  # from relu's kink
    np.testing.assert_allclose(got[away], (delta * slope)[away], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        sums, got.astype(np.float64).sum(0), rtol=1e-4, atol=1e-4 if dtype == np.float32 else 1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_leaves_out_a_share_and_scales_the_rest(dtype: Any) -> None:
    x = np.ones((400, 500), dtype)
    out = np.empty_like(x)
    _core.dropout(x, out, 0.3, 7, 11, 2)
    assert set(np.unique(out)) == {dtype(0), dtype(1 / 0.7)}
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.004)
    for axis in (0, 1):  # uniform over rows and columns
        assert np.ptp((out == 0).mean(axis)) < 0.2
    again, other_seed, other_stream = (np.empty_like(x) for _ in range(3))
    _core.dropout(x, again, 0.3, 7, 11, 1)
    _core.dropout(x, other_seed, 0.3, 8, 11, 1)
    _core.dropout(x, other_stream, 0.3, 7, 12, 1)
    assert_same_bits(again, out)
    for other in (other_seed, other_stream):
        both = ((other == 0) & (out == 0)).mean()
        assert both == pytest.approx(0.09, abs=0.004)  # independent
    _core.dropout(x, out, 0.0, 7, 11, 1)
    assert (out == 1).all()
    with pytest.raises(ValueError, match=r"probability: expected a number in \[0, 1\)"):
        _core.dropout(x, out, 1.0, 7, 11, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (50, 7), (600, 30)])
def test_batch_norm_is_torchs(shape: Any, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    x, gain, shift, delta = (
        some(shape, dtype) + dtype(3),
        some(shape[1], dtype, 1),
        some(shape[1], dtype, 2),
        some(shape, dtype, 3),
    )
    mean, variance, rate, gain_grad, shift_grad = (np.empty(shape[1], dtype) for _ in range(5))
    normal, out = np.empty_like(x), np.empty_like(x)
    _core.batch_norm_forward(x, gain, shift, mean, variance, rate, normal, out, 1e-5, 2)
    tx, tg, ts = (torch.from_numpy(a.copy()).requires_grad_() for a in (x, gain, shift))
    theirs = torch.nn.functional.batch_norm(tx, None, None, tg, ts, training=True, eps=1e-5)
    theirs.backward(torch.from_numpy(delta))
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if dtype == np.float32 else {"rtol": 1e-8, "atol": 1e-10}
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-4)
    np.testing.assert_allclose(out, theirs.detach().numpy(), **tolerance)
    got = delta.copy()
    _core.batch_norm_backward(got, normal, rate, gain, gain_grad, shift_grad, 2)
    np.testing.assert_allclose(got, tx.grad.numpy(), **tolerance)
    np.testing.assert_allclose(gain_grad, tg.grad.numpy(), **tolerance)
    np.testing.assert_allclose(shift_grad, ts.grad.numpy(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_instruction_set_or_threads(dtype: Any) -> None:
    shape = (900, 77)

    def run() -> list[Array]:
        z, bias, delta = some(shape, dtype), some(shape[1], dtype, 1), some(shape, dtype, 2)
        results: list[Array] = []
        threads = fusedopt.get_num_threads()
        for activation in NAMES:
            kept, out, back, sums = (np.empty_like(z), np.empty_like(z), delta.copy(), np.empty_like(bias))
            _core.layer_forward(activation, z, bias, kept, out, threads)
            _core.layer_backward(activation, kept if activation == 4 else out, back, sums, threads)
            results += [out, back, sums]
        dropped, normal, out = np.empty_like(z), np.empty_like(z), np.empty_like(z)
        _core.dropout(z, dropped, 0.5, 1, 2, threads)
        mean, variance, rate, gain_grad, shift_grad = (np.empty_like(bias) for _ in range(5))
        _core.batch_norm_forward(z, bias, bias, mean, variance, rate, normal, out, 1e-5, threads)
        _core.batch_norm_backward(delta, normal, rate, bias, gain_grad, shift_grad, threads)
        return [*results, dropped, out, variance, rate, delta, gain_grad, shift_grad]

    with engine("baseline", 1):
        want = run()
    for isa, threads in itertools.product(fusedopt.isas(), (1, 2, 5)):
        with engine(isa, threads):
            got = run()
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(a, b, f"{isa}, {threads} threads, {i}")


def test_arrays_that_do_not_fit_are_refused() -> None:
    z, wrong = np.zeros((3, 4)), np.zeros((3, 5))
    with pytest.raises(ValueError, match=r"out: expected shape \(3, 4\), got \(3, 5\)"):
        _core.layer_forward(1, z, None, None, wrong, 1)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(5,\)"):
        _core.layer_forward(1, z, np.zeros(5), None, z, 1)
    with pytest.raises(TypeError, match="bias: expected dtype float64 like z, got float32"):
        _core.layer_forward(1, z, np.zeros(4, np.float32), None, z, 1)
    with pytest.raises(ValueError, match="delta: expected a C-contiguous array"):
        _core.layer_backward(1, z, np.zeros((4, 3)).T, None, 1)
    with pytest.raises(IndexError, match="activation"):
        _core.layer_forward(9, z, None, None, z, 1)
    with pytest.raises(TypeError, match="kept: expected an array"):
        _core.layer_backward(1, None, z, None, 1)
    with pytest.raises(IndexError, match="loss"):
        _core.element_loss(99, z, z, None, None, z, 0.0, 1.0, 1)
