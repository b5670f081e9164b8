"""The in-place functions: return values, untouched arguments, layouts, kinds of array, DLPack. Refusals:
test_numpy_refusals; values: test_reference and test_bits."""

import inspect
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
    Problem,
    apply,
    apply_many,
    assert_same_bits,
    assert_same_problem,
    copies,
    filled,
    function,
    is_scalar_state,
    label,
    moved,
    problem,
    two_option_sets,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


class DLPack:
    """Only the two methods of the protocol, of any object."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.owner.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self.owner.__dlpack_device__()
        return int(kind), int(number)


class OldDLPack(DLPack):
    """An exporter older than DLPack 1.0: no keyword but `stream`."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.owner.__dlpack__()


@every_rule
def test_returns_none_and_keeps_objects_and_gradient(rule: Any) -> None:
    for options in two_option_sets(rule):
        now = problem(rule, options, FORMATS["f32"], 11)
        grad = now.grad.copy()
        addresses = [a.ctypes.data for a in (now.param, now.grad, *now.state.values())]
        before = now.param.copy()
        apply(rule, now.param, now.grad, now.state, now.step, options)  # asserts that None came back
        assert [a.ctypes.data for a in (now.param, now.grad, *now.state.values())] == addresses
        assert_same_bits(now.grad, grad)
        assert (now.param != before).any()


@every_rule
def test_step_and_first_are_asked_for_only_where_the_rule_needs_them(rule: Any) -> None:
    """If the step count does not affect the reference, the function has no such argument."""
    options = moved(rule)

    def reached(step: int) -> float:
        now = problem(rule, options, FORMATS["f64"], 1)
        rule.reference(now.param, now.grad, now.state, step, **filled(rule, options))
        return float(now.param[0])

    accepted = inspect.signature(function(rule)).parameters
    assert ("step" in accepted) == (reached(7) != reached(8))
    assert ("first" in accepted) == (reached(1) != reached(7) == reached(8))


@every_rule
def test_a_sequence_is_its_arrays_one_by_one(rule: Any) -> None:
    for options in two_option_sets(rule):
        shapes: list[tuple[int, ...]] = [(3,), (), (0,), (2, 0, 4), (5, 7), (1, 1), (130,)]
        many = [problem(rule, options, FORMATS["f32"], shape, seed=i) for i, shape in enumerate(shapes)]
        single = [p.copy() for p in many]
        apply_many(rule, many, options)
        for p in single:
            apply(rule, p.param, p.grad, p.state, p.step, options)
        for got, want in zip(many, single, strict=True):
            assert_same_problem(got, want)


def test_lists_and_tuples_are_sequences_and_may_be_empty() -> None:
    param, grad = np.ones(3), np.ones(3)
    fusedopt.sgd_((param,), [grad], lr=0.5)
    np.testing.assert_array_equal(param, 0.5)
    fusedopt.sgd_([], [], lr=0.5)
    fusedopt.adam_((), (), (), (), step=1)


def test_arrays_of_several_formats_in_one_call() -> None:
    many = [problem(RULES["Adam"], {}, fmt, 33, seed=i) for i, fmt in enumerate(FORMATS.values())]
    single = [p.copy() for p in many]
    apply_many(RULES["Adam"], many, {})
    for p in single:
        apply(RULES["Adam"], p.param, p.grad, p.state, p.step, {})
    for got, want, fmt in zip(many, single, FORMATS, strict=True):
        assert_same_problem(got, want, fmt)


def test_one_gradient_may_serve_several_parameters() -> None:
    grad = np.ones(5)
    params = [np.zeros(5), np.zeros(5)]
    fusedopt.sgd_(params, [grad, grad], lr=1.0)
    np.testing.assert_array_equal(params, -1.0)


def test_a_read_only_gradient_is_fine() -> None:
    param, grad = np.zeros(5), np.ones(5)
    grad.flags.writeable = False
    fusedopt.sgd_(param, grad, lr=1.0)
    np.testing.assert_array_equal(param, -1.0)


# ---- layouts

