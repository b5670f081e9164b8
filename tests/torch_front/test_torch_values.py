"""The values of `fusedopt.torch` against torch's plain loop, torch's fused step and the float64 reference.

Drop-in behaviour (state dicts, hooks, ...) is in test_torch_dropin.py; layouts and refusals are in
test_torch_fallback.py.
"""

from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt.rules import RULES
from torch_cases import (
    FLOATS,
    NAMES,
    SIXTEEN,
    TORCH_FUSED,
    accepts,
    cases,
    generator,
    gradients,
    optim_db,
    option_sets,
    ours,
    parameters,
    plain,
    simple,
    some_cases,
    values,
)
from torch_compare import (
    assert_close,
    assert_same_bits,
    check_as_exact_as_plain,
    check_equals_plain,
    check_one_step,
    check_steps_round_once,
    check_within_torchs_spread,
    count_fallbacks,
    distances,
    reference_step,
    same,
    snapshot,
    train,
    trained,
    ulp,
)

Options = dict[str, Any]

# torch's own loop uses fused multiply-adds from AVX2 on; ours does everywhere.
torch_fuses = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch's loop on this CPU has no fused multiply-add"
)
WITH_EPS = [n for n in NAMES if "eps" in RULES[n].defaults]


# -- float32 and float64 ---------------------------------------------------------------------------------------------


@torch_fuses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), cases(["SGD"]))
def test_sgd_equals_torchs_loop_bit_for_bit(name: str, options: Options, dtype: torch.dtype) -> None:
    check_equals_plain(name, options, dtype)


@torch_fuses
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs_loop_on_large_tensors_and_long_runs(momentum: float) -> None:
    shapes, options = [(300, 1001), (12345,)], {"momentum": momentum, "weight_decay": 0.01}
    grads = gradients(4, shapes=shapes, missing=False)
    assert_same_bits(*(trained(make, "SGD", options, torch.float32, grads, shapes) for make in (ours, plain)))
    check_equals_plain("SGD", options, torch.float32, steps=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), cases(["Adagrad", "Adam", "AdamW"]))
def test_stays_within_the_distance_between_torchs_fused_and_plain_paths(
    name: str, options: Options, dtype: torch.dtype
) -> None:
    check_within_torchs_spread(name, options, dtype)
    check_within_torchs_spread(name, options, dtype, shapes=[(4099,), (17, 33)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adagrad", {}),
        ("Adagrad", {"lr_decay": 0.5, "weight_decay": 0.1}),
        ("Adam", {}),
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
        ("AdamW", {}),
    ],
)
def test_a_thousand_steps_stay_within_the_distance_between_torchs_paths(name: str, options: Options) -> None:
    check_within_torchs_spread(name, options, torch.float32, steps=1000, shapes=[(1031,)])


@pytest.mark.parametrize(("name", "options"), cases())
def test_float32_is_as_near_to_the_float64_trajectory_as_torchs_loop(name: str, options: Options) -> None:
    check_as_exact_as_plain(name, options)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_thousand_float32_steps_are_as_exact_as_torchs_loop(name: str, options: Options) -> None:
    check_as_exact_as_plain(name, options, steps=1000, shapes=[(257,)], slack=8.0)


@pytest.mark.parametrize(("name", "options"), cases())
def test_float64_agrees_with_torchs_loop_to_the_last_digits(name: str, options: Options) -> None:
    grads = gradients(8, torch.float64)
    us, them = (trained(make, name, options, torch.float64, grads) for make in (ours, plain))
    assert_close(us, them, rtol=1e-12, atol=1e-14)


# -- one step against the float64 reference --------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("name", "options"), cases())
def test_one_step_is_nowhere_an_ulp_worse_than_torchs(
    name: str, options: Options, dtype: torch.dtype, warmup: int
) -> None:
    check_one_step(name, options, dtype, warmup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-20, -1e-20, 1e-12, 1e-8])
