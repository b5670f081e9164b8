"""Checkpoints of every form: exact through files, pickle and copies; with bounded loss from each form to each other, in
both front ends, and between fusedopt and torch."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import BF16, CASES, Case, assert_same, copied, data, join, kept, one_of_each_form, optimizer, train
from fusedopt import forms
from helpers import F32, F64, Array, assert_same_bits

FULL = one_of_each_form()
SHAPES = [(130,), (), (5, 30), (0,)]
BOTH = {"ema_decay": 0.9, "l1": 0.01}


def through_npz(opt: Any, path: Path) -> Any:
    np.savez(path / "state.npz", **opt.state_dict())
    with np.load(path / "state.npz") as loaded:
        return dict(loaded)


def through_pickle(opt: Any, path: Path) -> Any:
    return pickle.loads(pickle.dumps(opt.state_dict()))


def grads_of(case: Case, step: int) -> list[Array]:
    return [data(s, case.grad, 10 * step + i) for i, s in enumerate(SHAPES)]


def started(case: Case, steps: int = 3, **more: Any) -> Any:
    opt = optimizer(case, [data(s, case.param, i) for i, s in enumerate(SHAPES)], **{**BOTH, **more})
    train(opt, [grads_of(case, k) for k in range(steps)])
    return opt


def copies_of_params(opt: Any) -> list[Array]:
    return [p.copy() for p in opt.param_groups[0]["params"]]


# Files are slow: one rule for each form.
@pytest.mark.parametrize(
    ("case", "through"),
    [*((c, through_pickle) for c in CASES), *((c, through_npz) for c in FULL)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_a_checkpoint_goes_on_with_the_same_bits(case: Case, through: Callable[..., Any], tmp_path: Path) -> None:
    opt = started(case)
    new = optimizer(case, copies_of_params(opt), **BOTH)
    new.load_state_dict(through(opt, tmp_path))
    assert_same(kept(new), copied(opt))
    for o in (opt, new):
        train(o, [grads_of(case, k) for k in range(3, 6)])
    assert_same(kept(new), kept(opt))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_copies_and_pickles_of_the_optimizer_go_on_with_the_same_bits(case: Case) -> None:
    opt = started(case)
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for o in (opt, *others):
        train(o, [grads_of(case, k) for k in range(3, 6)])
    for other in others:
        assert_same(kept(other), kept(opt))


def test_a_checkpoint_of_streams_does_not_depend_on_the_order_of_restart() -> None:
    """The sequence number belongs to the parameter: it is stored in its state, wherever that is loaded."""
    opt: Any = fusedopt.AdamW([np.ones(100, BF16), np.ones(90, BF16)], stochastic_rounding=True)
    saved = opt.state_dict()
    assert (saved["state.0.stream"], saved["state.1.stream"]) == (0, 1)
    turned = {"state.0.": "state.1.", "state.1.": "state.0."}
    swapped = {turned[k[:8]] + k[8:]: v for k, v in saved.items() if k[:8] in turned}
    swapped.update({k: v for k, v in saved.items() if k.startswith("group")})
    other: Any = fusedopt.AdamW([np.ones(90, BF16), np.ones(100, BF16)], stochastic_rounding=True)
    other.load_state_dict(swapped)
    g = [data(100, "bfloat16", 1), data(90, "bfloat16", 2)]
    opt.step(g)
    other.step(g[::-1])
    assert_same(kept(other)[::-1], kept(opt))


# ---- from one form to another


def form_options(param: str) -> list[dict[str, Any]]:
    """Every form of AdamW for a parameter of this dtype, including the default."""
    cases = [c for c in CASES if c.rule.name == "AdamW" and not c.variant and c.param == param]
    return list({str(o): o for o in [{}, *(c.kept for c in cases)]}.values())


def numbers(state: dict[str, Any], name: str) -> Array:
    if f"{name}_codes" in state:
        return forms.dequantise(state[f"{name}_codes"].ravel(), state[f"{name}_scale"]).astype(F64)
    return state[name].ravel().astype(F64)


def check_states(new: dict[str, Any], old: dict[str, Any], name: str) -> None:
    """The loss is at most the new form's resolution: half an ulp, or half a code (one code above a vanishing v)."""
    want, got = numbers(old, name), numbers(new, name)
    if f"{name}_codes" in new:
        codes, scale = new[f"{name}_codes"].ravel(), new[f"{name}_scale"]
        if f"{name}_codes" in old:
            assert_same_bits(codes, old[f"{name}_codes"].ravel())
            assert_same_bits(scale, old[f"{name}_scale"])
            return
        top = 127.0 if codes.dtype == np.int8 else 255.0
        s = np.repeat(scale.astype(F64), forms.BLOCK)[: want.size]
        r = np.sqrt(np.divide(np.abs(want), s, where=s > 0, out=np.zeros(want.size)))
        d = (0.5001 if top == 127 else 1.0) / top
        assert (np.abs(got - want) <= s * (2 * r * d + d * d) + 1e-40).all()
        return
    digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[new[name].dtype.name]
    assert (np.abs(got - want) <= 2.0**-digits * np.abs(want) + (2.0**-25 if digits == 11 else 1e-40)).all()


