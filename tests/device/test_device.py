"""CUDA kernels as host code on the simulated device: bit-identical to the CPU for every rule and form. Also the norm,
GradScaler, graphs, addresses that change, and tensors of more than 2^31 elements."""

import copy
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
import fusedopt.torch as optim
from device import CHUNK, asked, capture, failing, full, opened, placed, replay, some_freed
from form_cases import CASES, Case, one_of_each_form
from form_cases_torch import BOTH, DTYPES, filled, made, parameter, wrapped
from fusedopt import _core
from fusedopt.torch import _engine
from fusedopt.torch._device import device_refusal
from fusedopt.torch._engine import engine_of
from gpu_cases import assert_same_bits as assert_tensors_same
from torch_cases import NAMES
from torch_compare import Snapshot, snapshot

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the simulated device is built on POSIX systems alone")
FULL = one_of_each_form()
LENGTHS = (0, 1, 7, 8, 63, 64, 65, 200, 2047, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77)
SHORT = (1, 8, 63, 65, 200, 0, 2100)


@pytest.fixture
def device() -> Iterator[None]:
    with opened():
        yield


def assert_same_bits(a: Snapshot, b: Snapshot) -> None:
    """Equal bits, the sign of zero included; any NaN equals any other."""
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert x.stride() == b[key].stride(), key
        assert_tensors_same(x, b[key], key)


def specials(t: torch.Tensor, seed: int) -> torch.Tensor:
    """Zeros, denormals, infinities, NaN and huge numbers among others."""
    gen = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 6e-8, float("inf"), float("-inf"), float("nan"), 1e30, 6e4, -1.0])
    chosen = values[torch.randint(len(values), t.shape, generator=gen)].to(t.dtype)
    return torch.where(torch.rand(t.shape, generator=gen) < 0.1, chosen, t)


def trained(case: Case, lengths: tuple[int, ...], steps: int = 3, odd: bool = True, **options: Any) -> Any:
    params = [parameter(case, (n,), i) for i, n in enumerate(lengths)]
    opt = made(case, params, **options)
    for k in range(steps):
        for i, p in enumerate(params):
            g = filled(p.shape, case.grad, 100 * k + i)
            p.grad = specials(g, k) if odd and k == steps - 1 and i % 2 else g
        opt.step()
    return opt


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    here = run()
    with opened():
        assert not _core.device_refusal("cpu")
        there = run()
    return here, there


