"""Random programs for fuzz_torch.py: what happens to an optimizer between its steps, done to ours and to torch's plain
loop, and how the two are compared after every step.

A program is a dict of plain values (see `generate`), so that it can be printed, shrunk and run again. An event changes
one side of a pair; which parameter it meets and what it draws come from two numbers in the program, so both sides get
the same.
"""

from __future__ import annotations

import collections
import copy
import gc
import inspect
import io
import math
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fusedopt
from torch_cases import IN_TORCH, TORCH_FUSED, generator, ours, plain, values
from torch_compare import ulp

Program = dict[str, Any]
Tensor = torch.Tensor
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SCALARS = ("step", "mu_product")  # state that counts; everything else has the parameter's shape

# A dict of options is drawn from these where the class has them; the first of each is the most usual.
OPTIONS: dict[str, list[Any]] = {
    "lr": [1e-2, 0.0, 0.3, ("tensor", 0.01, "f32", 0), ("tensor", 0.01, "f64", 0), ("tensor", 0.01, "f64", 1)],
    "betas": [(0.5, 0.7), (0.0, 0.5), (0.9, 0.999), (("tensor", 0.8, "f64", 0), ("tensor", 0.9, "f64", 0))],
    "eps": [1e-3, 1e-8, 1e-6],
    "weight_decay": [0.1, 0.0],
    "momentum": [0.9, 0.5],
    "dampening": [0.5, 0.0],
    "nesterov": [True],
    "centered": [True],
    "alpha": [0.9, 0.5],
    "rho": [0.5],
    "lr_decay": [0.1],
    "initial_accumulator_value": [0.1],
    "momentum_decay": [0.1],
    "decoupled_weight_decay": [True],
    "amsgrad": [True],
    "maximize": [True],
    "differentiable": [False, False, False, False, True],
    "capturable": [False, False, False, False, True],
}

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (0,), (3, 5), (4, 0), (2, 3, 4), (5, 1, 3), (257,), (33, 31),
    (1024,), (1025,), (40, 30), (2, 3, 4, 5), (3, 4, 16, 8), (2, 3, 4, 5, 2), (5003,), (70, 80),
]  # fmt: skip
MANY_DIMS = (65, 66, 70, 96, 130)

LAYOUTS = ("plain", "permuted", "gaps", "offset", "channels_last", "misaligned", "negated", "expanded", "sliding")


# -- tensors ----------------------------------------------------------------------------------------------------------


def strides_of(shape: tuple[int, ...], order: list[int], step: int = 1) -> list[int]:
    """Strides of a dense tensor whose dimensions lie in memory in this order, the innermost last."""
    out, size = [1] * len(shape), step
    for d in reversed(order):
        out[d] = size
        size *= max(shape[d], 1)
    return out


GAP = 7.0  # what lies between the elements of a strided tensor, and must stay


def laid_out(t: Tensor, layout: str, r: random.Random) -> Tensor:
    """A copy of the tensor with this layout, as far as its shape allows it."""
    t, n = t.detach(), t.dim()
    shape = tuple(t.shape)
    order = list(range(n))
    if layout == "channels_last":
        order = [0, *range(2, n), 1] if n >= 3 else order
    elif layout == "permuted" or (layout == "gaps" and r.random() < 0.5):
        r.shuffle(order)
    if layout == "negated":
        return torch._neg_view(t.neg().contiguous())
    if layout == "misaligned" and t.numel():
        memory = bytearray(t.numel() * t.element_size() + 8)
        out = torch.frombuffer(memory, dtype=t.dtype, offset=1, count=t.numel()).view(shape)
        return out.copy_(t)
    if layout == "expanded" and n and t.numel():
        d = r.randrange(n)
        return t.narrow(d, 0, 1).clone().expand(shape)
    if layout == "sliding" and n and t.numel() > 1:
        d = max(range(n), key=lambda k: shape[k])
        strides = strides_of(shape, order)
        others = [k for k in range(n) if k != d]
        strides = strides_of(tuple(shape[k] for k in others), list(range(n - 1)))
        strides.insert(d, 1)
        size = 1 + sum((s - 1) * k for s, k in zip(shape, strides, strict=True))
        return t.reshape(-1)[:size].clone().as_strided(shape, strides)
    step = r.choice([2, 3]) if layout == "gaps" else 1
    strides = strides_of(shape, order, step)
    offset = r.choice([1, 3, 16]) if layout in ("offset", "gaps") else 0
    size = offset + 1 + sum((max(s, 1) - 1) * k for s, k in zip(shape, strides, strict=True))
    memory = torch.full((size + offset,), GAP, dtype=t.dtype)
    return memory.as_strided(shape, strides, offset).copy_(t)


def gaps_are_kept(t: Tensor) -> bool:
    """Whether what lies around and between the elements of a tensor made by `laid_out` is as it was."""
    if t.is_neg() or not t.numel():
        return True
    n = t.untyped_storage().nbytes() // t.element_size()
    flat, used = t.detach().as_strided((n,), (1,), 0), torch.zeros(n, dtype=torch.bool)
    used.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return bool((flat[~used] == GAP).all())


def overlapping(t: Tensor) -> bool:
    """Whether elements share memory; counted, not derived from strides."""
    if t.layout != torch.strided or t.is_contiguous() or t.numel() < 2:
        return False
    used = torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=torch.bool)
    used.as_strided(t.shape, t.stride(), t.storage_offset()).squeeze().fill_(True)
    return int(used.sum()) < t.numel()


