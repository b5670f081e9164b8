"""`fusedopt.torch` with closures, hooks, schedulers, autograd, the profiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt.torch as optim
from torch_cases import (
    NAMES,
    gradients,
    ours,
    parameters,
    plain,
    simple,
    some_cases,
)
from torch_compare import all_params, assert_close, assert_same_bits, snapshot, train

Options = dict[str, Any]


# -- closures and hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_closure_runs_once_with_grad_and_its_loss_is_returned(name: str) -> None:
    p, calls = simple(), []
    opt = ours(name, [p])

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert torch.equal(loss, (before**2).sum())
    assert not torch.equal(p.detach(), before)
    assert opt.step() is None
    assert opt.step(closure=lambda: 2.5) == 2.5
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_that_raises_leaves_everything_untouched(name: str) -> None:
    p = simple()
    opt = ours(name, [p])
    before = snapshot(opt)
    with pytest.raises(KeyError):
        opt.step(lambda: {}["missing"])
    assert_same_bits(snapshot(opt), before)
    assert torch.is_grad_enabled()
    opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_step_hooks_run_exactly_once(name: str) -> None:
    p, seen = simple(), []
    opt = ours(name, [p])
    before = p.detach().clone()

    def hook(word: str) -> Callable[..., None]:
        return lambda o, args, kwargs: seen.append((word, o is opt, torch.equal(p.detach(), before)))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        opt.register_step_pre_hook(hook("pre")),
        opt.register_step_post_hook(hook("post")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    opt.step()
    want = [("global pre", True, True), ("pre", True, True), ("post", True, False), ("global post", True, False)]
    assert seen == want
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(seen) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_pre_hook_may_replace_the_arguments(name: str) -> None:
    opt = ours(name, [simple()])
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 4.0), {}))
    assert opt.step() == 4.0
    opt.register_step_pre_hook(lambda o, args, kwargs: "wrong")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_pre_hook_may_set_gradients_and_a_subclass_may_override_step(name: str) -> None:
    class Scaled(getattr(optim, name)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            for q in all_params(self):
                q.grad = q.grad * 0.5
            return super().step(closure)

    results = []
    for way in range(2):
        p = simple()
        opt = (Scaled if way else getattr(optim, name))([p])
        if not way:
            opt.register_step_pre_hook(lambda o, args, kwargs: setattr(p, "grad", p.grad * 0.5))  # noqa: B023
        opt.step()
        results.append(snapshot(opt))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_hooks_run(name: str) -> None:
    seen: list[str] = []
    opt = ours(name, [simple()])
    opt.register_state_dict_pre_hook(lambda o: seen.append("save"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda o: seen.append("load"))
    opt.step()
    saved = opt.state_dict()
    assert saved["note"] == 1
    opt.load_state_dict(saved)
    assert seen == ["save", "load"]


# -- learning rates --------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1.0 / (1 + e)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=_cycles(o)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=_cycles(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


def _cycles(opt: Any) -> bool:
    return "momentum" in opt.defaults or "betas" in opt.defaults


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.6 passes one itself
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_schedulers_drive_us_as_they_drive_torch(name: str, options: Options, schedule: str, tensor_lr: bool) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(8, torch.float64)
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        opt = make(name, params, lr=lr, **options)
        scheduler, rates = SCHEDULES[schedule](opt), []
        for row in grads:
            train(opt, [row], params)
            scheduler.step(1.0) if schedule == "ReduceLROnPlateau" else scheduler.step()
            rates.append(float(opt.param_groups[0]["lr"]))
        # What torch's scheduler keeps as a tensor: in torch 2.6 ReduceLROnPlateau makes a number of it.
        results.append((rates, isinstance(opt.param_groups[0]["lr"], torch.Tensor), snapshot(opt, params)))
    (rates, kept, us), (torch_rates, torch_kept, them) = results
    assert rates == torch_rates
    assert kept == torch_kept
    number = schedule == "ReduceLROnPlateau" and torch.__version__.startswith("2.6.")
    assert kept == (tensor_lr and not number)
    assert len(set(rates)) > 1
    assert_close(us, them, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_before_the_first_step_still_gets_its_warning(name: str) -> None:
    opt = ours(name, [simple()])
    scheduler = lr_scheduler.StepLR(opt, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_learning_rate_is_read_at_every_step(name: str, lr: torch.Tensor) -> None:
    lr, results = lr.clone(), []
    for rate in (lr, 0.5):
        p = simple()
        opt = ours(name, [p], lr=rate)
        opt.step()
        if isinstance(rate, torch.Tensor):
            assert opt.param_groups[0]["lr"] is rate
            rate.fill_(0.25)
        else:
            opt.param_groups[0]["lr"] = 0.25
        opt.step()
        results.append(snapshot(opt))
    assert_same_bits(*results)


# -- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_backward_through_a_changed_weight_raises(name: str, options: Options) -> None:
    p, q = simple(), simple(seed=1)
    opt = ours(name, [p, q], **options)
    q.grad = None
    loss = (p * p).sum() + (q * q * 2).sum()
    version = q._version
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert q._version == version
    (q * q).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_the_step_leaves_no_trace_in_the_graph(name: str) -> None:
    p = simple()
    opt = ours(name, [p])
    for _ in range(2):
        opt.step()
        assert p.is_leaf
        assert p.requires_grad
        assert p.grad_fn is None
        assert all(not v.requires_grad for v in opt.state[p].values() if isinstance(v, torch.Tensor))
    p.grad = (p.detach() * 2).requires_grad_()  # as backward(create_graph=True) leaves it
    before = p.detach().clone()
    opt.step()
    assert p.is_leaf
    assert not torch.equal(p.detach(), before)
    assert p.grad.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_training_a_model_lowers_the_loss_as_in_torch(name: str) -> None:
    losses: list[list[float]] = []
    for make in (ours, plain):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        x = torch.randn(32, 6, dtype=torch.float64)
        y = x.prod(1, keepdim=True)
        opt = make(name, model.parameters(), lr=1.0 if name == "Adadelta" else 0.01)
        losses.append([])
        for _ in range(20):
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_profiler_sees_the_step_once(name: str) -> None:
    opt = ours(name, [simple()])
    opt.step()
    with torch.autograd.profiler.profile() as prof:
        opt.step()
    assert [e.name for e in prof.function_events].count(f"Optimizer.step#{name}.step") == 1