LAYOUTS: dict[str, tuple[tuple[int, ...], Any]] = {  # shape of the base, and the updated view
    "every second": ((40,), lambda a: a[1:-1:2]),
    "backwards": ((33,), lambda a: a[::-1]),
    "backwards by three": ((50,), lambda a: a[-2:3:-3]),
    "transposed": ((7, 9), lambda a: a.T),
    "columns": ((9, 8), lambda a: a[:, 1:7:2]),
    "one column": ((17, 5), lambda a: a[:, 2]),
    "inner block": ((11, 13), lambda a: a[2:-2, 3:-3]),
    "rows backwards": ((11, 13), lambda a: a[::-1, 1:]),
    "axes moved": ((4, 5, 6), lambda a: a.transpose(2, 0, 1)),
    "axes moved, sliced": ((4, 5, 6), lambda a: a.transpose(1, 2, 0)[1:, ::-2, ::3]),
    "channels last": ((2, 6, 5, 3), lambda a: a.transpose(0, 3, 1, 2)),
    "axes of one": ((6, 1, 5, 1), lambda a: a[::2, :, ::-1]),
    "a new axis": ((12,), lambda a: a[::2, None]),
    "one element": ((5, 5), lambda a: a[2:3, 3:4]),
    "zero-d": ((5,), lambda a: a[2:3].reshape(())),
    "nothing": ((5, 5), lambda a: a[2:2, ::2]),
    "long rows": ((3, 300), lambda a: a[:, :257]),
    "fortran": ((8, 9), lambda a: np.asfortranarray(a)),
    "six axes": ((2, 3, 2, 3, 2, 3), lambda a: a.transpose(5, 0, 3, 2, 1, 4)[:, ::-1, 1:]),
}


def laid_out(values: Array, layout: str) -> tuple[Array, Array]:
    """A base array of sevens, and a view of it with the given values."""
    shape, view = LAYOUTS[layout]
    base = np.full(shape, 7, values.dtype)
    if layout == "fortran":
        base = np.asfortranarray(base)
        part = base
    else:
        part = view(base)
    part[...] = values
    return base, part


def outside(base: Array, part: Array) -> Array:
    """The elements of the base outside the view."""
    kept = part.copy()
    part[...] = -1
    rest = base[base != -1].copy()
    part[...] = kept
    return rest


@pytest.mark.parametrize("layout", LAYOUTS)
@every_rule
def test_strided_views_are_updated_in_place_and_nothing_outside_them(rule: Any, layout: str) -> None:
    shape = LAYOUTS[layout][1](np.empty(LAYOUTS[layout][0])).shape
    fmt = FORMATS[list(FORMATS)[list(LAYOUTS).index(layout) % len(FORMATS)]]
    options = two_option_sets(rule)[1]
    plain = problem(rule, options, fmt, shape)
    want = plain.copy()
    apply(rule, want.param, want.grad, want.state, want.step, options)

    bases: list[Array] = []

    def place(values: Array) -> Array:
        base, part = laid_out(values, layout)
        bases.append(base)
        return part

    state = {k: v.copy() if is_scalar_state(rule, k) else place(v) for k, v in plain.state.items()}
    all_strided = Problem(place(plain.param), place(plain.grad), state, plain.step)
    only_param = Problem(place(plain.param), plain.grad.copy(), copies(plain.state), plain.step)
    only_grad = Problem(plain.param.copy(), place(plain.grad), copies(plain.state), plain.step)
    only_state = Problem(plain.param.copy(), plain.grad.copy(), copies(plain.state), plain.step)
    for name, array in plain.state.items():
        if not is_scalar_state(rule, name):
            only_state.state[name] = place(array)
    for mixed in (all_strided, only_param, only_grad, only_state):
        apply(rule, mixed.param, mixed.grad, mixed.state, mixed.step, options)
        assert_same_problem(mixed, want, layout)
    for base in bases:
        part = base if layout == "fortran" else LAYOUTS[layout][1](base)
        assert (outside(base, part) == 7).all()


def test_strided_views_among_many_arrays() -> None:
    rule = RULES["AdamW"]
    plain = [problem(rule, {}, FORMATS["f32"], LAYOUTS[k][1](np.empty(LAYOUTS[k][0])).shape, seed=3) for k in LAYOUTS]
    want = [p.copy() for p in plain]
    for p in want:
        apply(rule, p.param, p.grad, p.state, p.step, {})
    strided = [p._replace(param=laid_out(p.param, k)[1]) for p, k in zip(plain, LAYOUTS, strict=True)]
    apply_many(rule, strided, {})
    for got, expected, layout in zip(strided, want, LAYOUTS, strict=True):
        assert_same_problem(got, expected, layout)


