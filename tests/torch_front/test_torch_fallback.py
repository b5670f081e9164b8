"""Fallbacks and unusual layouts: results are right or refused, never silently wrong, with one warning."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_cases import IN_TORCH, NAMES, TORCH_FUSED, accepts, gradients, ours, parameters, plain, simple, some_cases
from torch_compare import (
    assert_close,
    assert_same_bits,
    count_fallbacks,
    falling_back_is_fine,
    outcome,
    snapshot,
    train,
)

Options = dict[str, Any]


class Tagged(torch.Tensor):
    """A subclass of Tensor, whose operations may do anything."""


def sparse(p: torch.Tensor) -> torch.Tensor:
    """With two sparse dimensions: kernels take one."""
    places = torch.tensor([[0, 2, 0], [1, 2, 1]])
    return torch.sparse_coo_tensor(places, torch.ones(3, dtype=p.dtype), p.shape, check_invariants=True)


def _sparse(p: torch.nn.Parameter) -> torch.Tensor:
    p.grad = sparse(p)
    return p


def _complex(p: torch.nn.Parameter) -> torch.Tensor:
    q = torch.nn.Parameter(torch.complex(p.detach(), p.detach().flip(0)))
    q.grad = torch.ones_like(q) * (1 + 2j)
    return q


def _subclass(p: torch.nn.Parameter) -> torch.Tensor:
    q = p.detach().as_subclass(Tagged).requires_grad_()
    q.grad = torch.ones_like(q)
    return q


def _subclass_grad(p: torch.nn.Parameter) -> torch.Tensor:
    p.grad = torch.ones_like(p).as_subclass(Tagged)
    return p


FOREIGN: dict[str, Callable[[Any], torch.Tensor]] = {
    "sparse gradient": _sparse,
    "complex": _complex,
    "subclass": _subclass,
    "subclass gradient": _subclass_grad,
}
HANDLES_SPARSE = ("SGD", "Adagrad")


def built(kind: str) -> torch.Tensor:
    return FOREIGN[kind](torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)))


def kinds_for(name: str) -> list[str]:
    return [k for k in FOREIGN if k != "sparse gradient" or name in HANDLES_SPARSE]


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in IN_TORCH for k in kinds_for(n)])
def test_foreign_tensors_take_torchs_path_with_one_warning(name: str, kind: str) -> None:
    results = []
    for make in (ours, plain):
        odd, normal = built(kind), simple(9, torch.float64)
        opt = make(name, [normal, odd])
        with count_fallbacks(1 if make is ours else 0):
            for _ in range(3):
                opt.step()
        results.append(snapshot(opt, [normal, odd.detach()]) | {"odd": odd.detach().clone()})
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in IN_TORCH for k in kinds_for(n)])
def test_hooks_and_closure_run_once_on_torchs_path_too(name: str, kind: str) -> None:
    odd, seen = built(kind), []
    opt = ours(name, [odd])
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    with falling_back_is_fine():
        assert opt.step(lambda: seen.append("closure") or 1.5) == 1.5
    assert seen == ["pre", "closure", "post"]
    version = odd._version
    with falling_back_is_fine():
        opt.step()
    assert odd._version > version


@pytest.mark.parametrize("extra", [{"max_grad_norm": 1.0}, {"state_dtype": "float64"}], ids=str)
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in IN_TORCH for k in kinds_for(n)])
def test_foreign_tensors_with_an_option_of_ours_are_refused_before_anything_is_written(
    name: str, kind: str, extra: Options
) -> None:
    odd, normal = built(kind), simple(9, torch.float64)
    before = [odd.detach().clone(), normal.detach().clone()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            opt = ours(name, [normal, odd], **extra)
        except ValueError as error:  # a refusal in the constructor is as good
            assert next(iter(extra)) in str(error)  # noqa: PT017
            return
        for _ in range(3):  # later calls must be refused, too
            with pytest.raises(RuntimeError, match=next(iter(extra))):
                opt.step()
    assert torch.equal(odd.detach(), before[0])
    assert torch.equal(normal.detach(), before[1])


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("name", TORCH_FUSED)
def test_foreign_tensors_with_scaled_gradients_are_refused(name: str, earlier: int) -> None:
    """Also after successful steps without a scale."""
    odd, normal = built("subclass gradient"), simple(9, torch.float64)
    opt = ours(name, [normal, odd], fused=True)
    with falling_back_is_fine():
        for _ in range(earlier):
            opt.step()
    before = [odd.detach().clone(), normal.detach().clone()]
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(2):
        with falling_back_is_fine(), pytest.raises(RuntimeError, match=r"(?i)scale"):
            opt.step()
        assert torch.equal(odd.detach(), before[0])
        assert torch.equal(normal.detach(), before[1])


@pytest.mark.parametrize("name", IN_TORCH)
def test_clipping_switched_on_after_a_fallback_is_refused(name: str) -> None:
    odd, normal = built("complex"), simple(9, torch.float64)
    opt = ours(name, [normal, odd])
    with falling_back_is_fine():
        opt.step()
    before = [odd.detach().clone(), normal.detach().clone()]
    opt.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        opt.step()
    assert torch.equal(odd.detach(), before[0])
    assert torch.equal(normal.detach(), before[1])


@pytest.mark.parametrize("name", [n for n in IN_TORCH if n not in HANDLES_SPARSE])
def test_a_sparse_gradient_that_torch_refuses_is_refused(name: str) -> None:
    p = built("sparse gradient")
    before = p.detach().clone()
    with falling_back_is_fine(), pytest.raises(RuntimeError):
        ours(name, [p]).step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in IN_TORCH])
def test_a_rule_that_torch_lacks_refuses_foreign_tensors(name: str) -> None:
    for kind in FOREIGN:
        p = built(kind)
        before = p.detach().clone()
        with pytest.raises((RuntimeError, TypeError)):
            ours(name, [p]).step()
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_tensor_may_turn_foreign_and_back(name: str) -> None:
    results = []
    for make in (ours, plain):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))
        opt = make(name, [p])
        with falling_back_is_fine():
            for step in range(6):
                g = torch.full_like(p, 0.5 + step)
                p.grad = g.as_subclass(Tagged) if step in (2, 3) else g
                opt.step()
        results.append(snapshot(opt))
    assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", IN_TORCH)
def test_differentiable_steps_are_torchs(name: str) -> None:
    results = []
    for module in (ours, plain):
        leaf = torch.linspace(0.5, 1, 5, dtype=torch.float64).requires_grad_()
        q = leaf.clone()
        opt = module(name, [q], differentiable=True)
        q.grad = (leaf * 2).clone()
        with falling_back_is_fine():
            opt.step()
        q.sum().backward()
        results.append((q.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in IN_TORCH if accepts(n, "capturable")])
def test_capturable_ends_as_in_torch(name: str) -> None:
    ends = []
    for make in (ours, plain):
        p = simple()
        ends.append((outcome(lambda p=p, make=make: make(name, [p], capturable=True).step())[0], p.detach()))
    assert ends[0][0] is ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_do_not_crash(name: str) -> None:
    ends = []
    for make in (ours, plain):
        p = torch.nn.Parameter(torch.empty(3, 4, device="meta"))
        p.grad = torch.empty(3, 4, device="meta")
        ends.append(outcome(lambda p=p, make=make: make(name, [p]).step())[0])
    assert ends[0] is ends[1] or (name not in IN_TORCH and ends[0] is RuntimeError)


# -- layouts ---------------------------------------------------------------------------------------------------------


def _reference(name: str, options: Options, value: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    p = torch.nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
    opt = ours(name, [p], **options)
    train(opt, [[g.clone(memory_format=torch.contiguous_format)] for g in grads], [p])
    return p.detach()


def _transposed(g: torch.Tensor) -> torch.Tensor:
    return g.t().contiguous().t()


def _expanded(g: torch.Tensor) -> torch.Tensor:
    return g[:1].expand(g.shape)


def _every_second(g: torch.Tensor) -> torch.Tensor:
    return torch.stack([g, torch.full_like(g, 9.0)], -1)[..., 0]


def _negated(g: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(g.neg())


def _offset(g: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=g.dtype), g.flatten()])[1:].view(g.shape)


LAYOUTS = [_transposed, _expanded, _every_second, _negated, _offset]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_gradient_may_be_laid_out_otherwise_than_its_parameter(
    name: str, options: Options, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """torch's fused path updates the wrong elements then."""
    if layout is _negated and name not in IN_TORCH:
        pytest.skip("refused: torch has no step for it to fall back on")
    grads = [layout(torch.randn(37, 23, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    value = torch.randn(37, 23, generator=torch.Generator().manual_seed(9))
    p = torch.nn.Parameter(value.clone())
    opt = ours(name, [p], **options)
    with falling_back_is_fine():
        for g in grads:
            p.grad, kept = g, g.clone()
            opt.step()
            assert torch.equal(p.grad, kept)
    assert_close({"p": p.detach()}, {"p": _reference(name, options, value, grads)}, rtol=1e-5, atol=1e-6)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda b: b[:, ::2],
    "rows": lambda b: b[1:-1:3],
    "both": lambda b: b[2::2, 1:-3:3],
    "transposed": lambda b: b.t(),
    "block": lambda b: b[3:9, 4:11],
    "diagonal": lambda b: b.diagonal(),
    "one": lambda b: b[5, 5],
    "last": lambda b: b[-1, -1:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_nothing_outside_a_strided_parameter_is_written(name: str, options: Options, view: str) -> None:
    """torch's fused path writes outside the tensor."""
    base = torch.randn(24, 25, generator=torch.Generator().manual_seed(0))
    outside = base.clone()
    p = VIEWS[view](base).detach().requires_grad_()
    value = p.detach().clone()
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    opt = ours(name, [p], **options)
    with falling_back_is_fine():
        train(opt, [[g] for g in grads], [p])
    VIEWS[view](outside).copy_(p.detach())
    assert torch.equal(base, outside)
    assert_close({"p": p.detach().clone()}, {"p": _reference(name, options, value, grads)}, rtol=1e-5, atol=1e-6)
    fresh = plain(name, [torch.nn.Parameter(value.clone())], **options)
    fresh.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("param_last", [False, True])
@pytest.mark.parametrize(("name", "options"), some_cases())
def test_channels_last(name: str, options: Options, param_last: bool, grad_last: bool) -> None:
    form = {True: torch.channels_last, False: torch.contiguous_format}
    value = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    grads = [torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(1, 4)]
    p = torch.nn.Parameter(value.to(memory_format=form[param_last], copy=True))
    other = plain(name, [torch.nn.Parameter(p.detach().clone())], **options)
    opt = ours(name, [p], **options)
    for g in grads:
        p.grad = g.to(memory_format=form[grad_last])
        opt.step()
        other.param_groups[0]["params"][0].grad = p.grad.clone()
        other.step()
    assert_close({"p": p.detach()}, {"p": _reference(name, options, value, grads)}, rtol=1e-5, atol=1e-6)
    assert p.is_contiguous(memory_format=form[param_last])
    for mine, theirs in zip(opt.state[p].values(), next(iter(other.state.values())).values(), strict=True):
        # torch's SGD clones the gradient, and so its layout; ours is the parameter's
        assert mine.stride() == (p if name == "SGD" else theirs).stride()
    opt.load_state_dict(other.state_dict())
    opt.step()


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_expanded_and_overlapping_parameters_are_right_or_refused(name: str, options: Options) -> None:
    views = {
        "expanded": lambda b: b[:3].expand(4, 3),
        "overlapping": lambda b: b.as_strided((3, 3), (2, 1)),
        "windows": lambda b: b.unfold(0, 4, 2),
    }
    for view in views.values():
        ends = []
        for make in (ours, plain):
            base = torch.linspace(-1, 1, 12, dtype=torch.float64)
            p = view(base).detach().requires_grad_()
            p.grad = torch.ones(p.shape, dtype=torch.float64)
            opt = make(name, [p], **options)
            ends.append((outcome(opt.step)[0], base))
        (refused, us), (_, them) = ends
        want = torch.linspace(-1, 1, 12, dtype=torch.float64) if refused else them
        torch.testing.assert_close(us, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_parameters_that_share_memory_are_right_or_refused(name: str, options: Options) -> None:
    pairs = {
        "the same": lambda b: (b[:], b[:]),
        "shifted": lambda b: (b[:-1], b[1:]),
        "one within the other": lambda b: (b, b[100:200]),
        "interleaved": lambda b: (b[::2], b[1::2]),
    }
    for key, pair in pairs.items():
        ends = []
        for make in (ours, plain):
            base = torch.linspace(-1, 1, 1000, dtype=torch.float64)
            params = [v.detach().requires_grad_() for v in pair(base)]
            for i, p in enumerate(params):
                p.grad = torch.full(p.shape, 0.5 + i, dtype=torch.float64)
            opt = make(name, params, **options)
            ends.append((outcome(lambda o=opt: [o.step() for _ in range(3)])[0], base))
        (refused, us), (_, them) = ends
        assert refused is None or key != "interleaved" or name not in IN_TORCH, "disjoint elements must work"
        want = torch.linspace(-1, 1, 1000, dtype=torch.float64) if refused else them
        torch.testing.assert_close(us, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), some_cases())
def test_a_gradient_that_is_the_parameters_own_memory_is_right_or_refused(name: str, options: Options) -> None:
    """Correct means: as with a copy of it, or as in torch."""
    aliases = {
        "itself": (lambda b: b[:800], lambda b: b[:800]),
        "shifted": (lambda b: b[:800], lambda b: b[1:801]),
        "behind": (lambda b: b[16:816], lambda b: b[:800]),
        "reversed": (lambda b: b[:900].view(30, 30), lambda b: b[:900].view(30, 30).t()),
    }
    for key, (param, grad) in aliases.items():
        ends = []
        for way in ("ours", "copied", "torch"):
            base = torch.linspace(-1, 1, 1000, dtype=torch.float64)
            p = param(base).detach().requires_grad_()
            p.grad = grad(base).clone() if way == "copied" else grad(base)
            opt = (plain if way == "torch" else ours)(name, [p], **options)
            refused = outcome(opt.step)[0]
            ends.append(base if refused is None else torch.linspace(-1, 1, 1000, dtype=torch.float64))
            assert way != "copied" or refused is None
        us, copied, them = ends
        start = torch.linspace(-1, 1, 1000, dtype=torch.float64)
        assert any(torch.allclose(us, want, rtol=1e-12, atol=1e-14) for want in (copied, them, start)), key


def test_two_parameters_may_share_one_gradient() -> None:
    g, results = torch.linspace(-1, 1, 50), []
    for shared in (True, False):
        params = [torch.nn.Parameter(torch.ones(50)) for _ in range(2)]
        for p in params:
            p.grad = g if shared else g.clone()
        opt = ours("Adam", params)
        opt.step()
        results.append(snapshot(opt))
    assert_same_bits(*results)


def test_state_shared_between_parameters_is_right_or_refused() -> None:
    ends = []
    for make in (ours, plain):
        p, q = simple(64, torch.float64), simple(64, torch.float64, 1)
        opt = make("SGD", [p, q], momentum=0.9)
        opt.step()
        opt.state[q]["momentum_buffer"] = opt.state[p]["momentum_buffer"]
        middle = torch.cat([p.detach(), q.detach()])
        refused = outcome(opt.step)[0]
        ends.append((refused, middle, torch.cat([p.detach(), q.detach()])))
    (refused, middle, us), (_, _, them) = ends
    torch.testing.assert_close(us, middle if refused else them, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TORCH_FUSED)
def test_fused_false_is_a_wish_and_not_worth_a_warning(name: str) -> None:
    with count_fallbacks(0):
        opt = ours(name, parameters(), fused=False)
        train(opt, gradients(2))
    with pytest.raises((RuntimeError, ValueError), match="max_grad_norm"):
        train(ours(name, parameters(), fused=False, max_grad_norm=1.0), gradients(1))


@pytest.mark.parametrize("name", NAMES)
def test_steps_under_no_grad_and_inference_mode(name: str) -> None:
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        p = simple()
        opt = ours(name, [p])
        opt.step()
        with mode():
            opt.step()
        results.append(snapshot(opt))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_a_first_step_beside_overlapping_parameters_still_begins_the_buffer() -> None:
    results = []
    for make in (ours, plain):
        memory = torch.arange(6.0)
        params = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:]), torch.nn.Parameter(torch.ones(5))]
        opt = make("SGD", params, lr=0.5, momentum=0.5, dampening=0.25)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 2.0)
            with falling_back_is_fine():
                opt.step()
        results.append([p.detach().clone() for p in params])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_fallback_for_several_reasons_keeps_the_order_of_the_parameters() -> None:
    """A gradient that is another parameter tells the order: the first is updated before the second reads it."""
    results = []
    for make in (ours, plain):
        params = [torch.nn.Parameter(torch.full((4,), k)) for k in (1.0, 2.0)]
        opt = make("SGD", params, lr=0.1)
        with falling_back_is_fine():
            for i in range(3):
                first = torch.full((4,), 3.0)
                params[0].grad = first if i < 2 else first.to_sparse()  # a reason of its own, that comes later
                params[1].grad = params[0].detach() if i == 2 else torch._neg_view(first.neg())
                opt.step()
        results.append(snapshot(opt, params))
    assert_close(*results, rtol=1e-6, atol=1e-7)
