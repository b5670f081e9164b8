"""What the in-place functions refuse: the exception, a message that names the argument, and nothing written before.
Every case runs on one array and as the last of three, where an early write would be visible. Options:
test_numpy_hyperparameters."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    F32,
    F64,
    FORMATS,
    Array,
    Options,
    Problem,
    apply,
    apply_many,
    assert_same_problem,
    filled,
    is_scalar_state,
    label,
    option_sets,
    problem,
    two_option_sets,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


def array_names(rule: Any, options: Options) -> list[str]:
    now = problem(rule, options, FORMATS["f64"], 1, warm=0)
    return ["param", "grad", *(n for n in now.state if not is_scalar_state(rule, n))]


def get(p: Problem, name: str) -> Any:
    return getattr(p, name) if name in ("param", "grad") else p.state[name]


def put(p: Problem, name: str, value: Any) -> Problem:
    if name in ("param", "grad"):
        return p._replace(**{name: value})
    return p._replace(state={**p.state, name: value})


def refused(
    rule: Any,
    options: Options,
    name: str,
    bad: Callable[[Problem], Any],
    error: Any,
    shape: Any = (4, 3),
    also: str = "",
) -> None:
    """`bad` turns a valid problem into the wrong argument; it may share memory with the problem's arrays."""
    now = problem(rule, options, FORMATS["f64"], shape)
    wrong = put(now, name, bad(now))
    before = now.copy()
    names = f"({name}|{also})" if also else name
    with pytest.raises(error, match=rf"\b{names}\b"):
        apply(rule, wrong.param, wrong.grad, wrong.state, wrong.step, options)
    assert_same_problem(now, before, "written before the refusal:")

    many = [problem(rule, options, FORMATS["f64"], shape, seed=i) for i in range(3)]
    wrong_many = [*many[:2], put(many[2], name, bad(many[2]))]
    before_many = [p.copy() for p in many]
    with pytest.raises(error, match=rf"\b{names}\[2\]"):
        apply_many(rule, wrong_many, options)
    for got, want in zip(many, before_many, strict=True):
        assert_same_problem(got, want, "written before the refusal:")


def read_only(array: Array) -> Array:
    view = array[...]
    view.flags.writeable = False
    return view


def misaligned(array: Array) -> Array:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    out = raw.view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def odd_stride(array: Array) -> Array:
    """A field of a packed record: aligned start, but the stride is not a multiple of the item size."""
    records = np.zeros(array.shape, np.dtype([("x", array.dtype), ("tag", np.uint8)]))
    records["x"] = array
    return records["x"]  # type: ignore[no-any-return]


@every_rule
def test_read_only_parameters_and_states_are_refused(rule: Any) -> None:
    for options in two_option_sets(rule):
        for name in array_names(rule, options):
            if name != "grad":
                refused(rule, options, name, lambda p, name=name: read_only(get(p, name)), ValueError)


