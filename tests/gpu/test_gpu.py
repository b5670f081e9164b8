"""A step on a GPU is bit-identical to one on the CPU: every rule, form and option, lengths and layouts, zeros,
denormals, every 16-bit value, the norm, in-place functions on CUDA arrays. Synchronisation, graphs and streams:
test_gpu_steps.py."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
import fusedopt.torch as optim
from form_cases import CASES, Case, one_of_each_form
from form_cases_torch import BOTH, DTYPES, made, wrapped
from fusedopt import _core
from fusedopt.rules import RULES
from fusedopt.torch import _engine
from gpu_cases import (
    DEVICE,
    LENGTHS,
    NEEDS_GPU,
    PLAIN,
    assert_same,
    assert_same_bits,
    both,
    numbers,
    parameters,
    plain,
    stepped,
    trained,
)
from helpers import FORMATS, Problem, apply, assert_same_problem, label, problem, two_option_sets
from torch_cases import NAMES, cases, gradients, ours
from torch_cases import parameters as torch_parameters
from torch_compare import train

pytestmark = NEEDS_GPU
FULL = one_of_each_form()


def test_the_library_has_every_rule_in_every_form() -> None:
    assert _core.device_formats() == _core.formats()


@pytest.mark.parametrize("case", PLAIN + CASES, ids=str)
def test_every_rule_and_form_gives_the_cpus_bits(case: Case) -> None:
    here, there = both(lambda device: trained(case, device))
    assert_same(there, here)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_l1_and_the_average_of_the_weights_give_the_cpus_bits(case: Case) -> None:
    here, there = both(lambda device: trained(case, device, **BOTH))
    assert_same(there, here)


@pytest.mark.parametrize(("name", "options"), cases())
def test_every_option_gives_the_cpus_bits(name: str, options: dict[str, Any]) -> None:
    def run(device: str) -> Any:
        params = [torch.nn.Parameter(p.detach().to(device)) for p in torch_parameters()]
        opt = ours(name, params, **options)
        train(opt, [[None if g is None else g.to(device) for g in row] for row in gradients(6)], params)
        return opt

    here, there = both(run)
    assert_same(there, here)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float32_is_rounded_to_16_bits_as_on_the_cpu(dtype: str) -> None:
    """By the first value of a momentum buffer, which is the gradient."""
    n = 1 << 26
    for first in range(-(1 << 31), 1 << 31, n):
        g = torch.arange(first, first + n).to(torch.int32).view(torch.float32)

        def run(device: str, g: torch.Tensor = g) -> torch.Tensor:
            buffer = torch.zeros(n, dtype=DTYPES[dtype], device=device)
            fusedopt.sgd_(torch.zeros(n, device=device), g.to(device), buffer, lr=0.0, momentum=0.5)
            return buffer.cpu()

        here, there = both(run)
        assert_same_bits(there, here, f"from {first}")


# ---- layouts


def misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[..., ::2].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device).permute(3, 2, 1, 0).copy_(x)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = (torch.clone, misaligned, strided, transposed, channels_last)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_pair_of_layouts_gives_the_cpus_bits(case: Case) -> None:
    shape = (3, 5, 41, 37)  # more than a chunk
    n = 3 * 5 * 41 * 37

    def run(device: str) -> Any:
        pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS]
        start = numbers(n, case.param, 1).view(shape).to(device)
        params = [wrapped(case, a(start)) for a, _ in pairs]
        opt = made(case, params, **BOTH)
        for k in range(2):
            for i, (p, (_, b)) in enumerate(zip(params, pairs, strict=True)):
                p.grad = b(numbers(n, case.grad, 10 * k + i).view(shape).to(device))
            opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)


def test_a_gradient_whose_elements_share_memory_gives_the_cpus_bits() -> None:
    def run(device: str) -> Any:
        opt = optim.Adam([torch.nn.Parameter(numbers(3000).view(30, 100).to(device, copy=True))])
        opt.param_groups[0]["params"][0].grad = numbers(100, seed=1).to(device).expand(30, 100)
        opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_read_without_the_exchange_api_give_the_cpus_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "EXCHANGE", False)
    here, there = both(lambda device: trained(plain(name), device, max_grad_norm=0.5, steps=3))
    assert_same(there, here)


# ---- the norm, the learning rate

LISTS = {"one": (5,), "around a chunk": LENGTHS, "many": (5,) * 3000, "1025 chunks": (1024 * 16384 + 5, 3)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LISTS)
def test_the_norm_is_the_cpus_to_the_bit(dtype: str, lengths: str) -> None:
    case = plain("SGD", dtype)
    here, there = both(lambda device: trained(case, device, 2, LISTS[lengths], max_grad_norm=0.37))
    assert there.last_grad_norm.device.type == torch.device(DEVICE).type
    assert float(here.last_grad_norm) > 0.37
    assert_same_bits(there.last_grad_norm.cpu(), here.last_grad_norm, "norm")
    assert_same(there, here)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_gives_the_cpus_bits_up_to_a_norm_that_is_no_number(name: str) -> None:
    def run(device: str) -> tuple[Any, list[torch.Tensor]]:
        case, norms = plain(name), []
        opt = made(case, parameters(case, device), max_grad_norm=0.5)
        for k in range(5):  # any bits in the fourth
            stepped(opt, case, [k])
            norms.append(opt.last_grad_norm.cpu())
        return opt, norms

    (here, want), (there, got) = both(run)
    assert_same_bits(torch.stack(got), torch.stack(want), "norms")
    assert want[3].isnan()
    assert_same(there, here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_on_the_gpu_gives_the_cpus_bits(name: str, dtype: torch.dtype) -> None:
    def run(device: str) -> Any:
        case, rate = plain(name), torch.tensor(0.01, dtype=dtype, device=device)
        opt = made(case, parameters(case, device), lr=rate)
        for k in range(3):
            stepped(opt, case, [k])
            rate.mul_(0.7)
        return opt

    here, there = both(run)
    assert_same(there, here)


def test_groups_of_their_own_options_dtypes_and_late_members_give_the_cpus_bits() -> None:
    def run(device: str) -> Any:
        wide, narrow = plain("AdamW"), plain("AdamW", "bfloat16")
        params = parameters(wide, device), parameters(narrow, device)
        groups = [{"params": params[0], "weight_decay": 0.3}, {"params": params[1], "lr": 0.1, "maximize": True}]
        opt = optim.AdamW(groups, lr=0.01, max_grad_norm=0.5)
        for k in range(4):
            for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
                dtype = str(p.dtype).removeprefix("torch.")
                p.grad = None if (i + k) % 5 == 4 else numbers(p.numel(), dtype, 30 * k + i).to(device)
            if k == 2:
                late = torch.nn.Parameter(numbers(70, seed=3).to(device, copy=True))
                late.grad = numbers(70, seed=4).to(device)
                opt.add_param_group({"params": [late], "betas": (0.5, 0.6)})
            opt.param_groups[k % 2]["lr"] *= 0.5
            opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)
    assert_same_bits(there.last_grad_norm.cpu(), here.last_grad_norm, "norm")


# ---- in-place functions

Ways = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _torch() -> Ways:
    return lambda x: torch.from_numpy(x).to(DEVICE), lambda x: x.cpu().numpy()


def _cupy() -> Ways:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cupy = pytest.importorskip("cupy")
    return cupy.asarray, cupy.asnumpy


@pytest.mark.parametrize("form", ["f64", "f32", "f16", "f16+f32state"])
@pytest.mark.parametrize("rule", RULES.values(), ids=label)
@pytest.mark.parametrize("ways", [_torch, _cupy])
def test_functions_take_arrays_on_the_gpu(ways: Callable[[], Ways], rule: Any, form: str) -> None:
    to, back = ways()
    for options in two_option_sets(rule):
        here = problem(rule, options, FORMATS[form], 20_000)
        there = Problem(to(here.param), to(here.grad), {k: to(v) for k, v in here.state.items()}, here.step)
        for step in range(here.step, here.step + 3):
            for p in (here, there):
                apply(rule, p.param, p.grad, p.state, step, options)
        state = {k: np.asarray(back(v)) for k, v in there.state.items()}
        assert_same_problem(Problem(back(there.param), back(there.grad), state, here.step), here, rule.name)


def test_functions_take_many_arrays_on_the_gpu_at_once() -> None:
    lengths = (5, 64, 20_000)

    def run(device: str) -> list[torch.Tensor]:
        arrays = [[numbers(n, seed=k).abs().to(device, copy=True) for n in lengths] for k in range(4)]
        for step in (1, 2):
            fusedopt.adam_(*arrays, step=step, lr=0.1)
        return [x for row in arrays for x in row]

    for here, there in zip(*both(run), strict=True):
        assert_same_bits(there.cpu(), here)


def test_cupys_current_stream_is_the_one_used() -> None:
    to, back = _cupy()
    cupy = pytest.importorskip("cupy")
    param, grad = to(np.ones(1 << 22, np.float32)), to(np.zeros(1 << 22, np.float32))
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(50):
            grad += 1.0
        fusedopt.sgd_(param, grad, lr=1.0)
        stream.synchronize()
    assert set(back(param).tolist()) == {-49.0}


def test_arrays_on_the_cpu_and_on_the_gpu_are_not_updated_together() -> None:
    param = torch.ones(5, device=DEVICE)
    with pytest.raises(ValueError, match="grad: expected it on the same device as param"):
        fusedopt.sgd_(param, np.ones(5, np.float32), lr=0.1)
    assert bool((param == 1).all())
