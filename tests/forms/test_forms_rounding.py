"""Stochastic rounding: the result is one of the two neighbours, unbiased, independent between elements and steps, and
reproducible for the same seed. The tests are also run on wrong roundings, which they have to detect.

Power: N = 1,000,000 elements and a threshold of 4.5 standard errors (one false alarm in 150,000 runs; seeds are fixed).
The variance of one rounding is f (1 - f) squared ulps with f the fraction cut off, 1/6 on average. A bias of 0.0031 ulp
is therefore detected with probability 0.999: (4.5 + 3.1) sqrt(1/6 / N).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import BF16, numpy_dtype
from fusedopt import forms
from helpers import F16, F32, Array, assert_same_bits, bits, engine

N = 1_000_000
LIMIT = 4.5


def neighbours(x: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """(the neighbour of x towards zero, the one away from it), in float64; x lies within the format's range."""
    near = x.astype(dtype)
    inner = bits(near) - (np.abs(near.astype(np.float64)) > np.abs(x)).astype(np.uint16)
    return inner.view(dtype).astype(np.float64), (inner + np.uint16(1)).view(dtype).astype(np.float64)


def check_unbiased(x: Array, got: Array, dtype: np.dtype[Any], slack: float = 0.0) -> None:
    """x: the values before rounding, in float64. ``slack``: the format's known bias in ulps."""
    low, high = neighbours(x, dtype)
    up = got.astype(np.float64) == high
    share = (x - low) / (high - low)
    wrong = ~(up | (got.astype(np.float64) == low)) | (up & (share == 0))
    assert not wrong.any(), f"{int(wrong.sum())} of {x.size} are no neighbours, first {got[wrong][0]} of {x[wrong][0]}"
    error, variance = up - share, share * (1 - share)

    def z(mean: Array, var: Array, allowed: float = 0.0) -> float:
        return (abs(float(mean.sum())) - allowed * mean.size) / max(np.sqrt(float(var.sum())), 1.0)

    assert z(error, variance, slack) < LIMIT, f"biased by {error.mean():.2e} of an ulp"
    bins = np.minimum((share * 16).astype(int), 15)
    for b in range(16):  # unbiased for each fraction, too
        these = bins == b
        assert z(error[these], variance[these], slack) < LIMIT, f"biased where {b}/16 of an ulp are cut off"
    for place in range(64):  # unbiased at each position in a vector or block
        assert z(error[place::64], variance[place::64], slack) < LIMIT, f"biased in place {place} of 64"
    for lag in (1, 2, 16, 32, 48, 64):  # neighbours are independent
        mean, var = error[lag:] * error[:-lag], variance[lag:] * variance[:-lag]
        assert z(mean, var, slack) < LIMIT, f"elements {lag} apart are rounded alike"


def numbers(dtype: np.dtype[Any], seed: int = 0) -> Array:
    """float32 values between those of a 16-bit format; for float16 denormals, too."""
    rng = np.random.default_rng(seed)
    exponent = rng.integers(-20, 8, N) if dtype == F16 else rng.integers(-60, 60, N)
    return np.ldexp((1 + rng.random(N)) * rng.choice([-1.0, 1.0], N), exponent).astype(F32)


def rounded_state(dtype: np.dtype[Any], seed: int = 0) -> tuple[Array, Array]:
    """(values, the buffer after SGD's first step)"""
    x = numbers(dtype)
    opt = fusedopt.SGD(np.zeros(N, F32), momentum=0.9, state_dtype=dtype.name, seed=seed)
    opt.step(x)
    return x.astype(np.float64), opt.state[0]["momentum_buffer"]


def rounded_weight(dtype: np.dtype[Any], seed: int = 0, **options: Any) -> tuple[Array, Array]:
    """(p - lr g, the parameter after the step)"""
    p = numbers(dtype).astype(dtype)
    rng = np.random.default_rng(1)
    g = (p.astype(F32) * rng.random(N)).astype(dtype)
    exact = p.astype(np.float64) - np.float64(np.float32(0.01)) * g.astype(np.float64)
    opt = fusedopt.SGD(p, lr=0.01, stochastic_rounding=True, seed=seed, **options)
    opt.step(g)
    return exact.astype(F32).astype(np.float64), p


