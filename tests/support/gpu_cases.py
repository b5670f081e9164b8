"""Shared by the tests on a GPU: availability, test values, runs on CPU and GPU, bit comparison. No tests here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from form_cases import Case, Options
from form_cases_torch import DTYPES, made, wrapped
from fusedopt import forms
from fusedopt.bench.gpu import missing
from fusedopt.rules import RULES
from fusedopt.torch._engine import engine_of
from helpers import SPECIAL
from torch_cases import generator, values
from torch_compare import all_params

DEVICE = "cuda"
MISSING = missing()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=f"needs a GPU: {MISSING}")]

# Around a block of codes and a chunk of 16384, nothing, and a length that is a multiple of neither.
LENGTHS = (0, 1, 63, 64, 65, 16383, 16384, 16385, 100_003)
BASE = LENGTHS[-1]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Plain(Case):
    """A rule in torch's form: one dtype throughout, 16-bit states rounded to nearest."""

    @property
    def kept(self) -> Options:
        return {}

    def __str__(self) -> str:
        return f"plain-{super().__str__()}"


def plain(name: str, dtype: str = "float32", variant: tuple[str, ...] = ()) -> Case:
    return Plain(RULES[name], variant, dtype, dtype, forms.Form(dtype, None, False, False))


PLAIN = [plain(name, dtype, variant) for name in RULES for variant in RULES[name].variants for dtype in DTYPES]


@cache
def _numbers(n: int, dtype: str, seed: int) -> torch.Tensor:
    return values((n,), torch.float64, generator(seed)).to(DTYPES[dtype])


def numbers(n: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    """Normal values with magnitudes over two decades; long arrays repeat. On the CPU, shared, read-only."""
    return _numbers(n, dtype, seed) if n <= BASE else _numbers(BASE, dtype, seed).repeat(n // BASE + 1)[:n]


@cache
def patterns(n: int, dtype: str) -> torch.Tensor:
    """Bit patterns as values: all for 16 bits, else random ones after NaN, infinities, zeros and denormals."""
    size = DTYPES[dtype].itemsize
    if size == 2:
        return torch.arange(n).to(torch.int16).view(DTYPES[dtype])
    out = torch.randint(-128, 128, (n * size,), generator=generator(n), dtype=torch.int8).view(DTYPES[dtype])
    out[: len(SPECIAL)] = torch.tensor(SPECIAL[:n], dtype=torch.float64).to(out.dtype)
    return out


def gradient(n: int, dtype: str, step: int, place: int) -> torch.Tensor:
    """Zeros, denormals or random bits for some tensors in the first steps, else normal values."""
    usual = numbers(n, dtype, 100 * step + place)
    if step == 0 and place % 3 == 0:
        return torch.zeros_like(usual)
    if step == 1 and place % 3 == 1:
        return usual * torch.finfo(usual.dtype).tiny
    return patterns(n, dtype) if step == 3 and place % 2 == 0 else usual


def parameters(case: Case, device: str, lengths: Sequence[int] = LENGTHS) -> list[torch.nn.Parameter]:
    return [wrapped(case, numbers(n, case.param, 7000 + i).to(device, copy=True)) for i, n in enumerate(lengths)]


def stepped(opt: Any, case: Case, steps: Sequence[int]) -> None:
    """The given steps of a case; every gradient is a new tensor."""
    for k in steps:
        for i, p in enumerate(all_params(opt)):
            p.grad = gradient(p.numel(), case.grad, k, i).view(p.shape).to(p.device, copy=True)
        opt.step()


def trained(case: Case, device: str, steps: int = 5, lengths: Sequence[int] = LENGTHS, **options: Any) -> Any:
    opt = made(case, parameters(case, device, lengths), **options)
    stepped(opt, case, range(steps))
    return opt


def start(device: str, lengths: Sequence[int] = (5, 64, 20_000)) -> list[torch.nn.Parameter]:
    """A few parameters in float32."""
    return parameters(plain("SGD"), device, lengths)


def rows(steps: int, device: str, lengths: Sequence[int] = (5, 64, 20_000)) -> list[list[torch.Tensor]]:
    """Gradients for them, created in advance."""
    return [[numbers(n, seed=50 * k + i).to(device, copy=True) for i, n in enumerate(lengths)] for k in range(steps)]


def give(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def both(run: Callable[[str], Any]) -> tuple[Any, Any]:
    """The results of the run on the CPU and on the GPU."""
    return run("cpu"), run(DEVICE)


def kept(opt: Any) -> dict[str, torch.Tensor]:
    """All parameters and states on the CPU, concatenated by name and dtype."""
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for p in all_params(opt):
        for name, t in {"param": p.detach(), **opt.state.get(p, {})}.items():
            if isinstance(t, torch.Tensor):
                assert t.device == p.device, f"{name} is on {t.device}, its parameter on {p.device}"
                parts[f"{name} {t.dtype}"].append(t.reshape(-1))
    return {key: torch.cat([t.to(some[0].device) for t in some]).cpu() for key, some in parts.items()}


def differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Indices of different bits; any NaN equals any other, as payloads differ between machines."""
    word = WORDS[a.element_size()]
    wrong = a.view(word) != b.view(word)
    return wrong & ~(a.isnan() & b.isnan()) if a.is_floating_point() else wrong


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
    wrong = differing(a, b)
    if wrong.any():
        i = int(wrong.flatten().int().argmax())
        pair = f"{a.flatten()[i].item()!r} against {b.flatten()[i].item()!r}"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {a.numel()} differ, first at {i}: {pair}")


def assert_same(there: Any, here: Any) -> None:
    """Two optimizers have bit-identical parameters and states, and no tensor took torch's own step."""
    for opt in (there, here):
        assert engine_of(opt).plan is not None
        assert not engine_of(opt).fallback.places
    a, b = kept(there), kept(here)
    assert a.keys() == b.keys()
    for key, value in b.items():
        assert_same_bits(a[key], value, key)
