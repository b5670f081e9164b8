"""`fusedopt.torch` in place of `torch.optim`: constructors, groups, copies, names.

Hooks, schedulers and autograd: test_torch_hooks.py; state dicts: test_torch_state.py; moving storage:
test_torch_moves.py; clipping and GradScaler: test_torch_amp.py.
"""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from fusedopt.forms import OPTIONS
from fusedopt.rules import RULES
from torch_cases import (
    IN_TORCH,
    NAMES,
    TORCH_FUSED,
    accepts,
    cases,
    gradients,
    optim_db,
    ours,
    parameters,
    plain,
    simple,
    some_cases,
)
from torch_compare import all_params, assert_close, assert_same_bits, outcome, same, snapshot, train

Options = dict[str, Any]
ADDED = {**OPTIONS, "lazy": False, "max_grad_norm": None}
ADAGRADS = "row_wise"  # which it alone takes
OURS = set(ADDED)


# -- constructors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_TORCH)
def test_signature_is_torchs_plus_keyword_only_options_of_ours(name: str) -> None:
    mine = dict(inspect.signature(getattr(optim, name)).parameters)
    theirs = dict(inspect.signature(getattr(torch.optim, name)).parameters)
    added = {k: v for k, v in ADDED.items() if k != ADAGRADS or name == "Adagrad"}
    extra = {k: mine.pop(k) for k in added}
    assert all(p.kind is p.KEYWORD_ONLY for p in extra.values())
    assert {k: p.default for k, p in extra.items()} == added
    assert list(mine) == list(theirs)
    for key, p in theirs.items():
        assert (mine[key].kind, mine[key].default) == (p.kind, p.default), key


@pytest.mark.parametrize("name", NAMES)
def test_is_a_torch_optimizer(name: str) -> None:
    opt = ours(name, parameters())
    assert isinstance(opt, torch.optim.Optimizer)
    assert isinstance(opt, getattr(torch.optim, name, torch.optim.Optimizer))
    assert type(opt).__name__ == name
    assert type(opt).__module__ == "fusedopt.torch"
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")
    assert name in repr(opt)


@pytest.mark.parametrize(("name", "options"), cases(IN_TORCH))
def test_param_groups_and_defaults_are_torchs(name: str, options: Options) -> None:
    mine, theirs = ours(name, parameters(), **options), getattr(torch.optim, name)(parameters(), **options)
    for a, b in ((mine.param_groups[0], theirs.param_groups[0]), (mine.defaults, theirs.defaults)):
        assert set(a) - OURS == set(b)
        assert {k: v for k, v in a.items() if k not in OURS | {"params"}} == {
            k: v for k, v in b.items() if k != "params"
        }


@pytest.mark.parametrize(("name", "options"), cases(IN_TORCH))
def test_state_keys_order_types_and_shapes_are_torchs(name: str, options: Options) -> None:
    made = []
    for make in (ours, plain):
        params = parameters(torch.float64)
        opt = make(name, params, **options)
        made.append([_shape_of_state(opt, params)])
        train(opt, gradients(3, torch.float64), params)
        made[-1].append(_shape_of_state(opt, params))
    assert made[0] == made[1]


def _shape_of_state(opt: Any, params: list[torch.nn.Parameter]) -> Any:
    return [
        [(k, v if v is None else (v.dtype, tuple(v.shape), v.device.type)) for k, v in opt.state.get(p, {}).items()]
        for p in params
    ]


@pytest.mark.parametrize("name", IN_TORCH)
def test_positional_arguments_mean_what_they_mean_in_torch(name: str) -> None:
    kinds = inspect.signature(getattr(torch.optim, name)).parameters.values()
    args = [p.default for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "params"]
    args[0] = 0.125
    mine, theirs = (getattr(m, name)(parameters(), *args) for m in (optim, torch.optim))
    assert mine.param_groups[0]["lr"] == 0.125
    for key in set(theirs.param_groups[0]) - {"params"}:
        assert mine.param_groups[0][key] == theirs.param_groups[0][key]


BAD: list[Options] = [
    {"lr": -1.0},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"momentum": -0.5},
    {"alpha": -0.1},
    {"rho": 1.5},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -1.0},
    {"momentum_decay": -1.0},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"nesterov": True},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": "fast"},
    {"nonsense": 1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]


