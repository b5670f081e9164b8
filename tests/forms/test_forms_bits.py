"""Every form of every rule is bit-identical for every instruction set, thread count, length, offset, batching, order of
the tensors and front end. test_forms_values checks the values."""

from functools import cache
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
    kept,
    numpy_dtype,
    one_of_each_form,
    optimizer,
    stepped_by_rows,
    train,
)
from helpers import Array, assert_same_bits, engine, offset_empty

FEW = [0, 1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 200, 1000, 1027]
ALL = [*range(201), 1023, 1024, 1025, 4099]
FULL = one_of_each_form()
BOTH = {"ema_decay": 0.9, "l1": 0.01}

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def moved(x: Array, offset: int) -> Array:
    """A copy that starts the given number of elements after a cache line."""
    out = offset_empty(x.size, x.dtype, offset % 67)
    out[:] = x.ravel()
    return out.reshape(x.shape)


def built(case: Case, lengths: list[int], shift: int = 0, **more: Any) -> Any:
    params = [moved(data(n, case.param, n), i + shift) for i, n in enumerate(lengths)]
    opt = optimizer(case, params, **more)
    for i, state in enumerate(opt.state):
        for name, x in state.items():
            if isinstance(x, np.ndarray) and x.ndim:
                state[name] = moved(x, 3 * i + shift)
    return opt


@cache
def trained(case: Case, lengths: tuple[int, ...], extra: bool) -> list[dict[str, Any]]:
    """The expected result: one tensor after the other, baseline, one thread."""
    out = []
    grads = gradients(case, lengths)
    with engine("baseline", 1):
        for i, n in enumerate(lengths):
            opt = optimizer(case, [data(n, case.param, n)], **(BOTH if extra else {}))
            if "stream" in opt.state[0]:
                opt.state[0]["stream"] = i
            train(opt, [[row[i]] for row in grads])
            out += kept(opt)
    return out


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "ema-l1"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_isas_threads_offsets_and_batching_give_the_same_bits(case: Case, extra: bool) -> None:
    lengths = ALL if case in FULL and not extra else FEW
    grads = gradients(case, lengths)
    want = trained(case, tuple(lengths), extra)
    for i, isa in enumerate(fusedopt.isas()):
        opt = built(case, lengths, 5 * i, **(BOTH if extra else {}))
        with engine(isa, 1 + 2 * i):
            train(opt, [[moved(g, 7 * k + i) for k, g in enumerate(row)] for row in grads])
        assert_same(kept(opt), want, f"{isa}")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_tail_is_what_a_longer_array_has_there(case: Case) -> None:
    """An array equals the beginning of a longer one padded with zeros, partial blocks included."""
    for n in range(1, 200, 3):
        whole = {"param": data(n, case.param, n), "grad": data(n, case.grad, n + 1)}
        results = []
        for size in (n, 256):
            p, g = (np.zeros(size, x.dtype) for x in whole.values())
            p[:n], g[:n] = whole.values()
            opt = optimizer(case, [p], **BOTH)
            train(opt, [[g]] * 2)
            results.append(kept(opt)[0])
        for name, x in results[0].items():
            if isinstance(x, np.ndarray) and x.ndim:
                assert_same_bits(x, results[1][name][: x.size], f"{n} {name}")


LARGE = 400_007


@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_arrays_give_the_same_bits_for_1_to_8_threads(case: Case) -> None:
    param, grad = data(LARGE, case.param, 1), data(LARGE, case.grad, 2)
    want = None
    for threads in range(1, 9):
        opt = optimizer(case, [param.copy()], **BOTH)
        with engine(None, threads):
            train(opt, [[grad]])
        want = want or copied(opt)
        assert_same(kept(opt), want, f"{threads} threads")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_order_of_tensors_and_groups_does_not_show(case: Case) -> None:
    lengths = [65, 3, 1000, 64, 0]
    grads = gradients(case, lengths)
    want = trained(case, tuple(lengths), False)
    order = [3, 0, 4, 2, 1]
    for grouped in (False, True):
        params = [data(lengths[i], case.param, lengths[i]) for i in order]
        opt = optimizer(case, [{"params": [p]} for p in params] if grouped else params)
        for i, state in zip(order, opt.state, strict=True):
            if "stream" in state:
                state["stream"] = i
        train(opt, [[row[i] for i in order] for row in grads])
        assert_same(kept(opt), [want[i] for i in order], f"grouped: {grouped}")


