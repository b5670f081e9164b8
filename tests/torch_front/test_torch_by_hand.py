"""Groups, options, state and classes that were changed by hand, past the checks of constructors."""

import functools
import math
import warnings
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from torch_cases import gradients, ours, parameters, plain, some_cases
from torch_compare import assert_close, assert_same_bits, count_fallbacks, snapshot, train

Options = dict[str, Any]
BETAS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")


def _outcome(opt: Any, params: list[Any]) -> Any:
    try:
        opt.step()
    except Exception as error:
        return type(error)
    return snapshot(opt, params)


def _assert_alike(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, type):
        assert mine is theirs
    else:
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_groups_and_parameters_in_tuples(name: str, options: Options) -> None:
    grads, listed, tupled = gradients(4), parameters(), parameters()
    want, opt = ours(name, listed, **options), ours(name, tupled, **options)
    train(want, grads, listed)
    for i, row in enumerate(grads):
        if i == 1:
            opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])
        if i == 2:
            opt.param_groups = tuple(opt.param_groups)
        train(opt, [row], tupled)
    assert_same_bits(snapshot(opt, tupled), snapshot(want, listed))


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (1.5, 0.9), (0.9, -0.5), (math.nan, 0.9)])
@pytest.mark.parametrize("name", BETAS)
def test_betas_out_of_range_are_torchs(name: str, betas: tuple[float, float]) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(), gradients(3, missing=False)
        opt = make(name, params)
        train(opt, grads[:1], params)
        opt.param_groups[0]["betas"] = betas
        for p, g in zip(params, grads[1], strict=True):
            p.grad = g
        with count_fallbacks(make is ours):
            results.append(_outcome(opt, params))
    _assert_alike(*results)


def test_betas_that_are_in_range_again_are_ours_again() -> None:
    params, grads = parameters(), gradients(4, missing=False)
    opt = ours("NAdam", params)
    betas = opt.param_groups[0]["betas"]
    for i, row in enumerate(grads):
        opt.param_groups[0]["betas"] = (1.0, 0.9) if i == 1 else betas
        with count_fallbacks(i == 1):
            train(opt, [row], params)
        assert bool(opt._engine.fallback.places) == (i == 1)


@pytest.mark.parametrize("count", [1.5, -3.0, -1.0, math.inf, math.nan, 1e30, 2.0**24, 0.0])
@pytest.mark.parametrize("name", [*BETAS, "Adagrad", "RMSprop", "Adadelta"])
def test_a_count_of_steps_that_is_no_count_is_torchs(name: str, count: float) -> None:
    odd = not (count >= 0 and count < 2**53 and count.is_integer())
    results = []
    for make in (ours, plain):
        params, grads = parameters(), gradients(3, missing=False)
        opt = make(name, params)
        train(opt, grads[:1], params)
        opt.state[params[4]]["step"].fill_(count)
        for p, g in zip(params, grads[1], strict=True):
            p.grad = g
        with count_fallbacks(odd and make is ours):
            results.append(_outcome(opt, params))
    _assert_alike(*results)


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


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoupled_weight_decay_set_by_hand_is_followed(name: str, dtype: torch.dtype) -> None:
    grads, results = gradients(4, dtype, missing=False), []
    for make in (ours, plain):
        params = parameters(dtype)
        opt = make(name, params, lr=0.1, weight_decay=0.3)
        with count_fallbacks(0):
            for row in grads:
                for group in opt.param_groups:
                    group["decoupled_weight_decay"] = not group["decoupled_weight_decay"]
                train(opt, [row], params)
        results.append(snapshot(opt, params))
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (3e-2, 3e-2)
    assert_close(*results, rtol=rtol, atol=atol)


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
