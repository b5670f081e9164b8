"""The formats against their NumPy version in fusedopt.forms: int8 codes within the documented bound, split and copied
masters bit for bit; split16 and float32 masters against a float32 optimizer. Stochastic rounding: test_forms_rounding.
"""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import fusedopt
from form_cases import BF16, CASES, Case, data, join, kept, optimizer, round_away, train
from fusedopt import forms
from helpers import F32, Array, assert_same_bits, bits

BLOCK = forms.BLOCK
KINDS = ("normal", "zeros", "negative zeros", "denormal", "outlier", "huge", "tiny", "one", "equal", "half zeros")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|underflow) encountered:RuntimeWarning")


def block(kind: str, rng: np.random.Generator, low: float, high: float) -> Array:
    """64 float32 values of this kind, none larger than 10**high."""
    x = rng.standard_normal(BLOCK)
    match kind:
        case "zeros":
            x *= 0
        case "negative zeros":
            x = np.full(BLOCK, -0.0)
        case "denormal":
            x *= 10.0 ** (low + 1)
        case "outlier":
            x *= 10.0 ** (low / 2)
            x[rng.integers(BLOCK)] = 10.0 ** (high - 2)
        case "huge":
            x *= 10.0 ** (high - 1)
        case "tiny":
            x *= 10.0 ** (0.75 * low)
        case "one":
            x = np.where(np.arange(BLOCK) == rng.integers(BLOCK), x, 0)
        case "equal":
            x[:] = x[0]
        case "half zeros":
            x[::2] = 0
    return x.astype(np.float32)


def encoded(x: Array, second: bool, seed: int = 0) -> tuple[Array, Array, Array]:
    """(the values to store, codes, scales): SGD's first step stores g, Adagrad's g * g."""
    opt: Any
    if second:
        opt, name, x = fusedopt.Adagrad(np.zeros_like(x), state_dtype="int8", seed=seed), "sum", np.sqrt(np.abs(x))
        stored = (x.astype(np.float64) ** 2).astype(np.float32)
    else:
        opt = fusedopt.SGD(np.zeros_like(x), momentum=0.9, state_dtype="int8", seed=seed)
        name, stored = "momentum_buffer", x
    opt.step(x)
    return stored, opt.state[0][f"{name}_codes"], opt.state[0][f"{name}_scale"]


def check_codes(x: Array, codes: Array, scale: Array, distance: float = 1.0) -> None:
    """The documented bound per element: s (2 r d + d^2), r = sqrt(|x| / s), d = 1/127 or 1/255."""
    second = codes.dtype == np.uint8
    top = 255.0 if second else 127.0
    whole = np.zeros(scale.size * BLOCK, np.float32)
    whole[: x.size] = np.abs(x)
    assert_same_bits(scale, whole.reshape(-1, BLOCK).max(axis=1), "scale")
    s = np.repeat(scale.astype(np.float64), BLOCK)[: x.size]
    r = np.sqrt(np.divide(np.abs(x).astype(np.float64), s, where=s > 0, out=np.zeros(x.size)))
    d = distance * (1 + 1e-4) / top
    error = np.abs(forms.dequantise(codes, scale).astype(np.float64) - x)
    bound = s * (2 * r * d + d * d) * (1 + 1e-6) + 2.0**-149
    worst = int(np.argmax(error - bound)) if x.size else 0
    assert (error <= bound).all(), f"[{worst}]: {x[worst]!r} of a block of {s[worst]:g} is off by {error[worst]:g}"
    assert (codes[s == 0] == 0).all(), "a block of zeros has codes"
    if second:
        assert (codes[s > 0] >= 1).all(), "a second moment vanished"
    else:
        assert (np.sign(codes.astype(int)) * np.sign(x) >= 0).all(), "a sign was turned"


blocks = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)


@pytest.mark.parametrize("second", [False, True], ids=["signed", "second moment"])
@settings(max_examples=150)
@given(kinds=blocks, tail=st.integers(1, BLOCK), seed=st.integers(0, 2**31))
def test_every_code_is_within_the_documented_bound(kinds: list[str], tail: int, seed: int, second: bool) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([block(kind, rng, -44.0, 38.0) for kind in kinds])[: BLOCK * (len(kinds) - 1) + tail]
    stored, codes, scale = encoded(x, second, seed % 2**32)
    check_codes(stored, codes, scale)
    made = forms.quantise(stored, codes.dtype.name)  # the NumPy version rounds to nearest: half the distance
    check_codes(stored, *made, distance=0.5 if not second else 1.0)
    assert_same_bits(made[1], scale)
    assert np.abs(made[0].astype(int) - codes).max() <= 1


