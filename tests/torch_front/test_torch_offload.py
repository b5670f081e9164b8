"""`Offload` with the CPU in place of the accelerator, so that copies are copies and every value can be checked. Pinned
memory and streams of an accelerator are not tested."""

import contextlib
import copy
import importlib.util
import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from fusedopt.torch._engine import engine_of
from torch_cases import NAMES, gradients, ours, parameters, some_cases
from torch_compare import assert_close, assert_same_bits, same, train

MASTERS = {"master": "float32", "state_dtype": "float32"}
FORMS = {torch.float32: None, torch.bfloat16: "float32", torch.float16: "float32"}


def weights(params: Any) -> dict[str, torch.Tensor]:
    return {str(i): p.detach() for i, p in enumerate(params)}


@pytest.mark.integration("`fusedopt.torch.Offload`", "16-bit weights, float32 masters; the CPU stands in for a GPU")
@pytest.mark.parametrize("dtype", FORMS, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_the_bits_are_those_of_the_plain_optimizer_with_masters(name: str, options: Any, dtype: torch.dtype) -> None:
    grads, mine, want = gradients(6, dtype), parameters(dtype), parameters(dtype)
    opt = optim.Offload(mine, getattr(optim, name), **options)
    plain = ours(name, want, **options, **(MASTERS if FORMS[dtype] else {}))
    train(opt, grads, mine)
    train(plain, grads, want)
    assert_same_bits(weights(mine), weights(want))
    assert engine_of(opt.inner).plan is not None
    assert not engine_of(opt.inner).fallback.places
    if FORMS[dtype]:
        stepped = [s for s in opt.inner.state.values() if "master" in s]
        assert len(stepped) >= 7
        assert all(s["master"].dtype == torch.float32 for s in stepped)
    assert not opt.state


def test_groups_schedulers_zero_grad_and_scaler_see_the_parameters() -> None:
    params = parameters(torch.bfloat16)
    opt = optim.Offload([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], optim.AdamW, lr=0.1, fused=True)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.5]
    rates = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i in range(3):
        opt.zero_grad()
        assert all(p.grad is None for p in params)
        scaler.scale(torch.zeros(()))
        for p in params:
            p.grad = torch.full_like(p, math.inf if i == 1 else 0.5)
        before = [p.detach().clone() for p in params]
        scaler.step(opt)
        scaler.update()
        rates.step()
        unchanged = all(same(p.detach(), b) for p, b in zip(params, before, strict=True))
        assert unchanged == (i == 1)
    assert [g["lr"] for g in opt.inner.param_groups] == [0.1 * 0.25, 0.5 * 0.25]
    assert {int(s["step"]) for s in opt.inner.state.values()} == {2}


def test_clipping() -> None:
    mine, want = parameters(), parameters()
    grads = gradients(3, missing=False)
    opt = optim.Offload(mine, optim.Adam, max_grad_norm=0.1)
    plain = optim.Adam(want, max_grad_norm=0.1)
    train(opt, grads, mine)
    train(plain, grads, want)
    assert_same_bits(weights(mine), weights(want))
    assert opt.last_grad_norm == plain.last_grad_norm


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_keep_the_masters_and_interchange(name: str) -> None:
    grads = gradients(6, torch.bfloat16, missing=False)
    whole, first = parameters(torch.bfloat16), parameters(torch.bfloat16)
    opt = optim.Offload(whole, getattr(optim, name))
    train(opt, grads, whole)
    half = optim.Offload(first, getattr(optim, name))
    train(half, grads[:3], first)
    again = [torch.nn.Parameter(p.detach().clone()) for p in first]
    other = optim.Offload(again, getattr(optim, name))
    other.load_state_dict(half.state_dict())
    train(other, grads[3:], again)
    assert_same_bits(weights(again), weights(whole))
    alone = [torch.nn.Parameter(p.detach().clone()) for p in first]
    plain = ours(name, alone, **MASTERS)
    plain.load_state_dict(half.state_dict())
    train(plain, grads[3:], alone)
    assert_same_bits(weights(alone), weights(whole))