@every_rule
def test_misaligned_arrays_are_refused(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    for name in array_names(rule, options):
        for make in (misaligned, odd_stride):
            refused(rule, options, name, lambda p, name=name, make=make: make(get(p, name)), ValueError)


@every_rule
def test_masked_arrays_are_refused_even_without_a_mask(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    for name in array_names(rule, options):
        refused(rule, options, name, lambda p, name=name: np.ma.masked_array(get(p, name)), TypeError)


@pytest.mark.parametrize("dtype", ["i8", "u2", "c16", "?", "O", "g", "S8", "V8", "M8[s]", "e", "f"])
def test_wrong_dtypes_are_refused(dtype: str) -> None:
    for rule in (RULES["SGD"], RULES["Adam"], RULES["RMSprop"]):
        options = two_option_sets(rule)[1]
        for name in array_names(rule, options):
            # "e" and "f" are dtypes that exist, in a combination with float64 that does not: either side may be named
            refused(
                rule, options, name, lambda p: np.zeros((4, 3), dtype), TypeError, also=".*" if dtype in "ef" else ""
            )


@every_rule
def test_other_byte_orders_are_refused(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    for name in array_names(rule, options):
        refused(rule, options, name, lambda p, name=name: get(p, name).astype(F64.newbyteorder()), TypeError)


@every_rule
@pytest.mark.parametrize("shape", [(12,), (3, 4), (4, 1), (1, 3), (4, 3, 1), (3,), (), (4, 2), (5, 3), (0, 3)], ids=str)
def test_other_shapes_are_refused_even_where_they_would_broadcast(rule: Any, shape: tuple[int, ...]) -> None:
    options = two_option_sets(rule)[1]
    for name in array_names(rule, options):
        if name != "param":
            refused(rule, options, name, lambda p: np.zeros(shape), ValueError)
    refused(rule, options, "param", lambda p: np.zeros(shape), ValueError, also="grad")


NOT_ARRAYS = [None, 1.0, "weights", object(), b"12345678", np.float64(1), {"a": 1}, memoryview(b"12345678")]


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda v: type(v).__name__)
def test_things_that_are_no_arrays_are_refused(value: Any) -> None:
    for rule in (RULES["SGD"], RULES["AdamW"]):
        for name in array_names(rule, {}):
            refused(rule, {}, name, lambda p: value, TypeError)


def test_a_list_of_numbers_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"\bparam\[0\]"):
        fusedopt.sgd_([1.0, 2.0], [np.ones(1), np.ones(1)])
    with pytest.raises(TypeError, match=r"\bgrad\[0\]"):
        fusedopt.sgd_([np.ones(1), np.ones(1)], [1.0, 2.0])


# ---- overlap


@every_rule
def test_arguments_that_share_memory_are_refused(rule: Any) -> None:
    """Any two operands: the same array, a part of it, or shifted by one element."""
    options = two_option_sets(rule)[1]
    names = array_names(rule, options)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            refused(rule, options, second, lambda p, first=first: get(p, first), ValueError, also=first)
            refused(rule, options, second, lambda p, first=first: get(p, first)[::-1], ValueError, also=first)


@every_rule
def test_a_shift_by_one_element_is_an_overlap(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    names = array_names(rule, options)
    for first, second in pairwise(names):
        for n in (8, 100):
            base = np.ones(n + 1)
            now = problem(rule, options, FORMATS["f64"], n)
            wrong = put(put(now, first, base[1:]), second, base[:-1])
            with pytest.raises(ValueError, match=rf"\b({first}|{second})\b"):
                apply(rule, wrong.param, wrong.grad, wrong.state, wrong.step, options)
            assert (base == 1).all()


def test_the_last_and_the_first_element_shared_are_an_overlap() -> None:
    base = np.ones(19)
    with pytest.raises(ValueError, match=r"\b(param|grad)\b"):
        fusedopt.sgd_(base[:10], base[9:])
    with pytest.raises(ValueError, match=r"\b(param|grad)\b"):
        fusedopt.sgd_(base[9:], base[:10])
    assert (base == 1).all()


def test_overlap_among_the_arrays_of_a_sequence_is_refused() -> None:
    base = np.ones(12)
    zeros = [np.zeros(6) for _ in range(9)]
    cases: list[tuple[list[Array], list[Array], list[Array]]] = [
        ([base[:6], base[:6]], zeros[:2], zeros[2:4]),  # one parameter twice
        ([base[:6], base[5:11]], zeros[:2], zeros[2:4]),
        ([zeros[0], zeros[1]], zeros[2:4], [base[:6], base[3:9]]),  # two states
        ([base[:6], zeros[0]], [zeros[1], base[2:8]], zeros[2:4]),  # a parameter and the gradient of another
        ([zeros[0], zeros[1]], [base[2:8], zeros[2]], [zeros[3], base[:6]]),  # a gradient and the state of another
        ([base[:6], zeros[0]], zeros[1:3], [zeros[3], base[:6]]),  # a parameter and the state of another
    ]
    for params, grads, buffers in cases:
        before = [a.copy() for a in (base, *zeros)]
        with pytest.raises(ValueError, match=r"\b(param|grad|momentum_buffer)\[[01]\]"):
            fusedopt.sgd_(params, grads, buffers, momentum=0.9)
        for got, want in zip((base, *zeros), before, strict=True):
            np.testing.assert_array_equal(got, want)


def test_an_array_that_overlaps_itself_is_refused_where_it_is_written() -> None:
    sliding = np.lib.stride_tricks.sliding_window_view(np.ones(9), 4, writeable=True)
    repeated = np.lib.stride_tricks.as_strided(np.ones(4), (3, 4), (0, 8))
    zeros = np.zeros
    for bad in (sliding, repeated):
        with pytest.raises(ValueError, match=r"\bparam\b"):
            fusedopt.sgd_(bad, zeros(bad.shape))
        with pytest.raises(ValueError, match=r"\bmomentum_buffer\b"):
            fusedopt.sgd_(zeros(bad.shape), zeros(bad.shape), bad, momentum=0.9)
        assert (bad == 1).all()
        param = zeros(bad.shape)
        fusedopt.sgd_(param, bad, lr=1.0)  # a gradient is only read
        assert (param == -1).all()


def test_overlap_of_views_with_other_strides_is_found() -> None:
    base = np.ones((8, 8))
    flat = base.reshape(-1)
    cases = [
        (base[::2, 1], base[::2, 1]),
        (base[:4], base[3:7]),
        (base, base.T),
        (base[0], base[:, 0]),
        (base[::3, 0], base[::2, 0][:3]),
        (flat[0:9:2], flat[8:17:2]),  # one element: the last and the first
        (flat[8:17:2], flat[0:9:2]),
        (flat[8::-2], flat[8:17:2]),
    ]
    for param, grad in cases:
        with pytest.raises(ValueError, match=r"\b(param|grad)\b"):
            fusedopt.sgd_(param, grad)
    assert (base == 1).all()


# ---- sequences


@every_rule
def test_sequences_of_unequal_length_are_refused(rule: Any) -> None:
    options = two_option_sets(rule)[1]
    names = array_names(rule, options)
    for name in names:
        for change in (lambda x: x[:1], lambda x: [*x, np.zeros(3)], lambda x: []):
            many = [problem(rule, options, FORMATS["f64"], 3, seed=i) for i in range(2)]
            before = [p.copy() for p in many]
            lists = {n: [get(p, n) for p in many] for n in names}
            lists[name] = change(lists[name])
            state = {n: lists.get(n, [p.state[n] for p in many]) for n in many[0].state}
            with pytest.raises(ValueError, match=rf"\b({name}|{'grad' if name == 'param' else name})\b"):
                apply(rule, lists["param"], lists["grad"], state, many[0].step, options)
            for got, want in zip(many, before, strict=True):
                assert_same_problem(got, want)


def test_an_array_beside_a_sequence_is_refused() -> None:
    param, grad = np.zeros(3), np.ones(3)
    for args in ((param, [grad]), ([param], grad)):
        with pytest.raises((TypeError, ValueError), match=r"\bgrad\b"):
            fusedopt.sgd_(*args)
    two = np.ones((2, 3))  # an array does not count as a sequence of rows
    with pytest.raises((TypeError, ValueError), match=r"\bgrad\b"):
        fusedopt.sgd_([np.zeros(3), np.zeros(3)], two)
    assert (param == 0).all()


@every_rule
def test_a_missing_state_is_named(rule: Any) -> None:
    for options in option_sets(rule):
        now = problem(rule, options, FORMATS["f64"], 3)
        before = now.copy()
        for name in now.state:
            rest = {k: v for k, v in now.state.items() if k != name}
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                apply(rule, now.param, now.grad, {**rest}, now.step, options)
            assert_same_problem(now, before)


@every_rule
def test_a_state_that_the_options_do_not_use_is_refused(rule: Any) -> None:
    """Otherwise it would silently stay unchanged."""
    fullest = max((rule.states(filled(rule, options)) for options in option_sets(rule)), key=len)
    now = problem(rule, {}, FORMATS["f64"], 3)
    for name in set(fullest) - set(now.state):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            apply(rule, now.param, now.grad, {**now.state, name: np.zeros(3)}, now.step, {})


# ---- DLPack and files


class OnDevice:
    """Reports another device, but returns a pointer all the same."""

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return np.zeros((4, 3)).__dlpack__()


@pytest.mark.parametrize("device", [(2, 0), (8, 0), (10, 1), (13, 0)], ids=["cuda", "metal", "rocm", "managed"])
def test_arrays_on_another_device_are_refused(device: tuple[int, int]) -> None:
    for rule in (RULES["SGD"], RULES["Adam"]):
        for name in array_names(rule, {}):
            refused(rule, {}, name, lambda p: OnDevice(device), TypeError)


class DLPackOf:
    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_dlpack_objects_are_checked_like_arrays() -> None:
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        refused(RULES["Adam"], {}, name, lambda p: DLPackOf(np.zeros((3, 4))), ValueError)
        refused(RULES["Adam"], {}, name, lambda p: DLPackOf(np.zeros((4, 3), np.int64)), TypeError)
        refused(RULES["Adam"], {}, name, lambda p: DLPackOf(p.param), ValueError, also="param")
        refused(RULES["Adam"], {}, name, lambda p: DLPackOf(misaligned(p.param)), (ValueError, TypeError))


def test_a_read_only_dlpack_object_is_refused_where_it_is_written() -> None:
    for name in ("param", "exp_avg", "exp_avg_sq"):
        refused(
            RULES["Adam"],
            {},
            name,
            lambda p, name=name: DLPackOf(read_only(get(p, name))),
            (ValueError, TypeError, BufferError),
        )


def test_torch_tensors_that_cannot_be_written_are_refused() -> None:
    torch = pytest.importorskip("torch")
    grad = np.ones(3, F32)
    for bad in (
        torch.ones(3, requires_grad=True),  # writing without autograd's knowledge
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to_sparse(),
        torch.ones(3)._neg_view(),
        torch.ones(3, dtype=torch.complex64).conj(),
    ):
        with pytest.raises((TypeError, ValueError, BufferError), match=r"\bparam\b"):
            fusedopt.sgd_(bad, grad)
        with pytest.raises((TypeError, ValueError, BufferError), match=r"\bparam\[1\]"):
            fusedopt.sgd_([torch.ones(3), bad], [grad, grad])
    both = torch.ones(3)
    with pytest.raises(ValueError, match=r"\b(param|grad)\b"):
        fusedopt.sgd_(both, both)
    with pytest.raises(ValueError, match=r"\bparam\b"):
        fusedopt.sgd_(torch.ones(1).expand(3), grad)


def test_a_negated_torch_gradient_is_read_right_or_refused() -> None:
    torch = pytest.importorskip("torch")
    param = np.zeros(3, F32)
    try:
        fusedopt.sgd_(param, torch.ones(3)._neg_view(), lr=1.0)
    except (TypeError, ValueError, BufferError) as error:
        assert "grad" in str(error)  # noqa: PT017
        assert (param == 0).all()
    else:
        assert (param == 1).all()


def test_a_read_only_memory_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.ones(4).tofile(path)
    with pytest.raises(ValueError, match=r"\bparam\b"):
        fusedopt.sgd_(np.memmap(path, F64, "r"), np.ones(4))
    np.testing.assert_array_equal(np.fromfile(path), 1.0)


@pytest.mark.parametrize("isa", fusedopt.isas())
def test_refusals_do_not_depend_on_the_isa(isa: str) -> None:
    fusedopt.set_isa(isa)
    refused(RULES["Adam"], {}, "grad", lambda p: p.param, ValueError, also="param")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, g: fusedopt.Adam(w, lr="0.1"), TypeError, "lr: expected a number, got '0.1'"),
        (lambda w, g: fusedopt.sgd_(w, g, lr="0.1"), TypeError, "lr: expected a number, got '0.1'"),
        (lambda w, g: fusedopt.Adam(w, lr=10**400), ValueError, "lr: expected a value below 1.8e308, got 1000"),
        (lambda w, g: fusedopt.Adam(w, betas=(10**400, 0.9)), ValueError, "betas: expected a value below"),
        (lambda w, g: fusedopt.sgd_(w, g, lr=10**400), ValueError, "lr: expected a value below"),
        (lambda w, g: fusedopt.adam_(w, g, g * 0, g * 0, step=2**63), ValueError, "step: expected 9223372036854775807"),
        (lambda w, g: fusedopt.SGD(w, max_grad_norm=10**400).step(g), ValueError, "max_grad_norm: expected a positive"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_and_too_large_ones_are_refused_by_name(call: Any, error: Any, message: str) -> None:
    w, g = np.ones(3), np.ones(3)
    with pytest.raises(error, match=message):
        call(w, g)
    np.testing.assert_array_equal(w, 1)
