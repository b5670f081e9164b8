"""Tensors of `fusedopt.torch` optimizers that move, or are replaced, between steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_cases import IN_TORCH, NAMES, SIXTEEN, gradients, ours, parameters, plain, simple, some_cases
from torch_compare import (
    all_params,
    assert_close,
    assert_same_bits,
    check_steps_round_once,
    falling_back_is_fine,
    kinds,
    outcome,
    snapshot,
    train,
)

Options = dict[str, Any]
with_adam_and_sgd = pytest.mark.parametrize(("name", "options"), some_cases(["SGD", "Adam"]))


# -- tensors that move -----------------------------------------------------------------------------------------------


def _new_storage(p: torch.Tensor, opt: Any) -> None:
    p.data = p.data.clone()


def _shared_memory(p: torch.Tensor, opt: Any) -> None:
    p.share_memory_()


def _other_view(p: torch.Tensor, opt: Any) -> None:
    p.data = torch.stack([p.data, torch.full_like(p.data, 7.0)], -1)[..., 0]


def _swapped_in_set(p: torch.Tensor, opt: Any) -> None:
    p.detach().set_(p.detach().clone())


def _state_cloned(p: torch.Tensor, opt: Any) -> None:
    if p in opt.state:
        for key, value in opt.state[p].items():
            opt.state[p][key] = value.clone()


def _state_set_data(p: torch.Tensor, opt: Any) -> None:
    for value in opt.state.get(p, {}).values():
        value.data = value.data.clone()


def _state_strided(p: torch.Tensor, opt: Any) -> None:
    for key, value in opt.state.get(p, {}).items():
        if value.dim():
            opt.state[p][key] = torch.stack([value, torch.full_like(value, 7.0)], -1)[..., 0]


def _state_dict_replaced(p: torch.Tensor, opt: Any) -> None:
    if p in opt.state:
        opt.state[p] = {k: v.clone() for k, v in opt.state[p].items()}


MOVES = [
    _new_storage,
    _shared_memory,
    _other_view,
    _swapped_in_set,
    _state_cloned,
    _state_set_data,
    _state_strided,
    _state_dict_replaced,
]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_tensors_may_move_between_steps(name: str, options: Options, move: Callable[[Any, Any], None]) -> None:
    grads, still, moving = gradients(6), parameters(), parameters()
    want, opt = ours(name, still, **options), ours(name, moving, **options)
    train(want, grads, still)
    with falling_back_is_fine():
        for i, row in enumerate(grads):
            train(opt, [row], moving)
            for p in moving[i % 2 :: 2]:
                move(p, opt)
    assert_same_bits(snapshot(opt, moving), snapshot(want, still))


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_state_written_by_the_user_counts(name: str, options: Options) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(6, torch.float64, missing=False)
        opt = make(name, params, **options)
        train(opt, grads[:2], params)
        for p in params[:4]:
            for key, value in opt.state[p].items():
                value.fill_(41.0) if key == "step" else value.mul_(0.5)
        for p in params[4:]:
            for key, value in opt.state[p].items():
                opt.state[p][key] = torch.full_like(value, 0.25 if key != "step" else 11.0)
        train(opt, grads[2:4], params)
        del opt.state[params[7]]
        opt.state[params[8]] = {}
        if name == "Adagrad":  # torch makes its state in the constructor alone
            opt.state[params[7]] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(params[7])}
            opt.state[params[8]] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(params[8])}
        train(opt, grads[4:], params)
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), some_cases([n for n in NAMES if n != "Adagrad"]))
def test_clearing_the_state_starts_anew(name: str, options: Options) -> None:
    grads, params = gradients(4), parameters()
    opt = ours(name, params, **options)
    train(opt, grads[:2], params)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt.state.clear()
    train(opt, grads[2:], params)
    want = ours(name, fresh, **options)
    train(want, grads[2:], fresh)
    assert_same_bits(snapshot(opt, params), snapshot(want, fresh))


@pytest.mark.parametrize("step", [torch.tensor(5), torch.tensor(5.0, dtype=torch.float64)], ids=["int64", "float64"])
@pytest.mark.parametrize("name", [n for n in IN_TORCH if n != "SGD"])
def test_the_step_counter_may_have_another_type(name: str, step: torch.Tensor) -> None:
    results = []
    for make in (ours, plain):
        p = simple(9, torch.float64)
        opt = make(name, [p])
        opt.step()
        opt.state[p]["step"] = step.clone()
        with falling_back_is_fine():
            opt.step()
        assert opt.state[p]["step"] == 6
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_state_of_a_wrong_shape_is_an_error_and_nothing_is_written(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    p = simple(6)
    opt = ours(name, [p], **options)
    opt.step()
    key = next(k for k, v in opt.state[p].items() if v.dim())
    for wrong in (torch.zeros(5), torch.zeros(2, 3), torch.zeros(7)):
        opt.state[p][key] = wrong
        before = p.detach().clone()
        with falling_back_is_fine(), pytest.raises((ValueError, RuntimeError)):
            opt.step()
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float64, *SIXTEEN], ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_model_may_change_type_before_training(name: str, options: Options, dtype: torch.dtype) -> None:
    results = []
    for early in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        if early or name == "Adagrad":  # its state is there from the start, in float32
            model.to(dtype)
        opt = ours(name, model.parameters(), **options)
        params = list(model.to(dtype).parameters())
        assert [id(p) for p in params] == [id(p) for p in all_params(opt)]
        train(opt, gradients(4, dtype, [p.shape for p in params], missing=False), params)
        assert kinds(opt) == {dtype}
        results.append(snapshot(opt, params))
    assert_same_bits(*results)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_model_that_turns_sixteen_bit_in_mid_training_keeps_its_float32_state(name: str, options: Options) -> None:
    model = torch.nn.Linear(5, 3)
    opt, params = ours(name, model.parameters(), **options), list(model.parameters())
    shapes = [p.shape for p in params]
    train(opt, gradients(2, torch.float32, shapes, missing=False), params)
    model.to(torch.bfloat16)
    check_steps_round_once(name, opt, gradients(3, torch.bfloat16, shapes, missing=False))
    assert kinds(opt) == {torch.float32}


@pytest.mark.parametrize(("name", "options"), some_cases(IN_TORCH))
def test_a_model_that_turns_float64_in_mid_training_fares_as_in_torch(name: str, options: Options) -> None:
    results = []
    for make in (ours, plain):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        opt, params = make(name, model.parameters(), **options), list(model.parameters())
        shapes = [p.shape for p in params]
        train(opt, gradients(2, torch.float32, shapes, missing=False), params)
        model.to(torch.float64)
        grads = gradients(3, torch.float64, shapes, missing=False)
        refused, _ = outcome(lambda o=opt, g=grads, p=params: train(o, g, p))
        results.append((refused is None, [p.detach() for p in params]))
    (us_ok, us), (them_ok, them) = results
    assert us_ok == them_ok
    for a, b in zip(us, them, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@with_adam_and_sgd
def test_a_parameter_that_changes_shape_needs_new_state(name: str, options: Options) -> None:
    p = simple(6)
    opt = ours(name, [p], **options)
    opt.step()
    p.grad = None
    p.data = torch.ones(3, 4)
    p.grad = torch.ones(3, 4)
    with falling_back_is_fine(), pytest.raises((ValueError, RuntimeError)):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3, 4))
    opt.state.clear()
    opt.step()
    fresh = torch.nn.Parameter(torch.ones(3, 4))
    fresh.grad = torch.ones(3, 4)
    other = ours(name, [fresh], **options)
    other.step()
    assert_same_bits(snapshot(opt), snapshot(other))


@with_adam_and_sgd
def test_many_optimizers_come_and_go_without_mixing_up_memory(name: str, options: Options) -> None:
    """Freed storage is often reused: stale pointers would show."""
    want = None
    for _ in range(50):
        params = parameters(shapes=[(64,), (64,)])
        opt = ours(name, params, **options)
        train(opt, gradients(2, shapes=[(64,), (64,)], missing=False), params)
        got = snapshot(opt, params)
        want = got if want is None else want
        assert_same_bits(got, want)
        for p in params:
            for key in opt.state[p]:
                opt.state[p][key] = opt.state[p][key].clone()
        del params, opt, p


def test_a_reshaped_parameter_is_not_stepped_with_state_of_the_old_shape() -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    opt = ours("Adam", [p])
    opt.step()
    p.data = torch.ones(3, 2)
    p.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
