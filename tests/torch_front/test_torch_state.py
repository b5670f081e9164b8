"""State dicts of `fusedopt.torch`: exchange with torch, dtype of the state. Moving tensors: test_torch_moves.py."""

import copy
import io
from typing import Any

import pytest
import torch

from fusedopt.forms import OPTIONS
from fusedopt.rules import RULES
from torch_cases import IN_TORCH, NAMES, SIXTEEN, cases, gradients, ours, parameters, plain, simple, some_cases
from torch_compare import (
    assert_close,
    assert_same_bits,
    check_steps_round_once,
    kinds,
    snapshot,
    train,
)

Options = dict[str, Any]
with_adam_and_sgd = pytest.mark.parametrize(("name", "options"), some_cases(["SGD", "Adam"]))


def reloaded(state_dict: Any) -> Any:
    """Through a file, loaded with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- exchange with torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ours to torch", "torch to ours", "ours to ours"])
@pytest.mark.parametrize(("name", "options"), cases())
def test_state_dicts_exchange_and_training_goes_on_to_the_same_values(name: str, options: Options, way: str) -> None:
    first, then = {"o": ours, "t": plain}[way[0]], {"o": ours, "t": plain}[way.split()[-1][0]]
    dtype = torch.float64
    grads = gradients(7, dtype)
    params = parameters(dtype)
    opt = first(name, params, **options)
    train(opt, grads[:4], params)
    new = then(name, params)  # the options come with the checkpoint
    new.load_state_dict(reloaded(opt.state_dict()))
    train(new, grads[4:], params)

    alone = parameters(dtype)
    want = plain(name, alone, **options)
    train(want, grads, alone)
    # torch casts NAdam's mu_product to the parameter's type when it loads it: it is float32 before and float64 after
    exact = "mu_product" not in RULES[name].scalars
    rtol, atol = (1e-12, 1e-14) if exact else (1e-5, 1e-7)
    assert_close(snapshot(new, params), snapshot(want, alone), rtol=rtol, atol=atol, types=exact)
    for key, value in want.param_groups[0].items():
        if key not in ("params", "foreach"):
            assert new.param_groups[0][key] == value, key


@pytest.mark.parametrize(("name", "options"), cases(["SGD"]))
def test_float32_sgd_passes_to_torch_and_back_without_a_bit_lost(name: str, options: Options) -> None:
    grads, params, alone = gradients(9), parameters(), parameters()
    state = None
    for i, make in enumerate((ours, plain, ours)):
        opt = make(name, params, **options)
        if state is not None:
            opt.load_state_dict(state)
        train(opt, grads[3 * i : 3 * i + 3], params)
        state = reloaded(opt.state_dict())
    want = ours(name, alone, **options)
    train(want, grads, alone)
    assert_same_bits(snapshot(opt, params), snapshot(want, alone))


@pytest.mark.parametrize("name", IN_TORCH)
def test_state_dict_has_torchs_form(name: str) -> None:
    saved = []
    for make in (ours, plain):
        params = parameters()
        opt = make(name, params)
        train(opt, gradients(2), params)
        saved.append(reloaded(opt.state_dict()))
    mine, theirs = saved
    assert mine.keys() == theirs.keys()
    assert mine["state"].keys() == theirs["state"].keys()
    for i in theirs["state"]:
        assert list(mine["state"][i]) == list(theirs["state"][i])
    extra = set(mine["param_groups"][0]) - set(theirs["param_groups"][0])
    assert extra == {*OPTIONS, "lazy", "max_grad_norm"}
    assert mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]


@pytest.mark.parametrize("name", [n for n in IN_TORCH if n != "SGD"])
def test_a_checkpoint_of_an_old_torch_loads(name: str) -> None:
    """Steps as Python numbers, and without the options added later."""
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(5, torch.float64)
        opt = plain(name, params)
        train(opt, grads[:3], params)
        saved = copy.deepcopy(opt.state_dict())
        for group in saved["param_groups"]:
            for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
                group.pop(key, None)
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        new = make(name, params)
        new.load_state_dict(saved)
        train(new, grads[3:], params)
        results.append(snapshot(new, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_momentum_buffer_of_none_is_one_that_is_not_there_yet() -> None:
    p, q = simple(), simple()
    opt, fresh = ours("SGD", [p], momentum=0.9, dampening=0.5), ours("SGD", [q], momentum=0.9, dampening=0.5)
    opt.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": opt.state_dict()["param_groups"]})
    opt.step()
    fresh.step()
    assert_same_bits(snapshot(opt), snapshot(fresh))


@pytest.mark.parametrize(("name", "missing"), [("SGD", "momentum"), ("RMSprop", "alpha"), ("Adagrad", "lr_decay")])
def test_a_checkpoint_of_another_class_is_refused_and_changes_nothing(name: str, missing: str) -> None:
    other = ours("AdamW", [simple()])
    other.step()
    opt = ours(name, [simple()])
    opt.step()
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=f"'{missing}'"):
        opt.load_state_dict(other.state_dict())
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    opt = ours(name, [simple(), simple(seed=1)])
    opt.step()
    before = snapshot(opt)
    saved = opt.state_dict()
    two_groups = {**saved, "param_groups": saved["param_groups"] * 2}
    fewer = {**saved, "param_groups": [{**saved["param_groups"][0], "params": [0]}]}
    for bad in (two_groups, fewer):
        with pytest.raises(ValueError, match="param"):
            opt.load_state_dict(bad)
    assert_same_bits(snapshot(opt), before)
    opt.step()


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_checkpoint_loaded_in_mid_training_takes_over(name: str, options: Options) -> None:
    """Pointers cached by earlier steps must not survive the load."""
    grads, params = gradients(6, missing=False), parameters()
    opt = ours(name, params, **options)
    train(opt, grads[:2], params)
    saved, middle = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    train(opt, grads[2:], params)
    want = snapshot(opt, params)
    with torch.no_grad():
        for p, m in zip(params, middle, strict=True):
            p.copy_(m)
    opt.load_state_dict(saved)
    train(opt, grads[2:], params)
    assert_same_bits(snapshot(opt, params), want)


# -- the state's type ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_load_keeps_float32_state_of_a_sixteen_bit_parameter(name: str, options: Options, dtype: torch.dtype) -> None:
    """torch casts it to the parameter's type (pytorch#43706)."""
    grads, params = gradients(6, dtype), parameters(dtype)
    opt = ours(name, params, state_dtype=torch.float32, **options)
    train(opt, grads[:3], params)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = ours(name, twins)
    twin.load_state_dict(reloaded(opt.state_dict()))
    assert kinds(twin) == {torch.float32}
    for o, ps in ((opt, params), (twin, twins)):
        train(o, grads[3:], ps)
    assert_same_bits(snapshot(twin, twins), snapshot(opt, params))


