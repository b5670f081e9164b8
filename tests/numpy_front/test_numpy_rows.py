"""Updates by rows: the in-place functions and fusedopt.Rows. Values against the float64 reference over the rows that
are named, bits for every instruction set, thread count and split of a step, refusals, and memory."""

import inspect
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.bench.own import OwnAdam
from fusedopt.rules import RULES
from helpers import (
    F32,
    FORMATS,
    Array,
    Options,
    State,
    apply,
    assert_near,
    assert_same_bits,
    bits,
    cast_state,
    copies,
    engine,
    filled,
    is_scalar_state,
    label,
    new_state,
    normal,
    two_option_sets,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)
ROWS = 40


def rows_function(rule: Any) -> Callable[..., None]:
    return getattr(fusedopt, rule.rows_function)  # type: ignore[no-any-return]


def apply_rows(rule: Any, param: Any, indices: Any, values: Any, state: State, step: int, options: Options) -> None:
    accepted = inspect.signature(rows_function(rule)).parameters
    extra: Options = {"step": step} if "step" in accepted else {}
    if "first" in accepted and state:
        extra["first"] = step == 1
    returned: Any = rows_function(rule)(param, indices, values, **state, **extra, **options)  # type: ignore[func-returns-value]
    assert returned is None


def merged(indices: Array, values: Array, n_rows: int) -> tuple[Array, Array]:
    """The rows that occur, and the sums of their values, which are added up in their order."""
    named = np.unique(indices)
    wide = np.float64 if values.dtype == np.float64 else np.float32
    sums = np.zeros((n_rows, *values.shape[1:]), wide)
    began = np.zeros(n_rows, bool)
    for row, value in zip(indices, values, strict=True):
        sums[row] = sums[row] + value.astype(wide) if began[row] else value
        began[row] = True
    return named, sums[named].astype(values.dtype)


def of_rows(rule: Any, state: State, rows: Array) -> State:
    return {k: v.copy() if is_scalar_state(rule, k) else v[rows] for k, v in state.items()}


def lookups(rng: np.random.Generator, n: int, n_rows: int, width: Any, dtype: Any) -> tuple[Array, Array]:
    shape = (n, *width) if isinstance(width, tuple) else (n, width)
    return rng.integers(0, n_rows, n), normal(rng, shape, dtype)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rule", "options"), [(r, o) for r in RULES.values() for o in two_option_sets(r)], ids=label)
def test_named_rows_move_as_a_dense_step_moves_them_and_no_others(rule: Any, options: Options, fmt: str) -> None:
    """The same bits as those of the dense function over the named rows with merged values."""
    form = FORMATS[fmt]
    rng = np.random.default_rng(3)
    for width in (1, 5, 64, 600):
        param = normal(rng, (ROWS, width), form.param)
        state = cast_state(rule, new_state(rule, filled(rule, options), (ROWS, width), np.float64), form.state)
        for step in (1, 2, 3):
            indices, values = lookups(rng, 30, ROWS, width, form.grad)
            before, kept = param.copy(), copies(state)
            rows, sums = merged(indices, values, ROWS)
            want, want_state = param[rows], of_rows(rule, state, rows)
            apply(rule, want, sums, want_state, step, options)
            given = values.copy()
            apply_rows(rule, param, indices, values, state, step, options)
            assert_same_bits(values, given, "values were written")
            assert_same_bits(param[rows], want, "named rows")
            others = np.setdiff1d(np.arange(ROWS), rows)
            assert_same_bits(param[others], before[others], "other rows")
            for name, array in state.items():
                if is_scalar_state(rule, name):
                    assert_same_bits(array, want_state[name], name)
                else:
                    assert_same_bits(array[rows], want_state[name], name)
                    assert_same_bits(array[others], kept[name][others], f"other rows of {name}")