@pytest.mark.parametrize("name", WITH_EPS)
def test_eps_stands_where_torch_has_it(name: str, size: float, dtype: torch.dtype) -> None:
    """With a zero parameter the result is the update itself; a misplaced eps changes it by orders of magnitude."""
    for options in option_sets(name):
        if "maximize" in options or "weight_decay" in options or "initial_accumulator_value" in options:
            continue
        results = []
        for make in (ours, plain):
            p = torch.nn.Parameter(torch.zeros(19, dtype=dtype))
            opt = make(name, [p], **options)
            for _ in range(3):
                p.grad = torch.full_like(p, size)
                opt.step()
            results.append(p.detach())
        us, them = results
        torch.testing.assert_close(us, them, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
        assert bool((us != 0).all()) == bool((them != 0).all())


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "Adam", "AdamW"])
def test_denormal_moments_are_kept(name: str) -> None:
    """eps = 1e-30 and g = 1e-20: the second moment is denormal, and the step has its full size."""
    results = []
    for make in (ours, plain):
        p = torch.nn.Parameter(torch.zeros(37))
        opt = make(name, [p], eps=1e-30, lr=0.1)
        p.grad = torch.full_like(p, 1e-20)
        opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=2e-2, atol=0)
    assert bool((results[0].abs() > 0.01).all())


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e18, 1e-45])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_special_gradients_flow_as_in_torch(name: str, options: Options, special: float) -> None:
    results = []
    for make in (ours, plain):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 21))
        opt = make(name, [p], **options)
        for step in range(3):
            p.grad = torch.linspace(-2, 2, 21)
            p.grad[step::5] = special
            opt.step()
        results.append(snapshot(opt))
    us, them = results
    for key in them:
        kinds = [(torch.isnan(x), torch.isinf(x)) for x in (us[key], them[key])]
        assert torch.equal(kinds[0][0], kinds[1][0]), f"{key}: NaN elsewhere than torch"
        assert torch.equal(kinds[0][1], kinds[1][1]), f"{key}: inf elsewhere than torch"
    assert_close(us, them, rtol=1e-5, atol=1e-7)


# -- bf16 and f16 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("name", "options"), cases())
def test_a_sixteen_bit_step_is_the_float32_step_rounded_once(name: str, options: Options, dtype: torch.dtype) -> None:
    opt = ours(name, parameters(dtype), **options)
    check_steps_round_once(name, opt, gradients(8, dtype))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("name", "options"), cases())
def test_a_sixteen_bit_step_with_float32_state_is_the_float32_step_with_the_parameter_rounded(
    name: str, options: Options, dtype: torch.dtype
) -> None:
    opt = ours(name, parameters(dtype), state_dtype=torch.float32, **options)
    check_steps_round_once(name, opt, gradients(8, dtype))
    kinds = {str(v.dtype) for s in opt.state.values() for k, v in s.items() if v is not None and v.dim()}
    assert kinds <= {"torch.float32"}


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_sixteen_bit_training_ends_near_torchs(name: str, options: Options, dtype: torch.dtype) -> None:
    options = {"eps": 1e-3, **options} if name in WITH_EPS else options  # torch's f16 eps of 1e-8 would be zero
    grads = gradients(5, dtype)
    us, them = (trained(make, name, options, dtype, grads) for make in (ours, plain))
    assert {k: v.dtype for k, v in us.items()} == {k: v.dtype for k, v in them.items()}
    # on average: torch rounds after every operation, and single elements may differ much
    a, b = (torch.cat([v.double().flatten() for k, v in s.items() if k.endswith("param")]) for s in (us, them))
    assert float((a - b).norm()) <= 8 * torch.finfo(dtype).eps * float(b.norm())


@pytest.mark.parametrize("name", WITH_EPS)
def test_eps_does_not_vanish_in_half_precision(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(33, dtype=torch.float16))
    opt = ours(name, [p])
    for g in (0.0, 6e-8, 1e-4):
        before = p.detach().clone()
        p.grad = torch.full_like(p, g)
        old = {k: v.clone() for k, v in opt.state.get(p, {}).items()}
        opt.step()
        assert bool(torch.isfinite(p).all())
        truth = reference_step(name, opt.param_groups[0], before, p.grad, old)["param"]
        assert float((p.detach().double() - torch.from_numpy(truth)).abs().max()) <= float(ulp(before).max())
    assert opt.param_groups[0]["eps"] == RULES[name].defaults["eps"]


@pytest.mark.parametrize("n", [8, 64, 4096])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_sixteen_bit_sgd_moves_every_element(dtype: torch.dtype, n: int) -> None:
    """torch <= 2.13 with fused=True does not update full vectors."""
    for options in ({}, {"momentum": 0.9}):
        p = torch.nn.Parameter(torch.ones(n, dtype=dtype))
        p.grad = torch.ones_like(p)
        ours("SGD", [p], lr=0.5, **options).step()
        assert torch.equal(p.detach(), torch.full_like(p, 0.5))