def test_the_library_has_every_rule_in_every_form(device: None) -> None:
    assert _core.device_formats() == _core.formats()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rule_and_form_gives_the_cpus_bits(case: Case) -> None:
    here, there = both(lambda: trained(case, SHORT))
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_lengths_around_blocks_and_chunks_with_l1_and_average(case: Case) -> None:
    here, there = both(lambda: trained(case, LENGTHS, steps=2, **BOTH))
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("options", [{}, BOTH], ids=["alone", "with l1 and average"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_layouts_that_differ_and_addresses_that_are_not_aligned(case: Case, options: dict[str, Any]) -> None:
    def run() -> Any:
        base = filled((6, 40, 33), case.param, 3)
        odd = filled((5001,), case.param, 4)
        params = [
            base.permute(2, 0, 1),
            odd[1:],
            filled((64, 33), case.param, 5).t(),
            filled((130,), case.param, 6)[::2],
            filled((4099,), case.param, 7),
        ]
        params = [wrapped(case, p) for p in params]
        opt = made(case, params, **options)
        for k in range(2):
            for i, p in enumerate(params):
                g = filled((*p.shape[:-1], p.shape[-1] + 1), case.grad, 10 * k + i)
                p.grad = g[..., 1:] if i < 4 else g[1:].clone()
            opt.step()
        return opt

    here, there = both(run)
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("changed", ["a gradient", "l1", "an average"])
def test_one_tensor_that_is_not_plain_among_others(changed: str) -> None:
    """Plain tensors, which are aligned and have neither l1 nor an average, have a kernel of their own."""

    def run() -> Any:
        params = [torch.nn.Parameter(filled((n,), "float32", n)) for n in (40, CHUNK + 9, 300)]
        groups: list[dict[str, Any]] = [{"params": [p]} for p in params]
        opt = optim.Adam(groups, lr=0.1, ema_decay=0.9 if changed == "an average" else None)
        for k in range(4):
            if changed == "l1":
                opt.param_groups[1]["l1"] = 0.5 * (k % 2)
            for i, p in enumerate(params):
                g = filled((p.numel() + 1,), "float32", 10 * k + i)
                p.grad = g[1:] if (changed, i, k % 2) == ("a gradient", 1, 0) else g[1:].clone()
            opt.step()
        return opt

    here, there = both(run)
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("case", [c for c in FULL if c.form.state == "int8"], ids=str)
def test_blocks_with_unusual_scales_among_others(case: Case) -> None:
    """Zero, tiny, huge and not finite: the warps of a block of threads take different paths."""
    values = (0.0, 1e-30, 1e-38, 1e30, float("inf"), float("nan"))

    def run() -> Any:
        params = [parameter(case, (n,), i) for i, n in enumerate((CHUNK + 700, 640))]
        opt = made(case, params)
        for k in range(4):
            for i, p in enumerate(params):
                g = filled(p.shape, case.grad, 10 * k + i)
                for block, value in enumerate(values):
                    start = 64 * (7 * block + k)
                    g[start : start + 64] = value
                p.grad = g
            opt.step()
        return opt

    here, there = both(run)
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("lengths", [(5,), SHORT, LENGTHS, (70 * CHUNK + 5, 3, 33 * CHUNK)], ids=len)
def test_the_norm_is_the_cpus_to_the_bit(dtype: str, lengths: tuple[int, ...]) -> None:
    case = next(c for c in CASES if c.rule.name == "SGD" and not c.variant and (c.param, c.grad) == (dtype, dtype))
    here, there = both(lambda: trained(case, lengths, steps=2, odd=False, max_grad_norm=0.37))
    assert isinstance(there.last_grad_norm, torch.Tensor)
    assert torch.equal(here.last_grad_norm, there.last_grad_norm)
    assert_same_bits(snapshot(here), snapshot(there))


def test_the_norm_of_more_chunks_than_a_block_has_threads() -> None:
    def run() -> Any:
        p = torch.nn.Parameter(filled((1030 * CHUNK + 9,), "bfloat16", 1))
        opt = optim.SGD([p], lr=0.1, max_grad_norm=1.0)
        p.grad = filled(p.shape, "bfloat16", 2)
        opt.step()
        return opt

    here, there = both(run)
    assert torch.equal(here.last_grad_norm, there.last_grad_norm)
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch gives gradients the dtype of the weight")
def test_gradients_wider_than_their_weights_are_left_to_torch() -> None:
    """Which refuses them."""
    p = torch.nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    p.grad_dtype = None
    p.grad = torch.ones(70)
    warns = pytest.warns(optim.FallbackWarning, match="bfloat16 parameter with a torch.float32 gradient")
    with opened(), warns, pytest.raises(RuntimeError, match="dtype"):
        optim.Adam([p]).step()
    assert torch.equal(p, torch.ones_like(p))


def test_an_infinite_norm_is_the_cpus() -> None:
    def run() -> Any:
        p = torch.nn.Parameter(torch.ones(70))
        opt = optim.Adam([p], max_grad_norm=1.0)
        p.grad = torch.full((70,), float("inf"))
        opt.step()
        return opt

    here, there = both(run)
    assert there.last_grad_norm.isinf()
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradscalers_scalars_are_read_where_they_are(name: str, max_norm: float | None) -> None:
    def run() -> Any:
        params = [torch.nn.Parameter(filled((n,), "float32", n)) for n in (5, 300)]
        opt = getattr(optim, name)(params, lr=0.01, max_grad_norm=max_norm)
        skipped, kept = [], []
        for k, found in enumerate((0.0, 1.0, 0.0, 2.0, 0.0)):
            for p in params:
                p.grad = filled(p.shape, "float32", 7 * k + p.numel()) * 1024
                if found:
                    p.grad[0] = float("nan")
            opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(found)
            before = [p.detach().clone() for p in params]
            opt.step()
            skipped.append(opt.last_step_skipped)
            kept.append(all(torch.equal(a, b) for a, b in zip(before, params, strict=True)))
        assert skipped == kept == [False, True, False, True, False]
        return opt

    here, there = both(run)
    assert engine_of(there).home is not None
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_on_the_device_is_read_there(name: str, wide: bool) -> None:
    def run() -> Any:
        p = torch.nn.Parameter(filled((300,), "float32", 1))
        lr = torch.tensor(0.01, dtype=torch.float64 if wide else torch.float32)
        opt = getattr(optim, name)([p], lr=lr)
        for k in range(3):
            p.grad = filled((300,), "float32", 5 + k)
            lr.mul_(0.5)
            opt.step()
        return opt

    here, there = both(run)
    assert_same_bits(snapshot(here), snapshot(there))


@pytest.mark.parametrize("lies", [-1, 1])
def test_a_learning_rate_elsewhere_is_read_by_the_host(lies: int, device: None) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    lr = torch.tensor(0.5)
    opt = optim.SGD([p], lr=lr)
    p.grad = torch.ones(5)
    with placed({lr: lies}):
        opt.step()
    assert bool((p == 0.5).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_learning_rate_of_another_type_is_a_number(dtype: torch.dtype, device: None) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    opt = optim.SGD([p], lr=torch.tensor(1, dtype=dtype))
    p.grad = torch.ones(5)
    opt.step()
    assert bool((p == 0).all())


def test_the_norm_of_no_gradients_is_zero(device: None) -> None:
    opt = optim.Adam([torch.nn.Parameter(torch.ones(5))], max_grad_norm=1.0)
    opt.step()
    assert opt.last_grad_norm is not None
    assert float(opt.last_grad_norm) == 0


def test_groups_options_and_gradients_that_change(device: None) -> None:
    def run() -> Any:
        params = [torch.nn.Parameter(filled((n,), "float32", n)) for n in range(1, 60)]
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.1, "weight_decay": 0.3, "maximize": True}]
        opt = optim.AdamW(groups, lr=0.01)
        for k in range(6):
            for i, p in enumerate(params):
                p.grad = None if (i + k) % 7 == 0 else filled(p.shape, "float32", 50 * k + i)
            opt.param_groups[k % 2]["lr"] *= 0.7
            if k == 3:
                opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))], "betas": (0.5, 0.6)})
                opt.param_groups[2]["params"][0].grad = torch.ones(5)
            opt.step()
        return opt

    there = run()
    _core.set_device_library("")
    assert_same_bits(snapshot(run()), snapshot(there))


