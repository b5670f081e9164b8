"""A rule written in Python as a torch optimizer: every form and option of the drop-in classes, and the fallback."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch

import fusedopt.torch as fused
from fusedopt import zoo
from fusedopt.bench.own import OwnAdam, OwnNAdam, PlainSGD, own_rule
from fusedopt.rule import rule, state
from fusedopt.rules import RULES
from fusedopt.torch import FallbackWarning
from helpers import label


def weights(dtype: Any = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    shapes = [(7, 30), (64,), (), (3, 5, 4)]
    made = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    made.append(torch.nn.Parameter(torch.randn(8, 6).to(dtype).t()))
    return made


def train(opt: Any, steps: int = 4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()


def assert_same(a: Any, b: Any) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        for name, value in b.state[q].items():
            got = a.state[p][name]
            assert torch.equal(got.to(value.dtype), value) if isinstance(value, torch.Tensor) else got == value, name


FORMS: list[tuple[Any, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.float16, {"state_dtype": torch.float32}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.bfloat16, {"state_dtype": "int8", "master": "split8", "seed": 3}),
    (torch.bfloat16, {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 7}),
    (torch.float32, {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 1e-3, "maximize": True}),
]


@pytest.mark.parametrize(("dtype", "options"), FORMS, ids=lambda x: label(x))
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adamax", "Lion", "RAdam"])
def test_steps_have_the_bits_of_the_built_in_class(name: str, dtype: Any, options: dict[str, Any]) -> None:
    built_in = RULES[name]
    own, chosen = own_rule(built_in, {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {}), **options})
    given = {**options, "lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    if options.get("state_dtype") == "int8" and not all(own.kernel(chosen).codes):
        with pytest.raises(ValueError, match="int8"):
            own.torch(weights(dtype), **chosen)
        return
    a, b = own.torch(weights(dtype), **chosen), getattr(fused, name)(weights(dtype), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(a)
        train(b)
    if name == "SGD":  # its own step counter is none of torch's
        for p in a.param_groups[0]["params"]:
            a.state[p].pop("step", None)
        for p in b.param_groups[0]["params"]:
            b.state[p].pop("step", None)
    assert_same(a, b)
    if "max_grad_norm" in options:
        assert a.last_grad_norm == b.last_grad_norm


def test_checkpoints_resume_with_the_same_bits() -> None:
    for own, options in ((OwnNAdam, {}), (OwnAdam, {"state_dtype": "int8"})):
        opt = own.torch(weights(), **options)
        train(opt)
        buffer = io.BytesIO()
        torch.save(opt.state_dict(), buffer)
        buffer.seek(0)
        other = own.torch([torch.nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]], **options)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        train(opt, seed=5)
        train(other, seed=5)
        assert_same(other, opt)
    first = opt.param_groups[0]["params"][0]
    assert copy.deepcopy(opt).state_dict()["state"][0].keys() == opt.state[first].keys()


def test_the_carried_scalar_is_float64_and_stays_so() -> None:
    opt = OwnNAdam.torch(weights(torch.bfloat16))
    train(opt)
    opt.load_state_dict(opt.state_dict())
    assert {s["mu_product"].dtype for s in opt.state.values()} == {torch.float64}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_grad_scaler_unscales_and_skips_in_the_step(scale: float) -> None:
    results = []
    for make in (OwnAdam.torch, fused.Adam):
        params = weights()
        opt = make(params, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        for k in range(3):
            for i, p in enumerate(params):
                bad = float("inf") if k == 1 and i == 2 else 0.0
                p.grad = torch.full_like(p, 0.5 * scaler.get_scale()) + bad
            scaler.scale(torch.zeros(()))
            scaler.step(opt)
            scaler.update()
        results.append(params)
        assert int(opt.state[params[0]]["step"]) == 2
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_step_in_backward() -> None:
    torch.manual_seed(0)
    one = torch.nn.Linear(4, 3)
    two = copy.deepcopy(one)
    a = fused.step_in_backward(one, lambda params: OwnAdam.torch(params, lr=0.1))
    b = OwnAdam.torch(two.parameters(), lr=0.1)
    x = torch.randn(5, 4)
    for _ in range(3):
        one(x).square().sum().backward()
        a.step()
        b.zero_grad()
        two(x).square().sum().backward()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


# ---- the fallback


def test_sparse_gradients_take_the_function_itself_with_one_warning() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Embedding(6, 3, sparse=True)
    dense = torch.nn.Embedding.from_pretrained(layer.weight.detach().clone(), freeze=False)
    a, b = OwnNAdam.torch(layer.parameters(), lr=0.1), OwnNAdam.torch(dense.parameters(), lr=0.1)
    index = torch.tensor([1, 2, 4])
    layer(index).square().sum().backward()
    dense(index).square().sum().backward()
    with pytest.warns(FallbackWarning, match="the rule's function, not fused, updates it"):
        a.step()
    a.step()  # silently
    b.step()
    b.step()
    torch.testing.assert_close(layer.weight, dense.weight)
    for name, value in b.state[dense.weight].items():
        torch.testing.assert_close(a.state[layer.weight][name], value)


def test_an_option_that_the_function_lacks_is_refused_on_the_fallback() -> None:
    layer = torch.nn.Embedding(6, 3, sparse=True)
    opt = OwnAdam.torch(layer.parameters(), max_grad_norm=1.0)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1.0: the unfused step, needed here"):
        opt.step()


def test_a_differentiable_step() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    lr = torch.tensor(0.1, dtype=torch.float64)
    opt = PlainSGD.torch([p], lr=float(lr))
    opt.param_groups[0]["differentiable"] = True
    weight = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    q = p.detach().clone() * weight
    opt.param_groups[0]["params"] = [q]
    q.grad = (weight**2).clone()
    with pytest.warns(FallbackWarning):
        opt.step()
    q.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([1.0 - 0.2, 2.0 - 0.2], dtype=torch.float64))


def test_the_fallback_starts_states_as_declared() -> None:
    @rule(lr=0.1)
    def Made(p: Any, g: Any, a: Any = state("param"), b: Any = state(2.0), *, t: Any, lr: Any) -> Any:
        return p - lr * g, a + g, b + t

    class Sub(torch.Tensor):
        pass

    p = torch.nn.Parameter(torch.ones(3))
    opt = Made.torch([p])
    p.grad = torch.ones(3).as_subclass(Sub)
    with pytest.warns(FallbackWarning, match="subclass"):
        opt.step()
    assert opt.state[p]["a"].tolist() == [2.0, 2.0, 2.0]
    assert opt.state[p]["b"].tolist() == [3.0, 3.0, 3.0]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch gives gradients the dtype of the weight")
@pytest.mark.parametrize("options", [{}, {"master": "split8", "state_dtype": "int8"}, {"master": "split16"}], ids=label)
@pytest.mark.parametrize("made", [OwnAdam, zoo.LAMB, zoo.StableAdamW], ids=lambda made: made.name)
def test_float32_gradients_of_16_bit_weights(made: Any, options: dict[str, Any]) -> None:
    """With sums over a tensor, too."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        opt = made.torch(weights(torch.bfloat16), lr=0.01, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in opt.param_groups[0]["params"]:
                p.grad_dtype = None
                p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16).to(dtype)
            opt.step()
        results.append(opt)
    assert_same(*results)