@pytest.mark.parametrize("grad_dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_float32_parameter_with_sixteen_bit_gradient(name: str, options: Options, grad_dtype: torch.dtype) -> None:
    """Bit-identical to the same gradient in float32."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties the gradient's type to the parameter's")
    results = []
    for wide in (False, True):
        params = parameters()
        for p in params:
            p.grad_dtype = None
        opt = ours(name, params, **options)
        grads = gradients(5, grad_dtype)
        train(opt, [[None if g is None else g.float() if wide else g for g in row] for row in grads], params)
        results.append(snapshot(opt, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("state", ["float64", "float32", "bfloat16", torch.float16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_state_dtype_is_followed_or_refused(name: str, options: Options, dtype: torch.dtype, state: Any) -> None:
    wanted = state if isinstance(state, torch.dtype) else getattr(torch, state)
    params, shapes = parameters(dtype, [(7,), (33,)]), [(7,), (33,)]
    before = [p.detach().clone() for p in params]
    grads = gradients(4, dtype, shapes, missing=False)
    f32 = torch.float32
    must_work = wanted == dtype or (wanted == f32 and dtype in SIXTEEN) or (dtype == f32 and wanted in SIXTEEN)
    try:
        opt = ours(name, params, state_dtype=state, **options)
        train(opt, grads[:1], params)
    except (TypeError, ValueError, RuntimeError) as error:
        if must_work or "state_dtype" not in str(error):
            raise
        assert all(same(p.detach(), b) for p, b in zip(params, before, strict=True))  # refused before writing
        return
    if torch.float64 not in (dtype, wanted):
        check_steps_round_once(name, opt, grads[1:])
    for p in params:
        assert {v.dtype for v in opt.state[p].values() if isinstance(v, torch.Tensor) and v.dim()} <= {wanted}
        assert "step" not in opt.state[p] or opt.state[p]["step"].dtype == torch.float32


# -- many tensors, many groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_tensors_do_not_influence_each_other(name: str, options: Options) -> None:
    """All in one list, one group each, one optimizer each: bit-identical."""
    grads = gradients(5)
    together = parameters()
    opt = ours(name, together, **options)
    train(opt, grads, together)
    want = snapshot(opt, together)

    grouped = parameters()
    opt = ours(name, [{"params": [p]} for p in grouped], **options)
    train(opt, grads, grouped)
    assert_same_bits(snapshot(opt, grouped), want)

    alone = parameters()
    for i, p in enumerate(alone):
        opt = ours(name, [p], **options)
        train(opt, [[row[i]] for row in grads], [p])
        got = {k.replace("0.", f"{i}.", 1): v for k, v in snapshot(opt, [p]).items()}
        assert_same_bits(got, {k: v for k, v in want.items() if k.startswith(f"{i}.")})


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_thread_count_does_not_change_a_bit(name: str, options: Options, threads: int) -> None:
    shapes = [(70_001,), (3,), (257, 129), ()]
    grads = gradients(2, shapes=shapes, missing=False)
    fusedopt.set_num_threads(1)
    want = trained(ours, name, options, torch.float32, grads, shapes)
    fusedopt.set_num_threads(threads)
    assert_same_bits(trained(ours, name, options, torch.float32, grads, shapes), want)


@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_its_own_options(name: str) -> None:
    sets = option_sets(name)
    results = []
    for make in (ours, plain):
        params = [torch.nn.Parameter(values((37,), torch.float64, generator(i))) for i in range(len(sets))]
        opt = make(name, [{"params": [p], **options} for p, options in zip(params, sets, strict=True)])
        shapes = [tuple(p.shape) for p in params]
        train(opt, gradients(6, torch.float64, shapes), params)
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_types_may_be_mixed_in_one_group(name: str, options: Options) -> None:
    def build() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(values((19,), dt, generator(i))) for i, dt in enumerate(FLOATS * 2)]

    rows = [[values((19,), dt, generator(9 * s + i)) for i, dt in enumerate(FLOATS * 2)] for s in range(4)]
    mixed = build()
    opt = ours(name, mixed, **options)
    train(opt, [list(r) for r in rows], mixed)
    got = snapshot(opt, mixed)
    for i, p in enumerate(build()):
        alone = ours(name, [p], **options)
        train(alone, [[r[i]] for r in rows], [p])
        want = {k.replace("0.", f"{i}.", 1): v for k, v in snapshot(alone).items()}
        assert_same_bits({k: v for k, v in got.items() if k.startswith(f"{i}.")}, want)


@pytest.mark.parametrize("name", NAMES)
def test_many_small_tensors(name: str) -> None:
    shapes = [(n % 67,) for n in range(400)]
    grads = gradients(3, torch.float64, shapes)
    us, them = (trained(make, name, {}, torch.float64, grads, shapes) for make in (ours, plain))
    assert_close(us, them, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_step_without_any_gradient_changes_nothing(name: str) -> None:
    params = parameters()
    opt = ours(name, params)
    before = snapshot(opt, params)
    opt.step()
    assert_same_bits(snapshot(opt, params), before)
    versions = [p._version for p in params]
    opt.step()
    assert [p._version for p in params] == versions


@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.parametrize("option", ["foreach", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_choosing_an_implementation_does_not_change_the_values(name: str, option: str, flag: bool | None) -> None:
    if not accepts(name, option):
        pytest.skip(f"{name} has no {option}=")
    grads = gradients(4)
    want = trained(ours, name, {}, torch.float32, grads)
    assert_same_bits(trained(ours, name, {option: flag}, torch.float32, grads), want)


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_fused_false_takes_torchs_own_path(name: str) -> None:
    grads = gradients(4)
    us, them = (trained(make, name, {"fused": False}, torch.float32, grads) for make in (ours, plain))
    assert_same_bits(us, them)


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_default_type_is_no_obstacle(name: str) -> None:
    grads = gradients(3)
    torch.set_default_dtype(torch.float64)
    try:
        us, them = (trained(make, name, {}, torch.float32, grads) for make in (ours, plain))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {k: v.dtype for k, v in us.items()} == {k: v.dtype for k, v in them.items()}
    assert max(distances(us, them).values()) < 1e-5


def test_pytorchs_own_option_sets_are_among_the_cases() -> None:
    if not optim_db():
        pytest.skip("needs expecttest, which torch's test helpers import")
    assert {"SGD", "Adam", "AdamW", "RMSprop"} <= set(optim_db())
    for name, info in optim_db().items():
        kwargs = [i.kwargs for i in info.optim_inputs_func("cpu")]
        assert len(kwargs) >= 4
        assert len(option_sets(name)) >= len(kwargs)


def test_the_ulp_helper_counts_what_numpy_counts() -> None:
    x = np.array([1.0, 1.5, -2.0, 3.9999, 1e-30, 7e20], np.float32)
    assert np.array_equal(ulp(torch.from_numpy(x)).numpy(), np.spacing(np.abs(x)).astype(np.float64))
    h = x[:4].astype(np.float16)
    assert np.array_equal(ulp(torch.from_numpy(h)).numpy(), np.spacing(np.abs(h)).astype(np.float64))
    assert float(ulp(simple().detach()[0].to(torch.bfloat16))) > 0


# -- gradients wider than weights -----------------------------------------------------------------------------------

WIDER = [{}, {"stochastic_rounding": True}, {"master": "float32", "state_dtype": "float32"}, {"max_grad_norm": 0.5}]
WIDER += [{"master": "split16", "state_dtype": torch.bfloat16}, {"master": "split8", "state_dtype": "int8"}]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch gives gradients the dtype of the weight")
@pytest.mark.parametrize("options", WIDER, ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "NAdam", "Lion"])
def test_float32_gradients_of_16_bit_weights(name: str, options: dict[str, Any]) -> None:
    """torch's own step refuses them. Gradients that 16 bits can hold give the bits of 16-bit gradients."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        params = parameters(torch.bfloat16)
        opt = ours(name, params, **options)
        for p in params:
            p.grad_dtype = dtype
        for row in gradients(3, torch.bfloat16):
            for p, g in zip(params, row, strict=True):
                p.grad = None if g is None else g.to(dtype)
            with count_fallbacks(False):
                opt.step()
        results.append(snapshot(opt, params))
    assert_same_bits(results[1], results[0])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch gives gradients the dtype of the weight")
def test_a_gradient_may_change_its_dtype() -> None:
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    p.grad_dtype = None
    opt, alike = ours("Adam", [p]), torch.nn.Parameter(p.detach().clone())
    other = ours("Adam", [alike])
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        grad = torch.linspace(-1, 1, 100).to(torch.bfloat16)
        p.grad, alike.grad = grad.to(dtype), grad
        opt.step()
        other.step()
    assert torch.equal(p, alike)
