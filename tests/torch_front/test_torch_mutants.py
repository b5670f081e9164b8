"""Tests of the tests: wrong optimizers, which the comparison helpers must reject.

Each mutant is torch's own loop with one mistake. A helper that accepts one is a defect of the tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_cases import TORCH_FUSED, cases, gradients, ours, parameters, plain
from torch_compare import (
    all_params,
    assert_close,
    check_as_exact_as_plain,
    check_equals_plain,
    check_one_step,
    check_steps_round_once,
    check_within_torchs_spread,
    count_fallbacks,
    outcome,
    same,
    snapshot,
    train,
    trained,
)

Make = Callable[..., Any]
Options = dict[str, Any]


def mutant(before: Callable[[Any], None] = lambda o: None, after: Callable[[Any], None] = lambda o: None) -> Make:
    """A factory of torch's plain optimizer with code before and after its step."""

    def make(name: str, params: Any, **options: Any) -> Any:
        opt = plain(name, params, **options)
        right = opt.step

        def step(closure: Any = None) -> Any:
            before(opt)
            loss = right(closure)
            after(opt)
            return loss

        opt.step = step  # type: ignore[method-assign]
        return opt

    return make


def ignored(key: str, value: Any) -> Make:
    """The option is accepted and stored, but ignored."""

    def make(name: str, params: Any, **options: Any) -> Any:
        return plain(name, params, **{**options, key: value})

    return make


def stale_lr(name: str, params: Any, **options: Any) -> Any:
    opt = plain(name, params, **options)
    return mutant(lambda o: [g.update(lr=opt.defaults["lr"]) for g in o.param_groups] and None)(name, params, **options)


def _eps_in_root(opt: Any) -> None:
    """Undoes torch's update and repeats it with a misplaced eps."""
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            s = opt.state[p]
            beta1, beta2 = group["betas"]
            c1, c2 = 1 - beta1 ** s["step"].item(), 1 - beta2 ** s["step"].item()
            v = s["exp_avg_sq"] / c2
            right = s["exp_avg"] / (v.sqrt() + group["eps"])
            wrong = s["exp_avg"] / (v + group["eps"]).sqrt()
            with torch.no_grad():
                p.add_((right - wrong) * (group["lr"] / c1))


def _no_bias_correction(opt: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            if p in opt.state:
                opt.state[p]["step"].fill_(1e6)


def _tail_off_by_one(opt: Any) -> None:
    """The last element of a partial vector is not updated."""
    for p in all_params(opt):
        if p.numel() % 8 and p.grad is not None:
            p.grad.flatten()[-1] = 0.0


def _one_ulp(opt: Any) -> None:
    with torch.no_grad():
        for p in all_params(opt):
            if p.numel() > 100:
                p.view(-1)[77] = torch.nextafter(p.view(-1)[77], torch.tensor(9.0, dtype=p.dtype))


def _writes_gradients(opt: Any) -> None:
    for p in all_params(opt):
        if p.grad is not None:
            p.grad.mul_(2.0)


def _wrong_key(opt: Any) -> None:
    for state in opt.state.values():
        if "momentum_buffer" in state:
            state["buffer"] = state.pop("momentum_buffer")


def _wrong_type(opt: Any) -> None:
    for state in opt.state.values():
        for key in state:
            state[key] = state[key].float() if key != "step" else state[key]


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5}
NESTEROV = {"momentum": 0.9, "nesterov": True}
DECAY = {"weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        (ignored("weight_decay", 0.0), MOMENTUM),
        (ignored("dampening", 0.0), MOMENTUM),
        (ignored("nesterov", False), NESTEROV),
        (ignored("maximize", False), {"maximize": True}),
        (mutant(before=_tail_off_by_one), {}),
        (mutant(after=_one_ulp), {}),
        (mutant(after=_writes_gradients), {}),
        (mutant(after=_wrong_key), MOMENTUM),
    ],
)
def test_bit_comparison_finds(wrong: Make, options: Options, dtype: torch.dtype) -> None:
    check_equals_plain("SGD", options, dtype, make=plain)
    with pytest.raises((AssertionError, KeyError)):
        check_equals_plain("SGD", options, dtype, make=wrong)


