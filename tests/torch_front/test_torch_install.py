"""`install` and `convert`: fusedopt's classes in place of torch.optim's, and conversion of live optimizers."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import Adam as EarlyAdam

import fusedopt.torch as optim
from fusedopt.torch._engine import engine_of
from torch_cases import IN_TORCH, cases, gradients, ours, parameters, plain, some_cases
from torch_compare import assert_close, assert_same_bits, falling_back_is_fine, snapshot, train

Options = dict[str, Any]


@pytest.fixture
def _installed() -> Iterator[None]:
    optim.install()
    try:
        yield
    finally:
        optim.uninstall()


# -- install ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration("`fusedopt.torch.install()`", "every class, also under names imported before")
@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", IN_TORCH)
def test_torchs_classes_make_ours(name: str) -> None:
    opt = getattr(torch.optim, name)(parameters(), lr=0.01)
    assert type(opt) is getattr(optim, name)
    assert isinstance(opt, getattr(torch.optim, name))
    assert type(EarlyAdam(parameters())) is optim.Adam
    assert type(torch.optim.Adam(params=parameters())) is optim.Adam


@pytest.mark.usefixtures("_installed")
def test_what_is_not_exactly_torchs_class_is_left_alone() -> None:
    class Mine(torch.optim.Adam):
        pass

    assert type(Mine(parameters())) is Mine
    assert type(torch.optim.LBFGS(parameters())) is torch.optim.LBFGS
    assert type(optim.Adam(parameters())) is optim.Adam


@pytest.mark.usefixtures("_installed")
def test_copies_and_pickles_keep_their_class() -> None:
    optim.uninstall()
    theirs = torch.optim.SGD(parameters(), lr=0.1)
    optim.install()
    mine = torch.optim.SGD(parameters(), lr=0.1)
    for opt, cls in ((theirs, torch.optim.SGD), (mine, optim.SGD)):
        assert type(copy.deepcopy(opt)) is cls
        assert type(pickle.loads(pickle.dumps(opt))) is cls


def test_uninstall_undoes_it() -> None:
    assert not optim.installed()
    for _ in range(2):
        optim.install()
        optim.install()
        assert optim.installed()
        optim.uninstall()
        assert not optim.installed()
        for name in IN_TORCH:
            cls = getattr(torch.optim, name)
            assert type(cls(parameters(), lr=0.01)) is cls
        with pytest.raises(ValueError, match="Invalid learning rate"):
            torch.optim.Adam(parameters(), lr=-1.0)
        with pytest.raises(TypeError):
            torch.optim.Adam(parameters(), no_such_option=1)


@pytest.mark.usefixtures("_installed")
def test_bad_arguments_are_refused_as_before() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        torch.optim.Adam(parameters(), lr=-1.0)
    with pytest.raises(TypeError):
        torch.optim.Adam(parameters(), no_such_option=1)
    with pytest.raises(TypeError):
        torch.optim.Adam()  # type: ignore[call-arg]


# -- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration("`fusedopt.torch.convert()`", "every class and option, in the middle of a run, there and back")
@pytest.mark.parametrize(("name", "options"), cases(IN_TORCH))
def test_a_run_that_changes_sides_goes_on_as_if_it_had_not(name: str, options: Options) -> None:
    grads, mine, theirs = gradients(9, torch.float64), parameters(torch.float64), parameters(torch.float64)
    opt = getattr(torch.optim, name)(mine, **options)
    keys, defaults, attributes = set(opt.param_groups[0]), set(opt.defaults), set(vars(opt))
    with falling_back_is_fine():
        train(opt, grads[:3], mine)
        assert optim.convert(opt) is opt
        assert type(opt) is getattr(optim, name)
        train(opt, grads[3:6], mine)
        assert optim.convert(opt, back=True) is opt
        assert type(opt) is getattr(torch.optim, name)
        train(opt, grads[6:], mine)
    assert (set(opt.param_groups[0]), set(opt.defaults), set(vars(opt))) == (keys, defaults, attributes)
    reference = plain(name, theirs, **options)
    train(reference, grads, theirs)
    assert_close(snapshot(opt, mine), snapshot(reference, theirs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), some_cases(IN_TORCH))
def test_a_converted_optimizer_is_ours_bit_for_bit(name: str, options: Options) -> None:
    grads, mine, want = gradients(5), parameters(), parameters()
    opt = optim.convert(getattr(torch.optim, name)(mine, **options))
    train(opt, grads, mine)
    assert engine_of(opt).plan is not None
    fresh = ours(name, want, **options)
    train(fresh, grads, want)
    assert_same_bits(snapshot(opt, mine), snapshot(fresh, want))
    assert opt.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_and_hooks_follow(when: str) -> None:
    """A scheduler has wrapped ``opt.step`` of the instance: the wrapped method must not keep running."""
    grads, mine, theirs = gradients(6, torch.float64), parameters(torch.float64), parameters(torch.float64)
    calls: list[str] = []

    def begin(params: Any) -> tuple[Any, list[Any]]:
        opt = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        opt.register_step_pre_hook(lambda *_: calls.append("pre"))
        opt.register_step_post_hook(lambda *_: calls.append("post"))
        cls = torch.optim.lr_scheduler
        return opt, [cls.StepLR(opt, 2, 0.5), cls.LinearLR(opt, total_iters=4)]

    def go(opt: Any, params: Any, schedulers: list[Any], rows: list[Any]) -> list[float]:
        out = []
        for row in rows:
            train(opt, [row], params)
            for scheduler in schedulers:
                scheduler.step()
            out.append(opt.param_groups[0]["lr"])
        return out

    opt, schedulers = begin(mine)
    rates = go(opt, mine, schedulers, grads[:2]) if when == "after" else []
    optim.convert(opt)
    ran = []
    opt._step = lambda closure=None: (ran.append(1), type(opt)._step(opt, closure))[1]
    opt.register_step_pre_hook(lambda *_: calls.append("new"))
    calls.clear()
    rates += go(opt, mine, schedulers, grads[len(rates) :])
    assert calls == ["pre", "new", "post"] * (4 if when == "after" else 6)
    del opt._step
    assert opt._opt_called
    reference, others = begin(theirs)
    assert rates == go(reference, theirs, others, grads)
    assert_same_bits(snapshot(opt, mine), snapshot(reference, theirs))
    optim.convert(opt, back=True)
    assert opt.step.__wrapped__ is torch.optim.SGD.step
    assert opt._opt_called


def test_a_step_replaced_by_something_else_is_refused() -> None:
    opt = torch.optim.Adam(parameters())
    opt.step = lambda: None  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(RuntimeError, match="does not lead to Adam"):
        optim.convert(opt)
    assert type(opt) is torch.optim.Adam
    assert "state_dtype" not in opt.param_groups[0]


def test_state_in_another_dtype_comes_back_in_the_parameters() -> None:
    params = parameters(torch.bfloat16)
    opt = optim.Adam(params, state_dtype="float32")
    grads = gradients(4, torch.bfloat16, missing=False)
    train(opt, grads[:2], params)
    optim.convert(opt, back=True)
    assert {opt.state[p]["exp_avg"].dtype for p in params} == {torch.bfloat16}
    train(opt, grads[2:], params)


def test_a_scaler_goes_on_across_a_conversion() -> None:
    scaler, params, alone = torch.amp.GradScaler("cpu", init_scale=64.0), parameters(), parameters()
    opt = torch.optim.Adam(params, fused=True)
    grads = gradients(4, missing=False)
    for i, row in enumerate(grads):
        scaler.scale(torch.zeros(()))
        for p, g in zip(params, row, strict=True):
            p.grad = g * scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if i == 1:
            optim.convert(opt)
    want = plain("Adam", alone)
    train(want, grads, alone)
    assert_close(snapshot(opt, params), snapshot(want, alone), rtol=1e-5, atol=1e-6)


def test_convert_can_switch_clipping_on_and_refuses_to_lose_it() -> None:
    params, theirs = parameters(torch.float64), parameters(torch.float64)
    opt = optim.convert(torch.optim.Adam(params), max_grad_norm=0.5)
    row = gradients(1, torch.float64, missing=False)
    train(opt, row, params)
    assert opt.last_grad_norm > 0.5
    reference = optim.Adam(theirs, max_grad_norm=0.5)
    train(reference, row, theirs)
    assert_same_bits(snapshot(opt, params), snapshot(reference, theirs))
    with pytest.raises(ValueError, match="max_grad_norm"):
        optim.convert(opt, back=True)
    assert type(opt) is optim.Adam
    opt.max_grad_norm = None
    assert type(optim.convert(opt, back=True)) is torch.optim.Adam
    with pytest.raises(ValueError, match="max_grad_norm"):
        optim.convert(opt, back=True, max_grad_norm=1.0)


def test_what_has_no_other_side_is_refused_by_name() -> None:
    class Mine(torch.optim.Adam):
        pass

    for opt in (Mine(parameters()), torch.optim.LBFGS(parameters())):
        with pytest.raises(TypeError, match=type(opt).__name__):
            optim.convert(opt)
    with pytest.raises(TypeError, match="Lion"):
        optim.convert(optim.Lion(parameters()), back=True)
    with pytest.raises(TypeError, match="optimizer: expected"):
        optim.convert(object())
    opt = optim.Adam(parameters())
    assert optim.convert(opt) is opt
