"""Comparisons of two optimizers in the torch tests: bits, distances, errors against float64. Cases: torch_cases.

Every helper raises AssertionError; test_torch_mutants.py applies them to wrong rules.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fusedopt.rules import RULES
from fusedopt.torch import FallbackWarning
from torch_cases import SIXTEEN, Grads, gradients, numeric_options, ours, parameters, plain

Make = Callable[..., Any]  # make(name, params, **options) -> optimizer
Snapshot = dict[str, torch.Tensor]


def all_params(opt: Any) -> list[torch.Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt: Any, grads: Grads, params: Sequence[torch.Tensor] | None = None) -> None:
    """One step per row of gradients; checks that no gradient changes."""
    params = all_params(opt) if params is None else params
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()
        for p, g in zip(params, row, strict=True):
            assert (p.grad is None) == (g is None)
            assert g is None or same(p.grad, g), "the step wrote into a gradient"


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal dtype, shape and values; NaN equals NaN, and the sign of zero is ignored."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def snapshot(opt: Any, params: Sequence[torch.Tensor] | None = None) -> Snapshot:
    """Copies of all parameters and states, under names like `3.exp_avg`."""
    out: Snapshot = {}
    for i, p in enumerate(all_params(opt) if params is None else params):
        out[f"{i}.param"] = p.detach().clone()
        for key, value in opt.state.get(p, {}).items():
            if value is not None:
                out[f"{i}.{key}"] = torch.as_tensor(value).detach().clone()
    return out


def assert_same_bits(a: Snapshot, b: Snapshot) -> None:
    assert a.keys() == b.keys(), f"only in one of them: {sorted(a.keys() ^ b.keys())}"
    for key in a:
        assert a[key].dtype == b[key].dtype, f"{key}: {a[key].dtype} against {b[key].dtype}"
        assert same(a[key], b[key]), f"{key}: {_worst(a[key], b[key])}"


def assert_close(a: Snapshot, b: Snapshot, rtol: float, atol: float, types: bool = True) -> None:
    assert a.keys() == b.keys(), f"only in one of them: {sorted(a.keys() ^ b.keys())}"
    for k in a:
        torch.testing.assert_close(
            a[k], b[k], rtol=rtol, atol=atol, equal_nan=True, check_dtype=types, msg=lambda m, k=k: f"{k}: {m}"
        )


def _worst(a: torch.Tensor, b: torch.Tensor) -> str:
    gap = (a.double() - b.double()).abs().flatten()
    i = int(gap.argmax())
    return (
        f"{int((gap != 0).sum())} of {gap.numel()} differ, most at {i}: {a.flatten()[i]!r} against {b.flatten()[i]!r}"
    )


def distances(a: Snapshot, b: Snapshot) -> dict[str, float]:
    """The largest absolute difference per kind of tensor (param, exp_avg, ...)."""
    assert a.keys() == b.keys(), f"only in one of them: {sorted(a.keys() ^ b.keys())}"
    out: dict[str, float] = {}
    for key in a:
        assert a[key].dtype == b[key].dtype, f"{key}: {a[key].dtype} against {b[key].dtype}"
        gap = (a[key].double() - b[key].double()).abs()
        assert not gap.isnan().any(), f"{key}: NaN"
        kind = key.split(".", 1)[1]
        out[kind] = max(out.get(kind, 0.0), float(gap.max()) if gap.numel() else 0.0)
    return out


def largest(a: Snapshot) -> dict[str, torch.Tensor]:
    """The largest magnitude per kind of tensor, in its dtype."""
    out: dict[str, torch.Tensor] = {}
    for key, value in a.items():
        kind = key.split(".", 1)[1]
        if value.numel():
            top = value.abs().max()
            out[kind] = max(out[kind], top) if kind in out else top
    return out


def ulp(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The distance from |x| to the next larger value of the dtype, in float64."""
    info = torch.finfo(dtype or x.dtype)
    _, exponent = torch.frexp(x.detach().double().abs().clamp_min(info.tiny))
    return info.eps * torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1)


