"""Optimizers on a GPU over several steps: checkpoints from and to the CPU and torch's fused step, several devices, more
than 2^31 elements, gradients at new addresses, memory, errors. Values of one step: test_gpu.py."""

import gc
import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from form_cases import Case, one_of_each_form
from form_cases_torch import made, wrapped
from fusedopt.bench.shapes import gpt2
from fusedopt.torch._engine import engine_of
from gpu_cases import (
    DEVICE,
    NEEDS_GPU,
    PLAIN,
    assert_same,
    assert_same_bits,
    both,
    differing,
    give,
    kept,
    numbers,
    rows,
    start,
    stepped,
    trained,
)
from torch_cases import NAMES, TORCH_FUSED, ours
from torch_compare import all_params

pytestmark = NEEDS_GPU
LENGTHS = (5, 64, 20_000)


# ---- checkpoints


def carried(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, map_location="cpu")
    return loaded


@pytest.mark.parametrize("towards", ["cpu", "gpu"])
@pytest.mark.parametrize("case", one_of_each_form() + [c for c in PLAIN if c.param == "float32"], ids=str)
def test_a_run_goes_on_on_the_other_side_to_the_same_bits(case: Case, towards: str) -> None:
    def run(device: str) -> Any:
        return trained(case, device, 2, LENGTHS)

    here, there = both(run)
    first = here if towards == "gpu" else there

    def resume(device: str) -> Any:
        opt = made(case, [wrapped(case, p.detach().to(device, copy=True)) for p in all_params(first)])
        opt.load_state_dict(carried(first.state_dict()))
        stepped(opt, case, range(2, 5))
        return opt

    again, other = both(resume)
    want = trained(case, "cpu", 5, LENGTHS)
    assert_same(again, want)
    assert_same(other, want)


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_checkpoints_go_to_torchs_fused_step_and_back(name: str) -> None:
    options: dict[str, Any] = {"fused": True, "lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    grads, theirs = rows(6, DEVICE), getattr(torch.optim, name)

    def run(makes: Sequence[Callable[..., Any]]) -> Any:
        params, state = start(DEVICE), None
        for k, make in enumerate(makes):
            opt = make(params, **options)
            if state is not None:
                opt.load_state_dict(state)
            for row in grads[2 * k : 2 * k + 2]:
                give(params, row)
                opt.step()
            state = carried(opt.state_dict())
        return opt

    mine = getattr(optim, name)
    try:
        want = kept(run([theirs] * 3))
    except NotImplementedError as error:
        pytest.skip(f"this torch has no such step: {error}".splitlines()[0])
    for makes in ([mine, theirs, mine], [theirs, mine, theirs], [mine] * 3):
        got = kept(run(makes))
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=2e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


# ---- devices


def spread(places: Sequence[str], max_norm: float | None) -> Any:
    params = [p for i, n in enumerate(LENGTHS) for p in start(places[i], (n,))]
    opt = optim.Adam(params, lr=0.1, max_grad_norm=max_norm)
    for row in rows(3, "cpu"):
        give(params, [g.to(p.device) for p, g in zip(params, row, strict=True)])
        opt.step()
    return opt


def assert_close_to_the_cpus(opt: Any, max_norm: float | None) -> None:
    """Bit-identical, but the norm over several devices is summed in another order."""
    want = spread(("cpu",) * 3, max_norm)
    if max_norm is None:
        assert_same(opt, want)
        return
    assert float(opt.last_grad_norm) == pytest.approx(float(want.last_grad_norm), rel=1e-6)
    got = kept(opt)
    for key, value in kept(want).items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_tensors_on_the_cpu_and_on_the_gpu_in_one_optimizer(max_norm: float | None) -> None:
    assert_close_to_the_cpus(spread((DEVICE, "cpu", DEVICE), max_norm), max_norm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_several_gpus_in_one_optimizer(max_norm: float | None) -> None:
    before = torch.cuda.current_device()
    for places in (("cuda:0", "cuda:1", "cuda:0"), ("cuda:1",) * 3):
        assert_close_to_the_cpus(spread(places, max_norm), max_norm)
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_the_second_gpu_takes_no_memory_of_the_first() -> None:
    program = """
import torch
from fusedopt.torch import Adam
p = torch.zeros(64, device="cuda:1", requires_grad=True)
p.grad = torch.ones_like(p)
Adam([p]).step()
assert p.ne(0).all() and torch.cuda.current_device() == 0
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


# ---- sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Lion"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """A repeated pattern: each repetition must give the CPU's result for one."""
    period = 4099
    times = 2**31 // period + 1
    free = torch.cuda.mem_get_info()[0]
    if free < 30 << 30:
        pytest.skip(f"needs 30 GiB of the GPU's memory, {free >> 30} are free")
    small = [numbers(period, "bfloat16", k) for k in (1, 2)]

    def repeated(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(times * period + 5, dtype=x.dtype, device=DEVICE)
        out[:-5].view(times, period).copy_(x.to(DEVICE))
        out[-5:].copy_(x[:5])
        return out

    def run(params: Sequence[torch.Tensor]) -> Any:
        p = torch.nn.Parameter(params[0])
        p.grad = params[1]
        opt = ours(name, [p], lr=0.1, max_grad_norm=1e9)
        opt.step()
        return opt

    want, opt = run([x.clone() for x in small]), run([repeated(x) for x in small])
    squares = small[1].double().square()
    norm = math.sqrt(float(squares.sum()) * times + float(squares[:5].sum()))
    assert float(opt.last_grad_norm) == pytest.approx(norm, rel=1e-6)
    (p,), (q,) = all_params(opt), all_params(want)
    for key, one in {"param": q.detach(), **want.state.get(q, {})}.items():
        whole = p.detach() if key == "param" else opt.state[p][key]
        for part in whole[:-5].view(times, period).split(1 << 17):
            assert not differing(part, one.to(DEVICE).expand_as(part)).any(), key
        assert_same_bits(whole[-5:].cpu(), one[:5], key)


def test_ten_thousand_tensors_whose_gradients_are_elsewhere_in_every_step() -> None:
    lengths = [1 + i % 64 for i in range(10_000)]

    def run(device: str) -> Any:
        params = start(device, (sum(lengths),))[0].detach().split(lengths)
        params = [torch.nn.Parameter(p.clone()) for p in params]
        opt, old = optim.Adam(params, lr=0.1, max_grad_norm=10.0), []
        for k in range(5):
            opt.zero_grad()
            grads = numbers(sum(lengths), seed=k).to(device).split(lengths)
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if k == 3 and i % 7 == 0 else g.clone()
            if k < 2:  # first all addresses are new, later they are reused for other parameters
                old.append([p.grad for p in params])
            opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)


def used() -> tuple[int, int]:
    """Bytes allocated by torch, and free bytes of the device."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]


def assert_memory_stays(run: Callable[[int], None], before: int, more: int) -> None:
    """Running it more often takes no more memory."""
    run(before)
    allocated, free = used()
    run(more)
    after, left = used()
    assert after == allocated
    assert free - left <= 8 << 20


def test_memory_does_not_grow_over_steps() -> None:
    params = [torch.nn.Parameter(torch.full(shape, 0.5, device=DEVICE)) for shape in gpt2()]
    opt = optim.AdamW(params, max_grad_norm=1.0)

    def steps(n: int) -> None:
        for _ in range(n):
            opt.zero_grad()
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            opt.step()

    assert_memory_stays(steps, 10, 200)


def test_memory_does_not_grow_over_plans_and_optimizers() -> None:
    params = start(DEVICE, (1000,) * 200)
    give(params, [torch.ones_like(p) for p in params])

    def again(n: int) -> None:
        opt = optim.Adam(params)
        for _ in range(n):
            opt.step()
            opt.load_state_dict(opt.state_dict())
        for _ in range(n):
            optim.Adam(params, max_grad_norm=1.0).step()

    assert_memory_stays(again, 10, 300)


FAILS = """
import os, torch, fusedopt.torch as optim
p = torch.nn.Parameter(torch.ones(5, device="cuda"))
p.grad = torch.ones_like(p)
opt = optim.SGD([p], lr=0.1)
opt.step()
torch.cuda.synchronize()
try:
    torch.ones(3, device="cuda")[torch.tensor([7], device="cuda")]  # an assertion on the GPU: nothing works any more
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    opt.step()
    print("no error", flush=True)
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


def test_a_launch_that_fails_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=300, check=False)
    assert "cuda error" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_on_the_gpu(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(DEVICE)
    x = torch.randn(256, 20, device=DEVICE)
    y = x[:, :1] - x[:, 1:2]
    rates = {"SGD": 0.1, "Adagrad": 0.05, "Adadelta": 10.0, "Lion": 0.003}
    opt, losses = ours(name, model.parameters(), lr=rates.get(name, 0.01)), []
    for _ in range(60):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.9 * losses[0]
    assert engine_of(opt).plan is not None
    assert not engine_of(opt).fallback.places
