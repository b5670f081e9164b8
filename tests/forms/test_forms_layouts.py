"""Parameters of every memory layout in torch, in every form: bit-identical without random numbers; random numbers and
blocks follow the order of memory."""

from typing import Any

import pytest
import torch

import fusedopt.torch as optim
from form_cases import CASES, Case, one_of_each_form
from form_cases_torch import BOTH, DTYPES, assert_same, filled, made

FULL = one_of_each_form()


def views(case: Case) -> dict[str, torch.nn.Parameter]:
    """The same values in a tensor of shape (4, 5, 6, 7), in several memory orders."""
    x = filled((4, 5, 6, 7), case.param, 3)
    big = torch.zeros(8, 5, 6, 21, dtype=x.dtype)
    out = {
        "contiguous": x.clone(),
        "channels_last": x.clone().contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": big[::2, :, :, ::3],
        "turned": torch.zeros(7, 6, 5, 8, dtype=x.dtype).permute(3, 2, 1, 0)[::2],
    }
    for name in ("strided", "turned"):
        out[name].copy_(x)
    made_ = {k: torch.nn.Parameter(v) for k, v in out.items()}
    for p in made_.values():
        if case.param != case.grad:
            p.grad_dtype = None
    return made_


def grown(case: Case, p: torch.nn.Parameter, like: torch.Tensor | None = None, steps: int = 3) -> dict[str, Any]:
    opt = made(case, [p], **BOTH)
    for k in range(steps):
        g = filled((4, 5, 6, 7), case.grad, 50 + k)
        p.grad = g if like is None else torch.empty_like(like, dtype=g.dtype).copy_(g)
        opt.step()
    return {"param": p.detach(), **opt.state[p]}


@pytest.mark.parametrize("case", [c for c in FULL if not c.random], ids=str)
def test_layouts_of_parameters_give_the_same_bits(case: Case) -> None:
    want = grown(case, views(case)["contiguous"])
    for name, p in views(case).items():
        for like in (None, p.detach()):
            q = views(case)[name]
            assert_same(snapshot_of(grown(case, q, like)), snapshot_of(want), name)


def snapshot_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v).detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()}


@pytest.mark.parametrize("case", [c for c in FULL if c.random], ids=str)
def test_with_random_numbers_and_blocks_elements_count_in_the_order_of_memory(case: Case) -> None:
    """A dense parameter of any layout behaves as the flat array of its memory; the layout of the gradient has no
    effect."""
    for name, p in views(case).items():
        if name in ("strided", "turned"):
            got = grown(case, p)
            assert_same(snapshot_of(grown(case, views(case)[name], torch.zeros(4, 5, 6, 7))), snapshot_of(got), name)
            continue
        flat = torch.nn.Parameter(p.detach().clone().as_strided((840,), (1,)))
        if case.param != case.grad:
            flat.grad_dtype = None
        opt = made(case, [flat], **BOTH)
        for k in range(3):
            g = torch.empty_like(p.detach(), dtype=DTYPES[case.grad]).copy_(filled((4, 5, 6, 7), case.grad, 50 + k))
            flat.grad = g.as_strided((840,), (1,)).clone()
            opt.step()
        for like in (None, p.detach()):
            got = grown(case, views(case)[name], like)
            for key, x in {"param": flat.detach(), **opt.state[flat]}.items():
                y = got[key]
                if isinstance(y, torch.Tensor) and y.ndim == 4:
                    assert y.stride() == p.stride(), key
                    y = y.as_strided((840,), (1,))
                assert_same({key: torch.as_tensor(y)}, {key: torch.as_tensor(x)}, name)


@pytest.mark.parametrize("name", ["channels_last", "permuted", "strided", "turned"])
def test_codes_of_other_layouts_convert_as_those_of_contiguous_tensors(name: str) -> None:
    """int8 to float32 through a checkpoint: each block uses its own scale, whatever the layout."""
    case = next(c for c in CASES if c.rule.name == "Adam" and c.form.quantised and c.param == c.grad == "float32")
    p = views(case)[name]
    opt = optim.Adam([p], state_dtype="int8", lr=0.0, betas=(0.0, 0.5))
    g = torch.empty_like(p.detach())  # dense, and in the order of the codes
    g.as_strided((840,), (1,)).copy_(filled((840,), "float32", 3) * torch.logspace(-6, 6, 840))
    p.grad = g
    opt.step()
    new = optim.Adam([p], state_dtype="float32")
    new.load_state_dict(opt.state_dict())
    decoded = new.state[p]["exp_avg"]
    top = g.as_strided((840,), (1,)).abs()
    for i in range(0, 840, 64):
        block, got = g.as_strided((840,), (1,))[i : i + 64], decoded.as_strided((840,), (1,))[i : i + 64]
        assert float((block - got).abs().max()) <= 0.0161 * float(top[i : i + 64].max())
    again = optim.Adam([p], state_dtype="int8")
    again.load_state_dict(new.state_dict())
    back = optim.Adam([p], state_dtype="float32")
    back.load_state_dict(again.state_dict())
    torch.testing.assert_close(back.state[p]["exp_avg"], decoded, rtol=1e-5, atol=0)
