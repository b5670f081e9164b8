"""Bit-identical results for every instruction set, thread count, length, offset, split and batching, for every rule and
format.

Arrays contain NaN, infinities, denormals and huge values. test_reference checks the values.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    FORMATS,
    Array,
    Options,
    Problem,
    apply,
    apply_many,
    assert_same_bits,
    assert_same_problem,
    cast_state,
    engine,
    is_scalar_state,
    label,
    offset_empty,
    option_sets,
    problem,
    two_option_sets,
    with_specials,
)

LENGTHS = [*range(201), 1000, 4099]
TOTAL = sum(LENGTHS)

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@lru_cache(maxsize=4)
def long_problem(rule: Any, fmt: str, options: tuple[tuple[str, Any], ...], n: int) -> Problem:
    made = problem(rule, dict(options), FORMATS[fmt], n, seed=n)
    rng = np.random.default_rng(1)
    with_specials(made.grad, rng)
    with_specials(made.param, rng, 0.01)
    for name, array in made.state.items():
        if not is_scalar_state(rule, name):
            with_specials(array, rng, 0.01)
    return made


def same_problem_at(source: Problem, start: int, n: int, offset: int) -> Problem:
    """A slice of a problem in new memory; every array starts at another offset from a cache line."""

    def move(array: Array, shift: int) -> Array:
        if array.ndim == 0:
            return array.copy()
        out = offset_empty(n, array.dtype, (offset + shift) % 67)
        out[:] = array[start : start + n]
        return out

    state = {name: move(array, 5 * i + 3) for i, (name, array) in enumerate(source.state.items())}
    return Problem(move(source.param, 0), move(source.grad, 7), state, source.step)


def pieces(source: Problem) -> list[Problem]:
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return [same_problem_at(source, int(s), n, i) for i, (s, n) in enumerate(zip(starts, LENGTHS, strict=True))]


def assert_pieces(got: list[Problem], want: Problem, what: str) -> None:
    assert_same_bits(np.concatenate([p.param for p in got]), want.param, f"{what} param")
    assert_same_bits(np.concatenate([p.grad for p in got]), want.grad, f"{what} grad")
    for name, array in want.state.items():
        if array.ndim:
            assert_same_bits(np.concatenate([p.state[name] for p in got]), array, f"{what} {name}")
        else:
            assert_same_bits(got[-1].state[name], array, f"{what} {name}")


def one_plain_call(rule: Any, source: Problem, options: Options) -> Problem:
    want = source.copy()
    with engine("baseline", 1):
        apply(rule, want.param, want.grad, want.state, want.step, options)
    return want


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_lengths_offsets_batching_isas_and_threads_give_the_same_bits(rule: Any, fmt: str) -> None:
    for options in two_option_sets(rule):
        source = long_problem(rule, fmt, tuple(options.items()), TOTAL)
        want = one_plain_call(rule, source, options)
        for isa in fusedopt.isas():
            for threads in (1, 3):
                got = pieces(source)
                with engine(isa, threads):
                    apply_many(rule, got, options)
                assert_pieces(got, want, f"{isa}, {threads} threads, one call, {label(options)}")
        for isa in (fusedopt.isas()[0], fusedopt.isas()[-1]):
            got = pieces(source)
            with engine(isa, 2):
                for piece in got:
                    apply(rule, piece.param, piece.grad, piece.state, piece.step, options)
            assert_pieces(got, want, f"{isa}, a call per array, {label(options)}")


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_every_option_set_gives_the_same_bits_on_every_isa(rule: Any) -> None:
    formats = list(FORMATS)
    for i, options in enumerate(option_sets(rule)):
        for fmt in ("f32", formats[i % len(formats)]):
            source = long_problem(rule, fmt, tuple(options.items()), 533)
            want = one_plain_call(rule, source, options)
            for isa in fusedopt.isas()[1:]:
                got = source.copy()
                with engine(isa, 1):
                    apply(rule, got.param, got.grad, got.state, got.step, options)
                assert_same_problem(got, want, f"{isa}, {fmt}, {label(options)}")


LARGE = 2_000_003  # far above the size of a serial step, and not a multiple of any block


@lru_cache(maxsize=1)
def noise() -> Array:
    return np.random.default_rng(3).standard_normal(LARGE + 8)


def large_problem(rule: Any, fmt: str, options: Options, n: int) -> Problem:
    """From the same noise each time: only the loop is tested, so a state need only be non-negative."""
    param, grad, state_dtype = FORMATS[fmt]
    states = problem(rule, options, FORMATS["f64"], 1, warm=1).state
    for i, name in enumerate(states):
        if not is_scalar_state(rule, name):
            states[name] = np.abs(noise()[i + 2 : n + i + 2])
    state = cast_state(rule, states, state_dtype)
    return Problem(noise()[:n].astype(param), noise()[1 : n + 1].astype(grad), state, 2)


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_large_arrays_give_the_same_bits_for_1_to_8_threads(rule: Any) -> None:
    formats = list(FORMATS)
    number = list(RULES).index(rule.name)
    options = two_option_sets(rule)[number % 2]
    for fmt in ("f32", formats[number % len(formats)]):
        source = large_problem(rule, fmt, options, LARGE)
        want = source.copy()
        with engine(None, 1):
            apply(rule, want.param, want.grad, want.state, want.step, options)
        for threads in range(2, 9) if fmt == "f32" else (2, 5):
            got = source.copy()
            with engine(None, threads):
                apply(rule, got.param, got.grad, got.state, got.step, options)
            assert_same_problem(got, want, f"{threads} threads, {fmt}")


@pytest.mark.parametrize("fmt", FORMATS)
def test_large_arrays_in_every_format_and_isa_give_the_same_bits(fmt: str) -> None:
    for number, rule in enumerate(RULES.values()):
        options = two_option_sets(rule)[number % 2]
        source = large_problem(rule, fmt, options, 150_001)
        want = source.copy()
        with engine(None, 1):
            apply(rule, want.param, want.grad, want.state, want.step, options)
        for isa, threads in zip(fusedopt.isas(), (4, 2, 7), strict=False):
            if isa == "baseline" and (list(FORMATS).index(fmt) + number) % 3:
                continue  # software FMA is slow: a third of the pairs
            got = source.copy()
            with engine(isa, threads):
                apply(rule, got.param, got.grad, got.state, got.step, options)
            assert_same_problem(got, want, f"{rule.name} {isa}, {threads} threads")


def test_one_large_array_and_its_parts_in_one_call_give_the_same_bits() -> None:
    """Splits within an array, and many arrays per thread, have no effect."""
    rule = RULES["Adam"]
    source = large_problem(rule, "f32", {}, LARGE)
    want = source.copy()
    with engine(None, 1):
        apply(rule, want.param, want.grad, want.state, want.step, {})
    cuts = np.sort(np.random.default_rng(5).integers(0, LARGE, 300))
    whole = source.copy()
    arrays = {
        name: np.split(a, cuts) for name, a in (("param", whole.param), ("grad", whole.grad), *whole.state.items())
    }
    parts = [
        Problem(arrays["param"][i], arrays["grad"][i], {k: arrays[k][i] for k in whole.state}, whole.step)
        for i in range(len(cuts) + 1)
    ]
    with engine(None, 3):
        apply_many(rule, parts, {})
    assert_same_problem(whole, want)


def test_clipping_is_the_same_for_every_isa_thread_count_and_alignment() -> None:
    """The norm is a reduction, where the order of additions would show."""
    rng = np.random.default_rng(0)
    for dtype in ("f32", "f64", "bf16", "f16"):
        if dtype not in FORMATS:
            continue
        storage = FORMATS[dtype].param
        sizes = (0, 1, 13, 70_001, 300_007)
        start = [rng.standard_normal(n).astype(storage) for n in sizes]
        grads = [rng.standard_normal(n).astype(storage) for n in sizes]
        seen = []
        for isa in fusedopt.isas():
            for threads in (1, 2, 5, 8):
                params, moved = [], []
                for i, (p, g) in enumerate(zip(start, grads, strict=True)):
                    params.append(offset_empty(p.size, storage, i + threads))
                    moved.append(offset_empty(p.size, storage, 3 * i + threads))
                    params[-1][:], moved[-1][:] = p, g
                opt = fusedopt.AdamW(params, lr=1e-2, max_grad_norm=1.0)
                with engine(isa, threads):
                    opt.step(moved)
                seen.append((opt.last_grad_norm, np.concatenate(params)))
        for norm, params_after in seen[1:]:
            assert norm == seen[0][0]
            assert_same_bits(params_after, seen[0][1], dtype)