@every_rule
def test_named_rows_follow_the_float64_reference(rule: Any) -> None:
    rng = np.random.default_rng(4)
    options = two_option_sets(rule)[1]
    param = normal(rng, (ROWS, 7), F32)
    state = cast_state(rule, new_state(rule, filled(rule, options), (ROWS, 7), np.float64), F32)
    for step in (1, 2, 3, 4):
        indices, values = lookups(rng, 50, ROWS, 7, F32)
        rows, sums = merged(indices, values.astype(np.float64), ROWS)
        exact, exact_state = param[rows].astype(np.float64), cast_state(rule, of_rows(rule, state, rows), np.float64)
        old = exact.copy()
        rule.reference(exact, sums, exact_state, step, **filled(rule, options))
        apply_rows(rule, param, indices, values, state, step, options)
        magnitude = np.zeros_like(sums)  # of what is added up: where it cancels only the terms are accurate
        for k, row in enumerate(rows):
            magnitude[k] = np.abs(values[indices == row]).sum(axis=0)
        lost = np.max(magnitude / np.maximum(np.abs(sums), 1e-30), axis=0, initial=1.0).max()
        scale = np.abs(old) + np.abs(exact - old).max()
        assert_near(param[rows], exact, scale, F32, 6 * min(lost, 1e4), rule.name)


def trajectory(make: Callable[[], Any], n_rows: int, width: int, n: int, steps: int = 3) -> list[Array]:
    rng = np.random.default_rng(5)
    tables = [normal(rng, (n_rows, width), F32), normal(rng, (300, 16), F32), normal(rng, (50, 33), F32)]
    dense = normal(rng, 1000, F32)
    opt = make()([*tables, dense])
    for _ in range(steps):
        skewed = np.minimum(rng.zipf(1.2, n), n_rows) - 1
        opt.step(
            [
                fusedopt.Rows(skewed, normal(rng, (n, width), F32)),
                fusedopt.Rows(*lookups(rng, 2000, 300, 16, F32)),
                fusedopt.Rows(np.arange(50, dtype=np.int32), normal(rng, (50, 33), F32)),
                normal(rng, 1000, F32),
            ]
        )
    return [*tables, dense, *(v for s in opt.state for v in s.values() if isinstance(v, np.ndarray))]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@every_rule
def test_the_bits_are_those_of_every_instruction_set_and_thread_count(rule: Any, max_norm: float | None) -> None:
    def make() -> Any:
        return lambda params: getattr(fusedopt, rule.name)(params, max_grad_norm=max_norm)

    with engine("baseline", 1):
        want = trajectory(make, 5000, 16, 20_000)
    for isa in fusedopt.isas():
        for threads in (1, 2, 3, 8):
            with engine(isa, threads):
                for got, expected in zip(trajectory(make, 5000, 16, 20_000), want, strict=True):
                    assert_same_bits(got, expected, f"{isa}, {threads} threads")


@pytest.mark.parametrize("n", [1, 2, 47, 48, 49, 1000, 30_000])
@pytest.mark.parametrize("n_rows", [1, 2, 255, 256, 257, 100_000, 3_000_000])
def test_every_lookup_is_found(n: int, n_rows: int) -> None:
    """Sums of small integers are exact, so that they tell each lookup that is lost, doubled or misplaced."""
    rng = np.random.default_rng(n)
    for indices in (
        rng.integers(0, n_rows, n),
        np.sort(rng.integers(0, n_rows, n)),
        np.full(n, n_rows - 1),
        np.arange(n)[::-1] % n_rows,
        np.minimum(rng.zipf(1.3, n), n_rows) - 1,
    ):
        values = rng.integers(-8, 9, n).astype(np.float32)
        for kind in (np.int32, np.int64):
            for threads in (1, 3):
                with engine(threads=threads):
                    param = np.zeros(n_rows, np.float32)
                    fusedopt.sgd_rows_(param, indices.astype(kind), values, lr=1.0)
                    assert np.array_equal(-param, np.bincount(indices, values, n_rows)), (kind, threads)


def test_values_are_added_in_the_order_in_which_they_stand() -> None:
    indices = np.array([3, 1, 3, 3, 1] * 1000)
    values = np.tile(np.array([[1e8], [1.0], [-1e8], [1.0], [1e-3]], np.float32), (1000, 2))
    param = np.zeros((9, 2), np.float32)
    fusedopt.sgd_rows_(param, indices, values, lr=1.0)
    rows, sums = merged(indices, values, 9)
    assert_same_bits(-param[rows], sums)