def layout_of(t: Tensor) -> str:
    """The layout's name in the table at the end."""
    if t.layout != torch.strided:
        return "sparse"
    if t._is_zerotensor():
        return "no memory"
    if t.is_neg():
        return "negated"
    if t.data_ptr() % t.element_size():
        return "misaligned"
    if t.is_contiguous():
        return "offset" if t.storage_offset() else "contiguous"
    if 0 in t.stride():
        return "expanded"
    if overlapping(t):
        return "sliding"
    if t.dim() in (4, 5) and t.is_contiguous(
        memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    ):
        return "channels_last"
    size = 1
    for k, stride in sorted((stride, n) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1):
        if k != size:
            return "gaps"
        size *= stride
    return "permuted"


def size_of(t: Tensor) -> str:
    if t.dim() > 64:
        return ">64 dims"
    return "0-d" if not t.dim() else "empty" if not t.numel() else "<1024" if t.numel() < 1024 else ">=1024"


def decoded(value: Any) -> Any:
    """An option from its plain form: tensors are made anew."""
    if isinstance(value, tuple) and value and value[0] == "tensor":
        _, number, dtype, ndim = value
        return torch.full((1,) * ndim, number, dtype=DTYPES[dtype])
    return tuple(map(decoded, value)) if isinstance(value, tuple) else value


# -- programs ---------------------------------------------------------------------------------------------------------


def _options(name: str, r: random.Random) -> dict[str, Any]:
    takes = inspect.signature(getattr(torch.optim, name).__init__).parameters
    chance = r.choice([0.1, 0.4, 0.7])
    out = {key: r.choice(choices) for key, choices in OPTIONS.items() if key in takes and r.random() < chance}
    if out.get("nesterov"):
        out["momentum"], out["dampening"] = 0.9, 0.0
    return out


def _shape(r: random.Random) -> tuple[int, ...]:
    kind = r.random()
    if kind < 0.05:
        shape = [1] * r.choice(MANY_DIMS)
        for d in r.sample(range(len(shape)), r.randint(1, 6)):
            shape[d] = r.choice([2, 3])
        return tuple(shape)
    return (70001,) if kind < 0.055 else r.choice(SHAPES)


def _parameter(r: random.Random, dtype: str) -> dict[str, Any]:
    usual = r.random() < 0.6
    return {
        "shape": _shape(r),
        "dtype": dtype if r.random() < 0.8 else r.choice(list(DTYPES)),
        "layout": "plain" if usual else r.choices(LAYOUTS, (2, 6, 6, 4, 4, 2, 2, 1, 1))[0],
        "seed": r.randrange(10**6),
    }


def generate(seed: int, names: Sequence[str] = IN_TORCH) -> Program:
    """The program of this number, for one of these classes."""
    r = random.Random(seed)
    name = r.choice(names)
    options = _options(name, r)
    wide_default = r.random() < 0.03  # in which torch's fused step has another type of counter
    fused = (
        not wide_default and name in TORCH_FUSED and not options.get("differentiable") and not options.get("capturable")
    )
    dtype = r.choices(list(DTYPES), (3, 5, 3, 2))[0]
    params = [_parameter(r, dtype) for _ in range(r.choice([1, 1, 2, 3, 4, 6, 9]))]
    events: list[tuple[str, int, int]] = []

    def draw(kind: str) -> None:
        names = [n for n, e in EVENTS.items() if e.kind == kind]
        chosen = r.choices(names, [EVENTS[n].weight for n in names])[0]
        events.append((chosen, r.randrange(100), r.randrange(10**6)))

    for _ in range(r.randint(2, 8)):
        for _ in range(r.choice([0, 0, 1, 1, 2, 3]) if events else 0):
            draw("between")
        if r.random() < 0.85 or not events:
            events.append(("gradients", 0, r.randrange(10**6)))
        for _ in range(r.choice([0, 0, 0, 1, 2])):
            draw("gradient")
        events.append(("step", r.randrange(100), 0))
    return {
        "seed": seed,
        "name": name,
        "options": options,
        "ours": r.choice([{}, {"foreach": False}, {"foreach": None}] + [{"fused": True}, {"fused": None}] * fused),
        "wide_default": wide_default,
        "groups": r.choice([1, 1, 2, 3]),
        "params": params,
        "events": events,
    }


class Side:
    """One of the two optimizers, and what it trains."""

    def __init__(self, program: Program, mine: bool) -> None:
        self.program, self.mine = program, mine
        self.params = [self.parameter(spec) for spec in program["params"]]
        groups = [{"params": self.params[i :: program["groups"]]} for i in range(program["groups"])]
        self.opt = self.made([g for g in groups if g["params"]])
        self.ballast: list[Tensor] = []
        self.kept: list[Any] = []
        self.unusual = False  # gradients, parameters, states share memory

    def made(self, groups: Any) -> Any:
        options = {key: decoded(value) for key, value in self.program["options"].items()}
        if self.mine:
            return ours(self.program["name"], groups, **options, **self.program["ours"])
        return plain(self.program["name"], groups, **options)

    def parameter(self, spec: dict[str, Any]) -> torch.nn.Parameter:
        made = values(spec["shape"], DTYPES[spec["dtype"]], generator(spec["seed"]))
        return torch.nn.Parameter(laid_out(made, spec["layout"], random.Random(spec["seed"])))

    def state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.opt.state.get(p) or {}
        return state

    def entries(self, p: Tensor) -> list[str]:
        return sorted(k for k, v in self.state(p).items() if isinstance(v, Tensor))

    def group_of(self, p: Tensor) -> dict[str, Any] | None:
        return next((g for g in self.opt.param_groups if any(q is p for q in g["params"])), None)

    def replace_parameter(self, old: Tensor, new: Tensor) -> None:
        """Another object in its place, with its state."""
        group = self.group_of(old)
        if group is not None:
            group["params"][next(i for i, q in enumerate(group["params"]) if q is old)] = new
        if old in self.opt.state:
            self.opt.state[new] = self.opt.state.pop(old)
        self.params[next(i for i, q in enumerate(self.params) if q is old)] = new  # type: ignore[assignment]

    def fill_freed_memory(self, p: Tensor) -> None:
        """Takes what an event has freed, so that whoever still writes there is seen."""
        if self.mine and len(self.ballast) < 60:
            self.ballast += [torch.full((p.numel(),), GAP, dtype=p.dtype) for _ in range(4)]
            self.ballast += [torch.full((), GAP) for _ in range(4)]