@pytest.mark.parametrize("second", [False, True], ids=["signed", "second moment"])
def test_numbers_that_are_some_codes_keep_them(second: bool) -> None:
    """For all random bits, a state that a step does not change keeps its codes, with a normal scale and with 1e-32."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [block(kind, rng, -44.0, 38.0) for kind in ("normal", "outlier", "huge", "one") for _ in range(200)]
    )
    x[: 20 * BLOCK] *= np.float32(1e-32)
    opt: Any
    if second:
        opt, name, x = fusedopt.Adagrad(np.zeros_like(x), state_dtype="int8"), "sum", np.sqrt(np.abs(x))
    else:
        opt, name = fusedopt.SGD(np.zeros_like(x), momentum=1.0, state_dtype="int8"), "momentum_buffer"
    opt.step(x)
    codes, scale = opt.state[0][f"{name}_codes"].copy(), opt.state[0][f"{name}_scale"].copy()
    assert len(np.unique(codes)) == 255
    for _ in range(100):
        opt.step(np.zeros_like(x))
    assert_same_bits(opt.state[0][f"{name}_codes"], codes)
    np.testing.assert_allclose(opt.state[0][f"{name}_scale"], scale, rtol=1e-5)  # the largest, rounded twice a step


def test_the_bound_is_one_that_wrong_codes_miss() -> None:
    """Mutants: a neighbour's scale, a tail without codes, a code off by two."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(150) * np.repeat([1.0, 8.0, 0.1], BLOCK)[:150]).astype(np.float32)
    for second in (False, True):
        stored, codes, scale = encoded(x, second)
        check_codes(stored, codes, scale)
        off = codes.copy()
        off[100] = int(off[100]) + (4 if off[100] < 100 else -4)
        cut = codes.copy()
        cut[128:] = 0
        mutants = [(codes, np.roll(scale, 1)), (cut, scale), (off, scale), (np.roll(codes, 1), scale)]
        mutants += [(codes, np.full_like(scale, scale.max()))]
        for wrong in mutants:
            with pytest.raises(AssertionError):
                check_codes(stored, *wrong)


@pytest.mark.parametrize("second", [False, True], ids=["signed", "second moment"])
def test_a_block_that_is_not_finite_leaves_the_others_alone(second: bool) -> None:
    x = np.abs(data(300, "float32", 1)) + 0.1
    _, want, scales = encoded(x, second)
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = x.copy()
        poisoned[70] = np.abs(bad) if second else bad
        _, codes, scale = encoded(poisoned, second)
        others = np.r_[0:64, 128:300]
        assert_same_bits(codes[others], want[others])
        assert_same_bits(scale[[0, 2, 3, 4]], scales[[0, 2, 3, 4]])
        assert not np.isfinite(scale[1])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 3e-42, 1e-38, 2.0**-96, 2.0**-97, 1e-20, 1.0, 7.7, 1e20, 3e38])
def test_the_kernels_decode_as_the_statement_does(scale: float) -> None:
    codes = np.resize(np.arange(-127, 128), 256).astype(np.int8)
    opt = fusedopt.SGD(np.zeros(256, np.float32), lr=1.0, momentum=0.5, state_dtype="int8")
    opt.step(np.zeros(256, np.float32))
    state, (p,) = opt.state[0], opt.param_groups[0]["params"]
    state["momentum_buffer_codes"][:], state["momentum_buffer_scale"][:] = codes, scale
    opt.step(np.zeros(256, np.float32))
    want = -0.5 * forms.dequantise(codes, np.full(4, scale, F32)).astype(np.float64)
    np.testing.assert_allclose(p, want, rtol=5e-7, atol=2.0**-148)

    root = np.resize(np.arange(1, 256), 256).astype(np.uint8)
    rms = fusedopt.RMSprop(np.zeros(256, np.float32), lr=1.0, alpha=1.0 - 1e-9, eps=1e-30, state_dtype="int8")
    if scale < 1e-38:
        return  # the square root of a denormal is negligible next to eps
    rms.state[0].update(step=5, square_avg_codes=root.copy(), square_avg_scale=np.full(4, scale, F32))
    rms.step(np.full(256, 1e-18, F32))
    x = forms.dequantise(root, np.full(4, scale, F32)).astype(np.float64)
    if scale > 1e-30:
        np.testing.assert_allclose(rms.param_groups[0]["params"][0], -1e-18 / np.sqrt(x), rtol=1e-5)


