"""Forms: how parameter, gradient, states and residual are stored.

The options of every optimizer, the combinations that have a kernel, and the formats in NumPy, which convert checkpoints
and check the kernels. The kernels' formats are in cpp/rules/formats.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .rules import RULES, Kernel, Rule

BLOCK: int = _core.BLOCK
"""Elements of an int8 state that share one scale."""

OPTIONS: dict[str, Any] = {
    "state_dtype": None,
    "master": None,
    "stochastic_rounding": False,
    "seed": 0,
    "ema_decay": None,
    "l1": 0.0,
    "row_steps": False,
    "row_wise": False,
}
"""Keyword-only options of every optimizer, per parameter group, with their defaults."""

OURS = ("state_dtype", "master", "stochastic_rounding", "ema_decay")
"""Options that select the form; loading a checkpoint does not change them."""

MASTERS: dict[str, tuple[int, str]] = _core.masters()
"""``master`` of a 16-bit weight -> its number in cpp/rules/formats.h, and the dtype of the residual."""

FLOATS = ("float64", "float32", "bfloat16", "float16")
_STATES = ("float64", "float32", "bfloat16", "float16", "int8")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Form:
    """The form of one parameter."""

    state: str
    """dtype of the states; int8 states are codes and scales."""
    master: str | None
    noisy: bool
    """Whether the weight is rounded stochastically."""
    noisy_state: bool

    @property
    def quantised(self) -> bool:
        return self.state == "int8"

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return self.noisy or self.noisy_state

    @property
    def master_number(self) -> int:
        return MASTERS[self.master][0] if self.master else 0


def check(options: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError, naming the option, unless each of these options is in its range."""
    state, master, seed = options["state_dtype"], options["master"], options["seed"]
    if state is not None and state not in _STATES:
        raise ValueError(f"state_dtype: expected one of {', '.join(_STATES)} or None, got {state!r}")
    if master is not None and master not in MASTERS:
        raise ValueError(f"master: expected one of {', '.join(MASTERS)} or None, got {master!r}")
    for option in ("stochastic_rounding", "row_steps", "row_wise"):
        if not isinstance(options[option], bool | np.bool_):
            raise TypeError(f"{option}: expected True or False, got {options[option]!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed!r}")
    for option in ("ema_decay", "l1"):
        value = options[option]
        if value is None and option == "ema_decay":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
            raise TypeError(f"{option}: expected a number, got {value!r}")
        if option == "ema_decay" and not 0 < value < 1:
            raise ValueError(f"ema_decay: expected a value in (0, 1), got {value!r}")
        if option == "l1" and not 0 <= value < math.inf:
            raise ValueError(f"l1: expected a value in [0, inf), got {value!r}")


def unused_by(rule: Rule) -> tuple[str, ...]:
    """The options above that the classes of a rule do not take."""
    return () if rule.row_wise else ("row_wise",)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a state with one number for each row of a parameter of this shape."""
    return (*shape[:1], *(1 for _ in shape[1:]))


def explicit(options: Mapping[str, Any]) -> bool:
    """Whether the options select a form. 16-bit states are then rounded stochastically, unlike torch's."""
    return any(options[k] for k in ("state_dtype", "master", "stochastic_rounding"))


def form_of(param: str, options: Mapping[str, Any], default_state: str, state: str | None = None) -> Form:
    """The form that these options select for a parameter of dtype ``param``.

    ``master`` and ``stochastic_rounding`` apply to 16-bit parameters only.

    Args:
        default_state: dtype of the states if ``state_dtype`` is None.
        state: dtype of existing states, which takes precedence.
    """
    half = param in HALVES
    state = state or options["state_dtype"] or default_state
    noisy_state = state == "int8" or (state in HALVES and (explicit(options) or not half))
    return Form(state, options["master"] if half else None, half and bool(options["stochastic_rounding"]), noisy_state)


@cache
def _existing(index: int) -> frozenset[tuple[Any, ...]]:
    return frozenset(_core.formats_of(index))


