"""Two or three gloo processes for test_torch_distributed.py, and the cases that they run. No tests here.

The processes start once for all tests. A case is a function of this file; it runs in all at the same time and returns
its result, or the text of its exception, from each.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fusedopt.torch as optim
from fusedopt.torch import FallbackWarning

RANKS = 2
Options = dict[str, Any]


class Cluster:
    """The parent process: starts the processes and sends them cases."""

    def __init__(self, ranks: int = RANKS) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, self.folder.name, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((case.__name__, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(90), f"process {rank} does not answer"
            good, value = pipe.recv()
            assert good, f"process {rank}: {value}"
            results.append(value)
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def _serve(rank: int, ranks: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", FallbackWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    try:
        while (message := pipe.recv()) is not None:
            name, args = message
            try:
                pipe.send((True, globals()[name](*args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


# ---- what is trained


class Net(torch.nn.Module):
    """Odd sizes, so that shards are uneven; single elements, so that some shards are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 17), torch.nn.Linear(17, 1)
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(x))) * self.gain
        return y


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(rank: int | None, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rank's part of a batch; with None the whole batch."""
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64).to(dtype)
    return whole if rank is None else whole.chunk(dist.get_world_size())[rank]


def backward(model: torch.nn.Module, opt: Any, rank: int | None, step: int, dtype: torch.dtype = torch.float32) -> None:
    opt.zero_grad()
    model(batch(rank, step, dtype)).square().mean().backward()


def full(t: Any) -> torch.Tensor:
    """The whole tensor on every process."""
    return t.full_tensor().detach().clone() if isinstance(t, DTensor) else t.detach().clone()


def everything(opt: Any, params: Any) -> dict[str, torch.Tensor]:
    """Whole parameters and whole state by name."""
    out = {}
    for i, p in enumerate(params):
        out[f"{i}.param"] = full(p)
        for name, value in opt.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                out[f"{i}.{name}"] = full(value)
    return out


def train_alone(name: str, options: Options, steps: int) -> dict[str, torch.Tensor]:
    """One process, the whole batch."""
    model = net()
    opt = class_of(name)(model.parameters(), **options)
    for step in range(steps):
        backward(model, opt, None, step)
        opt.step()
    return everything(opt, model.parameters())


def class_of(name: str) -> Any:
    """A class of fusedopt.torch; or of a rule written in Python, such as ``fusedopt.zoo.Adan``."""
    module, _, rule = name.rpartition(".")
    return getattr(importlib.import_module(module), rule).torch if module else getattr(optim, name)


class Twin:
    """An unsharded copy of a sharded model, with the gradients of the sharded one."""

    def __init__(self, name: str, options: Options, params: list[torch.Tensor]) -> None:
        self.params = [torch.nn.Parameter(full(p)) for p in params]
        self.opt = class_of(name)(self.params, **options)

    def step(self, params: list[torch.Tensor]) -> None:
        for mine, p in zip(self.params, params, strict=True):
            mine.grad = None if p.grad is None else full(p.grad)
        self.opt.step()

    def check(self, opt: Any, params: list[torch.Tensor], rtol: float = 0.0) -> None:
        got, want = everything(opt, params), everything(self.opt, self.params)
        assert got.keys() == want.keys(), (got.keys(), want.keys())
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=rtol, atol=rtol * 1e-2, msg=lambda m, k=key: f"{k}: {m}")


# ---- cases


def ddp(name: str, options: Options) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(net())
    params = list(model.parameters())
    opt = class_of(name)(params, **options)
    twin = Twin(name, options, params)
    for step in range(4):
        backward(model, opt, dist.get_rank(), step)
        twin.step(params)
        opt.step()
    twin.check(opt, params)
    return everything(opt, params)


def sums_refused(name: str) -> tuple[str, bool]:
    """The error of a step that no kernel makes, and whether it has changed nothing."""
    model = net()
    fully_shard(model)
    params = list(model.parameters())
    opt = class_of(name)(params, lr=0.01)
    opt.param_groups[0]["differentiable"] = True
    backward(model, opt, dist.get_rank(), 0)
    before = [full(p) for p in params]
    try:
        opt.step()
    except RuntimeError as error:
        return str(error), not opt.state and all(torch.equal(full(p), q) for p, q in zip(params, before, strict=True))
    return "", False