def test_a_large_strided_view_gives_the_same_bits_with_threads() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((901, 1201)).astype(F32)
    grad = rng.standard_normal((600, 900)).astype(F32).T  # another order of axes than the parameter's
    param = base[:900, 1::2]
    want = np.ascontiguousarray(param)
    hidden = base[:, 0::2].copy()
    states = [np.zeros_like(want) for _ in range(4)]
    fusedopt.set_num_threads(1)
    fusedopt.adam_(want, np.ascontiguousarray(grad), states[0], states[1], step=1)
    fusedopt.set_num_threads(4)
    fusedopt.adam_(param, grad, states[2], states[3], step=1)
    assert_same_bits(np.ascontiguousarray(param), want)
    assert_same_bits(states[2], states[0])
    assert_same_bits(base[:, 0::2].copy(), hidden)


@every_rule
def test_a_broadcast_gradient_is_read_with_stride_zero(rule: Any) -> None:
    for part in (np.float32(0.5), np.arange(6, dtype=F32), np.arange(5, dtype=F32)[:, None]):
        plain = problem(rule, {}, FORMATS["f32"], (5, 6))
        view = np.broadcast_to(part, (5, 6))
        want = plain._replace(grad=np.ascontiguousarray(view)).copy()
        apply(rule, want.param, want.grad, want.state, want.step, {})
        apply(rule, plain.param, view, plain.state, plain.step, {})
        assert_same_problem(plain._replace(grad=want.grad), want)


def test_a_field_of_a_structured_array_is_a_strided_view() -> None:
    records = np.zeros(9, np.dtype([("weight", F64), ("count", np.int64), ("slope", F64)]))
    records["weight"], records["slope"], records["count"] = 1.0, 0.25, 7
    fusedopt.sgd_(records["weight"], records["slope"], lr=1.0)
    assert (records["weight"] == 0.75).all()
    assert (records["count"] == 7).all()


def test_interleaved_views_do_not_overlap() -> None:
    base = np.arange(20, dtype=F64)
    fusedopt.sgd_([base[0::4], base[2::4]], [base[1::4], base[3::4]], lr=1.0)
    np.testing.assert_array_equal(base.reshape(5, 4), [[-1, 4 * i + 1, -1, 4 * i + 3] for i in range(5)])


@pytest.mark.parametrize("columns", [3, 200])
def test_the_columns_of_a_matrix_do_not_overlap(columns: int) -> None:
    matrix, grads = np.ones((5, columns)), np.ones((5, columns))
    fusedopt.sgd_([matrix[:, i] for i in range(columns)], [grads[:, i] for i in range(columns)], lr=0.5)
    assert (matrix == 0.5).all()
    fusedopt.sgd_([DLPack(matrix[:, i]) for i in range(columns)], [grads[:, i] for i in range(columns)], lr=0.5)
    assert (matrix == 0.0).all()


@every_rule
def test_neighbours_in_one_buffer_do_not_overlap(rule: Any) -> None:
    """Parameter, gradient and states side by side, as in one flat buffer."""
    plain = problem(rule, {}, FORMATS["f64"], 9)
    want = plain.copy()
    apply(rule, want.param, want.grad, want.state, want.step, {})
    names = [n for n in plain.state if not is_scalar_state(rule, n)]
    buffer = np.concatenate([plain.param, plain.grad, *(plain.state[n] for n in names)])
    parts = np.split(buffer, len(names) + 2)
    got = Problem(parts[0], parts[1], {**copies(plain.state), **dict(zip(names, parts[2:], strict=True))}, plain.step)
    apply(rule, got.param, got.grad, got.state, got.step, {})
    assert_same_problem(got, want)


# ---- kinds of array


@every_rule
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_zero_dimensional_and_empty_arrays(rule: Any, shape: tuple[int, ...]) -> None:
    for fmt in FORMATS.values():
        now = problem(rule, {}, fmt, shape)
        want = problem(rule, {}, fmt, shape)._replace()
        flat = Problem(want.param.reshape(-1), want.grad.reshape(-1), copies(want.state), want.step)
        for name in flat.state:
            if not is_scalar_state(rule, name):
                flat.state[name] = flat.state[name].reshape(-1)
        apply(rule, now.param, now.grad, now.state, now.step, {})
        apply(rule, flat.param, flat.grad, flat.state, flat.step, {})
        assert now.param.shape == shape
        assert_same_bits(now.param.reshape(-1), flat.param)