GRAPHS = [c for c in FULL if c.param in ("float32", "bfloat16")] + [
    c for c in CASES if c.rule.name == "SGD" and c.variant and c.param == c.grad == c.form.state == "float32"
]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("case", GRAPHS, ids=str)
def test_a_replayed_graph_gives_the_values_of_plain_steps(case: Case, max_norm: float | None) -> None:
    lengths = (5, 200, 64)

    def gradients(params: list[torch.nn.Parameter], k: int) -> None:
        for i, p in enumerate(params):
            g = filled(p.shape, case.grad, 31 * k + i)
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    plain = [parameter(case, (n,), i) for i, n in enumerate(lengths)]
    want = made(case, plain, max_grad_norm=max_norm)
    for k in range(7):
        gradients(plain, k)
        want.step()

    with opened():
        params = [parameter(case, (n,), i) for i, n in enumerate(lengths)]
        opt = made(case, params, max_grad_norm=max_norm)
        for k in range(2):
            gradients(params, k)
            opt.step()
        before = snapshot(opt)
        with capture():
            opt.step()
        assert_same_bits(snapshot(opt), before)
        norm = opt.last_grad_norm  # the graph's gradients, written at every replay
        for k in (2, 3):
            gradients(params, k)
            replay()
        static = [p.grad for p in params]
        for p, g in zip(params, static, strict=True):  # plain steps in between, with gradients at other addresses
            p.grad = None if g is None else g.clone()
        for k in (4, 5):
            gradients(params, k)
            opt.step()
        for p, g in zip(params, static, strict=True):
            p.grad = g
        gradients(params, 6)
        replay()
    assert norm is None or torch.equal(norm, want.last_grad_norm)
    assert_same_bits(snapshot(opt), snapshot(want))


