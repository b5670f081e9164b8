"""The form options of NumPy's optimizers: supported combinations, refusals, mixed dtypes, groups."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest

import fusedopt
from form_cases import BF16, Case, assert_same, copied, data, kept, one_of_each_form, optimizer, train
from fusedopt import _core, forms
from fusedopt.rules import RULES
from helpers import F16, F32, F64, assert_same_bits

FULL = one_of_each_form()
PARAMS = ("float64", "float32", "bfloat16", "float16")
STATES = (None, *PARAMS, "int8")
MASTERS = (None, "split16", "split8", "float32")


# ---- the matrix


@pytest.mark.parametrize("name", RULES)
def test_every_combination_works_or_is_refused_in_a_sentence_that_says_what_to_use(name: str) -> None:
    """All dtypes, states, masters, roundings and variants; a refused one changes nothing."""
    rule = RULES[name]
    worked = refused = 0
    for variant, param, state, master, noisy in itertools.product(
        rule.variants, PARAMS, STATES, MASTERS, (False, True)
    ):
        chosen = {o: 0.9 if o == "momentum" else True for o in variant}
        options = {**chosen, "state_dtype": state, "master": master, "stochastic_rounding": noisy}
        p, g = data(70, param, 1), data(70, param, 2)
        before = p.copy()
        what = f"{name} {param} {options}"
        try:
            opt: Any = getattr(fusedopt, name)(p, lr=0.1, **options)
        except ValueError as error:
            refused += 1
            text = str(error)
            assert_same_bits(p, before, what)
            assert any(f"{o}=" in text or o in text for o in ("state_dtype", "master", "stochastic_rounding")), text
            assert ": use " in text, text
            assert text.count("\n") == 0, text
            assert len(text) < 200, text
            group = getattr(fusedopt, name)(np.ones(3, F32))
            with pytest.raises(ValueError, match="use"):
                group.add_param_group({"params": [p], **options})
            assert len(group.state) == len(group.param_groups) == 1
            continue
        worked += 1
        opt.step(g)
        assert not np.array_equal(p, before), what
        assert np.isfinite(p.astype(F64)).all(), what
        form = opt._form(p, opt.param_groups[0])
        assert set(opt.state[0]) == {
            "step", *forms.array_names(rule.states(chosen), form, False),
            *(["mu_product"] if "mu_product" in rule.scalars else []), *(["stream"] if form.random else []),
        }, what  # fmt: skip
    assert worked >= 20
    assert refused


def use(text: str) -> list[str]:
    return [word.strip("' ") for word in text.rsplit("use ", 1)[1].split(" or ")]


@pytest.mark.parametrize("name", RULES)
def test_what_a_refusal_says_to_use_can_be_used(name: str) -> None:
    rule = RULES[name]
    for variant, param, state, master, noisy in itertools.product(
        rule.variants, PARAMS, STATES, MASTERS, (False, True)
    ):
        chosen = {o: 0.9 if o == "momentum" else True for o in variant}
        options: Any = {**chosen, "state_dtype": state, "master": master, "stochastic_rounding": noisy}
        seen = []
        for _ in range(4):  # following the advice may take two rounds: for the master, then for the state
            try:
                getattr(fusedopt, name)(data(3, param, 1), **options)
                break
            except ValueError as error:
                text = str(error)
            seen.append(text)
            if "use it with master" in text:
                options["master"] = "float32"
            elif text.startswith("stochastic_rounding"):
                options["stochastic_rounding"] = False
            elif text.startswith("master"):
                options["master"] = use(text)[0]
            else:
                fits = [s for s in use(text) if accepted(name, param, {**options, "state_dtype": s})]
                options["state_dtype"] = fits[0] if fits else use(text)[0]
        else:
            raise AssertionError(f"{param} {variant} {state} {master} {noisy}: {seen}")


def accepted(name: str, param: str, options: dict[str, Any]) -> bool:
    try:
        getattr(fusedopt, name)(data(3, param, 1), **options)
    except ValueError:
        return False
    return True


def test_the_published_matrix_has_every_combination_of_the_core() -> None:
    rows = [line.split(" | ") for line in forms.matrix().splitlines()[2:]]
    assert len(rows) == len({tuple(row[:6]) for row in rows})
    listed = {
        (r[0].strip("| "), r[1], r[4].strip("-"), r[2].strip("-"), r[3] == "stochastic", r[5] == "stochastic")
        for r in rows
    }
    core = {f for name, found in _core.formats().items() for f in found if _core.kernels()[name][2]}
    assert core <= listed
    assert {f[:2] + f[3:5] for f in listed} == {f[:2] + f[3:5] for found in _core.formats().values() for f in found}
    int8 = next(r for r in rows if r[0].strip("| ") == "float32" and r[4] == "int8")
    without = {
        f"{rule.name} ({'+'.join(variant)})" if variant else rule.name
        for rule in RULES.values()
        for variant in rule.variants
        if not all(rule.kernel(dict.fromkeys(variant, True)).codes)
    }
    assert set(int8[6].strip(" |").removeprefix("all but ").split(", ")) == without


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"state_dtype": "int4"}, ValueError),
        ({"state_dtype": np.float32}, ValueError),
        ({"master": "bfloat16"}, ValueError),
        ({"master": True}, ValueError),
        ({"stochastic_rounding": 1}, TypeError),
        ({"stochastic_rounding": "yes"}, TypeError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**32}, ValueError),
        ({"seed": 0.5}, ValueError),
        ({"seed": True}, ValueError),
        ({"ema_decay": 0.0}, ValueError),
        ({"ema_decay": 1.0}, ValueError),
        ({"ema_decay": float("nan")}, ValueError),
        ({"ema_decay": "0.9"}, TypeError),
        ({"l1": -0.1}, ValueError),
        ({"l1": float("inf")}, ValueError),
        ({"l1": float("nan")}, ValueError),
        ({"l1": None}, TypeError),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=f"{name}: expected"):
        fusedopt.Adam(np.ones(3, F32), **options)
    opt: Any = fusedopt.Adam(np.ones(3, F32))
    with pytest.raises(error, match=f"{name}: expected"):
        opt.add_param_group({"params": [np.ones(3, F32)], **options})
    assert len(opt.state) == 1
    opt.param_groups[0].update(options)
    before = copied(opt)
    with pytest.raises(error, match=f"{name}: expected"):
        opt.step(np.ones(3, F32))
    assert_same(kept(opt), before)


# ---- arrays of a form that have been replaced


@pytest.mark.parametrize("case", [c for c in FULL if c.form.master or c.form.quantised], ids=str)
def test_a_wrong_array_in_the_state_is_refused_by_name_and_nothing_is_written(case: Case) -> None:
    opt = optimizer(case, data(130, case.param, 1), ema_decay=0.9)
    train(opt, [[data(130, case.grad, 2)]] * 2)
    for name, x in list(opt.state[0].items()):
        if not isinstance(x, np.ndarray) or x.ndim == 0:
            continue
        for wrong in (x[:-1].copy(), x.astype(np.int32), np.broadcast_to(x[:1], x.shape)):
            opt.state[0][name] = wrong
            before = copied(opt)
            with pytest.raises((TypeError, ValueError), match=name):
                opt.step(data(130, case.grad, 3))
            assert_same(kept(opt), before, name)
        opt.state[0][name] = x
    opt.step(data(130, case.grad, 3))
    opt.state[0]["ema"] = opt.param_groups[0]["params"][0]
    if case.param == "float32":
        with pytest.raises(ValueError, match="shares memory"):
            opt.step(data(130, case.grad, 3))


# ---- mixed models, groups


def test_a_group_of_several_dtypes_gives_each_its_form() -> None:
    shapes = {"weight": ((33, 5), BF16), "norm": ((33,), F32), "head": ((7,), F16), "wide": ((3,), F64)}
    params = {k: data(s, d.name, i) for i, (k, (s, d)) in enumerate(shapes.items())}
    with pytest.raises(ValueError, match=r"split16.*float16.*'float32'"):
        fusedopt.AdamW(params, master="split16")
    del params["head"]
    opt: Any = fusedopt.AdamW(params, lr=1e-2, master="split16", ema_decay=0.9)
    alone = {
        k: fusedopt.AdamW(p.copy(), lr=1e-2, master="split16" if k == "weight" else None, ema_decay=0.9)
        for k, p in params.items()
    }
    for step in range(5):
        grads = {k: data(p.shape, p.dtype.name, step) for k, p in params.items()}
        opt.step(grads)
        for k, one in alone.items():
            one.step(grads[k])
    assert_same(kept(opt), [x for one in alone.values() for x in kept(one)])
    assert ["master" in s for s in opt.state] == [True, False, False]


def test_f32_norms_and_bf16_weights_with_random_rounding() -> None:
    params = [data((20, 9), "bfloat16", 1), data(20, "float32", 2)]
    with pytest.raises(ValueError, match=r"int8.*use it with master='float32' or .* or stochastic_rounding=True"):
        fusedopt.Adam(params, state_dtype="int8")
    opt: Any = fusedopt.Adam(params, lr=1e-2, stochastic_rounding=True, state_dtype="int8")
    twin = fusedopt.Adam(params[1].copy(), lr=1e-2, state_dtype="int8")
    twin.state[0]["stream"] = 1
    for step in range(5):
        grads = [data(p.shape, p.dtype.name, step) for p in params]
        opt.step(grads)
        twin.step(grads[1])
    assert_same(kept(opt)[1:], kept(twin))


def test_groups_have_forms_of_their_own_and_none_gradients_leave_them_alone() -> None:
    cases = [c for c in FULL if c.rule.name in ("Adam", "AdamW")]
    groups = [
        {"params": [data(100, c.param, i)], **c.kept, "seed": i, "ema_decay": 0.9, "amsgrad": "amsgrad" in c.variant}
        for i, c in enumerate(cases)
    ]
    opt: Any = fusedopt.AdamW(groups, lr=0.01)
    grads = [data(100, c.grad, i) for i, c in enumerate(cases)]
    opt.step(grads)
    before = copied(opt)
    opt.step([None, *grads[1:]])
    assert_same(kept(opt)[:1], before[:1])
    late = copy.deepcopy(opt)
    for i, (c, group) in enumerate(zip(cases, groups, strict=True)):
        one: Any = fusedopt.AdamW(
            {**group, "params": [data(100, c.param, i)]}["params"],
            lr=0.01,
            **{k: v for k, v in group.items() if k != "params"},
        )
        if "stream" in one.state[0]:
            one.state[0]["stream"] = i
        one.step(grads[i])
        if i:
            one.step(grads[i])
        assert_same(kept(one), kept(opt)[i : i + 1], str(c))
    opt.add_param_group({"params": [data(70, "bfloat16", 5)], "master": "split8"})
    late.add_param_group({"params": [data(70, "bfloat16", 5)], "master": "split8"})
    for o in (opt, late):
        o.step([*grads, data(70, "bfloat16", 6)])
    assert_same(kept(opt), kept(late))


def test_options_switched_on_in_the_middle_of_a_run_get_their_arrays() -> None:
    opt: Any = fusedopt.AdamW([np.ones(70, BF16)], lr=0.01)
    g = np.ones(70, BF16)
    opt.step([g])
    opt.param_groups[0]["ema_decay"] = 0.9
    opt.param_groups[0]["master"] = "split16"
    opt.step([g])
    assert {"master", "ema"} <= set(opt.state[0])
    opt.param_groups[0]["master"] = None
    opt.step([g])
    opt.param_groups[0]["stochastic_rounding"] = True
    opt.step([g])
    assert opt.state[0]["step"] == 4


def test_clipping_goes_with_every_form() -> None:
    for case in FULL:
        grad = data(200, case.grad, 2)
        clipped = optimizer(case, data(200, case.param, 1), max_grad_norm=0.5)
        clipped.step(grad)
        norm = float(np.sqrt((grad.astype(F64) ** 2).sum()))
        assert clipped.last_grad_norm == pytest.approx(norm, rel=1e-6), str(case)
        if case.grad == "float64":
            other = optimizer(case, data(200, case.param, 1))
            other.step(grad * (0.5 / (norm + 1e-6)))
            np.testing.assert_allclose(
                clipped.param_groups[0]["params"][0], other.param_groups[0]["params"][0], rtol=1e-12
            )