def check_master(new: dict[str, Any], old: dict[str, Any], param: Array) -> None:
    """Conversion between wide masters loses at most one digit of 24 next to a tie; split8 keeps 15 to 16 digits."""
    if "master" not in new:
        return
    want, got = (join(param, s.get("master")).astype(F64) for s in (old, new))
    loss = 2.0**-15 if new["master"].dtype == np.int8 else 2.0**-23
    assert (np.abs(got - want) <= loss * np.abs(want) + 1e-40).all()
    if old.get("master") is not None and old["master"].dtype == new["master"].dtype:
        assert_same_bits(new["master"], old["master"])


@pytest.mark.parametrize("param", ["float64", "float32", "bfloat16", "float16"])
def test_every_form_loads_into_every_other_with_a_bounded_loss(param: str) -> None:
    shapes = [(3000,), (5, 30), ()]
    for have in form_options(param):
        params = [data(s, param, i) for i, s in enumerate(shapes)]
        old: Any = fusedopt.AdamW(params, lr=1e-2, **have)
        train(old, [[data(s, param, 10 * k + i) for i, s in enumerate(shapes)] for k in range(4)])
        saved = old.state_dict()
        before = copied(old)
        for want in form_options(param):
            new: Any = fusedopt.AdamW([p.copy() for p in params], lr=1e-2, **want)
            fresh = copied(new)
            new.load_state_dict(saved)
            for i, (a, b, f) in enumerate(zip(new.state, old.state, fresh, strict=True)):
                assert set(a) == set(f) - {"param"}, f"{have} {want}"
                assert_same_bits(new.param_groups[0]["params"][i], params[i])
                assert a["step"] == 4
                for name in ("exp_avg", "exp_avg_sq"):
                    check_states(a, b, name)
                check_master(a, b, params[i])
            assert {k: new.param_groups[0][k] for k in want} == want
            train(new, [[data(s, param, 99) for s in shapes]])
        assert_same(kept(old), before)


def test_masters_convert_next_to_ties_to_their_neighbours() -> None:
    """Ties in bf16: the forms round them to different weights, which loading does not change."""
    b = (np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16)[:, None] + np.arange(0x7F00, 0x8100, dtype=np.uint32)
    x = np.concatenate([b.ravel().view(F32), -b.ravel().view(F32)])
    for have in forms.MASTERS:
        opt: Any = fusedopt.SGD(np.zeros(x.size, BF16), lr=1.0, master=have)
        away = (x.view(np.uint32) + np.uint32(0x8080 if have == "split8" else 0x8000)) >> np.uint32(16)
        weight = forms.round_bf16(x) if have == "float32" else away.astype(np.uint16)
        (p,) = opt.param_groups[0]["params"]
        p.view(np.uint16)[:] = weight
        opt.state[0]["master"] = forms.split(x, have)
        held = forms.join(weight, opt.state[0]["master"]).astype(F64)
        assert np.abs(held / x - 1).max() <= (2.0**-16 if have == "split8" else 0)
        for want in forms.MASTERS:
            new: Any = fusedopt.SGD(p.copy(), lr=1.0, master=want)
            new.load_state_dict(opt.state_dict())
            got = forms.join(weight, new.state[0]["master"]).astype(F64)
            assert np.abs(got / held - 1).max() <= (2.0**-15 if want == "split8" else 2.0**-23), f"{have} to {want}"
            new.step(np.zeros(x.size, BF16))
            after = forms.join(new.param_groups[0]["params"][0].view(np.uint16), new.state[0]["master"])
            assert_same_bits(after.astype(F64), got, f"{have} to {want}")


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    opt: Any = fusedopt.AdamW([np.ones(130, BF16)], state_dtype="int8", master="split8")
    opt.step([np.ones(130, BF16)])
    saved, before = opt.state_dict(), copied(opt)
    for key, value in (
        ("state.0.exp_avg_scale", np.ones(2, F32)),
        ("state.0.exp_avg_codes", np.ones(129, np.int8)),
        ("state.0.master", np.ones((130, 1), np.int8)),
    ):
        with pytest.raises(ValueError, match=key):
            opt.load_state_dict({**saved, key: value})
        assert_same(kept(opt), before)
    for key in ("state.0.exp_avg_codes", "state.0.step"):
        with pytest.raises(KeyError, match=key.removesuffix("_codes")):
            opt.load_state_dict({k: v for k, v in saved.items() if k != key})
        assert_same(kept(opt), before)
    opt.load_state_dict(saved)


# ---- torch


def torch_started(case: Case, steps: int = 3) -> tuple[Any, list[Any]]:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim
    from test_forms_bits import to_torch

    params = [torch.nn.Parameter(to_torch(data(s, case.param, i))) for i, s in enumerate(SHAPES)]
    opt = getattr(optim, case.rule.name)(params, **case.options, **BOTH)
    torch_train(opt, params, case, range(steps))
    return opt, params