CAPTURED: dict[str, dict[str, Any]] = {"Adam": {"capturable": True}, "SGD": {"momentum": 0.9, "dampening": 0.5}}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_that_has_to_send_everything_can_be_captured_first(name: str, device: None) -> None:
    def started() -> Any:
        params = [torch.nn.Parameter(filled((n,), "float32", n)) for n in (5, 200)]
        opt = getattr(optim, name)(params, lr=0.1, **CAPTURED[name])
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    before, want = started(), started()
    opt = getattr(optim, name)(before.param_groups[0]["params"], lr=0.1, **CAPTURED[name])
    opt.load_state_dict(before.state_dict())
    with capture():
        opt.step()
    assert_same_bits(snapshot(opt), snapshot(before))
    for way in (replay, replay, opt.step, replay):
        way()
        want.step()
    assert_same_bits(snapshot(opt), snapshot(want))


@pytest.mark.parametrize("name", CAPTURED)
def test_state_is_not_created_within_a_graph(name: str, device: None) -> None:
    p = torch.nn.Parameter(torch.ones(70))
    opt = getattr(optim, name)([p], lr=0.1, **CAPTURED[name])
    p.grad = torch.ones(70)
    with capture(), pytest.raises(RuntimeError, match="do one step before the capture"):
        opt.step()
    replay()
    assert bool((p == 1).all())
    assert not opt.state
    opt.step()
    assert bool((p != 1).all())