def partial_refused(name: str) -> list[str]:
    """The errors of two steps on a parameter of partial sums."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    opt = class_of(name)([p], lr=0.01)
    messages = []
    for _ in range(2):
        try:
            opt.step()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def sums(name: str, options: Options, dtype: str, how: str, rtol: float) -> dict[str, torch.Tensor]:
    """A rule with sums over a tensor on shards, against the same on whole tensors.

    ``how``: "shard"; "replicate": copies along a dimension of the mesh; "some": all but one layer are plain tensors.
    """
    kind, int8 = getattr(torch, dtype), options.get("state_dtype") == "int8"
    model = net(kind)
    if how == "replicate":
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    else:
        fully_shard(model.up)
        if how == "shard":
            fully_shard(model)
    params = list(model.parameters())
    assert sum(isinstance(p, DTensor) for p in params) == (2 if how == "some" else 5)
    opt = class_of(name)(params, **options)
    twin = Twin(name, options, params)
    for step in range(4):
        backward(model, opt, None if how == "some" else dist.get_rank(), step, kind)
        if step == 2:
            params[1].grad = None
        twin.step(params)
        opt.step()
        if "max_grad_norm" in options:
            torch.testing.assert_close(opt.last_grad_norm, twin.opt.last_grad_norm, rtol=1e-6, atol=0)
        if int8:  # the states of shards are rounded with other random numbers than those of whole tensors
            got, want = (torch.cat([full(p).flatten() for p in side]) for side in (params, twin.params))
            torch.testing.assert_close(got, want, rtol=rtol if step == 0 else 0.1, atol=0.02 * (step > 0))
    if int8:
        return {str(i): full(p) for i, p in enumerate(params)}
    twin.check(opt, params, rtol)
    return everything(opt, params)


def fsdp(name: str, options: Options, rtol: float) -> dict[str, torch.Tensor]:
    model = net()
    fully_shard(model.up)
    fully_shard(model)
    params = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in params)
    opt = class_of(name)(params, **options)
    twin = Twin(name, options, params)
    for step in range(4):
        backward(model, opt, dist.get_rank(), step)
        twin.step(params)
        opt.step()
        if "max_grad_norm" in options:
            torch.testing.assert_close(opt.last_grad_norm, twin.opt.last_grad_norm, rtol=1e-6, atol=0)
    twin.check(opt, params, rtol)
    assert all(
        isinstance(s, DTensor) for p in params for k, s in opt.state[p].items() if k in opt._rule.states(options)
    )
    return everything(opt, params)


def fsdp_like_torch(name: str) -> None:
    """fusedopt's classes and torch's on DTensors; a scheduler, a frozen parameter, groups."""
    results = []
    for module in (optim, torch.optim):
        model = net()
        model.gain.requires_grad_(False)
        fully_shard(model)
        groups = [
            {"params": list(model.up.parameters())},
            {"params": [*model.down.parameters(), model.gain], "lr": 0.05},
        ]
        opt = getattr(module, name)(groups, lr=0.01)
        rates = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
        for step in range(4):
            backward(model, opt, dist.get_rank(), step)
            opt.step()
            rates.step()
        results.append(everything(opt, model.parameters()))
    assert results[0].keys() == results[1].keys()
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-5, atol=1e-6)


def fsdp_wide_gradients(name: str, options: Options) -> None:
    """float32 gradients of bfloat16 shards: the bits of the same shards as plain tensors."""
    model = net().to(torch.bfloat16)
    fully_shard(model)
    params: list[Any] = list(model.parameters())
    plain: list[Any] = [torch.nn.Parameter(p.to_local().detach().clone()) for p in params]
    opt, other = class_of(name)(params, **options), class_of(name)(plain, **options)
    torch.manual_seed(dist.get_rank())
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad_dtype = q.grad_dtype = None
            q.grad = torch.randn(q.shape)
            p.grad = DTensor.from_local(
                q.grad, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        opt.step()
        other.step()
        assert all(torch.equal(p.to_local(), q) for p, q in zip(params, plain, strict=True))


def fsdp_grad_dtype(name: str) -> None:
    """torch 2.15 shards parameters with their grad_dtype."""
    model = net().to(torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    fully_shard(model)
    opt = class_of(name)(model.parameters(), lr=0.01)
    before = [full(p) for p in model.parameters()]
    for step in range(2):
        opt.zero_grad()
        model(batch(dist.get_rank(), step).to(torch.bfloat16)).float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        opt.step()
    assert not any(torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True))


def fsdp_scaler(name: str) -> None:
    """GradScaler with DTensors: one step is skipped on both processes, though only one overflows."""
    model = net()
    fully_shard(model)
    opt = class_of(name)(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        opt.zero_grad()
        loss = model(batch(dist.get_rank(), step)).square().mean()
        if step == 2 and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = everything(opt, model.parameters())
        scaler.step(opt)
        scaler.update()
        after = everything(opt, model.parameters())
        changed = any(not torch.equal(after[k], v) for k, v in before.items())
        assert changed == (step != 2), step
    assert scaler.get_scale() == 128.0


def zero(name: str, options: Options) -> dict[str, torch.Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    model = DistributedDataParallel(net())
    params = list(model.parameters())
    opt = ZeroRedundancyOptimizer(params, optimizer_class=class_of(name), **options)
    twin = Twin(name, options, params)
    rates = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    other = torch.optim.lr_scheduler.StepLR(twin.opt, 2, 0.5)
    for step in range(4):
        backward(model, opt, dist.get_rank(), step)
        twin.step(params)
        opt.step()
        rates.step()
        other.step()
    for mine, p in zip(twin.params, params, strict=True):
        assert torch.equal(mine, p)
    assert type(opt.optim) is class_of(name)
    assert 0 < len(opt.optim.state) < len(params), "the state is not divided"
    opt.consolidate_state_dict(to=0)
    return {str(k): v["exp_avg"] for k, v in opt.state_dict()["state"].items()} if dist.get_rank() == 0 else {}


def tensor_parallel(name: str, options: Options, rtol: float) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    params = list(model.parameters())
    opt = class_of(name)(params, **options)
    twin = Twin(name, options, params)
    for step in range(4):
        backward(model, opt, None, step)
        twin.step(params)
        opt.step()
        if "max_grad_norm" in options:
            torch.testing.assert_close(opt.last_grad_norm, twin.opt.last_grad_norm, rtol=1e-6, atol=0)
    twin.check(opt, params, rtol)
    return everything(opt, params)


def checkpoint(name: str, source: str | None, target: str, steps: int) -> dict[str, torch.Tensor]:
    """Loads if a checkpoint exists, trains, saves; sharded over processes, or in a single process."""
    alone = not dist.is_initialized()
    model = net()
    if not alone:
        fully_shard(model)
    opt = class_of(name)(model.parameters(), lr=0.01)
    if source is not None:
        model_state, opt_state = get_state_dict(model, opt)
        before = everything(opt, model.parameters())
        assert all(torch.equal(full(p), q) for p, q in zip(model.parameters(), net().parameters(), strict=True)), before
        state = {"model": model_state, "optimizer": opt_state}
        dcp.load(state, checkpoint_id=source, no_dist=alone)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = everything(opt, model.parameters())
    for step in range(steps):
        backward(model, opt, None, step)
        opt.step()
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=target, no_dist=alone)
    return {**{f"loaded {k}": v for k, v in loaded.items()}, **everything(opt, model.parameters())}


def reports(path: str) -> str:
    """The report of ``fusedopt run`` for a sharded optimizer."""
    from fusedopt.cli.run import Recorder

    model = net()
    fully_shard(model)
    opt = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(Path(path)) as recorder:
        backward(model, opt, dist.get_rank(), 0)
        opt.step()
    return str(recorder.records[0])
