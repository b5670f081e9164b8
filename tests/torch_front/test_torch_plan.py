"""What a step plans anew when something changed between steps, and what a plan keeps alive."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedopt.torch import _engine
from fusedopt.torch._engine import engine_of
from torch_cases import gradients, ours, parameters, plain, some_cases
from torch_compare import assert_close, assert_same_bits, count_fallbacks, snapshot, train

Options = dict[str, Any]


def _note(opt: Any, params: list[Any]) -> None:
    for p in params:
        if p in opt.state:
            opt.state[p]["note"] = object()


def _many_notes(opt: Any, params: list[Any]) -> None:
    for p in params:
        if p in opt.state:
            opt.state[p].update({f"note {i}": i for i in range(20)}, sparse=torch.eye(3).to_sparse())


def _replace_states(opt: Any, params: list[Any]) -> None:
    for entry in opt.state.values():
        entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, torch.Tensor)})


def _replace_state_dicts(opt: Any, params: list[Any]) -> None:
    for p in list(opt.state):
        opt.state[p] = dict(opt.state[p])


def _reorder_state(opt: Any, params: list[Any]) -> None:
    for p in list(opt.state):
        opt.state[p] = dict(reversed(opt.state[p].items()))


def _replace_groups(opt: Any, params: list[Any]) -> None:
    opt.param_groups[:] = [dict(group) for group in opt.param_groups]


@pytest.mark.parametrize(
    "event", [_note, _many_notes, _replace_states, _replace_state_dicts, _reorder_state, _replace_groups]
)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_what_is_replaced_is_taken_without_planning_anew(
    name: str, options: Options, event: Callable[[Any, list[Any]], None]
) -> None:
    grads, still, changing = gradients(6, missing=False), parameters(), parameters()
    want, opt = ours(name, still, **options), ours(name, changing, **options)
    train(want, grads, still)
    built = 0
    for i, row in enumerate(grads):
        train(opt, [row], changing)
        built = built or engine_of(opt).plans_built
        assert engine_of(opt).plans_built == built, i
        event(opt, changing)
    for entry in opt.state.values():
        for key in [k for k in entry if k == "sparse" or k.startswith("note")]:
            del entry[key]
    assert_same_bits(snapshot(opt, changing), snapshot(want, still))


def test_a_value_under_another_name_is_not_taken_for_the_state() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = ours("Adam", [p])
    opt.step()
    state = opt.state[p]
    before = state["exp_avg_sq"]
    kept = before.clone()
    state["exp_avg_sq"], state["backup"] = before.clone(), before
    opt.step()
    assert torch.equal(before, kept)
    assert not torch.equal(state["exp_avg_sq"], kept)


def test_only_what_changed_is_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = parameters(), gradients(3, missing=False)
    opt = ours("Adam", params)
    train(opt, grads[:1], params)
    planned = []
    plan_param = _engine.Engine._plan_param

    def counted(self: Any, optimizer: Any, plan: Any, place: Any, *rest: Any) -> Any:
        planned.append(place)
        return plan_param(self, optimizer, plan, place, *rest)

    monkeypatch.setattr(_engine.Engine, "_plan_param", counted)
    opt.state[params[7]]["exp_avg"] = torch._neg_view(opt.state[params[7]]["exp_avg"].neg())
    with count_fallbacks(1):
        train(opt, grads[1:], params)
    assert set(planned) == {(0, 7)}


@pytest.mark.filterwarnings("ignore::fusedopt.torch.FallbackWarning")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("layout", ["columns", "diagonal", "mixed", "chain"])
def test_parameters_that_interleave_in_memory(name: str, layout: str) -> None:
    results = []
    for make in (ours, plain):
        memory = torch.arange(1.0, 61.0)
        if layout == "columns":
            views = [memory.view(20, 3)[:, i] for i in range(3)]
        elif layout == "diagonal":
            views = [memory.as_strided((4, 4), (13, 1), 5 * i) for i in range(2)]
        elif layout == "mixed":  # one of them dense
            views = [memory.as_strided((6,), (5,), 0), memory[1:5], memory[40:45]]
        else:  # each meets the next one, and one more parameter that torch has to take
            views = [memory[0:20], memory[15:40], memory[35:60], torch.ones(3)[::2].to(torch.complex64)]
        params = [torch.nn.Parameter(v) for v in views]
        opt = make(name, params, lr=0.1)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.5 + i + step)
            opt.step()
        results.append([memory, *(p.detach().clone() for p in params)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


CYCLES: dict[str, Callable[[Any, torch.nn.Module], Any]] = {
    "none": lambda opt, model: None,
    "parameter": lambda opt, model: setattr(model.weight, "optimizer", opt),
    "gradient hook": lambda opt, model: model.weight.register_hook(lambda g, opt=opt: None),
    "group": lambda opt, model: opt.param_groups[0].update(owner=opt),
    "state": lambda opt, model: opt.state[model.weight].update(owner=opt),
    "step hook": lambda opt, model: opt.register_step_post_hook(lambda *a, opt=opt: None),
    "option": lambda opt, model: opt.param_groups[0].update(lr=_Rate(opt)),
}


class _Rate(float):
    def __new__(cls, owner: Any) -> "_Rate":
        return super().__new__(cls, 0.1)

    def __init__(self, owner: Any) -> None:
        self.owner = owner


@pytest.mark.parametrize("where", CYCLES)
def test_a_cycle_through_the_optimizer_is_collected(where: str) -> None:
    alive = []
    for _ in range(30):
        model = torch.nn.Linear(4, 4)
        opt = ours("Adam", model.parameters())
        for i in range(3):
            model(torch.ones(2, 4)).sum().backward()
            opt.step()
            if i == 0:
                CYCLES[where](opt, model)
        alive += [weakref.ref(model.weight), weakref.ref(opt)]
        del model, opt
    gc.collect()
    assert not [r for r in alive if r() is not None]


def test_the_list_of_optimizers_does_not_grow_with_loading() -> None:
    params = parameters()
    opt = ours("Adam", params)
    train(opt, gradients(1), params)
    before = len(_engine.optimizers)
    for _ in range(5):
        opt.load_state_dict(opt.state_dict())
        assert _engine.optimizers[engine_of(opt).number] is opt
    assert len(_engine.optimizers) == before


@pytest.mark.filterwarnings("ignore::fusedopt.torch.FallbackWarning")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_gradient_that_a_kernel_does_not_take_changes_one_parameter_only(name: str) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(), gradients(4, missing=False)
        opt = make(name, params, lr=0.1)
        for step, row in enumerate(grads):
            for p, g in zip(params, row, strict=True):
                p.grad = g
            if step == 2:
                params[5].grad = params[5].grad.to_sparse() if name == "SGD" else torch._neg_view(params[5].grad)  # type: ignore[union-attr]
            opt.step()
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-5, atol=1e-6)