@pytest.mark.parametrize("then", ["as before", "a gradient is gone", "reloaded", "copied"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_first_step_that_is_skipped_begins_nothing(name: str, then: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}

    def run() -> Any:
        opt = getattr(optim, name)([torch.nn.Parameter(torch.ones(n)) for n in (70, 5)], lr=0.1, **options)
        for k in range(4):
            params = opt.param_groups[0]["params"]
            for p in params:
                p.grad = torch.ones_like(p)
            if k == 2 and then == "a gradient is gone":
                params[1].grad = None
            opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(float(k < 2))
            opt.step()
            assert opt.last_step_skipped == (k < 2)
            assert bool(opt.state) == (k >= 2)
            if k == 1 and then == "reloaded":
                opt.load_state_dict(opt.state_dict())
            if k == 1 and then == "copied":
                opt = copy.deepcopy(opt)
        return opt

    here, there = both(run)
    assert engine_of(there).home is not None
    assert_same_bits(snapshot(here), snapshot(there))


def test_a_tensor_that_joins_in_a_step_that_is_skipped_begins_later() -> None:
    def run() -> Any:
        params = [torch.nn.Parameter(torch.ones(n)) for n in (70, 5, 9)]
        opt = optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
        for k, found in enumerate((0.0, 1.0, 1.0, 0.0, 1.0, 0.0)):
            for i, p in enumerate(params):
                p.grad = None if (i, k) in ((1, 0), (2, 2)) else torch.full_like(p, k + 1.0)
            opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(found)
            opt.step()
        return opt

    here, there = both(run)
    assert_same_bits(snapshot(here), snapshot(there))


def test_capturable_is_done_on_a_device_and_falls_back_on_the_cpu() -> None:
    def run() -> Any:
        p = torch.nn.Parameter(torch.ones(9))
        p.grad = torch.ones(9)
        opt = optim.Adam([p], capturable=True)
        opt.step()
        return opt

    with opened(), warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    with pytest.warns(optim.FallbackWarning, match="capturable=True"), pytest.raises(AssertionError):
        run()  # torch's own step refuses it there


@pytest.mark.parametrize("n_states", [0, 1])
def test_more_elements_than_32_bits_count(device: None, n_states: int) -> None:
    function = (fusedopt.sgd_, fusedopt.lion_)[n_states]
    n = 2**31 + CHUNK + 5  # address space only: of so many elements the simulated device processes both ends
    arrays = [torch.from_numpy(np.zeros(n, np.int16)).view(torch.bfloat16) for _ in range(2 + n_states)]
    ends = [slice(0, 1000), slice(n - 1000, n)]
    for end in ends:
        for k in range(2):
            arrays[k][end] = filled((1000,), "bfloat16", k)
    want = [x[ends[0]].clone() for x in arrays]
    function(*arrays, lr=0.1)
    _core.set_device_library("")
    function(*want, lr=0.1)
    for end in ends:
        assert all(torch.equal(x[end], y) for x, y in zip(arrays, want, strict=True))
    assert not torch.equal(want[0], filled((1000,), "bfloat16", 0))


# ---- several devices, failures


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_one_optimizer_over_two_devices_and_the_host(max_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(filled((n,), "float32", n)) for n in (300, 5, CHUNK + 3, 77)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    want, opt = (optim.AdamW(list(ps), lr=0.01, max_grad_norm=max_norm) for ps in (twins, params))

    def gradients(k: int) -> None:
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            g = filled(p.shape, "float32", 31 * k + i)
            p.grad = g if p.grad is None else p.grad.copy_(g)
            twin.grad = g.clone()

    for k in range(4):
        gradients(k)
        want.step()
        if k == 0:
            opt.step()  # all on the CPU
            continue
        with opened():
            monkeypatch.setattr(_engine, "has_device_kernels", lambda device: False)  # torch sees one device only
            there = dict(zip(params, (0, 1, -1, 1), strict=True))
            all_of = [(t, d) for p, d in there.items() for t in (p.detach(), p.grad, *opt.state[p].values())]
            with placed(dict(all_of)):
                opt.step()
    if max_norm is None:
        assert_same_bits(snapshot(opt), snapshot(want))
        return
    assert opt.last_grad_norm == pytest.approx(want.last_grad_norm.item(), rel=1e-6)
    for name, x in snapshot(want).items():
        assert torch.allclose(snapshot(opt)[name], x, rtol=1e-5, atol=1e-7), name


def test_operands_on_different_devices_are_refused_before_anything_is_written(device: None) -> None:
    p = torch.nn.Parameter(torch.ones(9))
    p.grad = torch.ones(9)
    opt = optim.SGD([p], lr=0.1)
    with placed({p.grad: 1}), pytest.raises(RuntimeError, match="change while step"):
        opt.step()
    assert bool((p == 1).all())
    opt.step()
    assert bool((p != 1).all())


def test_a_launch_that_fails_raises_the_devices_own_message_and_the_next_step_is_whole(device: None) -> None:
    def run(fail: bool) -> Any:
        p = torch.nn.Parameter(torch.ones(300))
        opt = optim.Adam([p], lr=0.1)
        for k in range(4):
            p.grad = filled((300,), "float32", k)
            if fail and k in (0, 2):
                with failing(), pytest.raises(RuntimeError, match=r"simulated error 2 while .*: told to fail"):
                    opt.step()
            opt.step()
        return opt

    assert_same_bits(snapshot(run(fail=True)), snapshot(run(fail=False)))


def test_memory_that_torch_keeps_for_itself_is_asked_back(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, and before one with more tensors to describe."""

    def run(freed: Callable[[], None] | None) -> Any:
        parameters = [torch.nn.Parameter(torch.ones(300)) for _ in range(50)]
        opt = optim.Adam(parameters, lr=0.1)
        for k in range(4):
            for p in parameters if k else parameters[:1]:
                p.grad = filled((300,), "float32", k)
            if freed is None:
                opt.step()
                continue
            with full():
                monkeypatch.setattr(torch.cuda, "empty_cache", freed)
                opt.step()
        return opt

    with pytest.raises(_core.DeviceOutOfMemoryError, match="while loading kernels: out of memory"):
        run(lambda: None)
    assert_same_bits(snapshot(run(some_freed)), snapshot(run(None)))
    with pytest.raises(_core.DeviceOutOfMemoryError, match="while allocating memory: out of memory"):
        run(lambda: None)


def test_a_device_that_is_full_when_its_kernels_are_loaded_is_asked_again(
    device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, freed = _core.device_refusal, torch.device("cuda:7")
    monkeypatch.setattr(_core, "device_refusal", lambda kind, index=-1: ask("cpu", 0))
    with full():
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        with pytest.raises(_core.DeviceOutOfMemoryError, match="while loading kernels: out of memory"):
            device_refusal(freed)
        monkeypatch.setattr(torch.cuda, "empty_cache", some_freed)
        assert not device_refusal(freed)


def test_a_captured_step_that_cannot_be_described_keeps_no_memory(device: None) -> None:
    p = torch.nn.Parameter(torch.ones(300))
    opt = optim.SGD([p], lr=0.5)
    p.grad = torch.ones(300)
    opt.step()
    asked()
    with capture():
        with failing(), pytest.raises(RuntimeError, match="told to fail"):
            opt.step()
        assert asked() == ["allocate", "release"]
        opt.step()
    replay()
    assert bool((p == 0).all())


def test_another_choice_of_gradients_beside_a_huge_tensor_waits_for_nothing(device: None) -> None:
    """The tensor descriptions grow with the number of tensors, not of elements."""
    huge = torch.from_numpy(np.zeros(600_000_000, np.int16)).view(torch.bfloat16)  # reserved, not there
    params = [torch.nn.Parameter(p) for p in (huge, torch.ones(5, dtype=huge.dtype), torch.ones(9, dtype=huge.dtype))]
    opt = optim.SGD(params, lr=0.5)
    params[0].grad = torch.from_numpy(np.zeros(huge.numel(), np.int16)).view(torch.bfloat16)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    for k in range(4):
        asked()
        params[1].grad = None if k % 2 else torch.ones_like(params[1])
        opt.step()
        assert not {"upload", "wait 0"} & set(asked())
    assert bool((params[1] == 0).all())
    assert bool((params[2] == -1).all())


def test_a_step_on_another_device_uses_no_other_and_goes_back(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "has_device_kernels", lambda device: False)  # to torch there is one device only
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    with placed({p.detach(): 1, p.grad: 1}):
        asked()
        optim.SGD([p], lr=0.5).step()
        events = asked()
    assert bool((p == 0.5).all())
    assert [e for e in events if e.startswith(("context", "leave"))] == ["context 1", "leave"]


# ---- in-place functions, and what is refused


def test_functions_take_arrays_of_the_device() -> None:
    def run() -> list[torch.Tensor]:
        p, m, v = (filled((1000,), "float32", k) for k in range(3))
        v.abs_()
        for t in (1, 2, 2, 5):
            fusedopt.adam_(p, filled((1000,), "float32", 10 + t), m, v, lr=0.1, step=t)
        w, b = (filled((3, 50), "float64", k) for k in range(2))
        fusedopt.sgd_(w, filled((50, 3), "float64", 8).t(), b, lr=0.1, momentum=0.9)
        return [p, m, v, w, b]

    here, there = both(run)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


class Foreign:
    """An array of another library, on the device."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def __dlpack__(self, **options: Any) -> Any:
        return self.numbers.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@pytest.mark.parametrize(
    ("module", "its"), [("cupy", 7), ("cupy", 0), ("other", None)], ids=["own stream", "same stream", "unknown"]
)
@pytest.mark.parametrize("operand", [0, 1])
def test_operands_of_other_libraries_are_waited_for_before_and_after(
    module: str, its: int | None, operand: int, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work queued on another stream after the call may overwrite what the step still reads."""
    cupy = types.ModuleType("cupy")
    cuda = types.ModuleType("cupy.cuda")
    cuda.get_current_stream = lambda device: types.SimpleNamespace(ptr=its)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(Foreign, "__module__", module)
    arrays: list[Any] = [torch.ones(5), torch.ones(5)]
    arrays[operand] = Foreign(arrays[operand])
    asked()
    fusedopt.sgd_(*arrays, lr=0.5)
    events = [e for e in asked() if e.startswith(("wait", "launch"))]
    assert "launch 0" in events or operand == 0
    ours = its or 0 if operand == 0 else 0
    apart = module == "cupy" and its != 0
    assert events[:1] == [f"wait {its if operand else 0}"] if apart else not events[0].startswith("wait")
    assert {e for e in events if e.startswith("launch")} == {f"launch {ours}"}
    assert (events[-1] == f"wait {ours}") == (apart or its is None)


def test_more_hyperparameters_than_a_device_holds_are_refused(device: None) -> None:
    p, g = torch.ones(5), torch.ones(5)
    with pytest.raises(ValueError, match="more hyperparameters"):
        _core.update(0, [0.1] * 9, False, ("param", "grad"), ("param", "grad"), (p, g), 1, 1)
    assert bool((p == 1).all())


def test_arrays_here_and_there_are_not_updated_together(device: None) -> None:
    host, far = np.ones(5, np.float32), torch.ones(5)
    with pytest.raises(ValueError, match="grad: expected it on the same device as param"):
        fusedopt.sgd_(far, host, lr=0.1)
    assert bool((far == 1).all())


def test_a_library_that_is_none_says_so(tmp_path: Path) -> None:
    assert "FUSEDOPT_CUDA=ON" in _core.device_refusal("cuda")
    wrong = tmp_path / "_cuda.so"
    wrong.write_bytes(b"no library")
    with opened(wrong):
        assert "_cuda.so" in _core.device_refusal("cuda")
    with pytest.raises(ValueError, match="no library"):
        _core.device_formats()