def torch_train(opt: Any, params: list[Any], case: Case, steps: Any) -> None:
    from test_forms_bits import to_torch

    for k in steps:
        for p, g in zip(params, grads_of(case, k), strict=True):
            if case.param != case.grad:
                p.grad_dtype = None
            p.grad = to_torch(g)
        opt.step()


def saved_and_loaded(state_dict: Any) -> Any:
    import torch

    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_torch_same(a: Any, b: Any, what: str = "") -> None:
    from torch_compare import all_params, assert_same_bits, snapshot

    assert_same_bits(snapshot(a, all_params(a)), snapshot(b, all_params(b)))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_torch_checkpoints_go_on_with_the_same_bits(case: Case) -> None:
    torch = pytest.importorskip("torch")
    opt, params = torch_started(case)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    new = type(opt)(twins, **case.options, **BOTH)
    new.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert_torch_same(new, opt)
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    torch_train(opt, params, case, range(3, 6))
    torch_train(new, twins, case, range(3, 6))
    assert_torch_same(new, opt)
    for other in others:
        torch_train(other, [p for group in other.param_groups for p in group["params"]], case, range(3, 6))
        assert_torch_same(other, opt)


@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_torch_loads_every_form_into_every_other(param: str) -> None:
    """The result equals that of NumPy's front end for the same checkpoint."""
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim
    from test_forms_bits import to_numpy, to_torch

    for have in form_options(param):
        if not have:
            continue
        values, grad = data((9, 30), param, 1), data((9, 30), param, 2)
        p = torch.nn.Parameter(to_torch(values))
        old = optim.AdamW([p], lr=1e-2, **have)
        mine: Any = fusedopt.AdamW(values.copy(), lr=1e-2, **have)
        for _ in range(3):
            p.grad = to_torch(grad)
            old.step()
            mine.step(grad)
        for want in form_options(param):
            if not want:
                continue
            q = torch.nn.Parameter(p.detach().clone())
            new = optim.AdamW([q], lr=1e-2, **want)
            new.load_state_dict(saved_and_loaded(old.state_dict()))
            reference: Any = fusedopt.AdamW(mine.param_groups[0]["params"][0].copy(), lr=1e-2, **want)
            reference.load_state_dict(mine.state_dict())
            for _ in range(2):
                for name, x in reference.state[0].items():
                    if isinstance(x, np.ndarray) and (name in new.state[q] or name != "master"):  # torch makes it late
                        assert_same_bits(to_numpy(new.state[q][name]), x, f"{have} {want} {name}")
                assert_same_bits(to_numpy(q), reference.param_groups[0]["params"][0], f"{have} {want}")
                q.grad = to_torch(grad)
                new.step()
                reference.step(grad)


def test_plain_torch_fails_loudly_at_codes_and_takes_what_has_been_decoded() -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    p = torch.nn.Parameter(torch.randn(200))
    p.grad = torch.randn(200)
    opt = optim.Adam([p], state_dtype="int8")
    opt.step()
    saved = saved_and_loaded(opt.state_dict())
    theirs = torch.optim.Adam([p])
    theirs.load_state_dict(saved)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()
    between = optim.Adam([p], state_dtype="float32")
    between.load_state_dict(saved)
    theirs = torch.optim.Adam([p])
    theirs.load_state_dict(saved_and_loaded(between.state_dict()))
    before = p.detach().clone()
    q = torch.nn.Parameter(before.clone())
    q.grad = p.grad.clone()
    twin = optim.Adam([q], state_dtype="float32")
    twin.load_state_dict(between.state_dict())
    theirs.step()
    twin.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert not torch.equal(p, before)


@pytest.mark.parametrize("kept_options", [o for o in form_options("bfloat16") if o], ids=str)
def test_a_checkpoint_of_torch_loads_into_every_form(kept_options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    p = torch.nn.Parameter(torch.randn(200).bfloat16())
    theirs = torch.optim.AdamW([p], lr=1e-2)
    for _ in range(3):
        p.grad = torch.randn(200).bfloat16()
        theirs.step()
    opt = optim.AdamW([p], lr=0.5, **kept_options)
    opt.load_state_dict(saved_and_loaded(theirs.state_dict()))
    assert opt.param_groups[0]["lr"] == 1e-2
    before = p.detach().float().clone()
    opt.step()
    state = opt.state[p]
    assert float(state["step"]) == 4
    want = 0.001 * p.grad.float() ** 2 + 0.999 * theirs.state[p]["exp_avg_sq"].float()
    got = (
        torch.from_numpy(forms.dequantise(state["exp_avg_sq_codes"].numpy(), state["exp_avg_sq_scale"].numpy()))
        if "exp_avg_sq_codes" in state
        else state["exp_avg_sq"].float()
    )
    assert float((got - want).abs().max()) <= 0.02 * float(want.max())
    assert 0 < float((p.detach().float() - before).abs().max()) < 0.05
    assert ("master" in state) == (kept_options["master"] is not None)