# -- events -----------------------------------------------------------------------------------------------------------


class Event:
    def __init__(self, run: Callable[[Side, Any, random.Random], None], kind: str, weight: float, whole: bool) -> None:
        self.run, self.kind, self.weight, self.whole = run, kind, weight, whole


EVENTS: dict[str, Event] = {}


def event(kind: str, weight: float = 1.0, whole: bool = False) -> Any:
    """kind: between steps, or about a gradient; weight: how often; whole: it meets every parameter."""

    def register(function: Any) -> Any:
        EVENTS[function.__name__] = Event(function, kind, weight, whole)
        return function

    return register


def _some_layout(r: random.Random) -> str:
    return r.choices(LAYOUTS, (6, 4, 4, 3, 3, 1, 1, 0.3, 0.3))[0]


def _resizable(t: Tensor) -> bool:
    """torch crashes where storage in shared memory is resized, and changes the shape before it refuses."""
    return t.untyped_storage().resizable() and not t.is_shared()


@event("between", 2)
def freeze_or_unfreeze(side: Side, p: Any, r: random.Random) -> None:
    p.requires_grad_(not p.requires_grad)
    if r.random() < 0.7:
        p.grad = None


@event("between", 2)
def replace_data(side: Side, p: Any, r: random.Random) -> None:
    p.data = laid_out(p, _some_layout(r), r)
    side.fill_freed_memory(p)


@event("between")
def set_parameter(side: Side, p: Any, r: random.Random) -> None:
    with torch.no_grad():
        requires = p.requires_grad
        p.requires_grad_(False).set_(laid_out(p, _some_layout(r), r))
        p.requires_grad_(requires)
    side.fill_freed_memory(p)


@event("between")
def share_parameter(side: Side, p: Any, r: random.Random) -> None:
    p.share_memory_()
    side.fill_freed_memory(p)


@event("between")
def resize_parameter_storage(side: Side, p: Any, r: random.Random) -> None:
    storage = p.untyped_storage()
    size = storage.nbytes()
    if not _resizable(p):
        return
    storage.resize_(size + 65536)
    side.fill_freed_memory(p)
    storage.resize_(size)


@event("between")
def swap_parameter(side: Side, p: Any, r: random.Random) -> None:
    new = torch.nn.Parameter(laid_out(p, _some_layout(r), r), p.requires_grad)
    if r.random() < 0.5:
        new.grad = p.grad
    torch.utils.swap_tensors(p, new)
    del new
    side.fill_freed_memory(p)


@event("between")
def replace_parameter(side: Side, p: Any, r: random.Random) -> None:
    new = torch.nn.Parameter(laid_out(p, _some_layout(r), r), p.requires_grad)
    new.grad = p.grad
    side.replace_parameter(p, new)


@event("between")
def write_to_parameter(side: Side, p: Any, r: random.Random) -> None:
    with torch.no_grad():
        p.mul_(0.5)


@event("between", 0.7)
def move_parameter(side: Side, p: Any, r: random.Random) -> None:
    """To another dtype, as module.to() does; its state stays."""
    p.grad = None
    p.data = p.data.to(r.choice(list(DTYPES.values())))


def _with_state(function: Any) -> Any:
    """Runs only where the parameter has state; hands over a key of it."""

    def run(side: Side, p: Any, r: random.Random) -> None:
        keys = side.entries(p)
        if keys:
            function(side, p, r, r.choice(keys))
            side.fill_freed_memory(p)

    run.__name__ = function.__name__
    return run