# ---- masters


EDGES = [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x007F, 0x3FFF, 0x4000]
RESTS = [0, 1, -1, 127, -127, -128, 0x7FFF, -0x8000, 0x80, 0xFF]


def pairs(master: str) -> tuple[Array, Array]:
    """Weights and residuals: all pairs of edge cases, and random bits."""
    rng = np.random.default_rng(3)
    low, high = (-(2**15), 2**15) if master == "split16" else (-128, 128)
    rests = [r for r in RESTS if low <= r < high]
    w = np.concatenate([np.repeat(EDGES, len(rests)), rng.integers(0, 2**16, 100_000), np.arange(2**16)])
    rest = np.concatenate([np.tile(rests, len(EDGES)), rng.integers(low, high, w.size - len(EDGES) * len(rests))])
    w = w.astype(np.uint16)
    w = np.where((w & 0x7F80) == 0x7F80, w & 0xFF80, w).astype(np.uint16)  # infinities, no NaN
    return w.view(BF16), rest.astype(forms.MASTERS[master][1])


@pytest.mark.parametrize("master", ["split16", "split8"])
def test_split_masters_join_subtract_and_split_as_the_statement_does(master: str) -> None:
    w, rest = pairs(master)
    grad = data(w.size, "bfloat16", 4)
    for g, lr in ((np.zeros_like(grad), 0.0), (grad, 1.0)):
        opt = fusedopt.SGD(w.copy(), lr=lr, master=master)
        opt.state[0]["master"] = rest.copy()
        opt.step(g)
        x = forms.join(w.view(np.uint16), rest) - np.float32(lr) * g.astype(F32)
        got = kept(opt)[0]
        assert_same_bits(got["master"], forms.split(x, master), "rest")
        rounded = x if master == "split16" else ((bits(x) + np.uint32(0x80)) & ~np.uint32(0xFF)).view(F32)
        assert_same_bits(got["param"], round_away(rounded), "weight")
        if lr == 0 and master == "split16":
            assert_same_bits(forms.join(got["param"].view(np.uint16), got["master"]), x, "joined")


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31))
def test_split16_holds_every_float32_and_split8_all_but_8_bits(seed: int) -> None:
    b = np.random.default_rng(seed).integers(0, 2**32, 2000, dtype=np.uint32)
    edges = np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0x3F808000, 0x3F807FFF, 0x7F7F7FFF, 0x80000000, 0x80008000], np.uint32
    )
    x = np.concatenate([b, edges]).view(F32)
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]  # beyond this the weight rounds to infinity
    assert_same_bits(forms.join(round_away(x).view(np.uint16), forms.split(x, "split16")), x)
    w = round_away(((bits(x) + np.uint32(0x80)) & ~np.uint32(0xFF)).view(F32))
    back = forms.join(w.view(np.uint16), forms.split(x, "split8")).astype(np.float64)
    assert (np.abs(back - x) <= np.maximum(2.0**-16 * np.abs(x.astype(np.float64)), 2.0**-142)).all()


def test_the_weight_is_rounded_half_away_from_zero() -> None:
    """1 + 2^-8 is halfway between two bf16 values, the lower of which is even."""
    for sign in (1.0, -1.0):
        x = np.full(3, sign * (1 + 2.0**-8), F32)
        for master, want in (("split16", 1 + 2.0**-7), ("split8", 1 + 2.0**-7), ("float32", 1.0)):
            opt = fusedopt.SGD(np.full(3, sign, BF16), lr=1.0, master=master)
            opt.step(-(x - sign).astype(BF16))
            got = kept(opt)[0]
            assert (got["param"].astype(float) == sign * want).all(), master
            assert_same_bits(join(got["param"], got["master"]), x, master)