@pytest.mark.parametrize("case", [c for c in FULL if c.random], ids=str)
def test_another_seed_step_or_stream_gives_other_bits(case: Case) -> None:
    param, grad = data(4096, case.param, 1), data(4096, case.grad, 2)
    seen = []
    for change in ({}, {"seed": 1}, {"stream": 1}, {"step": 1}):
        opt = optimizer(case, [param.copy()], seed=change.get("seed", 0))
        opt.state[0]["stream"] = change.get("stream", 0)
        if "step" in change:  # results of a rule that uses the step count differ anyway
            opt.step([np.zeros_like(grad)])
        opt.step([grad])
        seen.append(
            np.concatenate(
                [np.atleast_1d(x).ravel().view(np.uint8) for x in kept(opt)[0].values() if isinstance(x, np.ndarray)]
            )
        )
    for other in seen[1:]:
        assert not np.array_equal(seen[0], other)


# ---- layouts


def layouts(x: Array, rows: int = 33, columns: int = 62) -> dict[str, Array]:
    """The same values, of shape (33, 62), in several memory orders."""
    big = np.zeros((rows * 2, columns * 3), x.dtype)
    turned = np.zeros((columns, rows), x.dtype)
    out = {"C": x.copy(), "F": np.asfortranarray(x), "strided": big[::2, ::3], "transposed": turned.T,
           "reversed": np.zeros_like(x)[::-1]}  # fmt: skip
    for view in out.values():
        view[...] = x
    return out


@pytest.mark.parametrize("case", [c for c in FULL if not c.random], ids=str)
def test_layouts_give_the_same_bits(case: Case) -> None:
    param, grad = data((33, 62), case.param, 1), data((33, 62), case.grad, 2)
    want = None
    for name in layouts(param):
        for g in layouts(grad).values():
            opt = optimizer(case, [layouts(param)[name]], **BOTH)
            train(opt, [[g], [g]])
            want = want or copied(opt)
            assert_same(kept(opt), want, name)


@pytest.mark.parametrize("case", [c for c in FULL if c.random], ids=str)
def test_with_random_numbers_the_gradients_layout_does_not_show(case: Case) -> None:
    param, grad = data((33, 62), case.param, 1), data((33, 62), case.grad, 2)
    for name in layouts(param):
        want = None
        for g in layouts(grad).values():
            opt = optimizer(case, [layouts(param)[name]], **BOTH)
            train(opt, [[g], [g]])
            want = want or copied(opt)
            assert_same(kept(opt), want, name)


# ---- torch


def to_torch(x: Array) -> Any:
    import torch

    if x.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(t: Any) -> Array:
    import torch

    t = t.detach()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(numpy_dtype("bfloat16"))  # type: ignore[no-any-return]
    return t.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_gives_the_bits_that_numpy_gives(case: Case) -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    if case.param != case.grad and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties the gradient's type to the parameter's")
    shapes = [(65,), (), (3, 50), (0,), (1000,)]
    first = [data(s, case.param, i) for i, s in enumerate(shapes)]
    grads = gradients(case, shapes)
    # torch keeps NAdam's product in the default dtype, and NumPy's front end in float64.
    torch.set_default_dtype(torch.float64)
    try:
        params = [torch.nn.Parameter(to_torch(p)) for p in first]
        opt = getattr(optim, case.rule.name)(params, **case.options, **BOTH)
        for row in grads:
            for p, g in zip(params, row, strict=True):
                if case.param != case.grad:
                    p.grad_dtype = None
                p.grad = to_torch(g)
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    mine = optimizer(case, [p.copy() for p in first], **BOTH)
    train(mine, grads)
    for p, want in zip(params, kept(mine), strict=True):
        assert_same_bits(to_numpy(p), want["param"], "param")
        for name, x in opt.state[p].items():
            if name == "stream":
                assert x == want[name]
            elif name != "step":
                assert_same_bits(to_numpy(x), want[name], name)
        missing = set(want) - set(opt.state[p]) - {"param", "step"}
        assert not missing


@pytest.mark.parametrize("case", FULL, ids=str)
def test_steps_by_rows_are_the_same_everywhere(case: Case) -> None:
    for options in ({}, {"ema_decay": 0.9, "l1": 0.01, "max_grad_norm": 1.0}):
        with engine("baseline", 1):
            want = copied(stepped_by_rows(case, **options))
        for isa in fusedopt.isas():
            for threads in (2, 8):
                with engine(isa, threads):
                    assert_same(kept(stepped_by_rows(case, **options)), want, f"{isa}, {threads} threads")
