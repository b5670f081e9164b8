"""Clipping inside the step (`max_grad_norm`) and GradScaler, in both of its protocols, on the CPU."""

import math
from typing import Any

import pytest
import torch

from torch_cases import NAMES, SIXTEEN, TORCH_FUSED, accepts, gradients, ours, parameters, plain, simple, some_cases
from torch_compare import all_params, assert_close, assert_same_bits, same, snapshot, train

Options = dict[str, Any]
FUSED = [n for n in NAMES if accepts(n, "fused")]
# Those that take part in GradScaler's fused protocol, as torch's own do: in torch 2.6 Adagrad does not.
PROTOCOL = [n for n in FUSED if hasattr(getattr(torch.optim, n)([simple()], fused=True), "_step_supports_amp_scaling")]
SHAPES = [(3, 5), (257,), (), (0,), (40, 30)]


def clipped_by_torch(opt: Any, grads: list[Any], max_norm: float) -> list[torch.Tensor]:
    """Trains with torch's own clipping before every step; returns the norms."""
    params, norms = all_params(opt), []
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
        opt.step()
    return norms


# -- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 5.0, 1e6])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_clipping_is_torchs_over_all_groups(name: str, options: Options, grouped: bool, max_norm: float) -> None:
    grads = gradients(5, torch.float64, SHAPES)
    results = []
    for make in (ours, plain):
        params = parameters(torch.float64, SHAPES)
        groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}] if grouped else params
        opt = make(name, groups, **options, **({"max_grad_norm": max_norm} if make is ours else {}))
        if make is ours:
            norms = []
            for row in grads:
                train(opt, [row], params)
                norms.append(opt.last_grad_norm)
        else:
            norms = clipped_by_torch(opt, grads, max_norm)
        results.append((norms, snapshot(opt, params)))
    (us_norms, us), (them_norms, them) = results
    for a, b in zip(us_norms, them_norms, strict=True):
        assert isinstance(a, torch.Tensor)
        assert a.shape == ()
        assert not a.requires_grad
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert_close(us, them, rtol=1e-6 if max_norm in (0.1, 5.0) else 1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN], ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_norm_below_the_limit_changes_not_a_bit(name: str, options: Options, dtype: torch.dtype) -> None:
    grads, results = gradients(4, dtype), []
    for extra in ({}, {"max_grad_norm": 1e4}):
        params = parameters(dtype)
        opt = ours(name, params, **options, **extra)
        assert opt.last_grad_norm is None
        train(opt, grads, params)
        assert (opt.last_grad_norm is None) == (not extra)
        results.append(snapshot(opt, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_the_norm_is_exact_enough_and_does_not_overflow(dtype: torch.dtype) -> None:
    """f16 gradients of 300 have squares beyond f16; a running float32 sum of a million small ones loses them."""
    for fill, n in ((300.0, 4096), (1e-3, 1_000_003)):
        p = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
        p.grad = torch.full_like(p, fill)
        opt = ours("SGD", [p], max_grad_norm=1.0)
        opt.step()
        want = math.sqrt(n) * float(p.grad[0])
        assert float(opt.last_grad_norm) == pytest.approx(want, rel=1e-6 if n < 10**5 else 1e-5)


def test_float32_gradients_whose_squares_overflow_are_clipped_all_the_same_or_as_in_torch() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(64)) for _ in range(2))
    for x in (p, q):
        x.grad = torch.full_like(x, 1e25)
    opt = ours("SGD", [p], lr=1.0, max_grad_norm=1.0)
    opt.step()
    clipped_by_torch(plain("SGD", [q], lr=1.0), [[q.grad]], 1.0)
    right = torch.full((64,), -0.125)
    assert torch.allclose(p.detach(), right) or same(p.detach(), q.detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_non_finite_gradients_are_clipped_as_torch_clips_them(name: str, options: Options, bad: float) -> None:
    grads = gradients(3, shapes=SHAPES, missing=False)
    assert grads[1][1] is not None
    grads[1][1][7] = bad
    mine, theirs = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    opt = ours(name, mine, max_grad_norm=0.5, **options)
    train(opt, grads[:2], mine)
    ref = plain(name, theirs, **options)
    norm = clipped_by_torch(ref, grads[:2], 0.5)[-1]
    assert same(opt.last_grad_norm.double().isnan(), norm.double().isnan())
    assert same(opt.last_grad_norm.double().isinf(), norm.double().isinf())
    assert_close(snapshot(opt, mine), snapshot(ref, theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_without_gradients(name: str) -> None:
    params = parameters()
    opt = ours(name, params, max_grad_norm=1.0)
    opt.step()
    assert opt.last_grad_norm is None or float(opt.last_grad_norm) == 0.0
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_last_grad_norm_is_the_last_steps(name: str) -> None:
    p = simple()
    opt = ours(name, [p], max_grad_norm=1.0)
    opt.step()
    first = opt.last_grad_norm
    kept = first.clone()
    p.grad = p.grad * 2
    opt.step()
    assert float(opt.last_grad_norm) == pytest.approx(2 * float(kept), rel=1e-6)


def test_grads_of_all_types_count_in_one_norm() -> None:
    params = [simple(9, dt, i) for i, dt in enumerate((torch.float32, torch.float64, *SIXTEEN))]
    want = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params))
    opt = ours("Adam", params, max_grad_norm=0.01)
    opt.step()
    assert float(opt.last_grad_norm) == pytest.approx(want, rel=1e-6)


# -- GradScaler ------------------------------------------------------------------------------------------------------


def scaled_step(scaler: Any, opt: Any, row: list[Any]) -> None:
    """Equivalent to scaler.scale(loss).backward(); scaler.step(opt); scaler.update() with these gradients."""
    scaler.scale(torch.zeros(()))  # its scale is made on first use
    scale = scaler.get_scale()
    for p, g in zip(all_params(opt), row, strict=True):
        p.grad = None if g is None else g * scale
    kept = [None if p.grad is None else p.grad.clone() for p in all_params(opt)]
    scaler.step(opt)
    if type(opt).__module__ == "fusedopt.torch" and getattr(opt, "_step_supports_amp_scaling", False):
        assert all(same(p.grad, k) for p, k in zip(all_params(opt), kept, strict=True)), "a gradient was written"
    scaler.update()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_grad_scaler_gives_the_values_of_unscaled_training(name: str, options: Options, fused: bool) -> None:
    """The scale is a power of two, so results must be bit-identical."""
    if fused and name not in PROTOCOL:
        pytest.skip(f"{name} has no fused=, or no part in the fused protocol")
    extra = {"fused": True} if fused else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    grads, params, alone = gradients(6), parameters(), parameters()
    opt = ours(name, params, **options, **extra)
    assert getattr(opt, "_step_supports_amp_scaling", False) == fused
    for row in grads:
        scaled_step(scaler, opt, row)
        assert opt.last_step_skipped is False
        assert getattr(opt, "grad_scale", None) is None
        assert getattr(opt, "found_inf", None) is None
    want = ours(name, alone, **options)
    train(want, grads, alone)
    assert_same_bits(snapshot(opt, params), snapshot(want, alone))
    assert scaler.get_scale() > 1024.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_skipped_step_leaves_everything_untouched(
    name: str, options: Options, fused: bool, when: int, bad: float
) -> None:
    """Also in the first step, where torch's fused SGD leaves the momentum buffer uninitialised."""
    if fused and name not in PROTOCOL:
        pytest.skip(f"{name} has no fused=, or no part in the fused protocol")
    extra = {"fused": True} if fused else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    grads, params, alone = gradients(5, missing=False), parameters(), parameters()
    opt = ours(name, params, **options, **extra)
    for row in grads[:when]:
        scaled_step(scaler, opt, row)
    broken = [None if g is None else g.clone() for g in grads[when]]
    assert broken[7] is not None
    broken[7][100] = bad
    before = dict(snapshot(opt, params).items())
    versions = [p._version for p in params]
    scaled_step(scaler, opt, broken)
    after = snapshot(opt, params)
    assert_same_bits({k: after[k] for k in before}, before)
    assert [p._version for p in params] == versions
    if fused:
        assert opt.last_step_skipped is True
    for row in grads[when:]:
        scaled_step(scaler, opt, row)
        assert opt.last_step_skipped is False
    want = ours(name, alone, **options)
    train(want, grads, alone)
    assert_same_bits(snapshot(opt, params), snapshot(want, alone))
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_the_fused_protocol_agrees_with_torchs_fused_class(name: str) -> None:
    options: Options = {"momentum": 0.9} if name == "SGD" else {}
    grads, results = gradients(4, missing=False), []
    for make in (ours, lambda n, p, **o: getattr(torch.optim, n)(p, **o)):
        scaler, params = torch.amp.GradScaler("cpu", init_scale=8.0), parameters()
        opt = make(name, params, fused=True, **options)
        for row in grads:
            scaled_step(scaler, opt, row)
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_clipping_sees_unscaled_gradients(name: str, unscale_first: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    grads, params, alone = gradients(4, missing=False), parameters(), parameters()
    opt = ours(name, params, fused=True, max_grad_norm=0.5)
    want = ours(name, alone, max_grad_norm=0.5)
    for row in grads:
        scaler.scale(torch.zeros(()))
        for p, g in zip(params, row, strict=True):
            p.grad = g * scaler.get_scale()
        if unscale_first:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        train(want, [row], alone)
        assert float(opt.last_grad_norm) == pytest.approx(float(want.last_grad_norm), rel=1e-7)
    assert_close(snapshot(opt, params), snapshot(want, alone), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FUSED)
def test_the_attributes_of_the_protocol_work_by_themselves(name: str) -> None:
    """Attributes set by a user's own scaler: scale without found_inf, found_inf without scale, other dtypes."""
    p, q = simple(), simple()
    opt, want = ours(name, [p], fused=True), ours(name, [q])
    p.grad = p.grad * 4
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    opt.step()
    want.step()
    assert_same_bits(snapshot(opt), snapshot(want))
    opt.grad_scale, opt.found_inf = None, torch.tensor(1.0)
    opt.step()
    assert opt.last_step_skipped
    assert_same_bits(snapshot(opt), snapshot(want))
    p.grad = q.grad.clone()
    opt.found_inf = torch.tensor([0.0])
    opt.step()
    want.step()
    assert not opt.last_step_skipped
    assert_same_bits(snapshot(opt), snapshot(want))
    opt.grad_scale, opt.found_inf = torch.tensor([2.0], dtype=torch.float64), None
    p.grad = q.grad * 2
    opt.step()
    want.step()
    assert_same_bits(snapshot(opt), snapshot(want))


@pytest.mark.parametrize("name", FUSED)
def test_a_scale_that_is_no_power_of_two(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    grads, params, alone = gradients(4, torch.float64), parameters(torch.float64), parameters(torch.float64)
    opt, want = ours(name, params, fused=True), plain(name, alone)
    for row in grads:
        scaled_step(scaler, opt, row)
    train(want, grads, alone)
    assert_close(snapshot(opt, params), snapshot(want, alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_sixteen_bit_gradients_are_unscaled_in_registers(name: str, dtype: torch.dtype) -> None:
    """An f16 gradient of 1e-3 over a scale of 65536 underflows in f16, but not in the step."""
    p = torch.nn.Parameter(torch.zeros(33, dtype=torch.float16 if dtype == torch.float16 else dtype))
    q = torch.nn.Parameter(torch.zeros(33))
    p.grad, q.grad = torch.full_like(p, 1e-3), torch.full_like(q, float(torch.tensor(1e-3, dtype=dtype)) / 65536)
    opt = ours(name, [p], fused=True, state_dtype="float32", lr=0.5)
    opt.grad_scale, opt.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    opt.step()
    want = ours(name, [q], lr=0.5)
    want.step()
    torch.testing.assert_close(p.detach().float(), q.detach().to(dtype).float(), rtol=1e-2, atol=6e-8)