def kinds(opt: Any) -> set[torch.dtype]:
    """The dtypes of the array states (`step` and `mu_product` are scalars)."""
    return {
        v.dtype
        for s in opt.state.values()
        for k, v in s.items()
        if isinstance(v, torch.Tensor) and k not in ("step", "mu_product")
    }


# -- against torch's plain loop -------------------------------------------------------------------------------------


def trained(
    make: Make, name: str, options: dict[str, Any], dtype: torch.dtype, grads: Grads, shapes: Any = None
) -> Snapshot:
    params = parameters(dtype, **({} if shapes is None else {"shapes": shapes}))
    opt = make(name, params, **options)
    train(opt, grads, params)
    return snapshot(opt, params)


def check_equals_plain(
    name: str, options: dict[str, Any], dtype: torch.dtype, make: Make = ours, steps: int = 6
) -> None:
    """Bit-identical to torch's plain loop, in parameters and state, after several steps."""
    grads = gradients(steps, dtype)
    assert_same_bits(trained(make, name, options, dtype, grads), trained(plain, name, options, dtype, grads))


def fused(name: str, params: Any, **options: Any) -> Any:
    return getattr(torch.optim, name)(params, fused=True, **options)


def check_within_torchs_spread(
    name: str, options: dict[str, Any], dtype: torch.dtype, make: Make = ours, steps: int = 6, shapes: Any = None
) -> None:
    """At most as far from torch's plain loop as torch's fused step is (or one ulp of the largest element)."""
    grads = gradients(steps, dtype, **({} if shapes is None else {"shapes": shapes}))
    us, loop, them = (trained(m, name, options, dtype, grads, shapes) for m in (make, plain, fused))
    ours_off, theirs_off, top = distances(us, loop), distances(them, loop), largest(loop)
    for kind, gap in ours_off.items():
        allowed = max(theirs_off[kind], float(ulp(top[kind])) if kind in top else 0.0)
        assert gap <= allowed, f"{kind}: {gap:g} from torch's plain loop, torch's fused path only {theirs_off[kind]:g}"


def check_as_exact_as_plain(
    name: str,
    options: dict[str, Any],
    make: Make = ours,
    steps: int = 12,
    shapes: Any = None,
    slack: float = 1.0,
) -> None:
    """In float32: as close to the float64 trajectory as torch's plain loop, to within `slack` ulps of the largest."""
    grads = gradients(steps, torch.float32, **({} if shapes is None else {"shapes": shapes}))
    wide: Grads = [[None if g is None else g.double() for g in row] for row in grads]
    us, loop = (trained(m, name, options, torch.float32, grads, shapes) for m in (make, plain))
    params = [torch.nn.Parameter(p.detach().double()) for p in parameters(torch.float32, **_shapes(shapes))]
    exact = plain(name, params, **options)
    train(exact, wide, params)
    truth, top = snapshot(exact, params), largest(loop)
    for key in us.keys() | loop.keys():
        assert (key in us) == (key in loop), f"{key}: only in one of them"
        assert us[key].dtype == loop[key].dtype, f"{key}: {us[key].dtype} against {loop[key].dtype}"
    for key, t in truth.items():
        if not t.numel():
            continue
        kind = key.split(".", 1)[1]
        mine, theirs = ((s[key].double() - t.double()).abs().max() for s in (us, loop))
        room = slack * float(ulp(top[kind], torch.float32))
        assert float(mine) <= float(theirs) + room, f"{key}: off by {mine:g}, torch's plain loop by {theirs:g}"


def _shapes(shapes: Any) -> dict[str, Any]:
    return {} if shapes is None else {"shapes": shapes}


# -- against the float64 reference ----------------------------------------------------------------------------------