def refusal(kernel: Kernel, param: str, form: Form) -> str | None:
    """Why no kernel has this form with a gradient of the parameter's dtype, and what to use; None if one has."""
    if exists(kernel, param, param, form):
        return None
    forms = {f for f in _existing(kernel.index) if f[0] == param}
    if form.master and form.noisy:
        return f"stochastic_rounding does nothing beside master={form.master!r}, which loses nothing: use one of them"
    if form.master and not any(f[3] == form.master for f in forms):
        return f"master={form.master!r} is for bfloat16 parameters, and this one is {param}: use 'float32'"
    if form.quantised and not all(kernel.codes):
        bad = ", ".join(name for name in kernel.states if not kernel.code(name))
        return f"state_dtype='int8' does not go with {bad}: use 'bfloat16' or 'float32'"
    ways = sorted({f"master={f[3]!r}" if f[3] else "stochastic_rounding=True" for f in forms if f[2] == "int8"})
    if form.quantised and ways and not form.master and not form.noisy:
        return f"state_dtype='int8' leaves a {param} parameter to rounding alone: use it with {' or '.join(ways)}"
    states = sorted({str(f[2]) for f in forms if f[3:5] == (form.master or "", form.noisy)})
    beside = f" with master={form.master!r}" if form.master else " with stochastic_rounding" if form.noisy else ""
    return (
        f"state_dtype={form.state!r} does not go with a {param} parameter{beside}: use {' or '.join(map(repr, states))}"
    )


def exists(kernel: Kernel, param: str, grad: str, form: Form) -> bool:
    """Whether kernels of the CPU take this form and gradient dtype: with a 16-bit weight, float32 gradients, too."""
    if grad == "float32" and param in HALVES:
        grad = param
    wanted = (form.state, form.master or "", form.noisy, form.noisy_state)
    return any(
        f[:2] == (param, grad) and (f[2:] == wanted if kernel.states else f[3:5] == wanted[1:3])
        for f in _existing(kernel.index)
    )


