"""A rule written in Python has the bits of the same rule compiled: every built-in rule, in every form, on every
instruction set, with every option."""

from typing import Any

import numpy as np
import pytest

import form_cases
import fusedopt
from form_cases import CASES, Case
from fusedopt.bench.own import own_rule
from fusedopt.rules import RULES
from helpers import engine, filled, label, normal, option_sets, with_specials

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

SHAPES = [(3, 41), (1,), (64,), (0,), (1000,)]


def pair(case: Case, shapes: list[Any], **more: Any) -> tuple[Any, Any]:
    """Optimizers over the same weights: the rule in Python, and the built-in one."""
    own, options = own_rule(case.rule, {**case.options, **more})
    params = [form_cases.data(s, case.param, i) for i, s in enumerate(shapes)]
    return own.numpy([p.copy() for p in params], **options), form_cases.optimizer(case, params, **more)


@pytest.mark.parametrize("isa", fusedopt.isas())
@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_every_rule_in_every_form_has_the_bits_of_the_built_in_one(rule: Any, isa: str) -> None:
    cases = [c for c in CASES if c.rule is rule]
    assert cases
    for case in cases:
        grads = form_cases.gradients(case, SHAPES)
        own, built_in = pair(case, SHAPES, weight_decay=0.1 * (len(str(case)) % 2))
        with engine(isa, 1):
            form_cases.train(own, grads)
            form_cases.train(built_in, grads)
        form_cases.assert_same(form_cases.kept(own), form_cases.kept(built_in), f"{case} on {isa}")


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_every_option_has_the_same_meaning(rule: Any) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for options in option_sets(rule):
            own, chosen = own_rule(rule, options)
            p = normal(rng, 333, np.dtype(dtype))
            a, b = own.numpy(p.copy(), **chosen), getattr(fusedopt, rule.name)(p, **filled(rule, options))
            for k in range(7):
                g = normal(rng, 333, np.dtype(dtype))
                if k == 6:
                    with_specials(g, rng)
                a.step(g)
                b.step(g)
            form_cases.assert_same(form_cases.kept(a), form_cases.kept(b), f"{rule.name} {label(options)}")


@pytest.mark.parametrize("case", form_cases.one_of_each_form(), ids=str)
def test_layouts_clipping_averages_l1_and_threads(case: Case) -> None:
    if case.grad != case.param:
        return  # gradients are made in the parameter's layout, below
    shapes = [(37, 90), (5000,)]
    more = {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01, "maximize": True}
    results = []
    for threads in (1, 3):
        own, options = own_rule(case.rule, {**case.options, **more})
        params = [form_cases.data(s, case.param, i) for i, s in enumerate(shapes)]
        params[0] = np.asfortranarray(params[0])
        wide = np.zeros((5000, 2), params[1].dtype)
        wide[:, 0] = params[1]
        grads = form_cases.gradients(case, shapes, specials=False)
        a = own.numpy([params[0].copy("K"), wide[:, 0]], **options)
        other = wide.copy()
        b = form_cases.optimizer(case, [params[0].copy("K"), other[:, 0]], **more)
        with engine(None, threads):
            form_cases.train(a, grads)
            form_cases.train(b, grads)
        form_cases.assert_same(form_cases.kept(a), form_cases.kept(b), f"{case}, {threads} threads")
        assert a.last_grad_norm == b.last_grad_norm
        results.append(form_cases.copied(a))
    form_cases.assert_same(*results, f"{case}, 1 and 3 threads")


def test_the_update_function_has_the_bits_of_the_built_in_one() -> None:
    rng = np.random.default_rng(1)
    p, g = normal(rng, 100_003, np.dtype(np.float32)), normal(rng, 100_003, np.dtype(np.float32))
    own, _ = own_rule(RULES["NAdam"], {})
    for threads in (1, 2, 5):
        arrays = [[p.copy(), np.zeros_like(p), np.zeros_like(p), np.ones(())] for _ in range(2)]
        with engine(None, threads):
            for step in (1, 2, 3):
                a, b = ({"mu_product": x[3], "step": step, "lr": 0.1} for x in arrays)
                own.update_(arrays[0][0], g, *arrays[0][1:3], **a)
                fusedopt.nadam_(arrays[1][0], g, *arrays[1][1:3], **b)
        for x, y in zip(*arrays, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rule", RULES.values(), ids=label)
def test_the_reference_is_the_built_in_one(rule: Any) -> None:
    rng = np.random.default_rng(2)
    for options in option_sets(rule):
        own, chosen = own_rule(rule, options)
        p, q = (x := rng.standard_normal(50)), x.copy()
        o = filled(rule, options)
        states = {k: np.full(50, rule.first(k, o)) for k in rule.states(o)}
        states.update({k: np.array(rule.first(k, o)) for k in rule.carried})
        others = {k: v.copy() for k, v in states.items()}
        for step in range(1, 9):
            g = rng.standard_normal(50)
            own.reference(p, g, states, step, **{k: v for k, v in chosen.items() if k in own.defaults})
            rule.reference(q, g, others, step, **o)
        np.testing.assert_allclose(p, q, rtol=1e-10, atol=1e-12, err_msg=f"{rule.name} {label(options)}")
        for k, v in states.items():
            np.testing.assert_allclose(v, others[k], rtol=1e-10, atol=1e-12)
