"""The rules of `fusedopt.zoo`: against other implementations, and in a small training."""

from typing import Any

import numpy as np
import pytest

from fusedopt import zoo
from fusedopt.rule import OwnRule
from helpers import label

RULES: list[OwnRule] = [getattr(zoo, name) for name in zoo.__all__]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_the_kernels_agree_with_the_reference(rule: OwnRule) -> None:
    rng = np.random.default_rng(0)
    p = rng.standard_normal(100)
    opt = rule.numpy(p.copy())
    states: Any = {k: opt.state[0][k].copy() for k in (*rule.states({}), *rule.carried)}
    for step in range(1, 6):
        g = rng.standard_normal(100)
        opt.step(g)
        rule.reference(p, g, states, step)
    np.testing.assert_allclose(opt.param_groups[0]["params"][0], p, 1e-12)
    for name, value in states.items():
        np.testing.assert_allclose(opt.state[0][name], value, 1e-12, 1e-15)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_linear_regression_converges(rule: OwnRule) -> None:
    rng = np.random.default_rng(1)
    x, truth = rng.standard_normal((200, 5)), rng.standard_normal(5)
    y = x @ truth
    w = np.zeros(5)
    opt = rule.numpy(w, lr=0.05)
    for _ in range(400):
        opt.step(2 * x.T @ (x @ w - y) / len(y))
    assert np.abs(w - truth).max() < 0.02


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("ASGD", {"lr": 0.1, "lambd": 0.01, "weight_decay": 0.1, "t0": 3.0}), ("Rprop", {"lr": 0.1})],
    ids=label,
)
def test_torch_has_the_same_rule(name: str, options: dict[str, Any], dtype: str) -> None:
    torch: Any = pytest.importorskip("torch")
    torch.manual_seed(0)
    p = torch.randn(50, dtype=getattr(torch, dtype), requires_grad=True)
    q = p.detach().clone().requires_grad_()
    a, b = getattr(zoo, name).torch([p], **options), getattr(torch.optim, name)([q], **options)
    for _ in range(20):
        for x, opt in ((p, a), (q, b)):
            x.grad = x.detach() ** 3 - 0.3 * x.detach()
            opt.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # torch keeps ASGD's rates in float32
    for key in ("ax", "prev", "step_size"):
        if key in a.state[p]:
            torch.testing.assert_close(a.state[p][key], b.state[q][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_timm_has_the_same_adan(decay: float) -> None:
    torch: Any = pytest.importorskip("torch")
    timm: Any = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    p = torch.randn(50, dtype=torch.float64, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    a = zoo.Adan.torch([p], lr=0.01, weight_decay=decay)
    b = timm.Adan([q], lr=0.01, weight_decay=decay)
    for k in range(10):
        for x, opt in ((p, a), (q, b)):
            x.grad = x.detach() ** 3 - 0.3 * x.detach() + k
            opt.step()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