def blocks(n: int) -> int:
    """The number of blocks of n elements."""
    return -(-n // BLOCK)


def plain_name(array: str) -> str:
    """The state that an array belongs to: ``exp_avg`` for exp_avg, exp_avg_codes and exp_avg_scale."""
    return array.removesuffix("_codes").removesuffix("_scale")


def array_names(states: tuple[str, ...], form: Form, ema: bool) -> tuple[str, ...]:
    """The names of a parameter's state arrays in this form, in the kernels' order."""
    names = [f"{s}_codes" if form.quantised else s for s in states]
    names += ["master"] * (form.master is not None) + ["ema"] * ema
    return (*names, *(f"{s}_scale" for s in states if form.quantised))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype with this name; bfloat16 is that of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def matrix() -> str:
    """The combinations that have a kernel, as a Markdown table."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for rule in RULES.values():
        kernels = list(dict.fromkeys(rule.variants.values()))
        for name in kernels:
            options = "+".join(next(k for k, v in rule.variants.items() if v == name))
            label = f"{rule.name} ({options})" if options else rule.name
            for param, grad, state, master, noisy, noisy_state in _core.formats()[name]:
                if not _core.kernels()[name][2]:
                    state, noisy_state = "", False
                rounding = "stochastic" if noisy_state else "nearest" if state else "-"
                key = param, grad, master or "-", "stochastic" if noisy else "nearest", state or "-", rounding
                if label not in rows.setdefault(key, []):
                    rows[key].append(label)
    all_of = {label for labels in rows.values() for label in labels}
    keep = sorted(all_of)
    head = ["weight", "gradient", "master", "weight's rounding", "state", "state's rounding", "rules"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    stateful = {label for key, labels in rows.items() if key[4] != "-" for label in labels}
    for key, labels in rows.items():
        whole = stateful if key[4] != "-" else all_of - stateful
        missing = [label for label in keep if label in whole and label not in labels]
        text = "all" if not missing and key[4] != "-" else ", ".join(labels)
        if missing and len(missing) < len(labels):
            text = "all but " + ", ".join(missing)
        lines.append("| " + " | ".join((*key, text)) + " |")
    return "\n".join(lines) + "\n"


# --- conversion of checkpoints between forms ---


def decoded(entry: Mapping[str, NDArray[Any]], states: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The states among the flat arrays of ``entry``, dequantised if int8."""
    found: dict[str, NDArray[Any]] = {}
    for name in states:
        if f"{name}_codes" in entry:
            found[name] = dequantise(entry[f"{name}_codes"], entry[f"{name}_scale"])
        elif name in entry:
            found[name] = entry[name]
    return found


def encoded(numbers: Mapping[str, NDArray[Any]], kernel: Kernel) -> dict[str, NDArray[Any]]:
    """Flat state arrays, quantised to int8."""
    entry: dict[str, NDArray[Any]] = {}
    for name, x in numbers.items():
        entry[f"{name}_codes"], entry[f"{name}_scale"] = quantise(x.astype(np.float32), kernel.code(name))
    return entry


# --- the formats in NumPy; arrays are one-dimensional, in memory order ---


def quantise(x: NDArray[np.float32], kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes of dtype ``kind`` and one scale per block. Rounds to nearest; the kernels round stochastically.

    With s the largest magnitude of a block, x = s c |c| / 127^2 (int8) or s c^2 / 255^2 (uint8, where only a block of
    zeros has code 0). A code is within e = 1/2 of the exact one, within e = 1 if rounded stochastically. The error of
    one element is at most s (2 r d + d^2) with r = sqrt(|x| / s) and d = e / 127 or e / 255.
    """
    top = 127.0 if kind == "int8" else 255.0
    rows = np.zeros((blocks(x.size), BLOCK))
    rows.reshape(-1)[: x.size] = x
    scale = np.abs(rows).max(axis=1, initial=0.0)
    with np.errstate(invalid="ignore"):
        share = np.divide(np.abs(rows), scale[:, None], where=scale[:, None] > 0, out=np.zeros_like(rows))
        codes = np.nan_to_num(np.rint(np.sqrt(share) * top))
    if kind == "uint8":
        codes = np.where(scale[:, None] > 0, np.maximum(codes, 1), 0)
    else:
        codes = np.copysign(codes, rows)
    return codes.reshape(-1)[: x.size].astype(kind), scale.astype(np.float32)


def dequantise(codes: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values that ``codes`` and ``scale`` represent."""
    c = codes.astype(np.float64)
    top = 127.0 if codes.dtype == np.int8 else 255.0
    with np.errstate(invalid="ignore"):
        x: NDArray[np.float32] = (
            c * np.abs(c) / top**2 * np.repeat(scale.astype(np.float64), BLOCK)[: codes.size]
        ).astype(np.float32)
    return x


def join(weight: NDArray[np.uint16], master: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 values of bf16 weights (given as bits) and their residual or master."""
    high = weight.astype(np.uint32) << np.uint32(16)
    if master.dtype == np.float32:
        kept: NDArray[np.float32] = np.where(round_bf16(master) == weight, master, high.view(np.float32))
        return kept
    residual = master.astype(np.int32) << (8 if master.dtype == np.int8 else 0)
    x: NDArray[np.float32] = (high + residual.astype(np.uint32)).view(np.float32)
    joined: NDArray[np.float32] = np.where(np.isnan(x), high.view(np.float32), x)
    return joined


def split(x: NDArray[np.float32], master: str, weight: NDArray[np.uint16] | None = None) -> NDArray[Any]:
    """The residual or master of the bf16 weight of ``x``, for ``master`` split16, split8 or float32.

    ``weight``: the weight's bits, if another form has already rounded it. Forms round ties differently; next to a tie
    the result then represents a neighbour of ``x``.
    """
    b = _bits_one_nan(x)
    if master == "float32":
        copied: NDArray[np.float32] = x.copy() if weight is None else (b + (round_bf16(x) != weight)).view(np.float32)
        return copied
    rounded = b + np.uint32(0x80 if master == "split8" else 0)
    if weight is None:
        weight = ((rounded + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    residual = rounded.astype(np.int64) - (weight.astype(np.int64) << 16)
    half: NDArray[np.int16] = np.clip(residual, -0x8000, 0x7FFF).astype(np.int16)
    return half if master == "split16" else (half >> 8).astype(np.int8)


def round_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of ``x`` rounded to bf16, ties to even."""
    b = _bits_one_nan(x)
    even = (b >> np.uint32(16)) & np.uint32(1)
    rounded: NDArray[np.uint16] = ((b + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return rounded


def _bits_one_nan(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    b: NDArray[np.uint32] = np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)
    return b
