"""Options, checkpoints and classes that were changed by hand, past the checks of constructors."""

import functools
import math
import warnings
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from torch_cases import gradients, ours, parameters
from torch_compare import assert_same_bits, snapshot, train


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf, "1"])
def test_max_grad_norm_set_by_hand_is_checked(value: Any) -> None:
    params = parameters()
    opt = ours("SGD", params, lr=0.1)
    train(opt, gradients(1), params)
    before = snapshot(opt, params)
    opt.param_groups[0]["max_grad_norm"] = value
    with pytest.raises(ValueError, match="max_grad_norm: expected a positive number"):
        opt.step()
    assert_same_bits(snapshot(opt, params), before)


def test_max_grad_norm_in_one_group_alone_is_refused() -> None:
    params = parameters()
    opt = ours("SGD", [{"params": params[:3]}, {"params": params[3:]}], lr=0.1)
    train(opt, gradients(1), params)
    opt.param_groups[1]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm: expected one for all groups"):
        opt.step()
    opt.param_groups[0]["max_grad_norm"] = 1.0
    opt.step()
    assert opt.last_grad_norm is not None


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_default_device_does_not_matter(name: str) -> None:
    results = []
    for device in ("cpu", "meta"):
        params = parameters()
        opt = ours(name, params, max_grad_norm=0.5)
        for row in gradients(3):
            for p, g in zip(params, row, strict=True):
                p.grad = g
            with torch.device(device):
                opt.step()
        results.append({**snapshot(opt, params), "norm": opt.last_grad_norm})
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("target", ["int8", None])
@pytest.mark.parametrize("trouble", ["too few scales", "too many scales", "no scales", "codes"])
def test_an_int8_checkpoint_of_another_size_is_refused(trouble: str, target: str | None) -> None:
    params = [torch.nn.Parameter(torch.ones(300, 3))]
    opt = ours("Adam", params, state_dtype="int8")
    params[0].grad = torch.ones(300, 3)
    opt.step()
    saved = opt.state_dict()
    entry = saved["state"][0]
    if trouble == "codes":
        entry["exp_avg_codes"] = entry["exp_avg_codes"][:-1]
    elif trouble == "no scales":
        del entry["exp_avg_scale"]
    else:
        scale = entry["exp_avg_scale"]
        entry["exp_avg_scale"] = scale[:-1] if trouble == "too few scales" else torch.cat([scale, scale])
    fresh = ours("Adam", [torch.nn.Parameter(torch.ones(300, 3))], state_dtype=target or "float32")
    part = "codes" if trouble == "codes" else "scale"
    with pytest.raises(ValueError, match=f"state 'exp_avg_{part}': expected shape"):
        fresh.load_state_dict(saved)
    assert not fresh.state


def test_a_step_that_was_replaced_is_followed_after_install(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    step = torch.optim.Adam.step

    def patched(self: Any, closure: Any = None) -> Any:
        called.append(self)
        return step(self, closure)

    optim.install()
    try:
        monkeypatch.setattr(torch.optim.Adam, "step", patched)
        with pytest.warns(optim.FallbackWarning, match="Adam.step was replaced"):
            opt = torch.optim.Adam(parameters())
        opt.step()
        assert called == [opt]
        monkeypatch.undo()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(torch.optim.Adam(parameters()), optim.Adam)
            assert isinstance(torch.optim.SGD(parameters(), lr=0.1), optim.SGD)
    finally:
        optim.uninstall()


def test_a_step_that_dynamo_disabled_is_still_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does so in SparseAdam's class when it is first used. functools.wraps copies every attribute."""
    theirs = torch.optim.SparseAdam
    table = torch.nn.Parameter(torch.ones(2, 2))
    theirs([table])  # puts the hooks in place
    monkeypatch.setattr(theirs, "step", torch._dynamo.disable(theirs.step))
    optim.install()
    try:
        assert type(theirs([table])) is optim.SparseAdam
        step: Any = theirs.step

        @functools.wraps(step)
        def users(self: Any, closure: Any = None) -> Any:
            return step(self, closure)

        monkeypatch.setattr(theirs, "step", users)
        with pytest.warns(optim.FallbackWarning, match="SparseAdam.step was replaced"):
            assert type(theirs([table])) is theirs
    finally:
        optim.uninstall()


def test_a_fallback_never_runs_torchs_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It assumes dense tensors: on one whose elements overlap it writes beyond the storage."""
    seen = []
    monkeypatch.setattr(optim.AdamW, "_plain_step", lambda self: seen.extend(g["fused"] for g in self.param_groups))
    p = torch.nn.Parameter(torch.ones(12).as_strided((4, 5), (2, 1)))
    p.grad = torch.ones(4, 5)
    opt = optim.AdamW([p], fused=True)
    with pytest.warns(optim.FallbackWarning):
        opt.step()
    assert seen == [False]
    assert opt.param_groups[0]["fused"] is True
