"""A step reads and writes tensors as they are now: moved, freed, shared, or without memory."""

import copy
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _core
from torch_cases import gradients, ours, parameters, plain, some_cases
from torch_compare import (
    assert_close,
    assert_same_bits,
    count_fallbacks,
    falling_back_is_fine,
    run_apart,
    snapshot,
    train,
)

Options = dict[str, Any]
Event = Callable[[torch.Tensor], None]


def _grow(value: torch.Tensor) -> None:
    kept = value.clone()
    value.resize_(100 * kept.numel() + 1)
    value.resize_(kept.shape).copy_(kept)


def _grow_storage(value: torch.Tensor) -> None:
    value.untyped_storage().resize_(value.untyped_storage().nbytes() + 40_000)


def _set_data(value: torch.Tensor) -> None:
    value.data = value.data.clone()


def _set(value: torch.Tensor) -> None:
    value.set_(value.clone())


def _swap(value: torch.Tensor) -> None:
    torch.utils.swap_tensors(value, value.clone())


def _share(value: torch.Tensor) -> None:
    value.share_memory_()


@pytest.mark.parametrize("event", [_grow, _grow_storage, _set_data, _set, _swap, _share])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_state_that_moves_loses_no_update(name: str, options: Options, event: Event) -> None:
    """If the memory of small states moves, the next step uses the new memory and does not write to freed memory."""
    grads, still, moving = gradients(20), parameters(), parameters()
    want, opt = ours(name, still, **options), ours(name, moving, **options)
    train(want, grads, still)
    junk = []
    for i, row in enumerate(grads):
        train(opt, [row], moving)
        if i % 4 == 2:
            for entry in opt.state.values():
                for value in entry.values():
                    event(value)
            junk += [torch.full((k,), 7.0) for k in (1, 3, 6, 15, 100)]  # takes the memory that has become free
    assert_same_bits(snapshot(opt, moving), snapshot(want, still))
    assert all(bool((t == 7).all()) for t in junk)


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch has no lazy clones")
def test_a_lazy_clone_of_the_state_keeps_its_values() -> None:
    p = torch.nn.Parameter(torch.ones(6))
    p.grad = torch.ones(6)
    opt = ours("Adam", [p])
    opt.step()
    saved = {k: torch._lazy_clone(v) for k, v in opt.state[p].items()}
    before = {k: float(v.reshape(-1)[0]) for k, v in saved.items()}
    opt.step()
    assert {k: float(v.reshape(-1)[0]) for k, v in saved.items()} == before
    assert float(opt.state[p]["step"]) == 2


@pytest.mark.parametrize("ndim", [60, 65, 70, 130])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_more_dimensions_than_numpy_has(name: str, ndim: int) -> None:
    shape = (4, *[1] * ndim, 2, 3)
    results = []
    for make in (ours, plain):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, *[1] * ndim, 3, 2, generator=generator).transpose(-1, -2))
        opt = make(name, [p])
        for _ in range(3):
            p.grad = torch.randn(shape, generator=generator)
            opt.step()
        results.append(p.detach().reshape(4, 2, 3))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_gradient_without_memory(name: str) -> None:
    results = []
    for make, fallbacks in ((ours, 1), (plain, 0)):
        p = torch.nn.Parameter(torch.ones(5))
        opt = make(name, [p], lr=0.1, weight_decay=0.5)
        with count_fallbacks(fallbacks):
            for grad in (torch.full((5,), 0.5), torch._efficientzerotensor(5), torch.full((5,), 0.25)):
                p.grad = grad
                opt.step()
        results.append(snapshot(opt, [p]))
    assert_close(*results, rtol=1e-6, atol=1e-7)


def test_memory_that_is_smaller_than_the_shape_is_refused() -> None:
    for size, message in ((4, "reaches beyond its storage"), (0, "has no memory")):
        for which in ("parameter", "exp_avg", "step"):
            p = torch.nn.Parameter(torch.ones(5))
            p.grad = torch.ones(5)
            opt = ours("Adam", [p])
            opt.step()
            target = p if which == "parameter" else opt.state[p][which]
            before = p.detach().clone()
            target.untyped_storage().resize_(min(size, target.untyped_storage().nbytes() - 1))
            with pytest.raises(RuntimeError, match=message if which != "step" else "beyond|no memory|changes? while"):
                opt.step()
            if which != "parameter":
                assert torch.equal(p, before)


@pytest.mark.parametrize("trouble", ["overlap", "negative"])
def test_state_that_cannot_be_written_in_place_is_refused_as_by_torch(trouble: str) -> None:
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    opt = ours("Adam", [p])
    opt.step()
    if trouble == "overlap":
        opt.state[p]["exp_avg"].set_(torch.zeros(1).expand(8))  # the same object as before
        with count_fallbacks(1), pytest.raises(RuntimeError, match="single memory location"):
            opt.step()
    else:
        twin = plain("Adam", [torch.nn.Parameter(p.detach().clone())])
        twin.load_state_dict(opt.state_dict())
        q = twin.param_groups[0]["params"][0]
        q.grad = torch.ones(8)
        for o, r in ((opt, p), (twin, q)):
            o.state[r]["exp_avg"].data = torch._neg_view(o.state[r]["exp_avg"].clone())
        with count_fallbacks(1):
            opt.step()
        twin.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("have", DTYPES, ids=str)