@pytest.mark.parametrize("options", BAD, ids=str)
@pytest.mark.parametrize("name", IN_TORCH)
def test_wrong_options_are_refused_as_in_torch(name: str, options: Options) -> None:
    def message(module: Any) -> tuple[type[BaseException] | None, str]:
        try:
            getattr(module, name)(parameters(), **options)
        except Exception as error:
            return type(error), str(error).split(".__init__")[-1]
        return None, ""

    assert message(optim) == message(torch.optim)


@pytest.mark.parametrize("name", IN_TORCH)
def test_pytorchs_own_error_inputs_raise_the_same(name: str) -> None:
    if not optim_db():
        pytest.skip("needs expecttest, which torch's test helpers import")
    for bad in optim_db()[name].optim_error_inputs_func("cpu", torch.float32):
        given = bad.optimizer_error_input
        if issubclass(bad.error_type, Warning):
            with pytest.warns(bad.error_type, match=bad.error_regex):
                ours(name, given.params, **given.kwargs)
        else:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                ours(name, given.params, **given.kwargs).step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{"state_dtype": torch.int32}, {"state_dtype": "float8"}, {"state_dtype": 3}, {"max_grad_norm": -1.0}],
    ids=str,
)
def test_wrong_options_of_ours_are_refused_by_name(name: str, options: Options) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ours(name, parameters(), **options)