def test_weights_that_somebody_else_writes_are_read_anew() -> None:
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = optim.Offload([p], optim.SGD, lr=0.5)
    p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        p.fill_(8.0)
    opt.step()
    assert p.tolist() == [7.5] * 5
    assert opt.inner.state[opt.inner.param_groups[0]["params"][0]]["master"].tolist() == [7.5] * 5


def test_masters_keep_what_16_bits_would_lose() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = optim.Offload([p], optim.SGD, lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        opt.step()
    assert_close({"p": p.detach().float()}, {"p": torch.full((3,), 0.99)}, rtol=4e-3, atol=0)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer_class"):
        optim.Offload(parameters(), torch.optim.Adam)
    opt = optim.Offload(parameters(), optim.Adam)
    with pytest.raises(NotImplementedError, match="groups"):
        opt.add_param_group({"params": parameters()})
    words = torch.nn.Embedding(5, 3, sparse=True)
    sparse = optim.Offload(words.parameters(), optim.SGD, lr=0.1)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        sparse.step()


# -- torchao's own, on the same stand-in -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(way: Callable[[Any], Any]) -> None:
    opt = optim.Offload(parameters(), optim.Adam)
    with pytest.raises(TypeError, match=r"Offload: .*state_dict"):
        way(opt)


@pytest.mark.integration(
    "torchao CPUOffloadOptimizer", "ours as `optimizer_class`; the CPU stands in for a GPU", "torchao"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_torchao_offloads_to_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao requires CUDA; here its streams are stubs and its pinned memory is ordinary memory."""
    torchao = pytest.importorskip("torchao.optim", exc_type=ImportError)
    module = pytest.importorskip("torchao.optim.cpu_offload", exc_type=ImportError)

    class Stream(contextlib.nullcontext):  # type: ignore[type-arg]
        def record_event(self) -> Any:
            return self

        def wait_stream(self, other: Any) -> None: ...
        def synchronize(self) -> None: ...

    empty_like = torch.empty_like
    monkeypatch.setattr(module, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: empty_like(t, **{**k, "pin_memory": False}))
    shapes = [(70, 70), (3,), (50, 100)]
    mine, want = parameters(shapes=shapes), parameters(shapes=shapes)
    opt = torchao.CPUOffloadOptimizer(mine, getattr(optim, name), lr=0.01)
    plain = ours(name, want, lr=0.01)
    for step in range(4):
        for params, o in ((mine, opt), (want, plain)):
            o.zero_grad()
            sum((p * (1 + step)).sin().sum() for p in params).backward()  # type: ignore[union-attr]
            o.step()
    assert_same_bits(weights(mine), weights(want))
    assert {type(o) for o in opt.optim_dict.values()} == {getattr(optim, name)}
    assert all(engine_of(o).plan is not None and not engine_of(o).fallback.places for o in opt.optim_dict.values())


DEEPSPEED = """
import warnings
warnings.simplefilter("ignore")
import sys
import torch, deepspeed
import fusedopt.torch
from fusedopt.torch._engine import engine_of

deepspeed.init_distributed(dist_backend="gloo", verbose=False)
results = []
for module in (fusedopt.torch, torch.optim):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    opt = module.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=opt, config={
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    })
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for _ in range(5):
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
    results.append([p.detach().float() for group in opt.param_groups for p in group["params"]])
    if module is fusedopt.torch:
        assert type(engine.optimizer.optimizer) is fusedopt.torch.AdamW
        assert engine_of(opt).plan is not None and not engine_of(opt).fallback.places
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
print("same", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.integration(
    "DeepSpeed ZeRO-Offload", "ours as client optimizer, ZeRO 2, bf16, its CPU accelerator", "deepspeed"
)
def test_deepspeed_takes_ours_as_client_optimizer(tmp_path: Path) -> None:
    """In a separate process; at first use DeepSpeed compiles its communication for a minute or two."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # DeepSpeed compiles with the ninja of the environment that Python runs in.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, **one, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "PATH": path}
    out = subprocess.run(
        [sys.executable, "-c", DEEPSPEED],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert out.stderr.rstrip().endswith("same"), out.stderr[-3000:]
