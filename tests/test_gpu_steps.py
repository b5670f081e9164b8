"""What is around a step on a GPU: nobody waits for it, GradScaler, CUDA graphs, streams, checkpoints from and to the CPU and
torch's fused step, several devices, more than 2^31 elements, memory, errors. The values alone: test_gpu.py."""

import gc
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from form_cases import Case, one_of_each_form
from form_cases_torch import made
from fusedopt.bench.shapes import gpt2
from gpu_cases import (
    DEVICE,
    NEEDS_GPU,
    PLAIN,
    assert_same,
    assert_same_bits,
    both,
    differing,
    kept,
    numbers,
    parameter,
    parameters,
    plain,
    stepped,
    trained,
)
from torch_cases import NAMES, TORCH_FUSED, accepts, ours
from torch_compare import all_params

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable"),
]
LENGTHS = (5, 64, 20_000)
SLEEP = 400_000_000  # cycles: some tenths of a second


def start(device: str, lengths: Sequence[int] = LENGTHS) -> list[torch.nn.Parameter]:
    return parameters(plain("SGD"), device, lengths)


def rows(steps: int, device: str, lengths: Sequence[int] = LENGTHS) -> list[list[torch.Tensor]]:
    """Gradients of some steps, made beforehand."""
    return [[numbers(n, seed=50 * k + i).to(device, copy=True) for i, n in enumerate(lengths)] for k in range(steps)]


