"""How weights and states are kept: the options that every optimizer has for it, which combinations exist, and the
formats once more in NumPy, to convert checkpoints and to check the kernels (cpp/rules/formats.h is what runs)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .rules import RULES, Kernel

BLOCK: int = _core.BLOCK
"""Elements of an int8 state under one scale."""

OPTIONS: dict[str, Any] = {
    "state_dtype": None,
    "master": None,
    "stochastic_rounding": False,
    "seed": 0,
    "ema_decay": None,
    "l1": 0.0,
}
"""The options and their defaults; keyword-only, per parameter group."""

OURS = ("state_dtype", "master", "stochastic_rounding", "ema_decay")
"""Options that say how things are kept; a checkpoint does not change them."""

MASTERS: dict[str, tuple[int, str]] = {"split16": (1, "int16"), "split8": (2, "int8"), "float32": (3, "float32")}
"""What may be kept beside a 16-bit weight: its number in cpp/rules/formats.h, the dtype of the array."""

FLOATS = ("float64", "float32", "bfloat16", "float16")
_STATES = ("float64", "float32", "bfloat16", "float16", "int8")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Form:
    """How one parameter is kept."""

    state: str
    """dtype of its states; int8: codes and scales."""
    master: str | None
    noisy: bool
    """Is the weight rounded stochastically?"""
    noisy_state: bool

    @property
    def quantised(self) -> bool:
        return self.state == "int8"

    @property
    def random(self) -> bool:
        """Does a step draw random numbers?"""
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
    if not isinstance(options["stochastic_rounding"], bool | np.bool_):
        raise TypeError(f"stochastic_rounding: expected True or False, got {options['stochastic_rounding']!r}")
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


def explicit(options: Mapping[str, Any]) -> bool:
    """Do the options ask for a form? Then 16-bit states are rounded stochastically; torch's own are not."""
    return any(options[k] for k in ("state_dtype", "master", "stochastic_rounding"))


def form_of(param: str, options: Mapping[str, Any], default_state: str, state: str | None = None) -> Form:
    """The form that these options ask for, for a parameter of this dtype.

    A wider parameter loses nothing to rounding: ``master`` and ``stochastic_rounding`` leave it as it is.

    Args:
        default_state: dtype of states without ``state_dtype``.
        state: dtype of the states that are there, whatever is asked for.
    """
    half = param in HALVES
    state = state or options["state_dtype"] or default_state
    noisy_state = state == "int8" or (state in HALVES and (explicit(options) or not half))
    return Form(state, options["master"] if half else None, half and bool(options["stochastic_rounding"]), noisy_state)


@cache
def _existing(kernel: str) -> frozenset[tuple[Any, ...]]:
    return frozenset(_core.formats()[kernel])


def refusal(kernel: Kernel, param: str, form: Form) -> str | None:
    """Why no kernel keeps a parameter of this dtype, its gradient of the same, like that, and what to use; or None."""
    if exists(kernel, param, param, form):
        return None
    forms = {f for f in _existing(kernel.name) if f[0] == param}
    if form.master and form.noisy:
        return f"stochastic_rounding does nothing beside master={form.master!r}, which loses nothing: use one of them"
    if form.master and not any(f[3] == form.master for f in forms):
        return f"master={form.master!r} is for bfloat16 parameters, and this one is {param}: use 'float32'"
    if form.quantised and not all(code(name) for name in kernel.states):
        bad = ", ".join(name for name in kernel.states if not code(name))
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
    """Is there a kernel for this form and gradient?"""
    wanted = (form.state, form.master or "", form.noisy, form.noisy_state)
    return any(
        f[:2] == (param, grad) and (f[2:] == wanted if kernel.states else f[3:5] == wanted[1:3])
        for f in _existing(kernel.name)
    )


@cache
def code(state: str) -> str | None:
    """dtype of the codes of a state of this name: int8 with a sign, uint8 a second moment, None if it has none."""
    return _core.code_of(state) or None


