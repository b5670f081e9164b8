"""Forms in torch: groups and mixed models, GradScaler, closures, late and missing gradients, moved storage, the moving
average, memory_report. Bits against NumPy: test_forms_bits; files: test_forms_checkpoints."""

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt.torch as optim
from form_cases import CASES, Case, one_of_each_form
from form_cases_torch import BOTH, assert_same, filled, made, parameter, stepped
from fusedopt import forms
from fusedopt.rules import RULES
from torch_cases import NAMES
from torch_compare import all_params, snapshot

FULL = one_of_each_form()


# ---- the matrix


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_works_or_is_refused_before_anything_is_made(name: str) -> None:
    worked = refused = 0
    states = [None, *forms.FLOATS, torch.bfloat16, "int8", torch.int8]
    for variant, param, state, master, noisy in itertools.product(
        RULES[name].variants, forms.FLOATS, states, [None, *forms.MASTERS], (False, True)
    ):
        chosen = {o: 0.9 if o == "momentum" else True for o in variant}
        options = {**chosen, "state_dtype": state, "master": master, "stochastic_rounding": noisy}
        p = torch.nn.Parameter(filled((70,), param, 1))
        p.grad, before = filled((70,), param, 2), p.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                opt = getattr(optim, name)([p], lr=0.1, **options)
            except ValueError as error:
                refused += 1
                text = str(error)
                other = getattr(optim, name)([torch.nn.Parameter(torch.ones(3))])
                with pytest.raises(ValueError, match="use"):
                    other.add_param_group({"params": [p], **options})
                assert len(other.param_groups) == 1
            else:
                opt.step()
                text = ""
        if text:
            assert any(o in text for o in ("state_dtype", "master", "stochastic_rounding")), text
            asked, advice = text.split(": use ")
            assert not set(asked.split()[0].partition("=")[2].split()) & set(advice.split()), text
            continue
        worked += 1
        assert not torch.equal(p.detach(), before), f"{param} {options}"
        assert bool(p.detach().isfinite().all()), f"{param} {options}"
        kinds = {k.removesuffix("_codes").removesuffix("_scale") for k in opt.state[p]}
        scalars = {*RULES[name].scalars, *(["step"] if "stream" in kinds else [])}
        assert kinds - {"master", "stream"} == {*RULES[name].states(chosen), *scalars}, f"{param} {options}"
        assert ("master" in kinds) == (master is not None and p.element_size() == 2)
    assert worked >= 20
    assert refused


@pytest.mark.parametrize(
    "bad",
    [{"master": "split32"}, {"seed": -1}, {"ema_decay": 1.5}, {"l1": -1.0}, {"state_dtype": torch.uint8}],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(bad: dict[str, Any]) -> None:
    (name,) = bad
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        optim.Adam([p], **bad)
    opt = optim.Adam([p])
    with pytest.raises(ValueError, match=f"{name}: expected"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **bad})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    "option", [{"ema_decay": 0.9}, {"l1": 0.1}, {"master": "split16"}, {"stochastic_rounding": True}]
)
def test_what_takes_torchs_step_is_refused_with_an_option_of_forms(option: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    opt = optim.AdamW([p], fused=False, **option)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=next(iter(option))):
            opt.step()
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.bfloat16))
    assert not opt.state.get(p)


# ---- models