@pytest.mark.parametrize("name", NAMES)
def test_bad_parameter_lists_are_refused(name: str) -> None:
    p = simple()
    for params in ([], p, [1.0], [{"params": {p}}], [p * 2]):
        with pytest.raises((TypeError, ValueError)):
            ours(name, params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours(name, [{"params": [p]}, {"params": [p]}])
    opt = ours(name, [{"params": p}])  # a bare tensor, as torchao's offload gives it
    opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_parameters_are_kept(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    opt = ours(name, model.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(3)).sum().backward()
    opt.step()
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert opt.param_groups[0]["params"][0] is model.weight


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_group_added_later_joins_in(name: str, options: Options) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(6, torch.float64)
        opt = make(name, params[:3], **options)
        train(opt, [row[:3] for row in grads[:2]], params[:3])
        opt.add_param_group({"params": params[3:6], "lr": 0.05})
        try:
            train(opt, [row[:6] for row in grads[2:4]], params[:6])
        except KeyError:
            if make is ours or name != "Adagrad":
                raise
            pytest.skip("the Adagrad of torch 2.6 makes no state for a group that is added")
        opt.add_param_group({"params": params[6:]})
        train(opt, grads[4:], params)
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_options_changed_between_steps_count_from_the_next_step(name: str, options: Options) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(6, torch.float64)
        opt = make(name, params, **options)
        for i, row in enumerate(grads):
            opt.param_groups[0]["lr"] = 0.1 / (i + 1)
            if "weight_decay" in opt.param_groups[0]:
                opt.param_groups[0]["weight_decay"] = 0.01 * i
            if "betas" in opt.param_groups[0] and i == 3:
                opt.param_groups[0]["betas"] = (0.5, 0.75, 0.8)[: len(RULES[name].defaults["betas"])]
            opt.param_groups[0]["maximize"] = i == 4
            train(opt, [row], params)
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_a_group_may_be_replaced(name: str) -> None:
    results = []
    for make in (ours, plain):
        params, grads = parameters(torch.float64), gradients(4, torch.float64, missing=False)
        opt = make(name, params[:4])
        train(opt, [row[:4] for row in grads[:2]], params[:4])
        opt.param_groups[0]["params"] = params[2:8]
        if name == "Adagrad":  # its state is made in the constructor
            other = make(name, params)
            for p in params[4:]:
                opt.state[p] = other.state[p]
        train(opt, [row[2:8] for row in grads[2:]], params[2:8])
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-12, atol=1e-14)


def test_duplicate_parameters_warn_and_are_stepped_twice_or_refused() -> None:
    for name in ("SGD", "Adam"):
        results = []
        for make in (ours, plain):
            p = simple(7, torch.float64)
            with pytest.warns(UserWarning, match="duplicate parameters"):
                opt = make(name, [p, p])

            def three(opt: Any = opt) -> None:
                for _ in range(3):
                    opt.step()

            results.append((outcome(three)[0], p.detach().clone()))
        (refused, us), (_, them) = results
        torch.testing.assert_close(us, simple(7, torch.float64).detach() if refused else them, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_zero_grad(name: str, set_to_none: bool) -> None:
    p = simple()
    opt = ours(name, [p])
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else not p.grad.any()


# -- copies ----------------------------------------------------------------------------------------------------------


def _pickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


def _saved(opt: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [_pickled, copy.deepcopy, _saved], ids=["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize(
    "extra", [{}, {"max_grad_norm": 0.5}, {"state_dtype": torch.float32}, {"state_dtype": "float32"}]
)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_copy_trains_on_to_the_same_values_on_its_own(
    name: str, options: Options, extra: Options, duplicate: Callable[[Any], Any]
) -> None:
    dtype = torch.bfloat16 if "state_dtype" in extra else torch.float32
    params, grads = parameters(dtype), gradients(6, dtype)
    opt = ours(name, params, **options, **extra)
    train(opt, grads[:3], params)
    twin = duplicate(opt)
    others = all_params(twin)
    assert type(twin) is type(opt)
    assert not {id(p) for p in others} & {id(p) for p in params}
    assert [p.requires_grad for p in others] == [p.requires_grad for p in params]
    middle = snapshot(twin)
    assert_same_bits(middle, snapshot(opt))
    train(opt, grads[3:], params)
    assert_same_bits(snapshot(twin), middle)
    train(twin, grads[3:], others)
    assert_same_bits(snapshot(twin), snapshot(opt))
    if "max_grad_norm" in extra:
        assert same(twin.last_grad_norm, opt.last_grad_norm)
    fresh = duplicate(ours(name, parameters(dtype), **options, **extra))  # before its first step
    train(fresh, grads[:3])
    assert_same_bits(snapshot(fresh), middle)


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_a_copy_keeps_to_the_grad_scalers_protocol(name: str) -> None:
    theirs = copy.deepcopy(getattr(torch.optim, name)([simple()], fused=True))
    mine = copy.deepcopy(ours(name, [simple()], fused=True))
    want = getattr(theirs, "_step_supports_amp_scaling", False)
    assert getattr(mine, "_step_supports_amp_scaling", False) in (want, True)


# -- names -----------------------------------------------------------------------------------------------------------


def test_other_names_are_forwarded_to_torch_optim() -> None:
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.LBFGS is torch.optim.LBFGS
    assert optim.Optimizer is torch.optim.Optimizer
    assert optim.swa_utils is torch.optim.swa_utils
    opt = optim.SGD([simple()], lr=0.1)
    optim.lr_scheduler.StepLR(opt, 1)
    from fusedopt.torch import LBFGS, Adam

    assert LBFGS is torch.optim.LBFGS
    assert Adam is optim.Adam
    assert Adam is not torch.optim.Adam
    with pytest.raises(AttributeError, match="NoSuchOptimizer"):
        _ = optim.NoSuchOptimizer
    missing = {n for n in dir(torch.optim) if not n.startswith("_")} - set(dir(optim))
    assert not missing, f"not listed by dir(): {missing}"
    assert all(n in optim.__all__ for n in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_documented_with_our_options(name: str) -> None:
    doc = inspect.getdoc(getattr(optim, name)) or ""
    assert len(doc) > 100
    assert "max_grad_norm" in doc
    assert "state_dtype" in doc


@pytest.mark.parametrize("name", NAMES)
def test_no_warning_is_given_in_ordinary_use(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = ours(name, parameters(), **({"foreach": True} if accepts(name, "foreach") else {}))
        train(opt, gradients(2))
        opt.load_state_dict(opt.state_dict())
        train(opt, gradients(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_zero_lr_and_zero_gradients_makes_all_state_and_moves_nothing(name: str) -> None:
    """torch.distributed.checkpoint initialises an optimizer that way."""
    for lr in (0.0, torch.tensor(0.0)):
        params = parameters()
        opt = ours(name, params, lr=lr)
        train(opt, [[torch.zeros_like(p) for p in params]])
        assert all(same(p.detach(), q.detach()) for p, q in zip(params, parameters(), strict=True))
        assert all(len(opt.state[p]) > 0 for p in params) or name == "SGD"
