"""The rules of `fusedopt.zoo`: against other implementations, and in a small training."""

import importlib.util
from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import BF16
from fusedopt import zoo
from fusedopt.bench.peers import ZOO, module_alone
from fusedopt.rule import OwnRule, RuleError, rule, scalar, state, tensor_mean, tensor_norm, tensor_sum, where
from helpers import engine, label

RULES: list[OwnRule] = [getattr(zoo, name) for name in zoo.__all__]


@pytest.mark.parametrize("made", RULES, ids=lambda r: r.name)
def test_the_kernels_agree_with_the_reference(made: OwnRule) -> None:
    rng = np.random.default_rng(0)
    p = rng.standard_normal(100)
    opt = made.numpy(p.copy())
    states: Any = {k: opt.state[0][k].copy() for k in (*made.states({}), *made.carried)}
    for step in range(1, 6):
        g = rng.standard_normal(100)
        opt.step(g)
        made.reference(p, g, states, step)
    np.testing.assert_allclose(opt.param_groups[0]["params"][0], p, 1e-12)
    for name, value in states.items():
        np.testing.assert_allclose(opt.state[0][name], value, 1e-12, 1e-15)


@pytest.mark.parametrize("made", RULES, ids=lambda r: r.name)
def test_a_linear_regression_converges(made: OwnRule) -> None:
    rng = np.random.default_rng(1)
    x, truth = rng.standard_normal((200, 5)), rng.standard_normal(5)
    y = x @ truth
    w = np.zeros(5)
    decays = made.name in ("LAMB", "LARS", "CautiousLion")  # steps whose length is that of the rate or of the weights
    rate = {"LARS": 10.0}.get(made.name, 0.05)
    opt = made.numpy(w, lr=(lambda step: rate * (1 - step / 400)) if decays else rate)
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


# Rule, module and class of another implementation, options of both, and those of the class alone.
THEIRS: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    *((name, *one) for name, one in ZOO.items() if one[0] != "torch.optim"),
    ("Adan", "timm.optim.adan", "Adan", {}, {}),
    ("StableAdamW", "pytorch_optimizer", "StableAdamW", {"weight_decay": 0.1, "eps": 1e-8}, {}),
]


@pytest.mark.integration(
    "`fusedopt.zoo`",
    "the parameters after ten steps of other implementations",
    "timm",
    "pytorch_optimizer",
    "torch-optimi",
)
@pytest.mark.parametrize(("name", "package", "theirs", "options", "more"), THEIRS, ids=label)
def test_another_implementation_gives_the_same(
    name: str, package: str, theirs: str, options: dict[str, Any], more: dict[str, Any]
) -> None:
    torch: Any = pytest.importorskip("torch")
    if importlib.util.find_spec(package.split(".")[0]) is None:
        pytest.skip(f"needs {package}")
    module = module_alone(package)
    torch.manual_seed(0)
    ours = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 6), (9, 20))]
    others = [p.detach().clone().requires_grad_() for p in ours]
    a = getattr(zoo, name).torch(ours, lr=0.01, **options)
    b = getattr(module, theirs)(others, lr=0.01, **{**options, **more})
    for k in range(10):
        for params, opt in ((ours, a), (others, b)):
            for p in params:
                p.grad = p.detach() ** 3 - 0.3 * p.detach() + 0.1 * k
            opt.step()
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)


def test_sums_over_a_tensor_do_not_depend_on_threads_isas_and_layouts() -> None:
    rng = np.random.default_rng(3)
    sizes = [(300, 417), (5,), (0,), (70_001,), (64, 64)]
    start = [rng.standard_normal(s) for s in sizes]
    grads = [rng.standard_normal(s) for s in sizes]
    for made in (zoo.LAMB, zoo.CautiousLion):
        for dtype, options in ((np.float32, {}), (np.float64, {}), (np.float32, {"state_dtype": "int8"})):
            seen = []
            for isa in fusedopt.isas():
                for threads in (1, 2, 5):
                    for strided in (False, True) if threads == 2 else (False,):
                        params = []
                        for p in start:
                            wide = np.zeros((*p.shape, 2), dtype)
                            params.append(wide[..., 0] if strided else np.zeros(p.shape, dtype))
                            params[-1][...] = p
                        opt = made.numpy(params, weight_decay=0.1, **options)
                        with engine(isa, threads):
                            for _ in range(3):
                                opt.step([g.astype(dtype) for g in grads])
                        seen.append(np.concatenate([p.ravel() for p in params]))
            assert all(np.array_equal(x, seen[0]) for x in seen[1:])
            assert np.isfinite(seen[0]).all()


@pytest.mark.parametrize("made", [r for r in RULES if r.reduces], ids=lambda r: r.name)
def test_sums_are_those_of_the_decoded_numbers(made: OwnRule) -> None:
    rng = np.random.default_rng(4)
    weights, *grads = (rng.standard_normal(9001).astype(BF16) for _ in range(4))
    wide = made.numpy(weights.astype(np.float32), weight_decay=0.1)
    split = made.numpy(weights, weight_decay=0.1, master="float32")
    for g in grads:
        wide.step(g.astype(np.float32))
        split.step(g)
    for name, value in wide.state[0].items():
        np.testing.assert_array_equal(split.state[0][name], value)
    np.testing.assert_array_equal(split.state[0]["master"], wide.param_groups[0]["params"][0])


def test_sums_in_several_passes_and_of_every_kind() -> None:
    @rule(lr=0.1)
    def Made(p: Any, g: Any, m: Any = state(), *, t: Any, lr: Any) -> Any:
        m = m + g
        spread = p - tensor_mean(p)
        scaled = spread / tensor_norm(spread)
        d = where(tensor_sum(m) > 0, scaled, -scaled) * tensor_mean(g > 0)
        return p - lr * d + where(t > 1, g / 50, 0.0), m

    rng = np.random.default_rng(0)
    p, m = rng.standard_normal(10_007), np.zeros(10_007)
    q, n = p.copy(), m.copy()
    for step in (1, 2, 3):
        g = rng.standard_normal(10_007)
        Made.update_(p, g, m, step=step, lr=0.1)
        Made.reference(q, g, {"m": n}, step, lr=0.1)
        np.testing.assert_allclose(p, q, 1e-11, 1e-13)
    assert repr(Made).count("sum(") == 4


def test_a_sum_is_refused_where_it_cannot_be() -> None:
    def of_a_number(p: Any, g: Any, *, lr: Any) -> Any:
        return p - tensor_sum(lr) * g

    def many(p: Any, g: Any, *, lr: Any) -> Any:
        return p - lr * sum(tensor_sum(p * k) for k in range(1, 6))

    def carried(p: Any, g: Any, s: Any = scalar(), *, lr: Any) -> Any:
        return p - lr * g, s + tensor_sum(g)

    with pytest.raises(RuleError, match="of numbers it is not defined"):
        rule(lr=0.1)(of_a_number)
    with pytest.raises(RuleError, match="does not depend on sums over a tensor"):
        rule(lr=0.1)(carried)
    with pytest.raises(RuleError, match="at most 4 sums over a tensor"):
        rule(lr=0.1)(many).numpy(np.ones(3))
