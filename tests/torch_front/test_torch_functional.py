"""fusedopt.torch.functional: the bits of the classes, torch's results, lists updated in place, what falls back."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt.torch as optim
from fusedopt.torch import functional
from helpers import assert_same_bits

SHAPES = [(3,), (5, 7), (), (300,)]
# The class, its options, and those of the function where they differ.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "Adadelta": ({"lr": 0.5, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.01, "maximize": False},),
    "Adagrad": ({"lr": 0.1, "lr_decay": 0.1, "eps": 1e-10, "weight_decay": 0.01, "maximize": True},),
    "Adam": (
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": True, "maximize": False},
        {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": True},
    ),
    "AdamW": (
        {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False},
    ),
    "Adamax": ({"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},),
    "NAdam": ({"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum_decay": 4e-3},),
    "RAdam": ({"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},),
    "RMSprop": (
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.9, "centered": True},
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.0, "centered": False},
    ),
    "SGD": (
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": False, "weight_decay": 0.1, "maximize": False},
        {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": True},
    ),
}
ALL = [(name, options) for name, several in CASES.items() for options in several]
LISTS = dict(functional._LISTS)


def theirs(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(importlib.import_module(f"torch.optim.{name.lower()}"), name.lower())
    return function


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in SHAPES]


class Lists:
    """Parameters and states of a function, and a call of it."""

    def __init__(self, name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.name, self.params = name, tensors(1, dtype)
        self.options = dict(options)
        if "betas" in options:
            self.options["beta1"], self.options["beta2"] = self.options.pop("betas")
        made: Any = getattr(torch.optim, name)([torch.nn.Parameter(p.clone()) for p in self.params], **options)
        for group in made.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.states: dict[str, list[Any]] = {}
        for key in inspect.signature(theirs(name)).parameters:
            if key in functional._STATES:
                self.states[key] = []
        made.step()  # makes the states
        for p in made.param_groups[0]["params"]:
            for key, values in self.states.items():
                state = made.state[p].get(functional._STATES[key])
                if name == "SGD":
                    values.append(None)
                elif state is not None:
                    values.append(torch.full_like(state, 1.0 if key == "mu_products" else 0.0))

    def run(self, function: Callable[..., None], grads: list[torch.Tensor], **more: Any) -> None:
        with torch.no_grad():
            function(self.params, grads, *self.states.values(), **{**self.options, **more})

    def all(self) -> list[torch.Tensor]:
        return [*self.params, *(v for values in self.states.values() for v in values if v is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_function_gives_the_bits_of_the_class(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    lists = Lists(name, options, dtype)
    params = [torch.nn.Parameter(p.clone()) for p in lists.params]
    opt: Any = getattr(optim, name)(params, **options)
    for seed in range(3):
        grads = tensors(10 + seed, dtype)
        before = [g.clone() for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
        lists.run(getattr(functional, name.lower()), grads)
        assert all(map(torch.equal, grads, before))
    for i, (p, q) in enumerate(zip(params, lists.params, strict=True)):
        assert torch.equal(p.detach(), q)
        for key, values in lists.states.items():
            state = opt.state[p].get(functional._STATES[key])
            if state is not None:
                assert torch.equal(state, values[i]), key


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_function_does_what_torchs_does(name: str, options: dict[str, Any]) -> None:
    a, b = Lists(name, options, torch.float64), Lists(name, options, torch.float64)
    for seed in range(3):
        a.run(getattr(functional, name.lower()), tensors(20 + seed, torch.float64))
        b.run(theirs(name), tensors(20 + seed, torch.float64), foreach=False)
    for x, y in zip(a.all(), b.all(), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", CASES)
def test_signatures_are_torchs(name: str) -> None:
    assert inspect.signature(getattr(functional, name.lower())) == inspect.signature(theirs(name))


def test_parameters_keep_their_gradients_and_autograd_hears_of_the_update() -> None:
    lists = Lists("Adam", CASES["Adam"][1])
    lists.params = [torch.nn.Parameter(p) for p in lists.params]
    versions = [p._version for p in lists.params]
    lists.run(functional.adam, tensors(5))
    assert all(p.grad is None and p.requires_grad for p in lists.params)
    assert [p._version for p in lists.params] == [v + 1 for v in versions]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    lists = Lists("Adam", CASES["Adam"][1])
    before = [t.clone() for t in lists.all()]
    with pytest.raises(ValueError, match=r"grads: expected a list of 4 tensors"):
        lists.run(functional.adam, tensors(5)[:2])
    exp_avgs, lists.states["exp_avgs"] = lists.states["exp_avgs"], []
    with pytest.raises(ValueError, match=r"exp_avgs: expected a list of 4 tensors"):
        lists.run(functional.adam, tensors(5))
    lists.states["exp_avgs"] = exp_avgs
    with pytest.raises(RuntimeError, match="size"):
        lists.run(functional.adam, [*tensors(5)[:3], torch.ones(7)])
    for x, y in zip(lists.all(), before, strict=True):
        assert_same_bits(x.numpy(), y.numpy())
    functional.adam([], [], [], [], [], [], **lists.options)


def test_fused_false_and_differentiable_are_torchs() -> None:
    a, b = (Lists("AdamW", CASES["AdamW"][0]) for _ in range(2))
    a.run(functional.adamw, tensors(6), foreach=False, fused=False)
    b.run(theirs("AdamW"), tensors(6), foreach=False)
    assert all(map(torch.equal, a.all(), b.all()))
    a.run(functional.adamw, tensors(6), differentiable=True, foreach=False)
    b.run(theirs("AdamW"), tensors(6), differentiable=True, foreach=False)
    assert all(map(torch.equal, a.all(), b.all()))


def test_a_skipped_step_changes_nothing() -> None:
    lists = Lists("Adam", CASES["Adam"][1])
    before = [t.clone() for t in lists.all()]
    lists.run(functional.adam, tensors(5), fused=True, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0))
    assert all(map(torch.equal, lists.all(), before))
    halved, plain = Lists("Adam", CASES["Adam"][1]), Lists("Adam", CASES["Adam"][1])
    grads = tensors(5)
    halved.run(functional.adam, [2 * g for g in grads], found_inf=torch.tensor(0.0), grad_scale=torch.tensor(2.0))
    plain.run(functional.adam, grads)
    assert all(map(torch.equal, halved.all(), plain.all()))


def test_other_names_are_torchs() -> None:
    module: Any = getattr(torch.optim, "functional", None)
    if module is None:
        with pytest.raises(AttributeError, match="no attribute 'muon'"):
            functional.muon  # noqa: B018
        assert optim.functional is functional
        return
    assert set(functional.__all__) <= set(module.__all__) <= set(dir(functional))
    assert functional.muon is module.muon
    assert optim.functional is functional


@pytest.mark.skipif(not hasattr(torch.optim, "functional"), reason="torch has no torch.optim.functional")
def test_install_replaces_the_functions_of_torch() -> None:
    module: Any = torch.optim.functional  # type: ignore[attr-defined]
    before = {name: getattr(module, name) for name in module.__all__}
    optim.install()
    try:
        optim.install()
        for name in functional.__all__:
            assert getattr(module, name) is getattr(functional, name)
    finally:
        optim.uninstall()
    assert {name: getattr(module, name) for name in module.__all__} == before


@pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="torch cannot swap parameters in"
)
def test_parameters_and_state_are_swapped_in_as_with_torchs_class() -> None:
    swapped_in: Any = torch.optim.swap_in_optimizer_params_and_state  # type: ignore[attr-defined]

    def run(module: Any) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.arange(1.0, 5.0)), torch.nn.Parameter(torch.ones(3))]
        others = {str(i): torch.nn.Parameter(torch.full_like(p, 5.0)) for i, p in enumerate(params)}
        for p in (*params, *others.values()):
            p.grad = torch.ones_like(p)
        opt = module.AdamW(params, lr=0.1)
        opt.step()
        kept = opt.state_dict()
        kept["state"] = {i: {name: value.clone() for name, value in s.items()} for i, s in kept["state"].items()}
        with swapped_in(opt, others, kept):
            opt.step()
        opt.step()
        states = [*kept["state"].values(), *(opt.state[p] for p in params)]
        return [*params, *others.values(), *(s[name] for s in states for name in sorted(s))]

    for ours, theirs in zip(run(optim), run(torch.optim), strict=True):
        torch.testing.assert_close(ours, theirs)