def test_16_bit_values_are_added_in_float32_and_rounded_once() -> None:
    param, values = np.zeros((1, 1), np.float16), np.full((3000, 1), 1.0, np.float16)
    fusedopt.sgd_rows_(param, np.zeros(3000, np.int64), values, lr=1.0)
    assert param[0, 0] == -3000.0  # in float16 the sum would stop at 2048


@pytest.mark.parametrize("width", [(), (3,), (4, 5), (2, 3, 4), (0,)])
def test_rows_have_any_shape_and_tables_any_distance_between_rows(width: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    indices, values = lookups(rng, 25, 12, width, F32)
    wide = normal(rng, (24, *width), F32)
    for param in (wide[:12].copy(), wide[::2].copy()[::-1], wide[::2]):
        want = param.copy()
        rows, sums = merged(indices, values, 12)
        want[rows] -= np.float32(0.5) * sums
        backwards = np.repeat(indices[::-1], 2)[::-1][::2]
        for given in (values, np.asfortranarray(values), np.repeat(values, 2, axis=0)[::2]):
            got = param if param.base is None else wide.copy()[::2] if param.base is wide else param.copy()
            fresh = got.copy() if got is param else got
            fusedopt.sgd_rows_(fresh, backwards, given, lr=0.5)
            np.testing.assert_allclose(fresh, want, rtol=1e-6, atol=1e-6)


def test_an_optimizer_takes_rows_and_arrays_by_turns() -> None:
    rng = np.random.default_rng(7)
    a, b = normal(rng, (30, 8), F32), normal(rng, 30, F32)
    opt = fusedopt.Adam({"table": a, "bias": b}, lr=0.1)
    want_a, want_b, state = a.copy(), b.copy(), [np.zeros_like(x) for x in (a, a, b, b)]
    for step in range(1, 5):
        indices, values = lookups(rng, 12, 30, 8, F32)
        dense = normal(rng, (30, 8), F32)
        grad = normal(rng, 30, F32)
        opt.step({"bias": grad, "table": fusedopt.Rows(indices, values) if step % 2 else dense})
        if step % 2:
            fusedopt.adam_rows_(want_a, indices, values, state[0], state[1], step=step, lr=0.1)
        else:
            fusedopt.adam_(want_a, dense, state[0], state[1], step=step, lr=0.1)
        fusedopt.adam_(want_b, grad, state[2], state[3], step=step, lr=0.1)
    assert_same_bits(a, want_a)
    assert_same_bits(b, want_b)


def test_the_norm_is_that_of_the_merged_gradients() -> None:
    rng = np.random.default_rng(8)
    table, other, dense = (normal(rng, s, F32) for s in ((50, 9), (20, 700), (77,)))
    opt = fusedopt.SGD([table, other, dense], lr=1.0, max_grad_norm=0.5)
    pairs = [lookups(rng, 400, 50, 9, F32), lookups(rng, 3, 20, 700, F32)]
    grad = normal(rng, 77, F32)
    before = table.copy()
    opt.step([*(fusedopt.Rows(*p) for p in pairs), grad])
    sums = [merged(i, v.astype(np.float64), n) for (i, v), n in zip(pairs, (50, 20), strict=True)]
    norm = np.sqrt(sum((s**2).sum() for _, s in sums) + (grad.astype(np.float64) ** 2).sum())
    assert opt.last_grad_norm == pytest.approx(norm, rel=1e-6)
    rows, total = sums[0]
    np.testing.assert_allclose(before[rows] - table[rows], total * 0.5 / norm, rtol=1e-4, atol=1e-5)


def test_no_lookups_change_nothing_but_the_count() -> None:
    table = np.ones((5, 4), np.float32)
    opt = fusedopt.Adam(table, lr=0.1, max_grad_norm=1.0)
    opt.step(fusedopt.Rows(np.zeros(0, np.int64), np.zeros((0, 4), np.float32)))
    assert (table == 1).all()
    assert opt.state[0]["step"] == 1
    assert opt.last_grad_norm == 0
    fusedopt.sgd_rows_(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))


