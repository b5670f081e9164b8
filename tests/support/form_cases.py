"""Shared by the tests of forms: every form of every rule, from the list of the core; training with NumPy; comparisons
of parameters and states. No tests here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import fusedopt
from fusedopt import _core, forms
from fusedopt.rules import RULES, Rule
from helpers import SPECIAL, Array, assert_same_bits

BF16 = np.dtype(ml_dtypes.bfloat16)
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One form of one variant of a rule."""

    rule: Rule
    variant: tuple[str, ...]
    param: str
    grad: str
    form: forms.Form

    @property
    def options(self) -> Options:
        """The rule's options that select the variant, and those that select the form."""
        out: Options = {name: 0.9 if name == "momentum" else True for name in self.variant}
        if "eps" in self.rule.defaults:
            out["eps"] = 1e-4
        return {**out, "lr": 0.02, **self.kept}

    @property
    def kept(self) -> Options:
        return {"state_dtype": self.form.state, "master": self.form.master, "stochastic_rounding": self.form.noisy}

    @property
    def states(self) -> tuple[str, ...]:
        return self.rule.states(dict.fromkeys(self.variant, True))

    @property
    def random(self) -> bool:
        return self.form.noisy or (self.form.noisy_state and self.states != ())

    def __str__(self) -> str:
        f = self.form
        words = [self.rule.name, *self.variant, self.param, self.grad, f.state, f.master or ""]
        return "-".join([w for w in words if w] + ["noisy"] * f.noisy + ["noisystate"] * f.noisy_state)


def _cases() -> Iterator[Case]:
    seen = set()
    for rule in RULES.values():
        for variant, kernel in rule.variants.items():
            for param, grad, state, master, noisy, noisy_state in _core.formats()[kernel]:
                case = Case(rule, variant, param, grad, forms.Form(state, master or None, noisy, noisy_state))
                # No options select 16-bit states rounded to nearest: torch's default, and that of the functions.
                options = {**forms.OPTIONS, **case.kept}
                if forms.form_of(param, options, "") == case.form and str(case) not in seen:
                    seen.add(str(case))
                    yield case


CASES = list(_cases())


def one_of_each_form(only_random: bool = False) -> list[Case]:
    """For every form the case with the most states, of a different rule for each if possible."""
    out: dict[tuple[Any, ...], Case] = {}
    names = list(RULES)
    keys = list(dict.fromkeys((c.param, c.grad, c.form) for c in CASES))
    for i, key in enumerate(keys):
        fit = [c for c in CASES if (c.param, c.grad, c.form) == key and c.states]
        fit.sort(key=lambda c: ((names.index(c.rule.name) - i) % len(names), -len(c.states)))
        if not only_random or fit[0].random:
            out[key] = fit[0]
    return list(out.values())


def numpy_dtype(name: str) -> np.dtype[Any]:
    return forms.numpy_dtype(name)


def optimizer(case: Case, params: Any, **more: Any) -> Any:
    return getattr(fusedopt, case.rule.name)(params, **{**case.options, **more})


def data(shape: Any, dtype: str, seed: int, spread: float = 2.0) -> Array:
    """Normally distributed values with magnitudes over several decades."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** (spread * (rng.random(shape) - 1))
    return np.asarray(x).astype(numpy_dtype(dtype))


def gradients(case: Case, shapes: Sequence[Any], steps: int = 3, specials: bool = True) -> list[list[Array]]:
    """Gradients of several steps; every third array has non-finite, huge and tiny elements in its last step."""
    out = [[data(s, case.grad, 100 * k + i) for i, s in enumerate(shapes)] for k in range(steps)]
    rng = np.random.default_rng(9)
    for g in out[-1][:: 3 if specials else 10**9] if specials else []:
        flat = g.reshape(-1)
        where = np.flatnonzero(rng.random(flat.size) < 0.02)
        with np.errstate(all="ignore"):
            flat[where] = rng.choice(np.asarray(SPECIAL), where.size).astype(g.dtype)
    return out


def train(opt: Any, grads: list[list[Array]]) -> None:
    for row in grads:
        opt.step(row)


def kept(opt: Any) -> list[dict[str, Any]]:
    """Every parameter and its state, not copied."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [{"param": p, **state} for p, state in zip(params, opt.state, strict=True)]


def copied(opt: Any) -> list[dict[str, Any]]:
    return [{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in one.items()} for one in kept(opt)]


def assert_same(got: Sequence[dict[str, Any]], want: Sequence[dict[str, Any]], what: str = "") -> None:
    """Bit-identical parameters and states."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == b.keys(), f"{what} {i}: {sorted(a)} against {sorted(b)}"
        for name, value in b.items():
            if isinstance(value, np.ndarray):
                assert_same_bits(a[name], value, f"{what} {i}.{name}")
            else:
                assert a[name] == value, f"{what} {i}.{name}: {a[name]} against {value}"


def join(param: Array, master: Array | None) -> Array:
    """The float32 value of a parameter and its residual."""
    if master is None:
        return param.astype(np.float32)
    if param.dtype != BF16:
        return np.where(master.astype(param.dtype) == param, master, param).astype(np.float32)
    return forms.join(param.reshape(-1).view(np.uint16), master.reshape(-1)).reshape(param.shape)


def round_away(x: Array) -> Array:
    """float32 rounded to bf16, ties away from zero, as for a split master."""
    b = np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)
    return ((b + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).view(BF16)


def stepped_by_rows(case: Case, steps: int = 3, **more: Any) -> Any:
    """An optimizer of tables after steps whose gradients name rows, by Zipf's law and evenly."""
    tables = [(4000, 64), (7, 128)] if case.form.quantised and case.states else [(4000, 24), (7, 100), (300, 1)]
    opt = optimizer(case, [data(shape, case.param, i) for i, shape in enumerate(tables)], **more)
    for step in range(steps):
        rng = np.random.default_rng(step)
        named = [np.minimum(rng.zipf(1.1, 20_000), 4000) - 1, *(rng.integers(0, n, 3000) for n, _ in tables[1:])]
        shapes = [(len(i), width) for i, (_, width) in zip(named, tables, strict=True)]
        specials = step == 2 and "max_grad_norm" not in more  # a norm that is no number spreads to all tables
        values = gradients(case, shapes, 1, specials)[0]
        opt.step([fusedopt.Rows(i, v) for i, v in zip(named, values, strict=True)])
    return opt
