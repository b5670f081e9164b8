"""Several optimizers: under one GradScaler, one per parameter in the backward pass, in threads, and in processes that
share parameters (Hogwild). GradScaler with one optimizer: test_torch_amp.py."""

import math
import threading
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import fusedopt.torch as optim
from torch_cases import NAMES, gradients, ours, parameters
from torch_compare import assert_close, assert_same_bits, snapshot, train

FUSED = [False, True]


def task(name: str, fused: bool, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return model, ours(name, model.parameters(), lr=0.01, **({"fused": True} if fused else {}))


# -- GradScaler, autocast --------------------------------------------------------------------------------------------


@pytest.mark.integration("GradScaler", "two optimizers, one overflows: only that one skips, visibly")
@pytest.mark.parametrize("fused", FUSED, ids=["plain", "fused"])
def test_only_the_optimizer_that_overflows_skips(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    (one, a), (two, b) = task("AdamW", fused, 0), task("SGD", fused, 1)
    before, steps = torch.optim.lr_scheduler.StepLR(a, 1, 0.5), [0, 0]
    for i in range(4):
        for opt in (a, b):
            opt.zero_grad()
        x = torch.randn(8, 4)
        loss = one(x).square().mean() * (math.inf if i == 1 else 1.0) + two(x).square().mean()
        scaler.scale(loss).backward()
        kept = [snapshot(opt, list(m.parameters())) for opt, m in ((a, one), (b, two))]
        scaler.unscale_(a)
        torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        scale = scaler.get_scale()
        scaler.step(a)
        scaler.step(b)
        scaler.update()
        for k, (opt, m) in enumerate(((a, one), (b, two))):
            after = snapshot(opt, list(m.parameters()))
            moved = any(not torch.equal(after[key], kept[k][key]) for key in kept[k])
            steps[k] += moved
            assert moved == (i != 1 or k == 1)
        skipped = scaler.get_scale() < scale  # the usual test for a skipped step, in either protocol
        assert skipped == (i == 1)
        assert a.last_step_skipped == (skipped and fused)
        if not skipped:
            before.step()
    assert steps == [3, 4]
    assert a.param_groups[0]["lr"] == 0.01 * 0.5**3


@pytest.mark.integration("GradScaler", "`unscale_`, torch's clipping, then the step: the values of unscaled training")
@pytest.mark.parametrize("fused", FUSED, ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_unscale_then_clip_then_step(name: str, fused: bool) -> None:
    results = []
    for scaled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        model, opt = task(name, fused, 0)
        make = torch.Generator().manual_seed(2)
        for _ in range(4):
            opt.zero_grad()
            scaler.scale(model(torch.randn(8, 4, generator=make)).square().mean()).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(opt)
            scaler.update()
        results.append(snapshot(opt, list(model.parameters())))
    assert_same_bits(*results)


@pytest.mark.integration("autocast", "bfloat16: as torch's own classes")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_training_under_bfloat16_autocast(name: str) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        opt = getattr(module, name)(model.parameters(), lr=0.01)
        for _ in range(5):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(8, 4)).float().square().mean()
            loss.backward()
            opt.step()
        results.append(snapshot(opt, list(model.parameters())))
    assert_close(*results, rtol=2e-2, atol=1e-3)  # bfloat16 magnifies a difference in the last bit of float32


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.integration("optimizer in the backward pass", "one optimizer per parameter, called by a gradient hook")
@pytest.mark.parametrize("name", NAMES)
def test_one_optimizer_per_parameter_in_the_backward_pass(name: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    mine, whole = make(), make()
    each = {p: ours(name, [p], lr=0.01) for p in mine.parameters()}

    def step(p: torch.Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in mine.parameters():
        p.register_post_accumulate_grad_hook(step)
    opt = ours(name, whole.parameters(), lr=0.01)
    for i in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        mine(x).square().mean().backward()
        opt.zero_grad()
        whole(x).square().mean().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), whole.parameters(), strict=True))
    assert all(p.grad is None for p in mine.parameters())


@pytest.mark.integration("threads", "an optimizer in each of four: the bits of one after another")
def test_optimizers_in_threads_do_not_meet() -> None:
    grads = gradients(20, missing=False)

    def run(name: str) -> Any:
        params = parameters()
        opt = ours(name, params, lr=0.01, max_grad_norm=1.0)
        train(opt, grads, params)
        return snapshot(opt, params)

    names = ["Adam", "SGD", "Lion", "Adam"]
    got: list[Any] = [None] * len(names)

    def work(i: int) -> None:
        got[i] = run(names[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for name, result in zip(names, got, strict=True):
        assert_same_bits(result, run(name))


# -- processes that share parameters ---------------------------------------------------------------------------------


def _hogwild(rank: int, model: Any, name: str, shared: Any) -> None:
    torch.set_num_threads(1)
    opt = shared if shared is not None else ours(name, model.parameters(), lr=0.05)
    make = torch.Generator().manual_seed(rank)
    for _ in range(60):
        opt.zero_grad(set_to_none=True)
        x = torch.randn(16, 4, generator=make)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()


@pytest.mark.integration("torch.multiprocessing", "hogwild: two processes train one shared model")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_hogwild(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    model.share_memory()
    x = torch.randn(64, 4)

    def loss() -> float:
        with torch.no_grad():
            return float((model(x) - x.sum(1, keepdim=True)).square().mean())

    first = loss()
    opt = ours(name, model.parameters(), lr=0.05)  # the parent has stepped before its children begin
    model(x).sum().backward()
    opt.step()
    mp.start_processes(_hogwild, (model, name, None), 2, start_method="fork")
    assert loss() < 0.05 * first


@pytest.mark.integration("torch.multiprocessing", "one optimizer with shared state, sent to two spawned processes")
def test_an_optimizer_with_shared_state_is_sent_to_processes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    model.share_memory()
    opt = ours("Adam", model.parameters(), lr=0.05)
    x = torch.randn(64, 4)
    model(x).sum().backward()
    opt.step()
    for state in opt.state.values():
        for value in state.values():
            value.share_memory_()
    opt.zero_grad()
    mp.start_processes(_hogwild, (model, "Adam", opt), 2, start_method="spawn")
    steps = {float(state["step"]) for state in opt.state.values()}
    assert all(60 < s <= 121 for s in steps), steps  # counts may be lost in races, but are shared
    with torch.no_grad():
        assert float((model(x) - x.sum(1, keepdim=True)).square().mean()) < 0.2