def test_one_row_a_thousand_times() -> None:
    values = normal(np.random.default_rng(9), (1000, 5), F32)
    param, m, v = (np.zeros((3, 5), np.float32) for _ in range(3))
    fusedopt.adam_rows_(param, np.full(1000, 1), values, m, v, step=1, lr=0.1)
    np.testing.assert_allclose(m[1], 0.1 * values.astype(np.float64).sum(axis=0), rtol=1e-3)
    assert not param[[0, 2]].any()


# ---- beyond the rule's own arrays


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"ema_decay": 0.9, "l1": 0.01}], ids=label)
def test_options_of_the_form_apply_to_named_rows(options: Options) -> None:
    rng = np.random.default_rng(10)
    table = normal(rng, (20, 64), F32)
    before = table.copy()
    opt = fusedopt.AdamW(table, lr=0.1, **options)
    kept = {k: v.copy() for k, v in opt.state[0].items() if isinstance(v, np.ndarray)}
    indices = np.array([3, 7, 3, 11])
    opt.step(fusedopt.Rows(indices, normal(rng, (4, 64), F32)))
    rows, others = np.unique(indices), np.setdiff1d(np.arange(20), indices)
    assert (table[rows] != before[rows]).mean() > 0.9
    assert_same_bits(table[others], before[others])
    for name, was in kept.items():
        now = opt.state[0][name]
        assert (now[rows] != was[rows]).any(), name
        assert np.array_equal(now[others], was[others]), name