def blocks(n: int) -> int:
    """How many blocks n elements are."""
    return -(-n // BLOCK)


def plain_name(array: str) -> str:
    """Of which state, whatever its form, an array is: ``exp_avg`` for exp_avg, exp_avg_codes and exp_avg_scale."""
    return array.removesuffix("_codes").removesuffix("_scale")


def array_names(states: tuple[str, ...], form: Form, ema: bool) -> tuple[str, ...]:
    """The arrays kept beside a parameter in this form, in the kernels' order."""
    names = [f"{s}_codes" if form.quantised else s for s in states]
    names += ["master"] * (form.master is not None) + ["ema"] * ema
    return (*names, *(f"{s}_scale" for s in states if form.quantised))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name; bfloat16 is that of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def matrix() -> str:
    """Which combinations exist, as a Markdown table."""
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


# --- checkpoints of one form in another ---


def decoded(entry: Mapping[str, NDArray[Any]], states: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The states of an entry of flat arrays as numbers, whatever form they are in; those that are there."""
    found: dict[str, NDArray[Any]] = {}
    for name in states:
        if f"{name}_codes" in entry:
            found[name] = dequantise(entry[f"{name}_codes"], entry[f"{name}_scale"])
        elif name in entry:
            found[name] = entry[name]
    return found


def encoded(numbers: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The int8 form of flat arrays of states."""
    entry: dict[str, NDArray[Any]] = {}
    for name, x in numbers.items():
        kind = code(name)
        assert kind is not None
        entry[f"{name}_codes"], entry[f"{name}_scale"] = quantise(x.astype(np.float32), kind)
    return entry


# --- the formats in NumPy; arrays are one-dimensional, in the order of memory ---


def quantise(x: NDArray[np.float32], kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes of dtype ``kind`` (rounded to nearest, where the kernels round stochastically) and a scale for each block.

    With s the largest magnitude of a block, x = s c |c| / 127^2 (int8) or s c^2 / 255^2 (uint8, where only a block of
    zeros has code 0). A code is within 1/2 of the exact one, within 1 when it is rounded stochastically; so the error
    of one element is at most s (2 r d + d^2) with r = sqrt(|x| / s), d the distance of codes over 127 or 255.
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
    """The numbers that codes stand for."""
    c = codes.astype(np.float64)
    top = 127.0 if codes.dtype == np.int8 else 255.0
    with np.errstate(invalid="ignore"):
        x: NDArray[np.float32] = (
            c * np.abs(c) / top**2 * np.repeat(scale.astype(np.float64), BLOCK)[: codes.size]
        ).astype(np.float32)
    return x


def join(weight: NDArray[np.uint16], master: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 that bf16 weights (their bits) and the array beside them stand for."""
    high = weight.astype(np.uint32) << np.uint32(16)
    if master.dtype == np.float32:
        kept: NDArray[np.float32] = np.where(round_bf16(master) == weight, master, high.view(np.float32))
        return kept
    rest = master.astype(np.int32) << (8 if master.dtype == np.int8 else 0)
    x: NDArray[np.float32] = (high + rest.astype(np.uint32)).view(np.float32)
    joined: NDArray[np.float32] = np.where(np.isnan(x), high.view(np.float32), x)
    return joined


def split(x: NDArray[np.float32], master: str, weight: NDArray[np.uint16] | None = None) -> NDArray[Any]:
    """What is kept beside the bf16 weight of ``x``, for ``master`` split16, split8 or float32.

    ``weight``: its bits where they are given, by another form's rounding; next to a tie, which the forms round to
    different weights, the result then stands for a neighbour of ``x``.
    """
    b = _bits_one_nan(x)
    if master == "float32":
        copied: NDArray[np.float32] = x.copy() if weight is None else (b + (round_bf16(x) != weight)).view(np.float32)
        return copied
    rounded = b + np.uint32(0x80 if master == "split8" else 0)
    if weight is None:
        weight = ((rounded + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    rest = rounded.astype(np.int64) - (weight.astype(np.int64) << 16)
    half: NDArray[np.int16] = np.clip(rest, -0x8000, 0x7FFF).astype(np.int16)
    return half if master == "split16" else (half >> 8).astype(np.int8)


def round_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of ``x`` rounded to bf16, to nearest even."""
    b = _bits_one_nan(x)
    even = (b >> np.uint32(16)) & np.uint32(1)
    rounded: NDArray[np.uint16] = ((b + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return rounded


def _bits_one_nan(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    b: NDArray[np.uint32] = np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)
    return b
