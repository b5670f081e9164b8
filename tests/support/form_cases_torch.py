"""Shared by the torch tests of forms: parameters, gradients and optimizers of a case, a comparison. No tests here."""

from typing import Any

import torch

import fusedopt.torch as optim
from form_cases import Case
from fusedopt import forms
from torch_compare import all_params

BOTH = {"ema_decay": 0.9, "l1": 0.01}
DTYPES = {name: getattr(torch, name) for name in forms.FLOATS}


def filled(shape: Any, dtype: str, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(DTYPES[dtype])


def wrapped(case: Case, data: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that takes the case's gradients."""
    p = torch.nn.Parameter(data)
    if case.param != case.grad:
        p.grad_dtype = None
    return p


def parameter(case: Case, shape: Any = (130,), seed: int = 0) -> torch.nn.Parameter:
    return wrapped(case, filled(shape, case.param, seed))


def made(case: Case, params: Any, **more: Any) -> Any:
    return getattr(optim, case.rule.name)(params, **{**case.options, **more})


def stepped(opt: Any, case: Case, steps: Any, skip: tuple[int, ...] = ()) -> None:
    for k in steps:
        for i, p in enumerate(all_params(opt)):
            if case.param != case.grad:
                p.grad_dtype = None
            p.grad = None if i in skip else filled(p.shape, case.grad, 100 * k + i)
        opt.step()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str = "") -> None:
    """The same bits, NaN equal to NaN."""
    assert a.keys() == b.keys(), f"{what}: {sorted(a.keys() ^ b.keys())}"
    for key, x in a.items():
        y = b[key]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{what} {key}"
        wide = x if not x.is_floating_point() else torch.nan_to_num(x.double(), nan=1234.5)
        other = y if not y.is_floating_point() else torch.nan_to_num(y.double(), nan=1234.5)
        assert torch.equal(wide, other), f"{what} {key}: {int((wide != other).sum())} of {x.numel()} differ"
