"""`fusedopt.torch` with Python threads, torch's own threads, and after fork."""

import os
import sys
import threading
import time
import warnings
from typing import Any

import pytest
import torch

from torch_cases import gradients, ours, parameters, simple, some_cases
from torch_compare import FallbackWarning, assert_same_bits, count_fallbacks, run_apart, snapshot, train

Options = dict[str, Any]
LARGE = [(300_000,), (3,), (64, 1000)]
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.parametrize("shapes", [[(300,), (3,)], LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("name", "options"), some_cases(["SGD", "RMSprop", "Adam", "Adagrad"]))
def test_optimizers_in_several_threads_do_not_disturb_each_other(name: str, options: Options, shapes: Any) -> None:
    steps, workers = (2 if shapes is LARGE else 30), 4
    grads = [gradients(steps, shapes=shapes, seed=i, missing=False) for i in range(workers)]
    errors: list[BaseException] = []

    def work(i: int, out: list[Any], gate: threading.Barrier | None = None) -> None:
        try:
            params = parameters(shapes=shapes, seed=i)
            opt = ours(name, params, **options)
            if gate is not None:
                gate.wait(timeout=60)
            train(opt, grads[i], params)
            out[i] = snapshot(opt, params)
        except BaseException as error:
            errors.append(error)

    alone: list[Any] = [None] * workers
    for i in range(workers):
        work(i, alone)
    together: list[Any] = [None] * workers
    gate = threading.Barrier(workers)
    threads = [threading.Thread(target=work, args=(i, together, gate)) for i in range(workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    assert not errors, errors
    assert not any(t.is_alive() for t in threads)
    for a, b in zip(alone, together, strict=True):
        assert_same_bits(a, b)


def test_the_gil_is_released_during_a_large_step() -> None:
    """Another thread makes progress during one step of a large tensor."""
    p = torch.nn.Parameter(torch.zeros(8_000_000))
    p.grad = torch.ones_like(p)
    opt = ours("Adam", [p])
    opt.step()
    inside, ticks, stop = threading.Event(), [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            if inside.is_set():
                ticks[0] += 1
            time.sleep(0)  # releases the GIL, and reacquires it

    thread = threading.Thread(target=tick)
    old = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # so the GIL is released only explicitly
    thread.start()
    try:
        inside.set()
        for _ in range(5):
            opt.step()
        inside.clear()
        seen = ticks[0]
    finally:
        sys.setswitchinterval(old)
        stop.set()
        thread.join(timeout=60)
    assert seen > 0


@can_fork
@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop"])
def test_a_forked_child_steps_to_the_same_values(name: str) -> None:
    """After the parent has used its threads OpenMP hangs: torch creates no large tensor before set_num_threads."""
    run_apart(
        f"""
        import os, signal, sys, warnings
        warnings.simplefilter("ignore")
        import torch
        import fusedopt.torch as optim

        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(500_000))
        p.grad = torch.randn(500_000)
        opt = optim.{name}([p])
        for _ in range(3):
            opt.step()
        torch.randn(400, 400) @ torch.randn(400, 400)
        twin = p.detach().clone()
        r, w = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            opt.step()
            torch.set_num_threads(1)
            fresh = torch.nn.Parameter(torch.zeros(500_000))
            fresh.grad = torch.ones(500_000)
            optim.{name}([fresh]).step()
            os.write(w, p.detach().double().sum().numpy().tobytes() + p.detach()[:64].numpy().tobytes())
            os._exit(0)
        os.close(w)
        with os.fdopen(r, "rb") as pipe:
            got = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert torch.equal(p.detach(), twin), "the child wrote into its parent"
        opt.step()
        want = p.detach().double().sum().numpy().tobytes() + p.detach()[:64].numpy().tobytes()
        assert got[8:] == want[8:] and got[:8] == want[:8]
        """
    )


@can_fork
def test_training_beside_data_loader_workers() -> None:
    out = run_apart(
        """
        import warnings
        warnings.simplefilter("ignore")
        import torch
        import fusedopt.torch as optim

        torch.manual_seed(0)
        x = torch.randn(256, 64)
        data = torch.utils.data.TensorDataset(x, x[:, :1].sin())
        model = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
        opt = optim.Adam(model.parameters(), max_grad_norm=1.0)
        first = last = None
        for epoch in range(3):
            loader = torch.utils.data.DataLoader(data, 32, num_workers=2, timeout=60, multiprocessing_context="fork")
            for a, b in loader:
                opt.zero_grad()
                loss = torch.nn.functional.mse_loss(model(a), b)
                loss.backward()
                opt.step()
                first = loss.item() if first is None else first
                last = loss.item()
        assert last < first, (first, last)
        print("done")
        """
    )
    assert out.strip() == "done"


@can_fork
def test_a_child_of_multiprocessing_trains_a_shared_model() -> None:
    """Hogwild: parameters in shared memory, a step in each of two forked workers; the parent sees the updates."""
    run_apart(
        """
        import warnings
        warnings.simplefilter("ignore")
        import torch, torch.multiprocessing as mp
        import fusedopt.torch as optim

        def work(p, threads=1):
            torch.set_num_threads(threads)
            opt = optim.SGD([p], lr=1.0)
            p.grad = torch.ones_like(p)
            opt.step()

        if __name__ == "__main__":
            p = torch.nn.Parameter(torch.zeros(200_000))
            p.share_memory_()
            work(p, 2)
            p.grad = None
            context = mp.get_context("fork")
            for _ in range(2):
                child = context.Process(target=work, args=(p,))
                child.start()
                child.join(20)
                assert child.exitcode == 0, child.exitcode
            assert torch.equal(p.detach(), torch.full((200_000,), -3.0)), p
        """
    )


def test_a_step_inside_a_backward_hook() -> None:
    """Optimizer in backward: runs in autograd's thread with its grad mode, one optimizer per parameter."""
    torch.manual_seed(0)
    one, other = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    opts = {p: ours("Adam", [p]) for p in one.parameters()}

    def hook(p: torch.Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in one.parameters():
        p.register_post_accumulate_grad_hook(hook)
    opt, x = ours("Adam", other.parameters()), torch.randn(16, 8)
    for _ in range(4):
        one(x).pow(2).mean().backward()
        opt.zero_grad()
        other(x).pow(2).mean().backward()
        opt.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_one_optimizer_used_from_changing_threads() -> None:
    p, q = simple(1000), simple(1000)
    opt, want = ours("Adam", [p]), ours("Adam", [q])
    for _ in range(5):
        thread = threading.Thread(target=opt.step)
        thread.start()
        thread.join(timeout=60)
        want.step()
    assert_same_bits(snapshot(opt), snapshot(want))


def test_the_flush_to_zero_mode_of_the_processor_is_as_before() -> None:
    results = []
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor has no flush-to-zero mode")
        try:
            p = torch.nn.Parameter(torch.ones(100_000))
            p.grad = torch.full_like(p, 1e-30)
            ours("Adam", [p]).step()
            results.append(float(torch.tensor(1e-30) * torch.tensor(1e-10)) == 0.0)
        finally:
            torch.set_flush_denormal(False)
    assert results == [False, True]


def test_fallback_warnings_count_right() -> None:
    """The counter that other tests use must not swallow another kind of warning, or the second of two."""
    for said, expected in ((1, 1), (0, 0)):
        with count_fallbacks(expected):
            for _ in range(said):
                warnings.warn("a reason that is long enough", FallbackWarning, stacklevel=1)
    for category, times in ((UserWarning, 1), (FallbackWarning, 2), (FallbackWarning, 0)):
        with pytest.raises(AssertionError), count_fallbacks(1):
            [warnings.warn("a reason that is long enough", category, stacklevel=1) for _ in range(times)]