@pytest.mark.parametrize("want", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases(["SGD", "Adam", "RMSprop"]))
def test_a_checkpoint_of_another_dtype_is_cast_as_by_torch(
    name: str, options: Options, have: torch.dtype, want: torch.dtype
) -> None:
    params, grads = parameters(have), gradients(3, have)
    before = plain(name, params, **options)
    train(before, grads[:2], params)
    kinds = []
    for make in (ours, plain):
        twins = [torch.nn.Parameter(p.detach().to(want)) for p in params]
        opt = make(name, twins, **options)
        opt.load_state_dict(before.state_dict())
        kinds.append([{k: getattr(v, "dtype", None) for k, v in opt.state[p].items()} for p in twins if p in opt.state])
        with count_fallbacks(0):
            train(opt, [[None if g is None else g.to(want) for g in row] for row in grads[2:]], twins)
        kinds.append([{k: getattr(v, "dtype", None) for k, v in opt.state[p].items()} for p in twins if p in opt.state])
    assert kinds[:2] == kinds[2:]


@pytest.mark.parametrize("other", ["exp_avg", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_stands_twice_in_a_checkpoint_is_one_after_the_load(other: str, dtype: torch.dtype) -> None:
    results = []
    for make in (ours, plain):
        params = [torch.nn.Parameter(torch.linspace(1, 2, 6).to(dtype)) for _ in range(2)]
        opt = make("RAdam", params, lr=0.1)
        rows = [[torch.linspace(k, 1, 6).to(dtype) for k in (2, 3)] for _ in range(3)]
        train(opt, rows, params)
        opt.state[params[1]][other] = opt.state[params[0]][other]
        checkpoint = opt.state_dict()
        kept = [dict(entry) for entry in checkpoint["state"].values()]
        values = copy.deepcopy(kept)
        opt = make("RAdam", params, lr=0.1)
        opt.load_state_dict(copy.deepcopy(checkpoint) if make is plain else checkpoint)
        assert opt.state[params[1]][other] is opt.state[params[0]][other]
        with falling_back_is_fine():
            train(opt, rows, params)
        for entry, value, now in zip(kept, values, checkpoint["state"].values(), strict=True):
            assert make is plain or all(v is entry[k] and torch.equal(v, value[k]) for k, v in now.items())
        results.append(snapshot(opt, params))
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (3e-2, 3e-2)
    assert_close(*results, rtol=rtol, atol=atol)


def test_one_optimizer_stepped_from_several_threads() -> None:
    """Each step completes or is refused, and the parameters have as many updates as steps succeeded."""
    out = run_apart(
        """
        import sys, threading, warnings
        warnings.simplefilter("ignore")
        import torch
        import fusedopt.torch as optim

        sys.setswitchinterval(1e-6)
        for trial in range(6):
            params = [torch.nn.Parameter(torch.zeros(n)) for n in [3, 50, 20_000] * 10]
            lr = torch.tensor(1.0) if trial % 2 else 1.0
            opt = optim.SGD(params, lr=lr, momentum=1e-30)
            for p in params:
                p.grad = torch.ones_like(p)
            done, errors = [0] * 4, []

            def work(i):
                for _ in range(60):
                    try:
                        opt.step()
                        done[i] += 1
                    except RuntimeError as error:
                        errors.append(str(error))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            [t.start() for t in threads]
            [t.join(60) for t in threads]
            assert all("another thread" in e for e in errors), set(errors)
            assert all(bool((p == -sum(done)).all()) for p in params), (sum(done), [p[0].item() for p in params])
        print("done")
        """,
        timeout=120,
    )
    assert out.strip() == "done"


def test_a_step_inside_a_step_is_refused() -> None:
    """Python code that runs during a step, such as a learning-rate function, cannot start another."""

    class Rate:
        def __float__(self) -> float:
            opt.step()
            return 1.0

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = ours("SGD", [p], lr=1.0)
    opt.step()
    opt.param_groups[0]["lr"] = Rate()
    with pytest.raises(RuntimeError, match="already running"):
        opt.step()
    opt.param_groups[0]["lr"] = 1.0
    opt.step()
    assert torch.equal(p, torch.full((3,), -1.0))


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux" or not shutil.which("objdump"),
    reason="reads x86-64 code by objdump",
)
def test_the_prefetches_are_in_the_code() -> None:
    """GCC has been seen to remove calls of a function that only prefetches."""
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert len(re.findall(r"\tprefetch\w+ ", code)) >= 40


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_gradient_that_shares_memory_with_its_parameter_takes_torchs_step(name: str, interleaved: bool) -> None:
    results = []
    for make, fallbacks in ((ours, 1), (plain, 0)):
        memory = torch.arange(12.0).reshape(6, 2).add(1)
        p = torch.nn.Parameter(memory[:, 0])
        opt = make(name, [p], lr=0.1)
        with count_fallbacks(fallbacks):
            for _ in range(3):
                p.grad = memory[:, 1] if interleaved else p.detach()
                opt.step()
        results.append(snapshot(opt, [p]))
    assert_close(*results, rtol=1e-6, atol=1e-7)


def shared_gradients(make: Any, name: str, which: str, threads: int | None) -> dict[str, torch.Tensor]:
    params = [torch.nn.Parameter(torch.linspace(-1, k, 60_000)) for k in (1, 2, 3)]
    options: Options = {"momentum": 0.5} if name == "SGD" else {}
    opt = make(name, params, lr=0.1, **options)
    expected = 0 if make is plain else 1
    with count_fallbacks(expected):
        for i in range(4):
            for p in params:
                p.grad = torch.linspace(1, i, 60_000)
            if i > 0:
                states = {k: [v for n, v in opt.state[p].items() if n != "step"] for k, p in enumerate(params)}
                taken = {"a later parameter": (0, params[2].detach()), "an earlier parameter": (2, params[0].detach())}
                taken |= {"a state": (1, states[0][-1]), "its own state": (1, states[1][0])}
                reader, params[taken[which][0]].grad = taken[which]
                if make is not plain:
                    fusedopt.set_num_threads(threads)
            opt.step()
    assert make is plain or opt._engine.updated_by(opt)[None] == (2 if which == "its own state" else 1), reader
    return snapshot(opt, params)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("which", ["a later parameter", "an earlier parameter", "a state", "its own state"])
def test_a_gradient_that_the_step_writes_to_is_read_in_torchs_order(name: str, which: str) -> None:
    """The kernels update parameters in several threads, so what such a gradient holds would depend on chance."""
    try:
        mine = shared_gradients(ours, name, which, 2)
    finally:
        fusedopt.set_num_threads(None)
    assert_close(mine, shared_gradients(plain, name, which, None), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_a_parameter_without_one_needs_no_fallback() -> None:
    p, frozen = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    opt = ours("Adam", [p, frozen], lr=0.1)
    frozen.grad = torch.ones(50)
    with count_fallbacks(0):
        for _ in range(3):
            p.grad = torch.ones(50)
            opt.step()
            frozen.grad, p.grad = None, frozen.detach()
            opt.step()
            frozen.data = frozen.data.clone()
            opt.step()  # the gradient is where the parameter was
            p.grad = frozen.detach()
            opt.step()


def test_a_refused_step_does_not_refuse_the_next_one() -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = ours("Lion", [p], lr=0.5)
    p.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    p.grad = torch.ones(4, 2)
    opt.step()
    assert torch.equal(p, torch.full((4, 2), 0.5))


@pytest.mark.parametrize("which", ["parameter", "gradient", "exp_avg"])
def test_memory_that_is_not_aligned_to_its_elements_takes_torchs_step(which: str) -> None:
    def odd(t: torch.Tensor) -> torch.Tensor:
        memory = bytearray(4 * t.numel() + 1)
        moved = torch.frombuffer(memory, dtype=torch.float32, offset=1)
        return moved.copy_(t)

    results = []
    for make, fallbacks in ((ours, 1), (plain, 0)):
        start = torch.linspace(-1, 1, 37)
        p = torch.nn.Parameter(odd(start) if which == "parameter" else start.clone())
        opt = make("Adam", [p], lr=0.1)
        with count_fallbacks(fallbacks):
            for i in range(3):
                g = torch.linspace(1, 2, 37) + i
                p.grad = odd(g) if which == "gradient" else g
                opt.step()
                if which == "exp_avg" and i == 0:
                    opt.state[p]["exp_avg"] = odd(opt.state[p]["exp_avg"])
        results.append(snapshot(opt, [p]))
    assert_close(*results, rtol=1e-5, atol=1e-6)


def has_huge_pages_advised(at: int) -> bool:
    """Whether the system has been asked for huge pages at this address."""
    advised = within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            within = int(head[1], 16) <= at < int(head[2], 16)
        advised |= within and line.startswith("VmFlags:") and " hg" in line
    return advised


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_large_states_and_tables_with_sparse_gradients_get_huge_pages() -> None:
    p = torch.nn.Parameter(torch.zeros(1 << 22))
    p.grad = torch.ones_like(p)
    opt = ours("Adam", [p])
    opt.step()
    middle = 1 << 22  # bytes from the beginning
    assert has_huge_pages_advised(opt.state[p]["exp_avg"].data_ptr() + middle)
    table = torch.nn.Parameter(torch.ones(1 << 16, 64))
    before = table.detach().clone()
    assert not has_huge_pages_advised(table.data_ptr() + middle)
    table.grad = torch.sparse_coo_tensor([[5]], torch.ones(1, 64), table.shape, check_invariants=True)
    opt = ours("Adagrad", [table], lr=1.0)  # torch's constructor makes its state
    opt.step()
    assert has_huge_pages_advised(table.data_ptr() + middle)
    assert has_huge_pages_advised(opt.state[table]["sum"].data_ptr() + middle)
    before[5] -= 1
    assert torch.equal(table, before)
