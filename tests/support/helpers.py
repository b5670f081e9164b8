"""Shared by the NumPy tests: formats, option sets derived from RULES, calls by rule, and the two comparisons (bits, and
distance from the float64 reference in ulps). No tests here."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fusedopt
from fusedopt.rules import RULES

Array = npt.NDArray[Any]
State = dict[str, Array]
Options = dict[str, Any]
Apply = Callable[[Array, Array, State, int, Options], None]

try:
    import ml_dtypes

    BF16: np.dtype[Any] | None = np.dtype(ml_dtypes.bfloat16)
except ImportError:  # bf16 formats are then simply absent from FORMATS
    BF16 = None
F64, F32, F16 = np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16)


class Format(NamedTuple):
    """Storage of parameter, gradient and array states."""

    param: np.dtype[Any]
    grad: np.dtype[Any]
    state: np.dtype[Any]


def _formats() -> dict[str, Format]:
    out = {"f64": Format(F64, F64, F64), "f32": Format(F32, F32, F32)}
    for name, half in (("bf16", BF16), ("f16", F16)):
        if half is None:
            continue
        out[name] = Format(half, half, half)
        out[f"{name}+f32state"] = Format(half, half, F32)
        out[f"f32+{name}grad"] = Format(F32, half, F32)
        out[f"f32+{name}state"] = Format(F32, F32, half)
    return out


FORMATS = _formats()

# A second value for every option; a new rule's unknown number is left at its default, an unknown flag is flipped.
MOVED: Options = {
    "lr": 0.02,
    "momentum": 0.9,
    "dampening": 0.3,
    "weight_decay": 0.1,
    "lr_decay": 0.01,
    "alpha": 0.9,
    "betas": (0.8, 0.95, 0.97),  # as many as the rule has
    "eps": 1e-3,
    "momentum_decay": 0.01,
    "rho": 0.8,
}
NEEDS: Mapping[str, Options] = {
    "nesterov": {"momentum": 0.9},
    "dampening": {"momentum": 0.9},
    "decoupled_weight_decay": {"weight_decay": 0.1},
}  # without effect alone
EXCLUDES: Mapping[str, str] = {"nesterov": "dampening"}  # torch refuses the pair


def function(rule: Any) -> Callable[..., None]:
    return getattr(fusedopt, rule.function)  # type: ignore[no-any-return]


def moved(rule: Any) -> Options:
    """The second value of every option of the in-place function."""
    accepted = inspect.signature(function(rule)).parameters
    out = {}
    for name, default in rule.defaults.items():
        value = (not default) if isinstance(default, bool) else MOVED.get(name, default)
        value = value[: len(default)] if isinstance(default, tuple) else value
        if name in accepted and value != default:
            out[name] = value
    return out


def option_sets(rule: Any) -> list[Options]:
    """The defaults, each option changed alone, and as many at once as the rule allows."""
    second = moved(rule)
    alone = [{**NEEDS.get(name, {}), name: value} for name, value in second.items()]
    together = [dict(second)]
    for name, other in EXCLUDES.items():
        if name in second and other in second:
            together = [{k: v for k, v in second.items() if k != drop} for drop in (name, other)]
    return [{}, *alone, *together]


def two_option_sets(rule: Any) -> list[Options]:
    """The defaults and the largest set, for tests of the loop and not of the rule."""
    sets = option_sets(rule)
    return [sets[0], sets[-1]]


def label(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()).replace(" ", "") or "defaults"
    return str(getattr(value, "name", value))


def rule_options(sets: Callable[[Any], list[Options]] = option_sets) -> list[tuple[Any, Options]]:
    return [(rule, options) for rule in RULES.values() for options in sets(rule)]


def filled(rule: Any, options: Options) -> Options:
    return {**rule.defaults, **options}


# ---- arrays


def offset_empty(n: int, dtype: np.dtype[Any], offset: int = 0) -> Array:
    """n elements that start `offset` elements after a 64-byte boundary, with 64 spare bytes on both sides."""
    raw = np.zeros((n + offset) * dtype.itemsize + 192, np.uint8)
    start = (-raw.ctypes.data) % 64 + 64 + offset * dtype.itemsize
    return raw[start : start + n * dtype.itemsize].view(dtype)


def normal(rng: np.random.Generator, shape: Any, dtype: np.dtype[Any], scale: float = 1.0) -> Array:
    return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)


def new_state(rule: Any, options: Options, shape: Any, dtype: Any) -> State:
    """Zero array states, and the product that starts at 1 for rules that have one."""
    state = {name: np.zeros(shape, dtype) for name in rule.states(filled(rule, options))}
    for name in rule.scalars:
        if name != "step":
            state[name] = np.ones((), F64)
    return state


def is_scalar_state(rule: Any, name: str) -> bool:
    return name in rule.scalars


def copies(state: State) -> State:
    return {name: array.copy() for name, array in state.items()}


def cast_state(rule: Any, state: State, dtype: Any) -> State:
    return {k: v.copy() if is_scalar_state(rule, k) else v.astype(dtype) for k, v in state.items()}


class Problem(NamedTuple):
    """Inputs of one step, in their storage formats; `step` is the number of the step to make."""

    param: Array
    grad: Array
    state: State
    step: int

    def copy(self) -> "Problem":
        return Problem(self.param.copy(), self.grad.copy(), copies(self.state), self.step)


def problem(rule: Any, options: Options, fmt: Format, shape: Any, seed: int = 0, warm: int = 3) -> Problem:
    """Random parameter and gradient, and a state after `warm` reference steps, so that it is reachable."""
    rng = np.random.default_rng(seed)
    param = normal(rng, shape, F64)
    state = new_state(rule, options, shape, F64)
    for step in range(1, warm + 1):
        rule.reference(param, normal(rng, shape, F64), state, step, **filled(rule, options))
    grad = normal(rng, shape, fmt.grad)
    return Problem(param.astype(fmt.param), grad, cast_state(rule, state, fmt.state), warm + 1)


SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -3e-42, 6e-8, 1e-20, 65504.0, 65520.0, -7e4, 3e38, 1e-310, 1e300)


def with_specials(array: Array, rng: np.random.Generator, share: float = 0.05) -> Array:
    """The same array with some elements replaced by NaN, infinities, denormals, zeros and huge numbers, in place."""
    flat = array.reshape(-1)
    where = np.flatnonzero(rng.random(flat.size) < share)
    with np.errstate(all="ignore"):
        flat[where] = rng.choice(np.asarray(SPECIAL), where.size).astype(array.dtype)
    return array


# ---- calls


def apply(rule: Any, param: Any, grad: Any, state: Mapping[str, Any], step: int, options: Options) -> None:
    """The rule's in-place function, on one array or on sequences of equal length."""
    accepted = inspect.signature(function(rule)).parameters
    extra: Options = {}
    if "step" in accepted:
        extra["step"] = step
    if "first" in accepted and state:
        extra["first"] = step == 1
    returned: Any = function(rule)(param, grad, **state, **extra, **options)  # type: ignore[func-returns-value]
    assert returned is None


