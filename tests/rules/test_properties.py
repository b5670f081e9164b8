"""Properties over random shapes, strides, formats, options and values (NaN, infinities, denormals, zeros, huge values):
one call equals one call per element, for every layout, split and batch; finite results equal the reference."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    F64,
    FORMATS,
    Array,
    Options,
    Problem,
    apply,
    apply_many,
    assert_same_bits,
    assert_same_problem,
    check_step,
    copies,
    engine,
    fused,
    is_scalar_state,
    new_state,
    option_sets,
)

EVERYTHING = st.one_of(
    st.floats(width=64),
    st.floats(min_value=-4, max_value=4),
    st.sampled_from(
        [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1e-310, 1e-45, 1e-42, 6e-8, 1e-20, 65504.0, 65520.0, 3.4e38]
    ),
)
TAME = st.one_of(st.floats(min_value=-8, max_value=8, width=16), st.sampled_from([0.0, -0.0, 1e-3, -1e-3]))
RULE = st.sampled_from(list(RULES.values()))
UNIT = st.floats(min_value=0, max_value=0.999)


def values(n: int, dtype: np.dtype[Any], elements: st.SearchStrategy[float] = EVERYTHING) -> st.SearchStrategy[Array]:
    drawn = st.lists(elements, min_size=min(n, 12), max_size=max(n, 0) and min(n, 12))

    def spread(few: list[float]) -> Array:
        with np.errstate(all="ignore"):
            return np.resize(np.asarray(few or [0.0], F64), n).astype(dtype)

    return drawn.map(spread)


@st.composite
def options_of(draw: st.DrawFn, rule: Any) -> Options:
    """Any valid value of an option, by the type of its default."""
    chosen = dict(draw(st.sampled_from(option_sets(rule))))
    for name in ("lr", "weight_decay", "eps", "betas"):
        if name in rule.defaults and draw(st.booleans()):
            if name == "betas":
                chosen[name] = tuple(draw(UNIT) for _ in rule.defaults[name])
            else:
                chosen[name] = draw(st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 0.5, 3.0]))
    return chosen


@st.composite
def problems(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> tuple[Any, Options, Problem]:
    rule = draw(RULE)
    options = draw(options_of(rule))
    fmt = FORMATS[draw(st.sampled_from(list(FORMATS)))]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)) if shape is None else shape
    n = int(np.prod(shape))
    state = new_state(rule, options, shape, fmt.state)
    for name in state:
        if not is_scalar_state(rule, name):
            state[name] = draw(values(n, fmt.state)).reshape(shape)
    param, grad = draw(values(n, fmt.param)).reshape(shape), draw(values(n, fmt.grad)).reshape(shape)
    return rule, options, Problem(param, grad, state, draw(st.sampled_from([1, 2, 3, 1000])))


@st.composite
def relaid(draw: st.DrawFn, array: Array) -> tuple[Array, Array]:
    """The same values in another layout (axes permuted, reversed, strided, misaligned), and their base array."""
    order = draw(st.permutations(range(array.ndim)))
    gaps = draw(st.lists(st.integers(1, 3), min_size=array.ndim, max_size=array.ndim))
    flips = draw(st.lists(st.booleans(), min_size=array.ndim, max_size=array.ndim))
    margin = draw(st.integers(0, 2))
    spread = [array.shape[axis] * gap + 2 * margin for axis, gap in zip(order, gaps, strict=True)]
    base = np.full(spread, 9, array.dtype)
    view = base[tuple(slice(margin, margin + array.shape[a] * g, g) for a, g in zip(order, gaps, strict=True))]
    view = view.transpose(np.argsort(order)) if array.ndim else view[...]
    view = view[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)] if array.ndim else view
    view[...] = array
    return base, view


def one_by_one(rule: Any, options: Options, whole: Problem) -> Problem:
    """The step with n = 1, element by element, on the baseline."""
    after = whole.copy()
    with engine("baseline", 1):
        for at in np.ndindex(whole.param.shape):
            index = (*at, ...)  # a 0-d view
            state = {k: v.copy() if is_scalar_state(rule, k) else after.state[k][index] for k, v in whole.state.items()}
            apply(rule, after.param[index], after.grad[index], state, after.step, options)
            for name, array in state.items():
                if is_scalar_state(rule, name):
                    final = array
                    after.state[name] = final
    return after


def without_scalars(rule: Any, p: Problem) -> Problem:
    return p._replace(state={k: v for k, v in p.state.items() if not is_scalar_state(rule, k)})


@given(problems(), st.sampled_from(fusedopt.isas()), st.integers(1, 8))
@settings(max_examples=300)
def test_an_array_is_its_elements_one_by_one(case: tuple[Any, Options, Problem], isa: str, threads: int) -> None:
    rule, options, whole = case
    want = one_by_one(rule, options, whole)
    got = whole.copy()
    with engine(isa, threads):
        apply(rule, got.param, got.grad, got.state, got.step, options)
    assert_same_problem(without_scalars(rule, got), without_scalars(rule, want), f"{rule.name} {options}")
    assert got.grad.tobytes() == whole.grad.tobytes()  # NaN payloads included


@given(problems(), st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_the_layout_does_not_matter_and_nothing_outside_is_touched(
    case: tuple[Any, Options, Problem], data: st.DataObject
) -> None:
    rule, options, plain = case
    want = plain.copy()
    apply(rule, want.param, want.grad, want.state, want.step, options)
    bases, state = [], copies(plain.state)
    base, param = data.draw(relaid(plain.param))
    bases.append((base, param))
    base, grad = data.draw(relaid(plain.grad))
    bases.append((base, grad))
    for name, array in plain.state.items():
        if not is_scalar_state(rule, name):
            base, state[name] = data.draw(relaid(array))
            bases.append((base, state[name]))
    apply(rule, param, grad, state, plain.step, options)
    assert_same_problem(Problem(param, grad, state, plain.step), want, f"{rule.name} {options}")
    for base, view in bases:
        view[...] = 9
        assert (base == 9).all()


@given(problems(), st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=150)
def test_the_split_into_arrays_does_not_matter(case: tuple[Any, Options, Problem], cuts: list[int]) -> None:
    rule, options, whole = case
    flat = Problem(whole.param.reshape(-1), whole.grad.reshape(-1), copies(whole.state), whole.step)
    for name in flat.state:
        if not is_scalar_state(rule, name):
            flat.state[name] = flat.state[name].reshape(-1)
    cut, one = flat.copy(), flat.copy()
    edges = sorted(min(c, flat.param.size) for c in cuts)
    arrays = {
        k: [v.copy() for _ in range(len(edges) + 1)] if is_scalar_state(rule, k) else np.split(v, edges)
        for k, v in cut.state.items()
    }
    params, grads = np.split(cut.param, edges), np.split(cut.grad, edges)
    parts = [
        Problem(params[i], grads[i], {k: v[i] for k, v in arrays.items()}, cut.step) for i in range(len(edges) + 1)
    ]
    apply(rule, one.param, one.grad, one.state, one.step, options)
    apply_many(rule, parts, options)
    assert_same_problem(without_scalars(rule, cut), without_scalars(rule, one), f"{rule.name} {options} {edges}")


@st.composite
def tame_problems(draw: st.DrawFn) -> tuple[Any, Options, Problem]:
    """A reachable state, from gradients of moderate size, for which the reference is accurate."""
    rule = draw(RULE)
    options = draw(st.sampled_from(option_sets(rule)))
    fmt = FORMATS[draw(st.sampled_from(list(FORMATS)))]
    n = draw(st.integers(0, 20))
    filled = {**rule.defaults, **options}
    param = draw(values(n, F64, TAME))
    state = new_state(rule, options, n, F64)
    steps = draw(st.integers(0, 3))
    for step in range(1, steps + 1):
        rule.reference(param, draw(values(n, F64, TAME)), state, step, **filled)
    stored = {k: v if is_scalar_state(rule, k) else v.astype(fmt.state) for k, v in state.items()}
    return rule, options, Problem(param.astype(fmt.param), draw(values(n, fmt.grad, TAME)), stored, steps + 1)


# At discontinuities of a rule rounding decides: the sign of a sum that cancels, a variance that is zero in exact
# arithmetic. The bits of such steps are compared above, and the reference in test_reference.
def continuous(rule: Any, options: Options) -> bool:
    return rule.name != "Lion" and not options.get("centered", False)


@given(tame_problems())
@settings(max_examples=300)
def test_finite_steps_agree_with_the_reference(case: tuple[Any, Options, Problem]) -> None:
    rule, options, now = case
    if continuous(rule, options):
        check_step(fused(rule), rule, options, now, ulps=32)


@given(problems(shape=(5,)), st.integers(2, 9))
@settings(max_examples=100)
def test_equal_elements_stay_equal(case: tuple[Any, Options, Problem], repeat: int) -> None:
    """Results do not depend on the position of an element: a periodic input gives a periodic output."""
    rule, options, one = case
    tiled = Problem(
        np.tile(one.param, repeat),
        np.tile(one.grad, repeat),
        {k: v.copy() if is_scalar_state(rule, k) else np.tile(v, repeat) for k, v in one.state.items()},
        one.step,
    )
    apply(rule, tiled.param, tiled.grad, tiled.state, tiled.step, options)
    for array in (tiled.param, *without_scalars(rule, tiled).state.values()):
        assert_same_bits(array, np.tile(array[:5], repeat), f"{rule.name} {options}")