def test_a_mixed_model_trains_in_every_form() -> None:
    """bf16 linear layers, float32 norms: master and stochastic rounding apply to the former."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 16), torch.randn(256, 1)
    ends = {}
    for label, options in {
        "split8+int8": {"master": "split8", "state_dtype": "int8"},
        "split16": {"master": "split16", "state_dtype": "bfloat16"},
        "float32": {"master": "float32", "state_dtype": "float32"},
        "stochastic": {"stochastic_rounding": True},
        "stochastic+int8": {"stochastic_rounding": True, "state_dtype": "int8"},
    }.items():
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.LayerNorm(64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        )
        for layer in (model[0], model[3]):
            layer.bfloat16()

        def forward(model: Any = model) -> torch.Tensor:
            hidden = model[2](model[1](model[0](x.bfloat16()).float()))
            return ((model[3](hidden.bfloat16()).float() - y) ** 2).mean()

        opt = optim.AdamW(model.parameters(), lr=1e-3, ema_decay=0.9, **options)
        first = float(forward().detach())
        for _ in range(150):
            opt.zero_grad()
            loss = forward()
            loss.backward()
            opt.step()
        ends[label] = float(loss.detach())
        assert ends[label] < 0.6 * first, label
        for p in all_params(opt):
            assert ("master" in opt.state[p]) == ("master" in options and p.dtype == torch.bfloat16)
    assert max(ends.values()) < 1.25 * min(ends.values()), ends


@pytest.mark.parametrize("case", FULL, ids=str)
def test_missing_late_and_added_parameters(case: Case) -> None:
    """Each parameter is updated as if it were alone, whenever its gradients arrive."""
    shapes, alone = [(130,), (9, 9), ()], []
    params = [parameter(case, s, i) for i, s in enumerate(shapes)]
    opt = made(case, params[:2], **BOTH)
    stepped(opt, case, [0], skip=(1,))
    stepped(opt, case, [1])
    opt.add_param_group({"params": [params[2]]})
    stepped(opt, case, [2], skip=(0,))
    stepped(opt, case, [3])
    for i, (s, steps) in enumerate(zip(shapes, ([0, 1, 3], [1, 2, 3], [2, 3]), strict=True)):
        p = parameter(case, s, i)
        one = made(case, [p], **BOTH)
        for k in steps:
            p.grad = filled(s, case.grad, 100 * k + i)
            if k == steps[0] and case.form.random and i:  # its index is its sequence number
                other = made(case, [*(parameter(case, (), 9) for _ in range(i)), p], **BOTH)
                other.step()
                begun = other.state_dict()["state"][i]
                one.load_state_dict({"state": {0: begun}, "param_groups": one.state_dict()["param_groups"]})
                continue
            one.step()
        alone.append(snapshot(one, [p]))
    together = snapshot(opt, params)
    for i, want in enumerate(alone):
        mine = {f"0.{k[2:]}": v for k, v in together.items() if k.startswith(f"{i}.")}
        assert_same(mine, want, f"{i}")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_moved_storage_and_replaced_state_are_noticed(case: Case) -> None:
    """Every tensor of a form, scales included, is read again after it has been replaced or moved."""
    n = 5000
    opt, twin = (made(case, [parameter(case, (n,), 1)], **BOTH) for _ in range(2))
    for o in (opt, twin):
        stepped(o, case, range(2))
    (p,) = all_params(opt)
    for key, value in list(opt.state[p].items()):
        if isinstance(value, torch.Tensor):
            opt.state[p][key] = value.clone()
            stepped(opt, case, [5])
            stepped(twin, case, [5])
            value.fill_(1)  # no longer read
    p.data = p.detach().clone()
    for value in opt.state[p].values():
        if isinstance(value, torch.Tensor) and value.numel() >= 1024:
            value.data = value.detach().clone()
    for o in (opt, twin):
        stepped(o, case, range(6, 9))
    assert_same(snapshot(opt, all_params(opt)), snapshot(twin, all_params(twin)))


@pytest.mark.parametrize("case", [c for c in FULL if c.form.quantised or c.form.master], ids=str)
def test_wrong_arrays_in_the_state_are_refused_by_name(case: Case) -> None:
    p = parameter(case)
    opt = made(case, [p], **BOTH)
    stepped(opt, case, range(2))
    for name, x in list(opt.state[p].items()):
        if not isinstance(x, torch.Tensor) or x.ndim == 0:
            continue
        for wrong in (x[:-1].clone(), x.to(torch.int32), x.double()):
            if name in opt._rule.states(opt.param_groups[0]) and wrong.shape == x.shape:
                continue  # a plain state may have several dtypes
            before = p.detach().clone()
            opt.state[p][name] = wrong
            with pytest.raises(ValueError, match=name):
                opt.step()
            assert torch.equal(p.detach(), before)
        opt.state[p][name] = x
    opt.step()


# ---- GradScaler, closures


@pytest.mark.parametrize("case", FULL, ids=str)
def test_found_inf_leaves_everything_untouched_and_grad_scale_unscales(case: Case) -> None:
    opt, twin = (made(case, [parameter(case)], **BOTH) for _ in range(2))
    for o in (opt, twin):
        stepped(o, case, range(2))
    before = snapshot(opt, all_params(opt))
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    stepped(opt, case, [2])
    assert opt.last_step_skipped
    assert_same(snapshot(opt, all_params(opt)), before)
    opt.found_inf = torch.tensor(0.0)
    for o, factor in ((opt, 4.0), (twin, 1.0)):
        (p,) = all_params(o)
        p.grad = filled(p.shape, case.grad, 3).clamp(-8, 8) * factor  # a power of two: exact
        o.step()
    assert_same(snapshot(opt, all_params(opt)), snapshot(twin, all_params(twin)))


def test_closures_and_schedulers_go_with_forms() -> None:
    p, q = (torch.nn.Parameter(torch.ones(130, dtype=torch.bfloat16)) for _ in range(2))
    opts = [optim.AdamW([x], lr=0.01, master="split8", state_dtype="int8", ema_decay=0.9, l1=0.1) for x in (p, q)]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in opts]
    for _ in range(6):

        def closure() -> torch.Tensor:
            opts[0].zero_grad()
            loss = (p.float() ** 2).sum()
            loss.backward()
            return loss

        assert float(opts[0].step(closure).detach()) > 0
        opts[1].zero_grad()
        (q.float() ** 2).sum().backward()
        opts[1].step()
        for s in schedules:
            s.step()
    assert_same(snapshot(opts[0]), snapshot(opts[1]))
    assert opts[0].param_groups[0]["lr"] == 0.01 / 8


# ---- average, report


def test_the_average_equals_torchs_lerp_beside_the_step() -> None:
    p, q = (torch.nn.Parameter(filled((1000,), "float32", 1)) for _ in range(2))
    opt, other = optim.AdamW([p], lr=0.01, ema_decay=0.99), optim.AdamW([q], lr=0.01)
    ema = [q.detach().clone()]
    for k in range(50):
        p.grad, q.grad = filled((1000,), "float32", k), filled((1000,), "float32", k)
        opt.step()
        other.step()
        torch._foreach_lerp_(ema, [q.detach()], 1 - 0.99)
    assert torch.equal(p.detach(), q.detach())
    torch.testing.assert_close(opt.state[p]["ema"], ema[0], rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_average_is_lent_to_the_parameters_and_taken_back(case: Case) -> None:
    params = [parameter(case, s, i) for i, s in enumerate([(130,), (), (3, 4)])]
    opt = made(case, params, ema_decay=0.5)
    with opt.ema_parameters():  # nothing has been stepped
        pass
    stepped(opt, case, range(3), skip=(2,))
    before = snapshot(opt, params)
    with opt.ema_parameters():
        for p in params[:2]:
            assert torch.equal(p.detach(), opt.state[p]["ema"].to(p.dtype))
        assert torch.equal(params[2].detach(), before["2.param"])
    assert_same(snapshot(opt, params), before)
    with pytest.raises(ZeroDivisionError), opt.ema_parameters():
        raise ZeroDivisionError
    assert_same(snapshot(opt, params), before)
    twin = copy.deepcopy(opt)
    for o in (opt, twin):
        stepped(o, case, [7])
    assert_same(snapshot(opt, params), snapshot(twin))


def test_memory_report_counts_what_there_is() -> None:
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / 64}
    n = 64 * 50
    for case in CASES:
        p = parameter(case, (n,))
        opt = made(case, [p], **BOTH)
        stepped(opt, case, [0])
        report = optim.memory_report(opt)
        assert report["parameters"] == n
        assert report["weight"] == sizes[case.param]
        assert report["gradient"] == sizes[case.grad]
        assert report["ema"] == (8 if case.param == "float64" else 4)
        assert report.get("master", 0) == {None: 0, "split8": 1, "split16": 2, "float32": 4}[case.form.master]
        for name in case.states:
            assert report[name] == sizes[case.form.state], str(case)
        kinds = {k: v for k, v in report.items() if k not in ("parameters", "total")}
        assert report["total"] == pytest.approx(sum(kinds.values()))
        p.grad = None
        assert optim.memory_report(opt)["gradient"] == 0


def test_the_smallest_adamw_takes_seven_bytes_a_parameter() -> None:
    p = torch.nn.Parameter(torch.zeros(64 * 1000, dtype=torch.bfloat16))
    opt = optim.AdamW([p], master="split8", state_dtype="int8")
    p.grad = torch.ones_like(p)
    opt.step()
    report = optim.memory_report(opt)
    assert report["total"] - report.get("other", 0) == 2 + 2 + 1 + 2 * (1 + 4 / 64)
    assert np.isclose(report["total"], 7.125, atol=1e-3)