@pytest.mark.parametrize(("have", "want"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_an_explicit_state_dtype_beats_the_checkpoints(name: str, options: Options, have: str, want: str) -> None:
    dtype = torch.float32 if want == "float16" else torch.bfloat16
    grads, params = gradients(5, dtype), parameters(dtype)
    opt = ours(name, params, state_dtype=have, **options)
    train(opt, grads[:2], params)
    new = ours(name, params, state_dtype=want, **options)
    new.load_state_dict(reloaded(opt.state_dict()))
    assert kinds(new) == {getattr(torch, want)}
    for p in params:
        for key, value in opt.state.get(p, {}).items():
            if value is not None and key not in ("step", "mu_product", "stream"):
                assert torch.equal(new.state[p][key], value.to(getattr(torch, want)))
            assert key != "step" or new.state[p][key].dtype == torch.float32
    check_steps_round_once(name, new, grads[2:])
    assert kinds(new) == {getattr(torch, want)}


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_torch_checkpoint_keeps_our_options(name: str, options: Options) -> None:
    dtype = torch.bfloat16
    grads, params = gradients(4, dtype), parameters(dtype)
    theirs = plain(name, params, **options)
    train(theirs, grads[:2], params)
    opt = ours(name, params, state_dtype="float32", max_grad_norm=0.25)
    opt.load_state_dict(reloaded(theirs.state_dict()))
    assert kinds(opt) == {torch.float32}
    train(opt, grads[2:], params)
    assert kinds(opt) == {torch.float32}
    assert opt.last_grad_norm is not None
    again = copy.deepcopy(opt)
    train(again, grads[:1])
    assert kinds(again) == {torch.float32}
    plain(name, parameters(dtype)).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_state_dtype_may_differ_between_groups(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    p, q, r = (simple(9, torch.bfloat16, seed) for seed in range(3))
    groups = [{"params": [p]}, {"params": [q], "state_dtype": "float32"}]
    opt = ours(name, groups, state_dtype=torch.bfloat16, **options)
    opt.add_param_group({"params": [r], "state_dtype": torch.float32})
    opt.step()
    for tensor, want in ((p, torch.bfloat16), (q, torch.float32), (r, torch.float32)):
        state = {k: v for k, v in opt.state[tensor].items() if k not in ("step", "mu_product", "stream")}
        assert {v.dtype for v in state.values()} == {want}
    reloaded(opt.state_dict())
    with pytest.raises((TypeError, ValueError), match="state_dtype"):
        opt.add_param_group({"params": [simple()], "state_dtype": "int4"})