@event("between")
@_with_state
def state_data(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.state(p)[key].data = laid_out(side.state(p)[key], _some_layout(r), r)


@event("between")
@_with_state
def state_set(side: Side, p: Any, r: random.Random, key: str) -> None:
    layout = _some_layout(r)
    layout = "plain" if layout == "negated" else layout  # set_() would lose the bit, and a count of -1 has no meaning
    side.state(p)[key].set_(laid_out(side.state(p)[key], layout, r))


@event("between")
@_with_state
def state_shared(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.state(p)[key].share_memory_()


@event("between")
@_with_state
def state_resized(side: Side, p: Any, r: random.Random, key: str) -> None:
    t = side.state(p)[key]
    shape = tuple(t.shape)
    if t.is_contiguous() and _resizable(t):
        t.resize_(t.numel() + 5000)
        side.fill_freed_memory(p)
        t.resize_(shape)


@event("between")
@_with_state
def state_storage_resized(side: Side, p: Any, r: random.Random, key: str) -> None:
    storage = side.state(p)[key].untyped_storage()
    size = storage.nbytes()
    if not _resizable(side.state(p)[key]):
        return
    storage.resize_(size + 65536)
    side.fill_freed_memory(p)
    if r.random() < 0.5:
        storage.resize_(size)


@event("between")
@_with_state
def state_swapped(side: Side, p: Any, r: random.Random, key: str) -> None:
    t = side.state(p)[key]
    other = r.choice(side.entries(p))
    if other != key and r.random() < 0.3 and side.state(p)[other].shape == t.shape and not {key, other} & set(SCALARS):
        torch.utils.swap_tensors(t, side.state(p)[other])
        return
    new = laid_out(t, _some_layout(r), r)
    torch.utils.swap_tensors(t, new)


@event("between")
@_with_state
def state_replaced(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.state(p)[key] = laid_out(side.state(p)[key], _some_layout(r), r)


@event("between", 0.6)
@_with_state
def state_overlapping(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.state(p)[key] = laid_out(side.state(p)[key], r.choice(["expanded", "sliding"]), r)


@event("between", 0.2)
@_with_state
def state_aliased(side: Side, p: Any, r: random.Random, key: str) -> None:
    """Two states, or those of two parameters, are one tensor."""
    other = r.choice(side.params)
    for name in side.entries(other) if key != "mu_product" else []:  # which torch's load rounds to 16 bits
        if side.state(other)[name].shape == side.state(p)[key].shape:
            side.state(other)[name] = side.state(p)[key]
            side.unusual = True


@event("between")
@_with_state
def state_written(side: Side, p: Any, r: random.Random, key: str) -> None:
    t = side.state(p)[key]
    t.fill_(41.0) if key == "step" else t.mul_(0.5)


@event("between", 0.5)
@_with_state
def state_dict_replaced(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.opt.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in side.state(p).items()}


@event("between", 0.5)
@_with_state
def state_dropped(side: Side, p: Any, r: random.Random, key: str) -> None:
    if side.program["name"] != "Adagrad":  # whose state torch makes in the constructor alone
        del side.opt.state[p]


@event("between", 0.3)
@_with_state
def state_of_ones_own(side: Side, p: Any, r: random.Random, key: str) -> None:
    side.state(p)[f"note {r.randrange(9)}"] = r.choice(["a word", 1, torch.ones(3)])


@event("between", 0.3)
@_with_state
def another_counter(side: Side, p: Any, r: random.Random, key: str) -> None:
    if "step" in side.state(p):
        side.state(p)["step"] = side.state(p)["step"].to(r.choice([torch.float64, torch.int64, torch.float32]))


@event("between", 2, whole=True)
def change_lr(side: Side, p: Any, r: random.Random) -> None:
    for group in side.opt.param_groups:
        lr = r.choice([0.0, 1e-3, 0.05])
        if isinstance(group["lr"], Tensor) and r.random() < 0.5:
            group["lr"].fill_(lr)
        else:
            kind = r.choice([None, None, "f32", "f64"])
            group["lr"] = torch.full((1,) * r.randint(0, 1), lr, dtype=DTYPES[kind]) if kind else lr


@event("between", 1.5)
def change_options(side: Side, p: Any, r: random.Random) -> None:
    group = side.group_of(p)
    if group is None:
        return
    takes = sorted(k for k in OPTIONS if k in group and k not in ("lr", "differentiable", "capturable"))
    key = r.choice(takes)
    choice = r.choice(OPTIONS[key])
    group[key] = (not group[key]) if isinstance(choice, bool) else decoded(choice)


@event("between", whole=True)
def zero_grad(side: Side, p: Any, r: random.Random) -> None:
    to_none = r.random() < 0.5
    if side.program["ours"].get("fused"):  # torch's zero_grad then refuses negated gradients; without it it does not
        to_none |= any(q.grad is not None and q.grad.is_neg() for q in side.params)
    side.opt.zero_grad(set_to_none=to_none)


@event("between", 1.5)
def add_group(side: Side, p: Any, r: random.Random) -> None:
    if len(side.params) < 10:
        new = [side.parameter(_parameter(r, r.choice(list(DTYPES)))) for _ in range(r.randint(1, 2))]
        side.opt.add_param_group({"params": new, **({"lr": 0.02} if r.random() < 0.5 else {})})
        side.params += new


@event("between")
def move_between_groups(side: Side, p: Any, r: random.Random) -> None:
    group = side.group_of(p)
    if group is not None:
        group["params"][:] = [q for q in group["params"] if q is not p]
    if group is None or r.random() < 0.7:
        r.choice(side.opt.param_groups)["params"].append(p)


@event("between", whole=True)
def deepcopied(side: Side, p: Any, r: random.Random) -> None:
    grads = [q.grad for q in side.params]
    pair = (side.params, side.opt)
    copied = copy.deepcopy(pair)
    side.kept = [pair if r.random() < 0.5 else None]
    if side.kept[0] is None or r.random() < 0.7:
        side.params, side.opt = copied
    for q, g in zip(side.params, grads, strict=True):
        q.grad = g


@event("between", whole=True)
def pickled(side: Side, p: Any, r: random.Random) -> None:
    grads = [q.grad for q in side.params]
    side.params, side.opt = pickle.loads(pickle.dumps((side.params, side.opt)))
    for q, g in zip(side.params, grads, strict=True):
        q.grad = g


def _load(side: Side, state: dict[str, Any], r: random.Random) -> None:
    if r.random() < 0.3:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    if r.random() < 0.5:
        side.opt = side.made([{"params": list(g["params"])} for g in side.opt.param_groups])
    side.opt.load_state_dict(state)


@event("between", 1.5, whole=True)
def load_same(side: Side, p: Any, r: random.Random) -> None:
    _load(side, copy.deepcopy(side.opt.state_dict()), r)


@event("between", 1.5, whole=True)
def load_another_dtype(side: Side, p: Any, r: random.Random) -> None:
    state, dtype = copy.deepcopy(side.opt.state_dict()), r.choice(list(DTYPES.values()))
    for entry in state["state"].values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and key not in SCALARS:
                entry[key] = value.to(dtype)
    _load(side, state, r)


@event("between", 0.5, whole=True)
def collect_garbage(side: Side, p: Any, r: random.Random) -> None:
    side.kept = []
    gc.collect()


@event("between", 0.5, whole=True)
def change_threads(side: Side, p: Any, r: random.Random) -> None:
    if side.mine:
        fusedopt.set_num_threads(r.choice([None, 1, 2, 3]))


@event("gradients", whole=True)
def gradients(side: Side, p: Any, r: random.Random) -> None:
    """New gradients for all, as a backward pass leaves them; a few are missing."""
    size, gone = r.choice([1.0, 1.0, 1e-4, 0.0]), r.choice([0.0, 0.0, 0.3])
    for q in side.params:
        seed, like, missing = r.randrange(10**6), r.random() < 0.5, r.random() < gone
        if not q.requires_grad or missing:
            q.grad = None
            continue
        g = values(tuple(q.shape), torch.float64, generator(seed)).mul_(size).to(q.dtype)
        q.grad = torch.empty_like(q, requires_grad=False).copy_(g) if like and not q.is_neg() else g


def _gradient(function: Any) -> Any:
    """Hands over the present gradient, or new values for it, and puts what comes back in its place."""

    def run(side: Side, p: Any, r: random.Random) -> None:
        old = p.grad
        if old is None or old.layout != torch.strided:
            old = values(tuple(p.shape), p.dtype, generator(r.randrange(10**6)))
        new = function(side, p, r, old.detach())
        if new is not None and new.dtype != p.dtype:
            p.grad = None
            p.grad_dtype = None
        p.grad = new

    run.__name__ = function.__name__
    return run


@event("gradient", 2)
@_gradient
def missing_gradient(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    return None


@event("gradient", 4)
@_gradient
def gradient_laid_out(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    return laid_out(g, r.choice([*LAYOUTS, "expanded"]), r)


@event("gradient", 2)
@_gradient
def gradient_without_memory(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    return torch._efficientzerotensor(tuple(p.shape), dtype=p.dtype)


@event("gradient", 2)
@_gradient
def gradient_of_another_dtype(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    return g.to(r.choice(list(DTYPES.values())))


@event("gradient", 1)
@_gradient
def gradient_with_odd_values(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    g = g.clone(memory_format=torch.contiguous_format)
    if g.numel():
        g.view(-1)[r.randrange(g.numel())] = r.choice([math.nan, math.inf, -math.inf, 1e30, 1e-30, -0.0])
    return g


@event("gradient", 0.3)
@_gradient
def sparse_gradient(side: Side, p: Any, r: random.Random, g: Tensor) -> Any:
    return g.to_sparse()


@event("gradient", 0.2)
def gradient_is_the_parameter(side: Side, p: Any, r: random.Random) -> None:
    p.grad, side.unusual = p.detach(), True


@event("gradient", 0.2)
def gradient_is_another_parameter(side: Side, p: Any, r: random.Random) -> None:
    """The same memory as another parameter's, as the tests of double descent and of tied weights make it."""
    for q in side.params:
        if q is not p and q.shape == p.shape and q.dtype == p.dtype:
            p.grad, side.unusual = q.detach(), True


@event("gradient", 0.3)
def gradient_shared(side: Side, p: Any, r: random.Random) -> None:
    """One tensor is the gradient of two parameters."""
    for q in side.params:
        if q is not p and q.shape == p.shape and q.dtype == p.dtype:
            q.grad = p.grad


@event("gradient", 0.2)
def gradient_is_a_state(side: Side, p: Any, r: random.Random) -> None:
    for key in side.entries(p):
        t = side.state(p)[key]
        if key not in SCALARS and t.shape == p.shape and t.dtype == p.dtype:
            p.grad, side.unusual = t, True


@event("step", whole=True)
def step(side: Side, p: Any, r: random.Random) -> None:
    if r.random() < 0.1:
        assert side.opt.step(lambda: 3.5) == 3.5
    else:
        side.opt.step()


@event("between", 0)
def crash(side: Side, p: Any, r: random.Random) -> None:
    """For the fuzzer's own tests."""
    os.kill(os.getpid(), signal.SIGSEGV)


@event("between", 0)
def hang(side: Side, p: Any, r: random.Random) -> None:
    """Likewise."""
    threading.Event().wait()


@event("between", 0.8, whole=True)
def step_in_threads(side: Side, p: Any, r: random.Random) -> None:
    """Done by `run_in_threads`, which needs both sides."""


# -- running and comparing --------------------------------------------------------------------------------------------


class Difference(AssertionError):
    """Ours is not where torch is."""


def rounding(dtype: torch.dtype) -> float:
    """The relative distance of two neighbours in the precision in which such a parameter is updated."""
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def nudge(dtype: torch.dtype) -> float:
    """A change of an input, relative to it, whose effect the float64 step shows to several digits."""
    return max(rounding(dtype), 2.0**-40)


class Snapshot:
    """What a step starts from: values of parameters, gradients, states, and the groups' options."""

    def __init__(self, side: Side) -> None:
        self.params = [p.detach().clone() for p in side.params]
        self.grads = [None if p.grad is None else p.grad.detach().clone() for p in side.params]
        self.states = [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in side.state(p).items()} for p in side.params
        ]
        places = {id(p): i for i, p in enumerate(side.params)}
        self.groups = [
            {**{k: copy.copy(v) for k, v in g.items()}, "params": [places[id(p)] for p in g["params"]]}
            for g in side.opt.param_groups
        ]

    def inputs(self) -> list[str]:
        """The names of the tensors that a step reads."""
        states = {k for s in self.states for k, v in s.items() if isinstance(v, Tensor) and k not in SCALARS}
        return ["param", "grad", *sorted(states)]

    def exact(self, name: str, moved: str = "") -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The step from here by torch's plain loop in float64; with the name of an input, from a little more of it."""

        def wide(t: Tensor, key: str, i: int) -> Tensor:
            t = t.detach().to(torch.float64, copy=True)
            return t * (1 + nudge(self.params[i].dtype)) if key == moved else t

        def number(v: Any) -> Any:
            if isinstance(v, Tensor):
                return v.item()
            return tuple(map(number, v)) if isinstance(v, tuple) else v

        twins = [torch.nn.Parameter(wide(p, "param", i)) for i, p in enumerate(self.params)]
        for i, (twin, g) in enumerate(zip(twins, self.grads, strict=True)):
            twin.grad = None if g is None else wide(g.to_dense() if g.layout != torch.strided else g, "grad", i)
        opt = plain(name, twins)
        opt.param_groups[:] = [
            {k: number(v) for k, v in g.items() if k != "params"} | {"params": [twins[i] for i in g["params"]]}
            for g in self.groups
        ]
        opt.state.clear()
        for i, (twin, state) in enumerate(zip(twins, self.states, strict=True)):
            if state:
                opt.state[twin] = {
                    k: wide(v, k, i) if isinstance(v, Tensor) and k not in SCALARS else copy.deepcopy(v)
                    for k, v in state.items()
                }
        opt.step()
        return [t.detach() for t in twins], [opt.state.get(t, {}) for t in twins]


def _unit(t: Tensor, old: Tensor | None, new: Tensor) -> Tensor:
    was = torch.zeros_like(new, dtype=torch.float64) if old is None else old.double()
    return ulp(torch.stack([was.abs(), (new.double() - was).abs(), new.double().abs()]).nan_to_num().amax(0), t.dtype)


def _text(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape) if t.dim() < 9 else f'{t.dim()} dims'} {layout_of(t)}".replace("torch.", "")


ROUNDINGS = 4  # of the terms of a step, before they are added


class Comparison:
    """Parameters and state of the two sides after a step. What is not equal to the bit has to be near torch's value,
    or, where torch's own path is the rougher one, near the float64 step from the same place."""

    def __init__(self, name: str, before: Snapshot, fused: bool) -> None:
        self.name, self.before, self.fused = name, before, fused
        self._exact: Any = None

    def exact(self, place: tuple[int, str]) -> tuple[Tensor, Tensor]:
        """(the value by a float64 step, how far it moves if each of the inputs moves by a rounding).

        It moves far where terms cancel: a rounding of one of them is then a large part of what is left.
        """
        if self._exact is None:
            runs = [self.before.exact(self.name, moved) for moved in ("", *self.before.inputs())]
            self._exact = [
                {(i, "param"): p for i, p in enumerate(params)}
                | {(i, k): v for i, s in enumerate(states) for k, v in s.items()}
                for params, states in runs
            ]
        truth, *moved = (run[place].squeeze() for run in self._exact)
        dtype = self.before.params[place[0]].dtype
        sum_ = torch.stack([(m - truth).abs() for m in moved]).nan_to_num(torch.inf).sum(0)
        return truth, sum_ * (rounding(dtype) / nudge(dtype))

    def check(self, i: int, key: str, mine: Tensor, theirs: Tensor | None) -> None:
        what = f"parameter {i}, {key} ({_text(mine)})"
        old = self.before.params[i] if key == "param" else self.before.states[i].get(key)
        if theirs is not None:
            # torch's load rounds mu_product to 16 bits; its first momentum is the gradient, in the gradient's dtype. A
            # load with fused=True, which the other side is not given, makes a step of any dtype a float32.
            odd = key == "mu_product" or (self.fused and key == "step" and mine.dtype == torch.float32)
            odd |= key == "momentum_buffer" and mine.dtype == self.before.params[i].dtype
            if mine.dtype != theirs.dtype and not odd:
                raise Difference(f"{what}: torch has {theirs.dtype}")
            if mine.shape != theirs.shape:
                raise Difference(f"{what}: torch has shape {tuple(theirs.shape)}")
            new = key != "param" and key not in self.before.states[i]
            if new and mine.numel() > 1 and mine.stride() != theirs.stride() and key != "momentum_buffer":
                # (the first momentum is a copy of the gradient in torch, with its strides)
                raise Difference(f"{what}: strides {mine.stride()}, torch has {theirs.stride()}")
            if bool(same_elements(mine, theirs).all()):
                return
        if key in SCALARS:
            off = abs(float(mine) - float(theirs if theirs is not None else mine))
            # In torch mu_product may have been rounded to 16 bits; in float16 the smallest become 0.
            if off > (1e-2 * abs(float(mine)) + 2.0**-25) * (key == "mu_product"):
                raise Difference(f"{what}: {float(mine)!r}, torch has {float(theirs)!r}")  # type: ignore[arg-type]
            return
        if not mine.is_floating_point():
            raise Difference(f"{what}: torch has other values")
        mine, theirs, old = (t if t is None else t.squeeze() for t in (mine, theirs, old))
        if theirs is not None:
            near = (mine.double() - theirs.double()).abs() <= 4 * _unit(mine, old, theirs)
            odd = same_elements(mine, theirs)
            if bool((near | odd).all()):
                return
        try:
            truth, moves = self.exact((i, key))
        except Exception as error:
            raise Difference(f"{what}: {self._worst(mine, theirs)}; no exact step: {error!r}") from error
        room = 16 if mine.dtype == torch.float64 else 4 if mine.dtype == torch.float32 else 1
        room *= 2 if key == "acc_delta" else 1  # the square of a product of two roots and a quotient
        room = room * _unit(mine, old, truth) + ROUNDINGS * moves
        off = (mine.double() - truth).abs()
        fine = off <= room
        if theirs is not None:
            off_torch = (theirs.double() - truth).abs()
            fine |= (off <= off_torch) | same_elements(mine, theirs) | (off_torch.isnan() & mine.isfinite())
        fine |= ~(truth.abs() <= torch.finfo(mine.dtype).max)  # beyond the type's range there is no error to speak of
        gradient = self.before.grads[i]
        if theirs is None and gradient is not None and gradient.squeeze().shape == mine.shape:  # nor where a square is
            fine |= gradient.squeeze().abs().nan_to_num(torch.inf) > 1e9
        if not bool(fine.all()):
            at = int((~fine).reshape(-1).int().argmax())
            was = None if old is None else old.reshape(-1)[at].item()
            raise Difference(
                f"{what}: {int((~fine).sum())} elements differ, the first at {at}: {mine.reshape(-1)[at].item()!r}, "
                f"torch {None if theirs is None else theirs.reshape(-1)[at].item()!r}, exact "
                f"{truth.reshape(-1)[at].item()!r}, before {was!r}"
            )

    @staticmethod
    def _worst(a: Tensor, b: Tensor | None) -> str:
        if b is None:
            return ""
        at = int((a.double() - b.double()).abs().nan_to_num(torch.inf).reshape(-1).argmax())
        return f"{a.reshape(-1)[at].item()!r} at {at}, torch {b.reshape(-1)[at].item()!r}"


def same_elements(a: Tensor, b: Tensor) -> Tensor:
    if a.layout != torch.strided:  # a first momentum, for example
        a, b = a.to_dense(), b.to_dense()
    a, b = a.squeeze(), b.squeeze()  # not everything in torch takes more than 64 dimensions
    return (a == b) | (a.isnan() & b.isnan())


def outcome(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def mixed(side: Side) -> bool:
    """Whether some parameter has a gradient or state of another dtype: there torch refuses what the kernels do."""
    for p in side.params:
        held = [side.state(p)[k] for k in side.entries(p) if k not in SCALARS] + ([] if p.grad is None else [p.grad])
        if any(t.is_floating_point() and t.dtype != p.dtype for t in held):
            return True
    return False


class Run:
    """A program, run on both sides. `seen` counts events by dtype, layout and size of what they met."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()

    def go(self) -> None:
        """Raises Difference where the sides part."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.program["wide_default"] else torch.float32)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._go()
        finally:
            torch.set_default_dtype(before)
            fusedopt.set_num_threads(None)

    def _go(self) -> None:
        self.counts[f"class {self.program['name']}"] += 1
        sides: list[Side] = []
        errors = [outcome(lambda mine=mine: sides.append(Side(self.program, mine))) for mine in (True, False)]  # type: ignore[misc]
        if any(errors):
            self.alike("the constructor", *errors)
            self.counts["constructor refuses"] += 1
            return
        self.mine, self.theirs = sides
        for number, (name, which, seed) in enumerate(self.program["events"]):
            self.at = f"event {number} ({name})"
            if name == "step":
                if not self.step(which):
                    self.counts["ends with an error of torch's"] += 1
                    return
            elif name == "step_in_threads":
                self.count(name, None)
                if not self.run_in_threads():
                    return
            else:
                self.event(name, which, seed)
        self.counts["reaches its end"] += 1

    def count(self, name: str, p: Any) -> None:
        for t in self.theirs.params if p is None else [p]:
            about = t.grad if EVENTS[name].kind == "gradient" and t.grad is not None else t
            short = next((k for k, v in DTYPES.items() if v == about.dtype), "?")
            for word in (short, layout_of(about), size_of(t)):
                self.seen[name, word] += 1

    def event(self, name: str, which: int, seed: int) -> None:
        errors = []
        for side in (self.mine, self.theirs):
            p = side.params[which % len(side.params)]
            errors.append(outcome(lambda s=side, q=p: EVENTS[name].run(s, q, random.Random(seed))))  # type: ignore[misc]
        self.alike(self.at, *errors)
        if name.startswith("load"):  # torch has rounded mu_product to 16 bits: ours goes on from there
            for p, q in zip(self.mine.params, self.theirs.params, strict=True):
                a, b = (side.state(t).get("mu_product") for side, t in ((self.mine, p), (self.theirs, q)))
                if a is not None and b is not None and abs(float(a) - float(b)) <= 1e-2 * abs(float(a)) + 2.0**-25:
                    a.copy_(b)
        if not any(errors):
            theirs = self.theirs.params
            self.count(name, None if EVENTS[name].whole else theirs[which % len(theirs)])

    def alike(self, what: str, mine: BaseException | None, theirs: BaseException | None) -> None:
        if (mine is None) != (theirs is None):
            raise Difference(f"{what}: ours {mine!r}, torch {theirs!r}"[:2000])

    def step(self, which: int) -> bool:
        before = Snapshot(self.theirs)
        overlap, overlap_kept = (any(map(overlapping, self.states(side))) for side in (self.mine, self.theirs))
        grads = [None if p.grad is None else p.grad.detach().clone() for p in self.mine.params]
        versions = [[p._version for p in side.params] for side in (self.mine, self.theirs)]
        errors = [
            outcome(lambda s=side: EVENTS["step"].run(s, None, random.Random(which)))  # type: ignore[misc]
            for side in (self.mine, self.theirs)
        ]
        comparison = Comparison(self.program["name"], before, bool(self.program["ours"].get("fused")))
        if errors[1] is not None and errors[0] is None and mixed(self.theirs):
            self.counts["kernels do what torch refuses"] += 1
            left = self.left()  # updated by torch, which has refused another one here: there is nothing to compare with
            for i, p in enumerate(self.mine.params):
                for key, mine in self.tensors(self.mine, p) if id(p) not in left else []:
                    self.checked(comparison, i, key, mine, None)
            return False
        if errors[1] is not None and errors[0] is None and overlap_kept and not overlap:
            self.counts["a load has copied overlapping state, which torch keeps and refuses"] += 1
            return False
        self.alike(self.at, *errors)
        if any(errors):
            return False
        self.counts["steps compared"] += 1
        self.count("step", None)
        self.count_paths()
        self.compare(comparison)
        for i, (p, g) in enumerate(zip(self.mine.params, grads, strict=True)):
            if not self.mine.unusual and (p.grad is None) != (g is None):
                raise Difference(f"{self.at}: the gradient of parameter {i} is gone, or new")
            plain_gradient = g is not None and g.layout == torch.strided and not self.mine.unusual
            if plain_gradient and not same_elements(p.grad, g).all():  # type: ignore[arg-type]
                raise Difference(f"{self.at}: the gradient of parameter {i} was written to")
            moved = [s.params[i]._version > v[i] for s, v in zip((self.mine, self.theirs), versions, strict=True)]
            if moved[0] != moved[1]:
                raise Difference(
                    f"{self.at}: the version of parameter {i} went on here {moved[0]}, in torch {moved[1]}"
                )
        for t in self.mine.ballast:
            if not bool((t == GAP).all()):
                raise Difference(f"{self.at}: the step wrote into memory that is not its own")
        self.follow()
        return True

    def left(self) -> set[int]:
        """Parameters with a gradient that took torch's own step."""
        engine = getattr(self.mine.opt, "_engine", None)  # a mutant of the tests may be a class of torch's
        left = engine.fallback.places.values() if engine else ()
        return {id(p) for places in left for _, p in places if p.grad is not None}

    def count_paths(self) -> None:
        left = self.left()
        for p in self.mine.params:
            if p.grad is not None and self.mine.group_of(p) is not None:
                self.counts["left to torch" if id(p) in left else "updated by the kernels"] += 1

    @staticmethod
    def states(side: Side) -> list[Tensor]:
        return [side.state(p)[k] for p in side.params for k in side.entries(p)]

    @staticmethod
    def tensors(side: Side, p: Tensor) -> list[tuple[str, Tensor]]:
        return [("param", p.detach()), *((k, side.state(p)[k]) for k in side.entries(p))]

    def checked(self, comparison: Comparison, *rest: Any) -> None:
        try:
            comparison.check(*rest)
        except Difference as error:
            raise Difference(f"{self.at}: {error}") from None

    def compare(self, comparison: Comparison) -> None:
        for i, (p, q) in enumerate(zip(self.mine.params, self.theirs.params, strict=True)):
            mine, theirs = dict(self.tensors(self.mine, p)), dict(self.tensors(self.theirs, q))
            if mine.keys() != theirs.keys():
                raise Difference(f"{self.at}: state of parameter {i}: {sorted(mine)}, torch has {sorted(theirs)}")
            for key in mine:
                self.checked(comparison, i, key, mine[key], theirs[key])
            if layout_of(p) in ("gaps", "offset") and gaps_are_kept(q) and not gaps_are_kept(p):
                raise Difference(f"{self.at}: parameter {i}: wrote between its elements")

    def follow(self) -> None:
        """Ours goes on from torch's values, so that distances do not add up."""
        for p, q in zip(self.mine.params, self.theirs.params, strict=True):
            for (_, a), (_, b) in zip(self.tensors(self.mine, p), self.tensors(self.theirs, q), strict=True):
                if not same_elements(a, b).all() and not overlapping(a):
                    a.squeeze().copy_(b.squeeze())

    def run_in_threads(self) -> bool:
        """Several threads step one optimizer: each step is done whole or refused, so as many steps from the same place
        in one thread give the same bits."""
        mine = self.mine
        tensors = [t for p in mine.params for _, t in self.tensors(mine, p)]
        tensors += [p.grad for p in mine.params if p.grad is not None]
        odd = ("sparse", "negated", "expanded", "sliding", "misaligned")  # a copy is stored in another way
        if mine.unusual or any(layout_of(t) in odd for t in tensors):
            return True
        params, opt = copy.deepcopy((mine.params, mine.opt))
        for p, q in zip(mine.params, params, strict=True):
            if p.grad is not None and p.grad.dtype != p.dtype:
                q.grad_dtype = None
            q.grad = p.grad
        done, wrong, gate = [0] * 4, [], threading.Barrier(4)

        def work(k: int) -> None:
            gate.wait(timeout=60)
            for _ in range(5):
                try:
                    mine.opt.step()
                    done[k] += 1
                except RuntimeError as error:
                    if "already running in another thread" not in str(error):
                        wrong.append(error)
                except Exception as error:
                    wrong.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        finally:
            sys.setswitchinterval(interval)
        if wrong:
            alone = outcome(opt.step)
            if alone is None or any(type(error) is not type(alone) for error in wrong):
                raise Difference(f"{self.at}: in threads {wrong[0]!r}, alone {alone!r}")
            return False
        for _ in range(sum(done)):
            opt.step()
        values_too = not self.left()  # torch's own step depends on the layout in the last bit, and copies are dense
        twin = copy.copy(mine)
        twin.params, twin.opt = params, opt
        for i, (p, q) in enumerate(zip(mine.params, params, strict=True)):
            a, b = dict(self.tensors(mine, p)), dict(self.tensors(twin, q))
            for key in sorted(a.keys() | b.keys()):
                if (
                    key not in a
                    or key not in b
                    or not (same_elements(a[key], b[key]).all() or (values_too is False and key not in SCALARS))
                ):
                    raise Difference(
                        f"{self.at}: {done} steps in four threads: parameter {i}, {key} is not where {sum(done)} steps "
                        f"in one thread end: {a.get(key)}, {b.get(key)}"[:600]
                    )
        for p, q in zip(mine.params, self.theirs.params, strict=True):
            with torch.no_grad():
                q.copy_(p)
            if mine.state(p):
                self.theirs.opt.state[q] = copy.deepcopy(mine.state(p))
        return True
