"""The step as torch.compile sees it. Imported while a graph is traced, as it imports torch's compiler.

A graph breaks at ``opt.step()`` and the step runs between its halves, at its usual speed. With ``fullgraph=True`` it is
one operator, ``torch.ops.fusedopt.step``, that declares what it changes and finds the optimizer by a number; lr and the
other options are read from the groups when it runs. Either way no option is guarded, so a new lr recompiles nothing.
The operator is not the default because the guards of its tensors cost several times the step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.optim import optimizer as _torch_optimizer

from .torch import _TYPES, _optimizers
from .torch_forms import DTYPES, refused

Tensors = Sequence[torch.Tensor]

_library: Any = torch.library.Library("fusedopt", "DEF")  # type: ignore[no-untyped-call]
_tags = [getattr(torch.Tag, "cudagraph_unsafe", None)]  # lr is read when it runs, which a replay would not do
_library.define(
    "step(str number, int[] chosen, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states) -> ()",
    tags=[tag for tag in _tags if tag is not None],
)


class _View:
    """The tensors of one optimizer in the operator's order, for one choice of parameters that have gradients."""

    def __init__(self, params: list[torch.Tensor], states: list[torch.Tensor]) -> None:
        self.params, self.states = params, states


def _run(number: str, chosen: Sequence[int], params: Tensors, grads: Tensors, states: Tensors) -> None:
    opt = _optimizers[number]
    view = opt._views[tuple(chosen)]
    mine, given = [*view.params, *view.states], [*params, *states]
    # Some backends let a graph work on copies, and write them back afterwards.
    copies = [(a, b) for a, b in zip(mine, given, strict=True) if a is not b and a.data_ptr() != b.data_ptr()]
    everything = opt._every
    kept = [p.grad for p in everything]
    with torch.no_grad():
        for a, b in copies:
            a.copy_(b)
        try:
            for p in everything:
                p.grad = None
            for p, g in zip(view.params, grads, strict=True):
                p.grad = g
            opt._step()
        finally:
            for p, was in zip(everything, kept, strict=True):
                p.grad = was
        for a, b in copies:
            b.copy_(a)


def _fake(number: str, chosen: Sequence[int], params: Tensors, grads: Tensors, states: Tensors) -> None:
    """Has no result; what it changes, it has declared."""


for _device in ("CPU", "CUDA"):
    _library.impl("step", _run, _device)
torch.library.register_fake("fusedopt::step", _fake, lib=_library)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _whole_graph() -> bool:
    """Whether the graph may not break. Called when a graph is traced."""
    return bool(getattr(InstructionTranslator.current_tx(), "one_graph", False))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _list_params(number: str) -> None:
    """All parameters as one list: a graph that went through the groups would guard lr, which stands beside them."""
    opt = _optimizers[number]
    opt._every = [p for group in opt.param_groups for p in group["params"]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(number: str, chosen: tuple[int, ...]) -> bool:
    """Creates the state of the chosen parameters; whether the operator takes them. Called when a graph is traced."""
    opt = _optimizers[number]
    everything = [(group, p) for group in opt.param_groups for p in group["params"]]
    picked = [everything[i] for i in chosen]
    for group, p in picked:
        plain = type(p) in _TYPES and p.layout == torch.strided and not refused(p.device) and p.dtype in _NAMES
        if not plain or opt._group_reason(group):
            return False
    states: list[torch.Tensor] = []
    for group, p in picked:
        if opt._rule.scalars:  # else nothing counts the steps but the state's existence, and it begins in the step
            opt._fill_state(p, group)
        states += [s for s in opt.state.get(p, {}).values() if isinstance(s, torch.Tensor)]
    opt._views[chosen] = _View([p for _, p in picked], states)
    return True


_NAMES = frozenset(DTYPES.values())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(opt: Any, closure: Any) -> Any:
    return opt.step(closure)


def step(opt: Any, closure: Any) -> Any:
    """``opt.step(closure)`` for a compiler that traces this function."""
    outside = (
        closure is not None
        or len(opt._optimizer_step_pre_hooks)
        or len(opt._optimizer_step_post_hooks)
        or len(_torch_optimizer._global_optimizer_pre_hooks)
        or len(_torch_optimizer._global_optimizer_post_hooks)
    )
    if not outside and _whole_graph():
        _list_params(opt._number)
        chosen = [i for i, p in enumerate(opt._every) if p.grad is not None]
        key = tuple(chosen)
        if key and _prepare(opt._number, key):
            view = opt._views[key]
            with torch.no_grad():
                torch.ops.fusedopt.step(opt._number, chosen, view.params, [p.grad for p in view.params], view.states)
            return None
    return _outside(opt, closure)