@pytest.mark.parametrize("case", [c for c in CASES if c.form.master and c.form.state == "float32"], ids=str)
def test_a_weight_that_is_overwritten_becomes_the_master(case: Case) -> None:
    g, n = data(200, case.grad, 3), 200
    opt = optimizer(case, data(n, case.param, 1))
    for _ in range(3):
        opt.step(g)
    state, (p,) = opt.state[0], opt.param_groups[0]["params"]
    old = p.copy()
    new = data(n, case.param, 8)
    new[:3] = 0, -0.0, 1
    p[10:] = new[10:]
    p[:3] = new[:3]
    got = join(p, state["master"])
    changed = p != old
    assert changed.sum() > 150
    x = p.astype(F32)
    if case.form.master == "float32":
        assert_same_bits(got[changed], x[changed])
    else:
        half = 0.5 * np.spacing(np.abs(x)) * 2.0**16  # half a bf16 ulp, 2^-134 at zero
        assert (np.abs(got - x) <= np.maximum(half, 2.0**-134)).all()
    # and the kernel continues from exactly this value
    if case.rule.name == "SGD" and not case.variant:
        opt.step(g)
        want = (got.astype(np.float64) - np.float64(np.float32(0.02)) * g.astype(np.float64)).astype(F32)
        assert np.abs(join(p, state["master"]) - want).max() <= 2.0**-16 * np.abs(want).max()
        if case.form.master == "float32":
            assert_same_bits(p[changed], want.astype(p.dtype)[changed])


def wide_twin(case: Case) -> tuple[str, str]:
    """(dtype of the float32 twin's gradients, its states); everything else is the same."""
    return ("bfloat16" if case.form.state in ("float32", "int8") else "float32"), case.form.state


MASTERED = [c for c in CASES if c.form.master in ("split16", "float32") and c.param == "bfloat16"]


def check_against_float32(case: Case, steps: int, n: int = 150, **more: Any) -> None:
    """Bit-identical at every step to a float32 optimizer whose weight is rounded for the forward pass. Each uses its
    own gradients, which depend on the rounded weight."""
    start, target = data(n, "bfloat16", 1), data(n, "float32", 2)
    away = case.form.master == "split16"
    opt = optimizer(case, start.copy(), **more)
    wide = optimizer(case, start.astype(F32), master=None, **more)
    (p,), (x,) = opt.param_groups[0]["params"], wide.param_groups[0]["params"]
    rng = np.random.default_rng(0)
    for step in range(steps):
        noise = rng.standard_normal(n).astype(F32)
        grads = [
            ((w - target) * (1 + noise)).astype(BF16)
            for w in (p.astype(F32), (round_away(x) if away else x.astype(BF16)).astype(F32))
        ]
        opt.step(grads[0])
        wide.step(grads[1].astype(forms.numpy_dtype(wide_twin(case)[0])))
        assert_same_bits(p, round_away(x) if away else x.astype(BF16), f"weight, step {step}")
        assert_same_bits(join(p, opt.state[0]["master"]), x, f"master, step {step}")
    for name, s in wide.state[0].items():
        if isinstance(s, np.ndarray):
            assert_same_bits(opt.state[0][name], s, name)


@pytest.mark.parametrize("case", MASTERED, ids=str)
def test_a_master_is_a_float32_optimizer_with_a_rounded_weight(case: Case) -> None:
    check_against_float32(case, 25, ema_decay=0.9, l1=0.001)


@pytest.mark.parametrize("case", [c for c in MASTERED if c.rule.name == "AdamW" and not c.variant], ids=str)
def test_a_master_equals_float32_over_a_thousand_steps(case: Case) -> None:
    check_against_float32(case, 1000)


def test_a_master_that_is_rounded_otherwise_is_caught() -> None:
    """Mutant of the comparison above: ties to even instead of away from zero, in one step."""
    x = np.array([1 + 2.0**-8, 1 + 2.0**-7, 3.0], F32)
    with pytest.raises(AssertionError):
        assert_same_bits(round_away(x), x.astype(BF16))


def test_a_float16_weight_with_a_float32_master_is_a_float32_optimizer() -> None:
    start, g = data(500, "float16", 1), data(500, "float16", 2)
    opt = fusedopt.AdamW(start.copy(), lr=1e-3, master="float32")
    wide = fusedopt.AdamW(start.astype(F32), lr=1e-3)
    for _ in range(300):
        opt.step(g)
        wide.step(g)
    (x,) = wide.param_groups[0]["params"]
    assert_same_bits(opt.state[0]["master"], x)
    assert_same_bits(opt.param_groups[0]["params"][0], x.astype(np.float16))


def test_plain_bf16_stalls_where_a_master_does_not() -> None:
    """Updates far below an ulp of the weight accumulate in the master."""
    ends = {}
    for master in (None, "split8", "split16", "float32"):
        p = np.ones(64, BF16)
        opt = fusedopt.SGD(p, lr=1e-4, master=master)
        train(opt, [[np.ones(64, BF16)]] * 1000)
        ends[master] = float(p[0])
    assert ends[None] == 1.0
    assert all(abs(end - 0.9) <= 0.008 for name, end in ends.items() if name), ends
