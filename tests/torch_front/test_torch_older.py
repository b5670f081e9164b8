"""torch before 2.10, without DLPack's exchange API: tensors are read by their attributes; results are bit-identical."""

import pytest
import torch

import fusedopt.torch as ours
from fusedopt.rules import RULES
from fusedopt.torch import _engine


def run(name: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((), (3, 5), (2, 4, 1, 3), (0,))]
    params.append(torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)))
    params.append(torch.nn.Parameter(torch.randn(6, 8).bfloat16()))
    opt = getattr(ours, name)(params)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        opt.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", RULES)
def test_steps_without_the_exchange_api_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(name)
    monkeypatch.setattr(_engine, "EXCHANGE", False)
    for got, expected in zip(run(name), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("master", ["split16", "split8", "float32"])
def test_forms_of_integers_are_read_there_too(master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> list[torch.Tensor]:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 200).bfloat16())
        opt = ours.AdamW([p], lr=0.1, state_dtype="int8", master=master)
        for k in range(3):
            p.grad = torch.linspace(k, -1, 200).bfloat16()
            opt.step()
        return [p.detach(), *(v for v in opt.state[p].values() if isinstance(v, torch.Tensor))]

    want = kept()
    monkeypatch.setattr(_engine, "EXCHANGE", False)
    for got, expected in zip(kept(), want, strict=True):
        assert torch.equal(got, expected)