HALVES = [BF16, F16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_states_are_rounded_without_bias(dtype: np.dtype[Any]) -> None:
    check_unbiased(*rounded_state(dtype), dtype)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"momentum": 0.5, "state_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_rounded_without_bias(dtype: np.dtype[Any], options: dict[str, Any]) -> None:
    if dtype == F16 and "state_dtype" in options:
        pytest.skip("no such form")
    check_unbiased(*rounded_weight(dtype, **options), dtype)


def test_what_has_no_rest_stays_and_what_is_too_large_becomes_infinite() -> None:
    for dtype in HALVES:
        exact = np.concatenate(
            [[0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 3e38 if dtype == BF16 else 65504.0], np.arange(58)]
        )
        exact = exact.astype(dtype)
        for seed in range(20):
            opt = fusedopt.SGD(np.zeros(65, F32), momentum=0.9, state_dtype=dtype.name, seed=seed)
            opt.step(exact.astype(F32))
            assert_same_bits(opt.state[0]["momentum_buffer"], exact)
    opt = fusedopt.SGD(np.zeros(3, F32), momentum=0.9, state_dtype="float16")
    opt.step(np.array([65536.0, -1e30, np.nan], F32))
    assert_same_bits(opt.state[0]["momentum_buffer"], np.array([np.inf, -np.inf, np.nan], F16))


def test_seeds_and_streams_are_independent() -> None:
    """The mean of the roundings of one value over seeds is the value; two seeds agree as often as by chance."""
    x = np.full(64, 1 + 0.3 * 2.0**-7, F32)
    ups = []
    for seed in range(2000):
        opt = fusedopt.SGD(np.zeros(64, F32), momentum=0.9, state_dtype="bfloat16", seed=seed)
        opt.step(x)
        ups.append(opt.state[0]["momentum_buffer"].astype(np.float64) > 1)
    ups = np.array(ups)
    assert abs(ups.mean() - 0.3) < LIMIT * np.sqrt(0.21 / ups.size)
    assert (np.abs(ups.mean(axis=0) - 0.3) < LIMIT * np.sqrt(0.21 / 2000)).all()
    assert abs((ups[1:] == ups[:-1]).mean() - 0.58) < LIMIT * np.sqrt(0.58 * 0.42 / ups[1:].size)

    opt = fusedopt.SGD([np.zeros(64, F32) for _ in range(500)], momentum=0.9, state_dtype="bfloat16")
    opt.step([x] * 500)
    ups = np.array([s["momentum_buffer"].astype(np.float64) > 1 for s in opt.state])
    assert abs((ups[1:] == ups[:-1]).mean() - 0.58) < LIMIT * np.sqrt(0.58 * 0.42 / ups[1:].size)
    assert abs(ups.mean() - 0.3) < LIMIT * np.sqrt(0.21 / ups.size)


@pytest.mark.parametrize("second", [False, True], ids=["signed", "second moment"])
def test_codes_are_rounded_without_bias(second: bool) -> None:
    """Biased by 1/512 of a step at most; the test below is sharper."""
    x = np.abs(np.random.default_rng(0).standard_normal(N)).astype(F32)
    if second:
        opt, name, top = fusedopt.Adagrad(np.zeros(N, F32), state_dtype="int8"), "sum", 255.0
    else:
        opt, name, top = fusedopt.SGD(np.zeros(N, F32), momentum=0.9, state_dtype="int8"), "momentum_buffer", 127.0
    opt.step(x)
    codes, scale = opt.state[0][f"{name}_codes"].astype(np.float64), opt.state[0][f"{name}_scale"]
    value = x.astype(np.float64) ** (2 if second else 1)
    exact = np.sqrt(value / np.repeat(scale, forms.BLOCK)[:N]) * top
    inside = (exact > 1.01) & (exact < top - 0.01)
    error, share = (codes - exact)[inside], (exact % 1)[inside]
    assert (np.abs(error) < 1 + 1e-4).all()
    deviation = np.sqrt((share * (1 - share)).sum())
    assert abs(error.sum() + error.size / 2048) < LIMIT * deviation
    for b in range(16):
        these = (share * 16).astype(int) == b
        slack = LIMIT * np.sqrt((share[these] * (1 - share[these])).sum()) + 1
        assert abs(error[these].sum() + these.sum() / 2048) < slack, b
    for lag in (1, 16, 32, 48, 64):
        both = error[lag:] * error[:-lag]
        assert abs(both.sum()) < LIMIT * np.sqrt((both**2).sum()) + both.size / 256, lag


def test_a_quarter_of_the_codes_have_8_random_bits_the_others_more() -> None:
    """0.9/256 above a code: 8 random bits never round up, more bits do with the right probability."""
    share, blocks = 0.9 / 256, 20_000
    x = np.full((blocks, forms.BLOCK), ((10 + share) / 127) ** 2, F32)
    x[:, 0] = 1.0
    opt = fusedopt.SGD(np.zeros(x.size, F32), momentum=0.9, state_dtype="int8")
    opt.step(x.reshape(-1))
    up = opt.state[0]["momentum_buffer_codes"].reshape(blocks, forms.BLOCK)[:, 1:] == 11
    assert not up[:, :15].any()
    others = up[:, 15:]
    assert abs(others.mean() - share) < LIMIT * np.sqrt(share / others.size) + 2.0**-13


# ---- wrong roundings, in NumPy


Mutant = Callable[[Array, Array, np.random.Generator], Array]
MUTANTS: dict[str, Mutant] = {  # (x, the fraction cut off) -> whether to round away from zero
    "to nearest": lambda x, f, rng: f > 0.5,
    "cut off": lambda x, f, rng: np.zeros(f.shape, bool),
    "noise that is 1/2 on average, but never near 1": lambda x, f, rng: f + 0.25 + 0.5 * rng.random(f.size) >= 1,
    "noise with a bias of 1/200": lambda x, f, rng: f + rng.random(f.size) + 0.005 >= 1,
    "4 random bits": lambda x, f, rng: f + rng.integers(0, 16, f.size) / 16 >= 1,
    "one number for two neighbours": lambda x, f, rng: f + np.repeat(rng.random(f.size // 2), 2) >= 1,
    "one number for a block": lambda x, f, rng: f + np.repeat(rng.random(f.size // 64), 64) >= 1,
    "no noise in the last place of a block": (
        lambda x, f, rng: f + rng.random(f.size) * (np.arange(f.size) % 64 != 63) >= 1
    ),
    "up in place of away": lambda x, f, rng: np.where(x > 0, f, 1 - f) + rng.random(f.size) >= 1,
}  # fmt: skip


def rounded_by(mutant: Mutant, x: Array, dtype: np.dtype[Any]) -> Array:
    low, high = neighbours(x, dtype)
    up = mutant(x, (x - low) / (high - low), np.random.default_rng(5))
    return np.where(up, high, low).astype(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_statistics_pass_what_is_right(dtype: np.dtype[Any]) -> None:
    x = numbers(dtype).astype(np.float64)
    check_unbiased(x, rounded_by(lambda x, f, rng: f + rng.random(f.size) >= 1, x, dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_statistics_catch_what_is_wrong(name: str, dtype: np.dtype[Any]) -> None:
    x = numbers(dtype).astype(np.float64)
    with pytest.raises(AssertionError):
        check_unbiased(x, rounded_by(MUTANTS[name], x, dtype), dtype)


def test_the_same_noise_twice_is_caught() -> None:
    """Steps, seeds and tensors with the same random numbers: two of them agree in every element."""
    x, first = rounded_state(BF16)
    _, second = rounded_state(BF16, seed=1)
    agree = (bits(first) == bits(second)).mean()
    low, high = neighbours(x, BF16)
    f = (x - low) / (high - low)
    assert abs(agree - (f * f + (1 - f) ** 2).mean()) < LIMIT * 0.5 / np.sqrt(N)


# ---- repeatable


def test_the_same_seed_gives_the_same_bits_whatever_the_threads() -> None:
    want = rounded_weight(BF16, seed=7)[1]
    for threads in (1, 3, 8):
        with engine(None, threads):
            assert_same_bits(rounded_weight(BF16, seed=7)[1], want)
    assert not np.array_equal(rounded_weight(BF16, seed=8)[1], want)


def test_noise_that_depends_on_the_thread_would_show() -> None:
    """As test_forms_bits compares thread counts: noise indexed within the thread's part differs."""

    def step(x: Array, threads: int) -> Array:
        parts = [
            rounded_by(lambda x, f, rng: f + rng.random(f.size) >= 1, part, BF16) for part in np.array_split(x, threads)
        ]
        return np.concatenate(parts)

    x = numbers(BF16).astype(np.float64)[:1000]
    with pytest.raises(AssertionError):
        assert_same_bits(step(x, 2), step(x, 1))


# ---- what it is for


def test_a_bf16_second_moment_moves_with_random_rounding_and_stalls_without() -> None:
    """Adam's v for a constant gradient of 1 with beta2 = 0.999 is 1 - 0.999^t; rounded to nearest it stalls at about
    0.2."""
    steps, n = 3000, 512
    ends = {}
    for kind in ("nearest", "stochastic", "float32"):
        p, g = np.ones(n, F32), np.ones(n, F32)
        if kind == "nearest":
            m, v = np.zeros(n, BF16), np.zeros(n, BF16)
            for step in range(1, steps + 1):
                fusedopt.adam_(p, g, m, v, step=step, lr=0.0)
        else:
            opt = fusedopt.Adam(p, lr=0.0, state_dtype="bfloat16" if kind == "stochastic" else kind)
            for _ in range(steps):
                opt.step(g)
            v = opt.state[0]["exp_avg_sq"]
        ends[kind] = v.astype(np.float64)
    right = 1 - 0.999**steps
    assert ends["nearest"].max() < 0.4 * right
    assert abs(ends["float32"].mean() - right) < 1e-4
    # v's own rounding noise: at most half an ulp a step over the last 1 / (1 - beta2^2) steps
    deviation = 0.5 * 2.0**-8 * np.sqrt(1 / (1 - 0.999**2)) / np.sqrt(n)
    assert abs(ends["stochastic"].mean() - right) < LIMIT * deviation


def test_bf16_weights_follow_small_updates_on_average() -> None:
    p = np.ones(4096, BF16)
    opt = fusedopt.SGD(p, lr=1e-4, stochastic_rounding=True)
    g = np.ones(4096, numpy_dtype("bfloat16"))
    for _ in range(1000):
        opt.step(g)
    deviation = 2.0**-8 * 0.5 * np.sqrt(1000) / np.sqrt(4096)
    assert abs(p.astype(np.float64).mean() - 0.9) < LIMIT * deviation
