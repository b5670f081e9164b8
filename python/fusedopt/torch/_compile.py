"""The step under torch.compile. Imported only while a graph is traced, since it imports torch's compiler.

A graph breaks at ``opt.step()``, and the step runs between the two parts at its usual speed. With ``fullgraph=True`` it
is one operator, ``torch.ops.fusedopt.step``, which declares what it changes and finds the optimizer by a number. It
reads lr and the other options from the groups when it runs: no option is guarded, and a new lr recompiles nothing.
The operator is not the default because the guards on its tensors cost several times the step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.optim import optimizer as _torch_optimizer

from ._eligibility import group_reason, takes_parameter
from ._engine import Engine, engine_of, optimizers
from ._state import create_state

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
    optimizer = optimizers[number]
    engine = engine_of(optimizer)
    view, everything = engine.traced_views[tuple(chosen)], engine.traced_params
    assert everything is not None
    # Some backends let a graph work on copies, and write them back afterwards.
    originals, given = [*view.params, *view.states], [*params, *states]
    copies = [(a, b) for a, b in zip(originals, given, strict=True) if a is not b and a.data_ptr() != b.data_ptr()]
    saved = [p.grad for p in everything]
    with torch.no_grad():
        for a, b in copies:
            a.copy_(b)
        try:
            for p in everything:
                p.grad = None
            for p, g in zip(view.params, grads, strict=True):
                p.grad = g
            engine.run(optimizer)
        finally:
            for p, grad in zip(everything, saved, strict=True):
                p.grad = grad
        for a, b in copies:
            b.copy_(a)


def _fake(number: str, chosen: Sequence[int], params: Tensors, grads: Tensors, states: Tensors) -> None:
    """There is no result; what the operator changes, it declares."""


for _device in ("CPU", "CUDA"):
    _library.impl("step", _run, _device)
torch.library.register_fake("fusedopt::step", _fake, lib=_library)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _whole_graph() -> bool:
    """Whether the graph may not break. Called when a graph is traced."""
    return bool(getattr(InstructionTranslator.current_tx(), "one_graph", False))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _list_params(number: str) -> None:
    """Puts all parameters into one list: a graph that read the groups would guard lr, which is in them, too."""
    optimizer = optimizers[number]
    engine_of(optimizer).traced_params = [p for group in optimizer.param_groups for p in group["params"]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(number: str, chosen: tuple[int, ...]) -> bool:
    """Creates the state of the chosen parameters; whether the operator takes them. Called when a graph is traced."""
    optimizer = optimizers[number]
    engine = engine_of(optimizer)
    everything = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    picked = [everything[i] for i in chosen]
    if any(not takes_parameter(p) or group_reason(group) for group, p in picked):
        return False
    states: list[torch.Tensor] = []
    for group, p in picked:
        if engine.rule.scalars:  # else steps are counted by the state's existence alone, and the step creates it
            create_state(optimizer, engine.rule, p, group)
        states += [s for s in optimizer.state.get(p, {}).values() if isinstance(s, torch.Tensor)]
    engine.traced_views[chosen] = _View([p for _, p in picked], states)
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(optimizer: Any, closure: Any) -> Any:
    return optimizer.step(closure)


def step(optimizer: Any, engine: Engine, closure: Any) -> Any:
    """``optimizer.step(closure)`` for a compiler that traces this function."""
    outside = (
        closure is not None
        or len(optimizer._optimizer_step_pre_hooks)
        or len(optimizer._optimizer_step_post_hooks)
        or len(_torch_optimizer._global_optimizer_pre_hooks)
        or len(_torch_optimizer._global_optimizer_post_hooks)
    )
    if not outside and _whole_graph():
        _list_params(engine.number)
        chosen = [i for i, p in enumerate(engine.traced_params or ()) if p.grad is not None]
        key = tuple(chosen)
        if key and _prepare(engine.number, key):
            view = engine.traced_views[key]
            with torch.no_grad():
                torch.ops.fusedopt.step(engine.number, chosen, view.params, [p.grad for p in view.params], view.states)
            return None
    return _outside(optimizer, closure)