def test_rows_of_whole_blocks_have_the_bits_of_a_dense_step() -> None:
    """Quantised states and random rounding go by an element's position in the table."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(11)
    for dtype, options in (
        (np.float32, {"state_dtype": "int8"}),
        (bfloat16, {"stochastic_rounding": True}),
        (bfloat16, {"master": "split8", "state_dtype": "int8"}),
        (bfloat16, {"master": "float32"}),
    ):
        by_rows = normal(rng, (30, 128), np.dtype(dtype))
        dense = by_rows.copy()
        one, two = fusedopt.Adam(by_rows, lr=0.1, **options), fusedopt.Adam(dense, lr=0.1, **options)
        for _ in range(3):
            grad = normal(rng, (30, 128), np.dtype(dtype))
            one.step(fusedopt.Rows(np.arange(30)[::-1], grad[::-1]))
            two.step(grad)
        assert np.array_equal(bits(by_rows), bits(dense)), options
        for name, value in two.state[0].items():
            assert np.array_equal(one.state[0][name], value), (options, name)


def test_int8_states_are_refused_where_blocks_cross_rows() -> None:
    table = np.zeros((4, 40), np.float32)
    opt = fusedopt.Adam(table, state_dtype="int8")
    with pytest.raises(ValueError, match=r"exp_avg_codes\[0\].*multiple of 64 elements, and these have 40"):
        opt.step(fusedopt.Rows(np.array([1]), np.ones((1, 40), np.float32)))
    assert opt.state[0]["step"] == 0


# ---- refusals


def valid() -> dict[str, Any]:
    rng = np.random.default_rng(12)
    return {
        "param": normal(rng, (6, 4), F32),
        "indices": np.array([5, 0, 5]),
        "values": normal(rng, (3, 4), F32),
        "exp_avg": np.zeros((6, 4), np.float32),
        "exp_avg_sq": np.zeros((6, 4), np.float32),
    }


def overlapping_rows() -> Array:
    return np.lib.stride_tricks.as_strided(np.zeros(12, np.float32), (6, 4), (4, 4))


BAD: list[tuple[str, str, Any, Any, str]] = [
    ("too large", "indices", np.array([5, 6, 0]), IndexError, r"\[1\]: expected a row in \[0, 6\), got 6"),
    ("negative", "indices", np.array([5, 0, -1], np.int32), IndexError, r"\[2\]: expected a row in \[0, 6\), got -1"),
    ("floats", "indices", np.array([1.0, 2.0, 3.0]), TypeError, ": expected int32 or int64"),
    ("unsigned", "indices", np.array([1, 2, 3], np.uint64), TypeError, ": expected int32 or int64"),
    ("a list", "indices", [1, 2, 3], TypeError, ": expected an array of int32 or int64, got list"),
    ("byte order", "indices", np.array([1, 2, 3], ">i8"), TypeError, ": expected int32 or int64"),
    ("two dimensions", "indices", np.array([[1, 2, 3]]), ValueError, ": expected one dimension, got 2"),
    ("fewer", "indices", np.array([1, 2]), ValueError, ""),
    ("a short row", "values", np.zeros((3, 3), np.float32), ValueError, r": expected shape \(3, 4\), a row for each"),
    ("flat", "values", np.zeros(12, np.float32), ValueError, r": expected shape \(3, 4\)"),
    ("float64", "values", np.zeros((3, 4)), TypeError, ""),
    ("integers", "values", np.zeros((3, 4), np.int64), TypeError, ""),
    ("a state of another shape", "exp_avg", np.zeros((6, 3), np.float32), ValueError, r": expected shape \(6, 4\)"),
    ("overlapping rows", "param", overlapping_rows(), ValueError, ": elements of the array overlap"),
    ("columns", "param", np.zeros((4, 6), np.float32).T, ValueError, ": expected rows that are contiguous"),
    ("a number", "param", np.zeros((), np.float32), ValueError, ""),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments_are_refused_before_anything_is_written(name: str, value: Any, error: Any, text: str) -> None:
    wrong = {**valid(), name: value}
    before = {k: np.array(v, copy=True) for k, v in wrong.items()}
    names = name if text else "(values|indices|exp_avg|param)"
    with pytest.raises(error, match=rf"^{names}{text}"):
        fusedopt.adam_rows_(**wrong, step=1)
    many = {k: [valid()[k], wrong[k]] for k in wrong}
    first = {k: v[0].copy() for k, v in many.items()}
    with pytest.raises(error, match=rf"^{names}\[1\]{text}"):
        fusedopt.adam_rows_(**many, step=1)
    for k in wrong:
        assert np.array_equal(np.asarray(wrong[k]), before[k]), k
        assert np.array_equal(many[k][0], first[k]), k


def test_the_first_bad_index_is_named_on_any_number_of_threads() -> None:
    indices = np.zeros(200_000, np.int64)
    indices[[150_001, 77_777, 199_999]] = -5
    for threads in (1, 2, 8):
        with engine(threads=threads), pytest.raises(IndexError, match=r"^indices\[77777\]: .* got -5"):
            fusedopt.sgd_rows_(np.zeros((3, 1), np.float32), indices, np.zeros((200_000, 1), np.float32))


def test_memory_that_is_shared_is_refused() -> None:
    now = valid()
    with pytest.raises(ValueError, match=r"shares memory"):
        fusedopt.adam_rows_(**{**now, "values": now["param"][:3]}, step=1)
    with pytest.raises(ValueError, match=r"shares memory"):
        fusedopt.adam_rows_(**{**now, "exp_avg_sq": now["exp_avg"]}, step=1)
    flat = np.zeros(30, np.float32)
    with pytest.raises(ValueError, match=r"shares memory"):
        fusedopt.sgd_rows_(flat[:24].reshape(6, 4), flat[20:26].view(np.int64), np.zeros((3, 4), np.float32))


def test_an_optimizer_names_the_gradient() -> None:
    opt = fusedopt.SGD([np.zeros((3, 2), np.float32)] * 1)
    with pytest.raises(IndexError, match=r"^grads\[0\]\.indices\[0\]: expected a row in \[0, 3\), got 3"):
        opt.step([fusedopt.Rows(np.array([3]), np.zeros((1, 2), np.float32))])
    with pytest.raises(ValueError, match=r"^grads\[0\]\.values: expected shape \(1, 2\)"):
        opt.step([fusedopt.Rows(np.array([1]), np.zeros((2, 2), np.float32))])
    with pytest.raises(TypeError, match=r"grads\[0\]: expected an array, got tuple"):
        opt.step([(np.array([1]), np.zeros((1, 2), np.float32))])


def test_sequences_have_one_of_each() -> None:
    now = valid()
    with pytest.raises(ValueError, match=r"^indices: expected 2 arrays, one for each of param, got 1"):
        fusedopt.sgd_rows_([now["param"], now["exp_avg"]], [now["indices"]], [now["values"]] * 2)


def test_a_second_step_of_equal_size_allocates_nothing() -> None:
    """Of the memory that Python is told of nothing, and of all other nothing that the process shows."""
    n, table = 300_000, np.zeros((1000, 8), np.float32)
    indices, values = np.random.default_rng(0).integers(0, 1000, n), np.ones((n, 8), np.float32)
    opt = fusedopt.SGD(table)
    grad = fusedopt.Rows(indices, values)
    opt.step(grad)
    tracemalloc.start()
    before = resident()
    for _ in range(20):
        opt.step(grad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000
    assert resident() - before < 16 * n  # one such allocation that is not freed would show


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


# -- counts and sums of rows -----------------------------------------------------------------------------------------

COUNTING = [r for r in RULES.values() if "row_steps" in inspect.signature(rows_function(r)).parameters]


def test_the_rules_that_count_steps_by_row() -> None:
    names = {r.name for r in COUNTING}
    assert names == {"SGD", "Adagrad", "Adam", "AdamW", "RAdam", "Adamax", "AdEMAMix"}
    for rule in RULES.values():
        if rule.name not in names:
            with pytest.raises(ValueError, match=f"row_steps: {rule.name} has"):
                getattr(fusedopt, rule.name)(np.ones((2, 3)), row_steps=True)


@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("rule", COUNTING, ids=label)
def test_a_row_that_counts_its_steps_moves_as_if_it_were_alone(rule: Any, dtype: Any) -> None:
    """As one optimizer for each row, bit by bit; the in-place function likewise."""
    rng = np.random.default_rng(11)
    options = {"lr": 0.1, **({"momentum": 0.9, "dampening": 0.5} if rule.name == "SGD" else {})}
    options |= {"lr_decay": 0.1} if rule.name == "Adagrad" else {}
    param = normal(rng, (ROWS, 70), dtype)
    by_hand, alone = param.copy(), param.copy()
    opt = getattr(fusedopt, rule.name)(param, row_steps=True, **options)
    each = [getattr(fusedopt, rule.name)(alone[r : r + 1], **options) for r in range(ROWS)]
    state = {k: v.copy() for k, v in opt.state[0].items() if isinstance(v, np.ndarray)}
    counts = np.zeros(ROWS, np.float32)
    for step in range(1, 40):
        indices, values = lookups(rng, 30, ROWS if step % 2 else 3, 70, dtype)
        opt.step(fusedopt.Rows(indices, values))
        extra = {"step": step} if rule.clock == "step" else {}
        rows_function(rule)(by_hand, indices, values, **state, **extra, row_steps=counts, **options)
        for row, total in zip(*merged(indices, values, ROWS), strict=True):
            each[row].step(total[None])
    assert_same_bits(param, alone, "parameter")
    assert_same_bits(by_hand, alone, "parameter of the function")
    steps = np.array([o.state[0]["step"] for o in each], np.float32)
    assert_same_bits(opt.state[0]["row_steps"], steps, "counts")
    assert_same_bits(counts, steps, "counts of the function")
    assert opt.state[0]["step"] == 39


def test_a_rule_written_in_python_counts_steps_by_row() -> None:
    rng = np.random.default_rng(16)
    built_in = normal(rng, (ROWS, 70), F32)
    own = built_in.copy()
    a, b = fusedopt.Adam(built_in, lr=0.1, row_steps=True), OwnAdam.numpy(own, lr=0.1, row_steps=True)
    for _ in range(5):
        gradient = fusedopt.Rows(*lookups(rng, 30, ROWS, 70, F32))
        a.step(gradient)
        b.step(gradient)
    assert_same_bits(own, built_in, "parameter")
    assert_same_bits(b.state[0]["row_steps"], a.state[0]["row_steps"], "counts")


def test_a_dense_gradient_does_not_count_the_steps_of_rows() -> None:
    rng = np.random.default_rng(12)
    param, other = normal(rng, (4, 3), F32), normal(rng, 5, F32)
    want = other.copy()
    opt, plain = fusedopt.Adam([param, other], row_steps=True), fusedopt.Adam(want)
    for _ in range(3):
        g = normal(rng, 5, F32)
        opt.step([fusedopt.Rows(np.array([1]), normal(rng, (1, 3), F32)), g])
        plain.step(g)
    assert_same_bits(other, want, "dense")
    assert "row_steps" not in opt.state[1]
    assert opt.state[0]["row_steps"].tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("width", [(3,), (700,), (4, 5), ()], ids=str)
def test_row_wise_adagrad_follows_its_definition(width: tuple[int, ...], dtype: Any) -> None:
    """A float64 transcription; by rows, and with dense gradients, for which every row occurs."""
    rng = np.random.default_rng(13)
    options = {"lr": 0.1, "lr_decay": 0.05, "eps": 1e-6}
    param = normal(rng, (ROWS, *width), dtype)
    theta, by_hand = param.astype(np.float64), param.copy()
    s = np.full((ROWS, *(1 for _ in width)), 0.25)
    total = s.astype(dtype)
    opt = fusedopt.Adagrad(param, row_wise=True, initial_accumulator_value=0.25, **options)
    for t in range(1, 9):
        if t % 3 == 0:
            indices, values = np.arange(ROWS), normal(rng, (ROWS, *width), dtype)
            opt.step(values)
        else:
            indices, values = lookups(rng, 30, ROWS, width, dtype)
            opt.step(fusedopt.Rows(indices, values))
        fusedopt.adagrad_rows_(by_hand, indices, values, total, step=t, row_wise=True, **options)
        for row, g in zip(*merged(indices, values, ROWS), strict=True):
            g = g.astype(np.float64)
            s[row] += (g * g).mean()
            theta[row] -= 0.1 / (1 + (t - 1) * 0.05) * g / (np.sqrt(s[row]) + 1e-6)
    assert opt.state[0]["sum"].shape == s.shape
    assert_same_bits(param, by_hand, "the function")
    assert_same_bits(opt.state[0]["sum"], total, "sums of the function")
    room = 1e-13 if dtype == np.float64 else 3e-6
    np.testing.assert_allclose(param, theta, rtol=room, atol=room)
    np.testing.assert_allclose(total, s, rtol=room)


@pytest.mark.parametrize("options", [{"row_wise": True}, {"row_steps": True}], ids=label)
def test_numbers_of_rows_have_the_bits_of_every_instruction_set_and_thread_count(options: Options) -> None:
    def make() -> Any:
        return lambda params: fusedopt.Adagrad(params, max_grad_norm=1.0, lr_decay=0.1, **options)

    with engine("baseline", 1):
        want = trajectory(make, 5000, 16, 20_000)
    for isa in fusedopt.isas():
        for threads in (1, 2, 8):
            with engine(isa, threads):
                for got, expected in zip(trajectory(make, 5000, 16, 20_000), want, strict=True):
                    assert_same_bits(got, expected, f"{isa}, {threads} threads")


def test_row_wise_in_16_bits_and_beside_options_of_the_form() -> None:
    """The sum sees the clipped gradient; a float32 master moves as a float32 weight does."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(14)
    wide = normal(rng, (ROWS, 64), F32).astype(ml_dtypes.bfloat16).astype(F32)
    half = wide.astype(ml_dtypes.bfloat16)
    options: Options = {"row_wise": True, "max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01}
    a, b = fusedopt.Adagrad(wide, **options), fusedopt.Adagrad(half, master="float32", **options)
    for _ in range(4):
        indices, values = lookups(rng, 30, ROWS, 64, F32)
        values = values.astype(ml_dtypes.bfloat16)
        a.step(fusedopt.Rows(indices, values))
        b.step(fusedopt.Rows(indices, values))
    assert_same_bits(b.state[0]["master"], wide, "master")
    assert_same_bits(b.state[0]["sum"], a.state[0]["sum"], "sum")


def test_numbers_of_rows_in_checkpoints() -> None:
    rng = np.random.default_rng(15)
    param = normal(rng, (ROWS, 6), F32)
    before = param.copy()
    steps = [lookups(rng, 30, ROWS, 6, F32) for _ in range(6)]
    opt = fusedopt.Adagrad(param, row_wise=True, row_steps=True, lr_decay=0.1)
    for s in steps[:3]:
        opt.step(fusedopt.Rows(*s))
    saved, at = opt.state_dict(), param.copy()
    for s in steps[3:]:
        opt.step(fusedopt.Rows(*s))
    want = param.copy()
    param[...] = at
    resumed = fusedopt.Adagrad(param, row_wise=True, row_steps=True, lr_decay=0.1)
    resumed.load_state_dict(saved)
    for s in steps[3:]:
        resumed.step(fusedopt.Rows(*s))
    assert_same_bits(param, want, "resumed")

    # A checkpoint without: the mean over each row is the row-wise sum of the same gradients, and every row counts on.
    param[...] = before
    plain = fusedopt.Adagrad(param)
    plain.step(fusedopt.Rows(*steps[0]))
    loaded = {k: v for k, v in plain.state_dict().items() if "row_" not in k}
    other = fusedopt.Adagrad(param, row_wise=True, row_steps=True)
    other.load_state_dict(loaded)
    np.testing.assert_allclose(other.state[0]["sum"], plain.state[0]["sum"].mean(1, keepdims=True), rtol=1e-6)
    other.step(fusedopt.Rows(*steps[1]))
    assert other.state[0]["row_steps"].max() == 2

    with pytest.raises(ValueError, match=r"row_steps: expected shape \(40,\), got \(3,\)"):
        resumed.load_state_dict({**saved, "state.0.row_steps": np.zeros(3, np.float32)})


def test_bad_numbers_of_rows_are_refused() -> None:
    param, indices, values = np.ones((4, 3), np.float32), np.array([1]), np.ones((1, 3), np.float32)
    state = {"exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}
    shape = r"row_steps: expected a contiguous array of one number for each row of param, got shape \(3,\)"
    with pytest.raises(ValueError, match=shape):
        fusedopt.adam_rows_(param, indices, values, **state, step=1, row_steps=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="row_steps: expected dtype float32, got float64"):
        fusedopt.adam_rows_(param, indices, values, **state, step=1, row_steps=np.zeros(4))
    with pytest.raises(ValueError, match="row_steps: shares memory with"):
        fusedopt.adam_rows_(param, indices, values, **state, step=1, row_steps=state["exp_avg"].reshape(-1)[:4])
    with pytest.raises(ValueError, match="sum: expected a contiguous array of one number for each row"):
        fusedopt.adagrad_rows_(param, indices, values, np.zeros_like(param), step=1, row_wise=True)
    with pytest.raises(ValueError, match="weight_decay: expected 0 with row_wise=True"):
        fusedopt.Adagrad(param, row_wise=True, weight_decay=0.1)
    with pytest.raises(ValueError, match="state_dtype: expected None with row_wise=True"):
        fusedopt.Adagrad(param, row_wise=True, state_dtype="bfloat16")
    with pytest.raises(TypeError, match="row_wise: expected True or False, got 1"):
        fusedopt.Adagrad(param, row_wise=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'row_wise'"):
        fusedopt.Adam(param, row_wise=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="one number for each row of"):
        fusedopt.Adagrad(np.ones(()), row_wise=True).step(np.ones(()))
    assert (param == 1).all()
    assert not state["exp_avg"].any()
    counts = np.array(
        [0, np.nan, -3, 2e9], np.float32
    )  # no counts: each is the first step, or the last that is counted
    fusedopt.adam_rows_(param, np.arange(4), np.ones((4, 3), np.float32), **state, step=1, row_steps=counts)
    assert counts.tolist() == [1, 1, 1, 2**24]
    assert np.isfinite(param).all()