def apply_many(rule: Any, many: Sequence[Problem], options: Options) -> None:
    """One call for all problems; they share the step number."""
    states = {name: [p.state[name] for p in many] for name in many[0].state}
    apply(rule, [p.param for p in many], [p.grad for p in many], states, many[0].step, options)


def fused(rule: Any) -> Apply:
    return lambda param, grad, state, step, options: apply(rule, param, grad, state, step, options)


@contextmanager
def engine(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    fusedopt.set_isa(isa)
    fusedopt.set_num_threads(threads)
    try:
        yield
    finally:
        fusedopt.set_isa(None)
        fusedopt.set_num_threads(None)


# ---- optimizer objects

SHAPES: list[tuple[int, ...]] = [(3, 4), (), (5,), (0,)]


def optimizer(rule: Any) -> Callable[..., Any]:
    return getattr(fusedopt, rule.name)  # type: ignore[no-any-return]


def some(seed: int, dtype: Any = F64) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [normal(rng, shape, np.dtype(dtype)) for shape in SHAPES]


def assert_all_same(got: list[Array], want: list[Array]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"[{i}]")


# ---- bits


def bits(array: Array) -> Array:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def assert_same_bits(got: Array, want: Array, what: str = "") -> None:
    """Equal bits, -0 and +0 distinguished; any NaN equals any other, as payloads differ between machines."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype} is not {want.dtype}"
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    differ = (bits(got) != bits(want)) & ~(np.isnan(got) & np.isnan(want))
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.size} differ, first at {at}: {got[at]!r} {want[at]!r}"
        )


def assert_same_problem(got: Problem, want: Problem, what: str = "") -> None:
    assert_same_bits(got.param, want.param, f"{what} param")
    assert_same_bits(got.grad, want.grad, f"{what} grad")
    assert got.state.keys() == want.state.keys()
    for name, array in want.state.items():
        assert_same_bits(got.state[name], array, f"{what} {name}")


# ---- distance from the reference


def _digits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Significand bits and the smallest frexp exponent of a normal number."""
    known = {F64: (53, -1021), F32: (24, -125), F16: (11, -13)}
    return known.get(dtype, (8, -125))  # else bfloat16


def ulp(x: Array, dtype: np.dtype[Any]) -> Array:
    """The distance between neighbours at |x| in a format, in float64; below the smallest normal, that of denormals."""
    digits, smallest = _digits(dtype)
    exponent = np.where(x == 0, smallest, np.frexp(np.where(np.isfinite(x), x, 1.0))[1])
    return np.ldexp(1.0, np.maximum(exponent, smallest) - digits)


def assert_near(got: Array, want: Array, scale: Array, computed: np.dtype[Any], ulps: float, what: str) -> None:
    """`got` equals `want` (float64) to within `ulps` of the arithmetic at `scale` plus one rounding to storage."""
    stored = got.dtype
    with np.errstate(over="ignore"):  # beyond the format's range both have to be infinite
        want_stored, value = want.astype(stored).astype(F64), got.astype(F64)
    special = ~np.isfinite(want_stored)
    wrong_special = special & ~((value == want_stored) | (np.isnan(value) & np.isnan(want_stored)))
    slack = ulps * ulp(scale, computed) + (0.5 * ulp(want, stored) if stored != computed else 0.0)
    with np.errstate(invalid="ignore"):
        error = np.where(special, 0.0, np.abs(value - want))
    far = wrong_special | ~(error <= slack)
    if far.any():
        at = tuple(int(i) for i in np.argwhere(far)[0])
        raise AssertionError(
            f"{what}: {int(far.sum())} of {far.size} are off, first at {at}: {value[at]!r} is not {want[at]!r}, "
            f"{float(np.asarray(error / ulp(scale, computed))[at]):.3g} ulp"
        )


def check_step(
    step_function: Apply, rule: Any, options: Options, before: Problem, ulps: float = 4, what: str = ""
) -> Problem:
    """Makes the step with `step_function`, compares all results with the float64 reference, and returns the next
    problem.

    Distances are in ulps of the larger of parameter and update (for a state: of its old and new value), but at least of
    the largest update of the array: if terms cancel, only the terms are accurate.
    """
    after = before.copy()
    step_function(after.param, after.grad, after.state, after.step, options)
    computed = F64 if before.param.dtype == F64 else F32
    param, grad = before.param.astype(F64), before.grad.astype(F64)
    state = cast_state(rule, before.state, F64)
    with np.errstate(all="ignore"):
        rule.reference(param, grad, state, before.step, **filled(rule, options))
    what = what or f"{rule.name} {label(options)} step {before.step}"
    assert_same_bits(after.grad, before.grad, f"{what}: the gradient was written")
    pairs = [("param", after.param, param, before.param)]
    pairs += [(name, after.state[name], state[name], before.state[name]) for name in before.state]
    for name, got, want, old in pairs:
        with np.errstate(invalid="ignore"):
            change = np.abs(want - old.astype(F64))
        finite = change[np.isfinite(change)]
        largest = finite.max() if finite.size else 0.0
        scale = np.maximum.reduce([np.abs(old.astype(F64)), np.abs(want), np.full(want.shape, largest)])
        number = F64 if is_scalar_state(rule, name) else computed
        # A state may keep the square of a quotient of roots (Adadelta): half as much again.
        assert_near(got, want, scale, number, ulps if name == "param" else 1.5 * ulps, f"{what}: {name}")
    return Problem(after.param, after.grad, after.state, after.step + 1)


def check_rule(step_function: Apply, rule: Any, fmt: Format, options: Options, ulps: float = 4) -> None:
    """Checks that every step function must pass, and every mutant of test_mutants must fail: first and later steps of a
    trajectory with a changing lr, odd lengths, and gradients from zero to large."""
    # The square of 1e-3 underflows in a float16 state: rounding then decides the step, and not the rule.
    scales = (1.0, 30.0) if fmt.state == F16 else (1.0, 30.0, 1e-3)
    for size, scale in itertools.product((1, 7, 67), scales):
        rng = np.random.default_rng(size)
        now = problem(rule, options, fmt, size, seed=size, warm=0)
        for step in range(1, 7):
            grad = normal(rng, size, fmt.grad, scale)
            changing = {**options, "lr": filled(rule, options)["lr"] / (1 + step % 3)}
            now = check_step(step_function, rule, changing, now._replace(grad=grad), ulps)
    check_eps(step_function, rule, fmt, options, ulps)


def check_eps(step_function: Apply, rule: Any, fmt: Format, options: Options, ulps: float = 4) -> None:
    """Steps dominated by eps: a zero gradient, and one far smaller than eps."""
    if "eps" not in rule.defaults:
        return
    for value, eps in ((0.0, rule.defaults["eps"]), (1e-7, 1e-3), (1e-5, 1e-4)):
        now = problem(rule, options, fmt, 5, warm=0)
        for _ in range(3):
            grad = np.full(5, value).astype(fmt.grad)
            now = check_step(step_function, rule, {**options, "eps": eps}, now._replace(grad=grad), ulps)