def give(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Fails if the block waits for a kernel that sleeps, or for anything that torch knows of."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    asleep = torch.cuda.Event()
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query(), "what was queued before the block is done: somebody has waited"


# ---- nobody waits; GradScaler


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(name: str) -> None:
    def run(device: str) -> Any:
        params, rate = start(device), torch.tensor(0.01, device=device)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
        opt = ours(name, groups, lr=rate, max_grad_norm=0.5)
        for k, row in enumerate(rows(5, device)):
            give(params, row)
            with nobody_waits() if k > 1 and device == DEVICE else nullcontext():
                opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", [name for name in NAMES if accepts(name, "fused")])
def test_gradscaler_skips_a_step_and_nobody_waits(name: str, max_norm: float | None) -> None:
    def run(device: str) -> Any:
        params = start(device)
        opt = ours(name, params, lr=0.01, fused=True, max_grad_norm=max_norm)
        scaler = torch.amp.GradScaler(device, init_scale=1000.0)
        scaler.scale(torch.zeros((), device=device))  # makes its tensors
        grads, skipped = rows(6, device), []
        for row in grads:
            for g in row:
                g.mul_(1000.0)
        grads[3][1][7] = math.inf
        for k, row in enumerate(grads):
            give(params, row)
            with nobody_waits() if k > 1 and device == DEVICE else nullcontext():
                scaler.step(opt)
                scaler.update()
            skipped.append(opt.last_step_skipped)
        assert skipped == [False, False, False, True, False, False]
        assert scaler.get_scale() == 500.0
        return opt

    here, there = both(run)
    assert_same(there, here)


def test_gradscaler_in_its_plain_protocol() -> None:
    def run(device: str) -> Any:
        params = start(device)
        opt = optim.RMSprop(params, lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        scaler.scale(torch.zeros((), device=device))
        for k, row in enumerate(rows(3, device)):
            give(params, row)
            if k == 1:
                row[0][2] = math.nan
            scaler.step(opt)
            scaler.update()
        return opt

    here, there = both(run)
    assert_same(there, here)


# ---- graphs, streams


def waiting_for_graphs() -> dict[str, list[int | None]]:
    """Which graph makes a step; None: the optimizer itself, on gradients elsewhere."""
    return {"one": [None, None, 0, 0, None, None, 0, 0], "two": [None, None, 0, 0, None, 1, 0, 1, None, 1]}


@pytest.mark.parametrize("ways", waiting_for_graphs().values(), ids=list(waiting_for_graphs()))
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_replayed_graphs_give_the_values_of_plain_steps(
    name: str, max_norm: float | None, ways: list[int | None]
) -> None:
    def run(device: str, graphed: bool = True) -> tuple[Any, list[torch.Tensor]]:
        capturable = {"capturable": True} if graphed and accepts(name, "capturable") else {}
        params, rate = start(device), torch.tensor(0.01, device=device)
        opt = ours(name, params, lr=rate, max_grad_norm=max_norm, **capturable)
        graphs: list[tuple[Any, list[torch.Tensor], Any]] = []
        norms = []
        for way, row in zip(ways, rows(len(ways), device), strict=True):
            if way is None or not graphed:
                give(params, row)
                opt.step()
                norm = opt.last_grad_norm
            else:
                if way == len(graphs):
                    graphs.append(captured(opt, params))
                graph, static, norm = graphs[way]
                for s, g in zip(static, row, strict=True):
                    s.copy_(g)
                graph.replay()
            rate.mul_(0.8)
            norms.append(norm if norm is None else norm.cpu())
        return opt, norms

    here, want = run("cpu", graphed=False)
    there, got = on_the_gpu(run)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (max_norm is None)
        if max_norm is not None:
            assert_same_bits(a, b, "norm")
    assert_same(there, here)


def on_the_gpu(run: Callable[[str], Any]) -> Any:
    return run(DEVICE)


def captured(opt: Any, params: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor], Any]:
    """A graph of the step, the gradients that it reads, the norm that it writes."""
    static = [torch.zeros_like(p) for p in params]
    give(params, static)
    before, graph = kept(opt), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    after = kept(opt)
    for key, value in before.items():
        assert_same_bits(after[key], value, f"{key}, by the capture alone")
    return graph, static, opt.last_grad_norm


@pytest.mark.parametrize("case", one_of_each_form(), ids=str)
def test_every_form_can_be_captured(case: Case) -> None:
    capturable = {"capturable": True} if accepts(case.rule.name, "capturable") else {}
    opt = made(case, parameters(case, DEVICE, LENGTHS), **capturable)
    stepped(opt, case, range(2))
    params = all_params(opt)
    static = [torch.zeros_like(p.grad) for p in params if p.grad is not None]
    give(params, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for k in (2, 3):
        for i, s in enumerate(static):
            s.copy_(numbers(s.numel(), case.grad, 100 * k + i))
        graph.replay()
    want = made(case, parameters(case, "cpu", LENGTHS))
    stepped(want, case, range(2))
    for k in (2, 3):
        for i, p in enumerate(all_params(want)):
            p.grad = numbers(p.numel(), case.grad, 100 * k + i).clone()
        want.step()
    assert_same(opt, want)


def test_a_class_that_can_be_captured_refuses_without_capturable() -> None:
    params = start(DEVICE)
    opt = optim.Adam(params)
    give(params, rows(1, DEVICE)[0])
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        opt.step()


def test_a_whole_iteration_in_a_graph() -> None:
    """Gradients lie in the graph's own memory; elementwise, so that plain iterations have the same bits."""

    def run(graphed: bool) -> Any:
        p = torch.nn.Parameter(numbers(20_000).to(DEVICE, copy=True))
        x = torch.zeros(20_000, device=DEVICE)
        opt = optim.AdamW([p], lr=0.1, capturable=True, max_grad_norm=1.0)

        def iterate() -> None:
            opt.zero_grad()
            (p.square() * x).sum().backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for k in range(3):
                x.copy_(numbers(20_000, seed=k))
                iterate()
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            if graphed:
                with torch.cuda.graph(graph, stream=side):
                    iterate()
            for k in range(3, 6):
                x.copy_(numbers(20_000, seed=k))
                graph.replay() if graphed else iterate()
            side.synchronize()
        return opt

    assert_same(run(True), run(False))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_runs_on_the_current_stream(max_norm: float | None) -> None:
    """Gradients are not there yet when the step is called: only its own stream knows when they will be."""

    def run(device: str) -> Any:
        params, grads = start(device), rows(3, device)
        opt = optim.Adam(params, lr=0.1, max_grad_norm=max_norm)
        give(params, grads[0])
        opt.step()
        static = [torch.full_like(p, math.nan) for p in params]
        side = torch.cuda.Stream() if device == DEVICE else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if side is not None else nullcontext():
            for row in grads[1:]:
                if side is not None:
                    torch.cuda._sleep(SLEEP // 4)
                for s, g in zip(static, row, strict=True):
                    s.copy_(g)
                give(params, static)
                opt.step()
        if side is not None:
            side.synchronize()
        return opt

    here, there = both(run)
    assert_same(there, here)


def test_the_step_inside_backward() -> None:
    def run(inside: bool) -> list[torch.Tensor]:
        params = start(DEVICE)
        make = lambda ps: optim.AdamW(ps, lr=0.1)  # noqa: E731
        opt: Any = optim.step_in_backward(params, make) if inside else make(params)
        for row in rows(3, DEVICE):
            opt.zero_grad()
            sum((p.square() * g).sum() for p, g in zip(params, row, strict=True)).backward()
            opt.step()
        return [p.detach().cpu() for p in params]

    for a, b in zip(run(True), run(False), strict=True):
        assert_same_bits(a, b)


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
        opt = made(case, [parameter(case, p.detach().to(device, copy=True)) for p in all_params(first)])
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


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_tensors_on_the_cpu_and_on_the_gpu_in_one_optimizer(max_norm: float | None) -> None:
    def run(places: Sequence[str]) -> Any:
        params = [p for i, n in enumerate(LENGTHS) for p in start(places[i], (n,))]
        opt = optim.Adam(params, lr=0.1, max_grad_norm=max_norm)
        for row in rows(3, "cpu"):
            give(params, [g.to(p.device) for p, g in zip(params, row, strict=True)])
            opt.step()
        return opt

    mixed, want = run((DEVICE, "cpu", DEVICE)), run(("cpu",) * 3)
    if max_norm is None:
        assert_same(mixed, want)
    else:
        assert float(mixed.last_grad_norm) == pytest.approx(float(want.last_grad_norm), rel=1e-6)
        a, b = kept(mixed), kept(want)
        assert all(torch.allclose(a[key], b[key], rtol=1e-5, atol=1e-7) for key in b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_several_gpus_in_one_optimizer(max_norm: float | None) -> None:
    def run(places: Sequence[str]) -> Any:
        params = [p for i, n in enumerate(LENGTHS) for p in start(places[i], (n,))]
        opt = optim.Adam(params, lr=0.1, max_grad_norm=max_norm)
        for row in rows(3, "cpu"):
            give(params, [g.to(p.device) for p, g in zip(params, row, strict=True)])
            opt.step()
        return opt

    before = torch.cuda.current_device()
    spread, one = run(("cuda:0", "cuda:1", "cuda:0")), run(("cuda:1",) * 3)
    assert torch.cuda.current_device() == before
    want = run(("cpu",) * 3)
    assert_same(one, want)
    if max_norm is None:
        assert_same(spread, want)
    assert float(max_norm or 0) == 0 or float(spread.last_grad_norm) == pytest.approx(float(want.last_grad_norm))


# ---- sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Lion"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """A pattern repeated: each repetition has to become what one becomes on the CPU."""
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
    opt = p = whole = part = None  # type: ignore[assignment]
    torch.cuda.empty_cache()


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
            if k < 2:  # no address comes again; later they do, for other parameters
                old.append([p.grad for p in params])
            opt.step()
        return opt

    here, there = both(run)
    assert_same(there, here)


def used() -> tuple[int, int]:
    """Bytes that torch has handed out, and that nobody has."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]


def test_memory_does_not_grow_over_steps() -> None:
    params = [torch.nn.Parameter(torch.full(shape, 0.5, device=DEVICE)) for shape in gpt2()]
    opt = optim.AdamW(params, max_grad_norm=1.0)

    def steps(n: int) -> None:
        for _ in range(n):
            opt.zero_grad()
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            opt.step()

    steps(10)
    allocated, free = used()
    steps(200)
    after, left = used()
    assert after == allocated
    assert free - left <= 4 << 20


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

    again(10)
    allocated, free = used()
    again(100)
    after, left = used()
    assert after == allocated
    assert free - left <= 4 << 20


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
    opt, losses = ours(name, model.parameters(), lr=0.003 if name == "Lion" else 0.01), []
    for _ in range(60):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.9 * losses[0]
    assert opt._plan is not None
    assert not opt._foreign
