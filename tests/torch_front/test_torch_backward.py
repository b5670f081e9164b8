"""step_in_backward: the values of an ordinary optimizer, gradients freed one by one, unchanged training loops."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fusedopt.torch as optim  # noqa: E402
from fusedopt.torch import FallbackWarning, step_in_backward  # noqa: E402

Factory = Callable[[Any], Any]


def net(seed: int = 0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


FACTORIES: dict[str, Factory] = {
    "ours": lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "momentum": lambda params: optim.SGD(params, lr=0.01, momentum=0.9),
    "int8": lambda params: optim.Adam(params, lr=0.01, state_dtype="int8", seed=7),
    "ema": lambda params: optim.Adam(params, lr=0.01, ema_decay=0.9, l1=0.1),
    "torch": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "groups": lambda params: optim.Adam([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], lr=0.01),
}


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def stepped(opt: Any, model: Any, first: int, n: int, scheduler: Any = None) -> None:
    for step in range(first, first + n):
        opt.zero_grad()
        model(batch(step)).square().mean().backward()
        opt.step()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize("name", [n for n in FACTORIES if n != "int8"])
def test_values_are_those_of_an_ordinary_optimizer(name: str) -> None:
    a, b = net(), net()
    inside, after = step_in_backward(a, FACTORIES[name]), FACTORIES[name](list(b.parameters()))
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 3, 0.5) for opt in (inside, after)]
    stepped(inside, a, 0, 10, schedulers[0])
    stepped(after, b, 0, 10, schedulers[1])
    assert same(a, b)
    assert [g["lr"] for g in inside.param_groups] == [g["lr"] for g in after.param_groups]
    assert inside.param_groups[0]["lr"] < after.defaults["lr"] or name == "groups"
    if name == "ema":
        with after.ema_parameters():
            averages = [p.detach().clone() for p in b.parameters()]
        assert all(torch.equal(inside.state[p]["ema"], e) for p, e in zip(a.parameters(), averages, strict=True))


def test_int8_draws_the_same_numbers_after_a_restart() -> None:
    a, b = net(), net()
    one, two = step_in_backward(a, FACTORIES["int8"]), step_in_backward(b, FACTORIES["int8"])
    stepped(one, a, 0, 6)
    stepped(two, b, 0, 3)
    c = net()
    c.load_state_dict(b.state_dict())
    three = step_in_backward(c, FACTORIES["int8"])
    three.load_state_dict(two.state_dict())
    stepped(three, c, 3, 3)
    assert same(a, c)


@pytest.mark.parametrize("name", ["ours", "torch", "groups"])
def test_a_checkpoint_goes_from_and_to_the_ordinary_optimizer(name: str) -> None:
    a, b = net(), net()
    inside, after = step_in_backward(a, FACTORIES[name]), FACTORIES[name](list(b.parameters()))
    stepped(inside, a, 0, 4)
    stepped(after, b, 0, 4)
    c, d = net(), net()
    c.load_state_dict(a.state_dict())
    d.load_state_dict(b.state_dict())
    ordinary, inside2 = FACTORIES[name](list(c.parameters())), step_in_backward(d, FACTORIES[name])
    ordinary.load_state_dict(deepcopy(inside.state_dict()))  # torch shares the step counts
    inside2.load_state_dict(deepcopy(after.state_dict()))
    for opt, model in ((inside, a), (after, b), (ordinary, c), (inside2, d)):
        stepped(opt, model, 4, 4)
    assert same(a, b)
    assert same(a, c)
    assert same(a, d)


@pytest.mark.parametrize("how", ["argument", "block", "step"])
def test_gradient_accumulation(how: str) -> None:
    a, b = net(), net()
    inside = step_in_backward(a, FACTORIES["ours"], accumulate=3 if how == "argument" else 1)
    after = FACTORIES["ours"](list(b.parameters()))
    for step in range(4):
        for part in range(3):
            if (how == "block" and part < 2) or how == "step":
                with inside.no_step():
                    a(batch(3 * step + part)).square().mean().backward()
            else:
                a(batch(3 * step + part)).square().mean().backward()
            b(batch(3 * step + part)).square().mean().backward()
        inside.step()
        after.step()
        after.zero_grad()
        assert same(a, b)
        assert all(p.grad is None for p in a.parameters())


def test_step_in_the_middle_of_an_accumulation_leaves_it_alone() -> None:
    a = net()
    inside = step_in_backward(a, FACTORIES["ours"], accumulate=2)
    before = [p.detach().clone() for p in a.parameters()]
    a(batch(0)).sum().backward()
    inside.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))
    assert all(p.grad is not None for p in a.parameters())


def test_a_closure_is_called_and_its_loss_returned() -> None:
    a = net()
    inside = step_in_backward(a, FACTORIES["ours"])
    before = [p.detach().clone() for p in a.parameters()]

    def closure() -> Any:
        loss = a(batch(0)).square().mean()
        loss.backward()
        return loss

    assert inside.step(closure).item() > 0
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))


class Watch:
    """The bytes of all live gradients, recorded when each becomes complete."""

    def __init__(self, model: Any) -> None:
        self.params = list(model.parameters())
        self.peak = 0
        for p in self.params:
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, _: Any) -> None:
        alive = sum(p.grad.numel() * p.grad.element_size() for p in self.params if p.grad is not None)
        self.peak = max(self.peak, alive)


def test_gradients_of_a_transformer_are_alive_one_at_a_time() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    peaks = {}
    for inside in (False, True):
        model = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        watch = Watch(model)  # before the optimizer's hooks, so that it sees each gradient before it is freed
        if inside:
            step_in_backward(model, lambda params: optim.AdamW(params, lr=1e-3))
        model(torch.randn(2, 8, 512)).square().mean().backward()
        peaks[inside] = watch.peak
    whole = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    assert peaks[False] == whole
    assert peaks[True] <= whole / 12
    assert peaks[True] == largest


def test_a_weight_that_is_used_twice_is_updated_once() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    b.load_state_dict(a.state_dict())
    inside, after = step_in_backward(a, FACTORIES["ours"]), FACTORIES["ours"](list(b.parameters()))
    for model, opt in ((a, inside), (b, after)):
        model(model(torch.ones(2, 4))).sum().backward()
        opt.step()
    assert same(a, b)


def test_parameters_frozen_from_the_start_are_left_alone() -> None:
    a = net()
    a[0].weight.requires_grad_(False)
    inside = step_in_backward(a, FACTORIES["ours"])
    before = a[0].weight.clone()
    stepped(inside, a, 0, 2)
    assert torch.equal(a[0].weight, before)
    assert len(inside.param_groups[0]["params"]) == 5


def test_hooks_can_be_taken_off() -> None:
    a = net()
    inside = step_in_backward(a, FACTORIES["ours"])
    inside.remove()
    a(batch(0)).sum().backward()
    assert all(p.grad is not None for p in a.parameters())


def test_what_cannot_work_is_refused() -> None:
    a = net()
    with pytest.raises(ValueError, match="max_grad_norm: a global norm needs all gradients"):
        step_in_backward(a, lambda params: optim.AdamW(params, max_grad_norm=1.0))
    with pytest.raises(ValueError, match="accumulate: expected an integer of 1 or more, got 0"):
        step_in_backward(a, FACTORIES["ours"], accumulate=0)
    with pytest.raises(ValueError, match="factory: the optimizer leaves out 5 of 6"):
        step_in_backward(a, lambda params: optim.SGD(params[:1]))
    with pytest.raises(TypeError, match="factory: expected it to return an optimizer, got list"):
        step_in_backward(a, list)
    with pytest.raises(ValueError, match="model: no parameter requires a gradient"):
        step_in_backward(torch.nn.Tanh(), FACTORIES["ours"])
    inside = step_in_backward(a, FACTORIES["ours"])
    with pytest.raises(RuntimeError, match="add_param_group: call step_in_backward again"):
        inside.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    inside.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        a(batch(0)).sum().backward()


def test_a_grad_scaler_fails_loudly() -> None:
    a = net()
    inside = step_in_backward(a, FACTORIES["ours"])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(a(batch(0)).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(inside)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "rows that the kernels do not take"])
def test_sparse_gradients(columns: bool) -> None:
    a, b = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Embedding(5, 3, sparse=True)
    if columns:
        a.weight = torch.nn.Parameter(torch.randn(3, 5).t())
    b.load_state_dict(a.state_dict())
    inside = step_in_backward(a, lambda params: optim.SGD(params, lr=0.1))
    with pytest.warns(FallbackWarning, match="sparse") if columns else nullcontext():
        a(torch.tensor([1, 2])).sum().backward()
    after = torch.optim.SGD(b.parameters(), lr=0.1)
    b(torch.tensor([1, 2])).sum().backward()
    after.step()
    assert same(a, b)
    inside.step()