def test_a_memory_map_is_updated_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.arange(10, dtype=F32).tofile(path)
    weights = np.memmap(path, F32, "r+")
    grad = np.memmap(path, F32, "r", shape=(10,)).copy()
    fusedopt.sgd_(weights, grad, lr=0.5)
    weights.flush()
    np.testing.assert_array_equal(np.fromfile(path, F32), np.arange(10) / 2)


def test_a_buffer_of_bytes_is_updated() -> None:
    memory = bytearray(np.ones(4, F32).tobytes())
    fusedopt.sgd_(np.frombuffer(memory, F32), np.ones(4, F32), lr=0.5)
    np.testing.assert_array_equal(np.frombuffer(memory, F32), 0.5)


@pytest.mark.parametrize("wrapper", [DLPack, OldDLPack])
@every_rule
def test_dlpack_objects_are_updated_in_place(rule: Any, wrapper: type[DLPack]) -> None:
    for fmt in ("f64", "f32", "f16", "f16+f32state", "f32+f16grad"):
        now = problem(rule, {}, FORMATS[fmt], (4, 5))
        want = now.copy()
        apply(rule, want.param, want.grad, want.state, want.step, {})
        state = {k: v if is_scalar_state(rule, k) else wrapper(v) for k, v in now.state.items()}
        apply(rule, wrapper(now.param), wrapper(now.grad), state, now.step, {})
        assert_same_problem(now, want, fmt)


def test_dlpack_objects_and_arrays_in_one_call() -> None:
    params, grads = [np.ones(3), np.ones(4)], [np.ones(3), np.ones((4, 2))[:, 0]]
    fusedopt.sgd_([DLPack(params[0]), params[1]], [grads[0], DLPack(grads[1])], lr=0.5)
    np.testing.assert_array_equal(np.concatenate(params), 0.5)


def test_an_exporter_may_call_a_function_of_ours_itself() -> None:
    """Python code may run while a call is prepared (a finaliser, a signal handler): calls must not interfere."""

    class Busy(DLPack):
        def __dlpack__(self, **kwargs: Any) -> Any:
            inner = [np.ones(2) for _ in range(9)]
            fusedopt.sgd_(inner, [np.ones(2)] * 9, lr=0.5)
            assert all((a == 0.5).all() for a in inner)
            return super().__dlpack__(**kwargs)

    params = [np.ones(3), np.ones(4), np.ones(5)]
    fusedopt.sgd_([params[0], Busy(params[1]), params[2]], [np.ones(3), np.ones(4), np.ones(5)], lr=0.5)
    np.testing.assert_array_equal(np.concatenate(params), 0.5)


def test_strided_dlpack_objects() -> None:
    base = np.ones((5, 6), F32)
    fusedopt.sgd_(DLPack(base[1:3, ::2]), DLPack(np.ones((3, 2), F32).T), lr=0.5)
    want = np.ones((5, 6))
    want[1:3, ::2] = 0.5
    np.testing.assert_array_equal(base, want)


def test_torch_tensors_on_the_cpu() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.float32, torch.float16):
        for shape in ((), (0,), (7, 3)):
            param, grad = torch.ones(shape, dtype=dtype), torch.full(shape, 0.5, dtype=dtype)
            states = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
            fusedopt.adam_(param, grad, *states, step=1, lr=0.25)
            assert torch.allclose(param, torch.full(shape, 0.75, dtype=dtype))
            assert (grad == 0.5).all()
    leaf = torch.ones(3, requires_grad=True)
    fusedopt.sgd_(leaf.detach(), np.ones(3, F32), lr=0.5)
    assert (leaf == 0.5).all()


def test_torch_bfloat16_tensors_need_no_ml_dtypes() -> None:
    torch = pytest.importorskip("torch")
    param, grad = torch.ones(67, dtype=torch.bfloat16), torch.full((67,), 0.5, dtype=torch.bfloat16)
    momentum = torch.zeros(67)
    fusedopt.sgd_(param, grad, momentum, lr=1.0, momentum=0.9, first=True)
    assert (param == 0.5).all()
    assert (momentum == 0.5).all()