ADAM_MUTANTS = [
    (ignored("weight_decay", 0.0), DECAY),
    (ignored("amsgrad", False), {"amsgrad": True}),
    (ignored("maximize", False), {"maximize": True}),
    (ignored("eps", 1e-6), {}),
    (ignored("betas", (0.9, 0.99)), {}),
    (mutant(before=_no_bias_correction), {}),
    (mutant(after=_eps_in_root), {"eps": 1e-4}),
    (mutant(before=_tail_off_by_one), {}),
]


@pytest.mark.parametrize(("wrong", "options"), ADAM_MUTANTS)
def test_distance_between_torchs_paths_finds(wrong: Make, options: Options) -> None:
    check_within_torchs_spread("Adam", options, torch.float32, make=plain)
    with pytest.raises((AssertionError, KeyError)):
        check_within_torchs_spread("Adam", options, torch.float32, make=wrong)


@pytest.mark.parametrize(("wrong", "options"), ADAM_MUTANTS)
def test_distance_from_the_float64_trajectory_finds(wrong: Make, options: Options) -> None:
    check_as_exact_as_plain("Adam", options, make=plain)
    with pytest.raises((AssertionError, KeyError)):
        check_as_exact_as_plain("Adam", options, make=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("wrong", "options"), ADAM_MUTANTS[:-1])
def test_one_step_against_the_reference_finds(wrong: Make, options: Options, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and "eps" in str(options):
        options = {**options, "eps": 0.1}
    options = {"lr": 0.1, **options}
    check_one_step("Adam", options, dtype, 2, make=plain)
    if wrong is ADAM_MUTANTS[3][0] and dtype == torch.bfloat16:
        return  # an eps of 1e-6 for 1e-8 is less than bf16 can show
    # a loaded checkpoint brings the options with it, so an ignored one shows in a first step
    found = [outcome(lambda w=warmup: check_one_step("Adam", options, dtype, w, make=wrong))[0] for warmup in (2, 0)]
    assert set(found) & {AssertionError, KeyError}


def test_a_state_of_another_type_or_name_is_found() -> None:
    for spoil in (_wrong_type, _wrong_key):
        wrong = mutant(after=spoil)
        with pytest.raises((AssertionError, KeyError)):
            check_one_step("SGD", MOMENTUM, torch.bfloat16, 0, make=wrong)
    grads = gradients(2, torch.bfloat16)
    params = parameters(torch.bfloat16)
    with pytest.raises(AssertionError):  # torch rounds after every operation: not the float32 step rounded once
        check_steps_round_once("Adam", plain("Adam", params, eps=1e-3), grads)
    check_steps_round_once("SGD", ours("SGD", parameters(torch.bfloat16)), grads)


def test_a_stale_learning_rate_is_found() -> None:
    results = []
    for make in (stale_lr, plain):
        params, grads = parameters(torch.float64), gradients(4, torch.float64)
        opt = make("Adam", params, lr=0.01)
        for i, row in enumerate(grads):
            opt.param_groups[0]["lr"] = 0.01 / (i + 1)
            train(opt, [row], params)
        results.append(snapshot(opt, params))
    with pytest.raises(AssertionError):
        assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_options_of_the_cases_matter(name: str) -> None:
    """The results of every option set differ from those of the defaults."""
    grads = gradients(6, torch.float64)
    default = trained(plain, name, {}, torch.float64, grads)
    for case in cases([name]):
        _, options = case.values
        if options and options != {"weight_decay": 0.0}:
            other = trained(plain, name, options, torch.float64, grads)
            moved = [k for k in default if k.endswith("param") and not same(default[k], other[k])]
            assert len(moved) >= 4, options


def test_same_looks_at_type_shape_and_every_element() -> None:
    x = torch.tensor([1.0, float("nan"), -0.0])
    assert same(x, x.clone())
    assert same(None, None)
    assert not same(x, None)
    assert not same(x, x.double())
    assert not same(x, x[:2])
    assert not same(x, torch.tensor([1.0, 2.0, 0.0]))
    assert not same(x, torch.nextafter(x, torch.tensor(2.0)))
    with count_fallbacks(0):
        pass
