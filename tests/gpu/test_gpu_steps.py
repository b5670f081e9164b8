"""Steps on a GPU: no synchronisation, GradScaler, CUDA graphs, streams, the step inside backward. Values: test_gpu.py;
checkpoints, devices, sizes: test_gpu_state.py."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from form_cases import Case, one_of_each_form
from form_cases_torch import made
from gpu_cases import (
    DEVICE,
    NEEDS_GPU,
    assert_same,
    assert_same_bits,
    both,
    give,
    kept,
    numbers,
    parameters,
    rows,
    start,
)
from torch_cases import NAMES, accepts, ours
from torch_compare import all_params

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]
SLEEP = 400_000_000  # cycles: a few tenths of a second


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Fails if the block waits for a sleeping kernel, or synchronises in a way that torch detects."""
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
        scaler.scale(torch.zeros((), device=device))  # creates its tensors
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

# The graph of each step; None: the optimizer itself, with gradients at other addresses.
ONE = (None, None, 0, 0, None, None, 0, 0)
TWO = (None, None, 0, 0, None, 1, 0, 1, None, 1)


def walk(opt: Any, ways: Sequence[int | None], grads: Sequence[Sequence[torch.Tensor]], device: str) -> list[Any]:
    """Runs the steps, through graphs if there are any; returns the norms. The learning rate decreases in place."""
    params, norms = all_params(opt), []
    graphs: list[tuple[Any, list[torch.Tensor], Any]] = []
    for way, row in zip(ways, grads, strict=True):
        if way is None or device != DEVICE:
            give(params, [g.clone() for g in row])
            opt.step()
            norm = opt.last_grad_norm
        else:
            if way == len(graphs):
                graphs.append(captured(opt, row))
            graph, static, norm = graphs[way]
            for s, g in zip(static, row, strict=True):
                s.copy_(g)
            graph.replay()
        opt.param_groups[0]["lr"].mul_(0.8)
        norms.append(norm if norm is None else norm.clone().cpu())  # a replay overwrites it
    return norms


def captured(opt: Any, row: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor], Any]:
    """A graph of the step, the gradients it reads, and the norm it writes."""
    static = [torch.zeros_like(g) for g in row]
    give(all_params(opt), static)
    before, graph = kept(opt), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    after = kept(opt)
    for key, value in before.items():
        assert_same_bits(after[key], value, f"{key}, by the capture alone")
    return graph, static, opt.last_grad_norm


def capturable(name: str, device: str) -> dict[str, bool]:
    return {"capturable": True} if device == DEVICE and accepts(name, "capturable") else {}


@pytest.mark.parametrize("ways", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_replayed_graphs_give_the_values_of_plain_steps(name: str, max_norm: float | None, ways: Any) -> None:
    def run(device: str) -> tuple[Any, list[Any]]:
        rate = torch.tensor(0.01, device=device)
        opt = ours(name, start(device), lr=rate, max_grad_norm=max_norm, **capturable(name, device))
        return opt, walk(opt, ways, rows(len(ways), device), device)

    (here, want), (there, got) = both(run)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) == (max_norm is None)
        if max_norm is not None:
            assert_same_bits(a, b, "norm")
    assert_same(there, here)


@pytest.mark.parametrize("case", one_of_each_form(), ids=str)
def test_every_form_can_be_captured(case: Case) -> None:
    lengths = (5, 64, 20_000)

    def run(device: str) -> Any:
        rate = torch.tensor(0.01, device=device)
        opt = made(case, parameters(case, device, lengths), lr=rate, **capturable(case.rule.name, device))
        grads = [[numbers(n, case.grad, 9 * k + i).to(device) for i, n in enumerate(lengths)] for k in range(len(ONE))]
        walk(opt, ONE, grads, device)
        return opt

    here, there = both(run)
    assert_same(there, here)


def test_a_graph_outlives_its_optimizer() -> None:
    params, plain_params = start(DEVICE), start("cpu")
    opt, want = optim.Adam(params, lr=0.1, capturable=True), optim.Adam(plain_params, lr=0.1)
    for row in rows(2, DEVICE):
        give(params, row)
        opt.step()
    graph, static, _ = captured(opt, row)
    state = list(opt.state.values())  # the graph reads and writes it
    del opt
    gc.collect()
    for _ in range(5):  # allocates memory, to detect what was freed too early
        others = start(DEVICE, (70,) * 200)
        give(others, [torch.ones_like(p) for p in others])
        optim.Adam(others).step()
    for row in rows(4, DEVICE)[2:]:
        for s, g in zip(static, row, strict=True):
            s.copy_(g)
        graph.replay()
    for row in rows(4, "cpu"):
        give(plain_params, row)
        want.step()
    assert all(float(s["step"]) == 4 for s in state)
    for p, q in zip(params, plain_params, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach())


def test_a_class_that_can_be_captured_refuses_without_capturable() -> None:
    params = start(DEVICE)
    opt = optim.Adam(params)
    give(params, rows(1, DEVICE)[0])
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        opt.step()


def test_a_whole_iteration_in_a_graph() -> None:
    """Gradients are in the graph's memory pool; an elementwise model makes plain iterations bit-identical."""

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
    """The gradients are still being computed on another stream when the step is called."""

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

        def make(those: Any) -> Any:
            return optim.AdamW(those, lr=0.1)

        opt = optim.step_in_backward(torch.nn.ParameterList(params), make) if inside else make(params)
        for row in rows(3, DEVICE):
            opt.zero_grad()
            sum((p.square() * g).sum() for p, g in zip(params, row, strict=True)).backward()
            opt.step()
        return [p.detach().cpu() for p in params]

    for a, b in zip(run(True), run(False), strict=True):
        assert_same_bits(a, b)