def reference_step(
    name: str, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """One step of the rule's reference from these values, in long double, rounded to float64; with the parameter as
    `param`."""

    def wider(t: torch.Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    rule, options = RULES[name], numeric_options(name, group)
    wide = {k: wider(v) for k, v in state.items() if v is not None}
    if "step" in rule.scalars:
        step = int(wide.pop("step", 0)) + 1
    else:
        wide.pop("step", None)
        step = 2 if "momentum_buffer" in wide else 1
    for key in rule.states(options):
        fill = group.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0
        wide.setdefault(key, np.full(tuple(param.shape), fill, np.longdouble))
    for key in rule.scalars:
        if key != "step":
            wide.setdefault(key, np.ones((), np.longdouble))
    p = wider(param)
    rule.reference(p, wider(grad), wide, step, **options)
    return {key: np.asarray(x).astype(np.float64) for key, x in {"param": p, **wide}.items()}


def check_one_step(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    warmup: int,
    make: Make = ours,
    shapes: Any = ((), (4099,), (3, 5)),
) -> None:
    """One step from the same state: at most one ulp farther from the float64 reference than torch's own step.

    Ulps are those of the larger of parameter and update (of a state: of its old and new value). The maximum error is
    compared with torch's; in addition 6% of the elements may be worse, since a few correct roundings differ by two ulps
    where torch, whose sqrt is not correctly rounded on every CPU, happens to be exact. In float64 the reference is
    hardly more exact than the step where long double is no wider, so the tolerance is four ulps.
    """
    params = parameters(torch.float64, shapes)
    first = plain(name, params, **options)
    train(first, gradients(warmup, torch.float64, shapes, seed=2, missing=False), params)
    start = snapshot(first, params)
    grads = gradients(1, dtype, shapes, seed=3, missing=False)[0]
    results = []
    for maker in (make, plain):
        mine = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
        opt = maker(name, mine, **options)
        if warmup:
            opt.load_state_dict(_narrow(first.state_dict(), dtype))
        before = snapshot(opt, mine)
        train(opt, [list(grads)], mine)
        results.append((before, snapshot(opt, mine)))
    assert warmup == 0 or start.keys() == results[0][0].keys()
    (before, us), (_, them) = results
    assert us.keys() == them.keys(), f"only in one of them: {sorted(us.keys() ^ them.keys())}"
    errors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for i, grad in enumerate(grads):
        assert grad is not None
        state = {k.split(".", 1)[1]: v for k, v in before.items() if k.startswith(f"{i}.") and k != f"{i}.param"}
        truth = reference_step(name, opt.param_groups[0], before[f"{i}.param"], grad, state)
        for key, exact in truth.items():
            full = f"{i}.{key}"
            if full in us and us[full].numel() and key not in RULES[name].scalars:
                right, old = torch.from_numpy(np.asarray(exact)), before.get(full)
                errors.setdefault(key, []).append(_errors(full, us[full], them[full], right, old))
    room = 4.0 if dtype == torch.float64 else 1.0
    for key, pairs in errors.items():
        mine, theirs = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        worst = float(mine.max())
        assert worst <= float(theirs.max()) + room, (
            f"{key}: off by {worst:.3g} ulps, torch by {float(theirs.max()):.3g}"
        )
        worse = float((mine > theirs + room).double().mean())
        assert worse <= 0.06, f"{key}: {worse:.1%} of the elements are more than {room:g} ulps worse than torch's"


def assert_neighbour(got: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """``got``, in 16 bits, is one of the two neighbours of ``exact``, or ``exact`` if it is representable."""
    near = exact.to(got.dtype)
    inner = torch.where(near.abs() > exact.abs(), near.view(torch.int16) - 1, near.view(torch.int16))  # towards zero
    whole = inner.view(got.dtype).to(exact.dtype) == exact
    away = got.view(torch.int16).int() - inner.int()
    wrong = ~((away == 0) | ((away == 1) & ~whole) | (exact.isnan() & got.isnan()))
    if wrong.any():
        i = int(wrong.flatten().int().argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} are no neighbours, first {got.flatten()[i].item()!r} "
            f"of {exact.flatten()[i].item()!r}"
        )


def _narrow(state_dict: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy of the state in another dtype; `step` stays float32."""
    state = {
        i: {k: v.to(torch.float32 if k in ("step", "mu_product") else dtype, copy=True) for k, v in s.items()}
        for i, s in state_dict["state"].items()
    }
    return {"state": state, "param_groups": state_dict["param_groups"]}


def _errors(
    key: str, us: torch.Tensor, them: torch.Tensor, truth: torch.Tensor, old: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The errors of both, in ulps of the larger of value and update."""
    assert (us.dtype, us.shape) == (them.dtype, them.shape), f"{key}: {us.dtype} {tuple(us.shape)}"
    was = torch.zeros_like(truth) if old is None else old.double()
    unit = ulp(torch.stack([was.abs(), (truth - was).abs(), truth.abs()]).amax(0), us.dtype)
    known = truth.abs() <= torch.finfo(us.dtype).max  # beyond the type's range there is no error to speak of
    assert not us.double()[known].isnan().any(), f"{key}: NaN"
    mine, theirs = (((x.double() - truth).abs() / unit).where(known, 0.0) for x in (us, them))
    return mine, torch.where(theirs.isnan(), torch.inf, theirs)  # torch's f16 Adam divides 0 by 0 where eps vanished


def check_steps_round_once(name: str, opt: Any, grads: Grads) -> None:
    """Every step in a 16-bit format is the float32 step from the same values, rounded once when stored: to nearest, or,
    for a state with a sequence of random numbers, to one of the two neighbours."""
    params = all_params(opt)
    for row in grads:
        before = snapshot(opt, params)
        twins = [torch.nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in params]
        groups = []
        for group in opt.param_groups:
            mine = [twins[i] for i, p in enumerate(params) if any(p is q for q in group["params"])]
            groups.append({**group, "params": mine, "state_dtype": None})
        wide = ours(name, groups)
        for p, twin in zip(params, twins, strict=True):
            if p in opt.state:
                state = {k: v for k, v in opt.state[p].items() if k != "stream"}
                wide.state[twin] = {k: v if v is None else v.to(torch.float32, copy=True) for k, v in state.items()}
        train(opt, [row], params)
        train(wide, [[None if g is None else g.float() for g in row]], twins)
        after, want = snapshot(opt, params), snapshot(wide, twins)
        streams = {k.split(".")[0] for k in after if k.endswith(".stream")}
        for key, value in want.items():
            if (
                key in after
                and after[key].dtype in SIXTEEN
                and not key.endswith(".param")
                and key.split(".")[0] in streams
            ):
                assert_neighbour(after[key], value, key)
                want[key] = after[key]
        own = {"stream"} if "step" in RULES[name].scalars else {"stream", "step"}  # there for the random numbers
        kept = {k: v for k, v in after.items() if k.split(".")[1] not in own}
        want = {k: v for k, v in want.items() if k.split(".")[1] not in own}
        assert_same_bits(kept, {k: v.to(kept[k].dtype) if k in kept else v for k, v in want.items()})
        for i, g in enumerate(row):
            assert g is not None or same(after[f"{i}.param"], before[f"{i}.param"]), f"{i}: moved without a gradient"


# -- warnings, refusals ---------------------------------------------------------------------------------------------


@contextmanager
def falling_back_is_fine() -> Iterator[None]:
    """For tests of values, where either path may have computed them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@contextmanager
def count_fallbacks(expected: int) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    seen = [w for w in seen if "Sparse invariant checks" not in str(w.message)]  # torch's own, once in a process
    others = [w for w in seen if not issubclass(w.category, FallbackWarning)]
    assert not others, [str(w.message) for w in others]
    assert len(seen) == expected, f"{len(seen)} warnings instead of {expected}: {[str(w.message) for w in seen]}"
    assert all(len(str(w.message)) > 20 for w in seen), "a warning has to say why"


def outcome(action: Callable[[], Any]) -> tuple[type[BaseException] | None, Any]:
    """(None, result) or (type of the exception, None), to compare two calls."""
    try:
        with falling_back_is_fine():
            return None, action()
    except Exception as error:
        return type(error), None


def run_apart(script: str, timeout: float = 60) -> str:
    """Runs in a separate process, so that a hang or crash fails only this test."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout
