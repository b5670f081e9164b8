"""Steps on DTensors (FSDP2's ``fully_shard``, tensor parallelism): the kernels update the shards of this process.

The step of a sharded parameter is the step of its shards: updates are elementwise. An inner optimizer of the same
class holds the local tensors and updates them. The outer one, the user's, holds the state as DTensors, which
checkpoints and resharding need. The norm for clipping is reduced over the mesh, as are the sums over a tensor that a
rule written in Python may use.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from .. import _core

__all__ = ["Shards", "any_dtensor"]


def any_dtensor(groups: list[dict[str, Any]]) -> bool:
    """Whether a parameter among the groups is a DTensor."""
    return any(isinstance(p, DTensor) for group in groups for p in group["params"])


class Shards:
    """The local side of an optimizer over DTensors.

    Attributes:
        inner: the optimizer over the local tensors, of the same class.
        engine: its engine.
        local: parameter of the outer optimizer -> local tensor.
    """

    def __init__(self) -> None:
        self.inner: Any = None
        self.engine: Any = None
        self.local: dict[torch.Tensor, torch.Tensor] = {}
        self._published = -1  # engine.plans_built when the outer optimizer last got new state
        self._params: list[list[torch.Tensor]] = []  # the outer parameters that the inner optimizer was made for
        self._stepped: list[torch.Tensor] = []  # during a step: the outer parameters with a gradient, in its order
        self._wrapped: dict[torch.Tensor, dict[str, tuple[Any, Any]]] = {}  # param -> name -> (outer, inner) state

    def step(self, engine: Any, outer: Any, unscale: float, max_norm: float) -> torch.Tensor | None:
        """Does one step on the local shards; the norm of all gradients over the whole mesh where it clips.

        Args:
            engine: that of ``outer``.
        """
        self._follow(engine, outer)
        inner = self.inner
        self._stepped = []
        for theirs, ours in zip(outer.param_groups, inner.param_groups, strict=True):
            for p, local in zip(theirs["params"], ours["params"], strict=True):
                grad = _local_grad(p)
                if grad is not None and grad.dtype != local.dtype and hasattr(local, "grad_dtype"):
                    local.grad_dtype = None
                local.grad = grad
                if grad is not None:
                    self._stepped.append(p)
        norm, factor = None, 1.0
        if max_norm:
            norm = self._norm(outer) * abs(unscale)
            factor = _core.clip_factor(max_norm, float(norm))
        vars(inner).pop("grad_scale", None)
        if unscale * factor != 1.0:
            inner.grad_scale = 1.0 / (unscale * factor) if unscale * factor != 0 else float("inf")
        self.engine.complete = self._complete if engine.rule.reduces else None
        try:
            self.engine.run(inner)
        finally:
            self.engine.complete, self._stepped = None, []
            for group in inner.param_groups:
                for local in group["params"]:
                    local.grad = None
        if self.engine.fallback.places or self.engine.plans_built != self._published:  # there may be new state
            self._published = self.engine.plans_built
            self._publish(outer, engine.rule.scalars)
        return norm

    # --- the two sides ---

    def _follow(self, engine: Any, outer: Any) -> None:
        """Brings the inner optimizer up to date with the outer one's parameters, options and state."""
        params = [group["params"] for group in outer.param_groups]
        moved = any(_local(p) is not local for p, local in self.local.items())
        if (
            moved
            or len(params) != len(self._params)
            or any(
                len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))
                for a, b in zip(params, self._params, strict=True)
            )
        ):
            self._rebuild(engine, outer, params)
        for theirs, ours in zip(outer.param_groups, self.inner.param_groups, strict=True):
            for key, value in theirs.items():
                if key not in ("params", "max_grad_norm"):
                    ours[key] = value
        for p, local in self.local.items():
            entry = outer.state.get(p)
            known = self._wrapped.get(p, {})
            if entry is None:
                self.inner.state.pop(local, None)
                self._wrapped.pop(p, None)
            elif len(entry) != len(known) or any(entry.get(name) is not pair[0] for name, pair in known.items()):
                self._wrapped[p] = pairs = {name: (value, _local(value)) for name, value in entry.items()}
                self.inner.state[local] = {name: pair[1] for name, pair in pairs.items()}

    def _rebuild(self, engine: Any, outer: Any, params: list[list[torch.Tensor]]) -> None:
        for p in itertools.chain(*params):
            if isinstance(p, DTensor) and any(isinstance(place, Partial) for place in p.placements):
                raise RuntimeError("a parameter of partial sums (placement Partial) cannot be updated: redistribute it")
        self._params = [list(group) for group in params]
        self.local = {p: _local(p) for group in params for p in group}
        self._wrapped = {}
        groups = [{**group, "params": [self.local[p] for p in group["params"]]} for group in outer.param_groups]
        self.inner, self.engine = engine.twin(outer, groups)
        self._published = -1

    def _publish(self, outer: Any, scalars: tuple[str, ...]) -> None:
        """Gives the outer optimizer, as DTensors, the state that the step has created."""
        for p, local in self.local.items():
            entry = self.inner.state.get(local)
            if entry is None:
                continue
            known = self._wrapped.setdefault(p, {})
            if len(known) == len(entry) and all(known[n][1] is v for n, v in entry.items() if n in known):
                continue
            for name, value in entry.items():
                if name not in known or known[name][1] is not value:
                    spread = isinstance(p, DTensor) and name not in scalars
                    known[name] = (_like(value, p) if spread else value, value)
            outer.state[p] = {name: known[name][0] for name in entry}

    # --- sums over the mesh ---

    def _complete(self, rows: list[int], sums: memoryview) -> None:
        """Adds up, over the processes, the sums of one pass of a rule: one all-reduce for each dimension of a mesh that
        splits parameters.

        Args:
            rows: which of the tensors of the step have sums in this pass.
            sums: float64, a row for each of these.
        """
        table = torch.frombuffer(sums, dtype=torch.float64).view(len(rows), -1)
        of_mesh: dict[Any, list[int]] = {}
        for at, row in enumerate(rows):
            if isinstance(p := self._stepped[row], DTensor):
                of_mesh.setdefault(_split(p), []).append(at)
        for (mesh, dims), places in of_mesh.items():
            part = table[places]
            for dim in dims:
                dist.all_reduce(part, group=mesh.get_group(dim))
            table[places] = part

    def _norm(self, outer: Any) -> torch.Tensor:
        """The norm of all gradients: squares summed over local shards in float64, then over the meshes that split them.

        Copies along a replicated dimension of the mesh are counted once.
        """
        sums: dict[Any, torch.Tensor] = {}
        for theirs, ours in zip(outer.param_groups, self.inner.param_groups, strict=True):
            for p, local in zip(theirs["params"], ours["params"], strict=True):
                if local.grad is None:
                    continue
                key: Any = None
                if isinstance(p, DTensor):
                    key = _split(p)
                square = torch.linalg.vector_norm(local.grad, dtype=torch.float64).square()
                sums[key] = sums[key] + square if key in sums else square
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for key, value in sums.items():
            if key is not None:
                mesh, split = key
                for dim in split:
                    dist.all_reduce(value, group=mesh.get_group(dim))
            total = total + value.cpu()
        return total.sqrt()


def _split(p: DTensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a parameter, and the dimensions of the mesh that split it: those that do not replicate it."""
    return p.device_mesh, tuple(i for i, place in enumerate(p.placements) if not isinstance(place, Replicate))


def _like(value: Any, p: Any) -> Any:
    """A local state tensor as a DTensor with the placements of its parameter; quantisation scales stay local."""
    if not isinstance(value, torch.Tensor) or value.shape != p._local_tensor.shape:
        return value
    mesh, places = p.device_mesh, p.placements
    return DTensor.from_local(value, mesh, places, run_check=False, shape=p.shape, stride=p.stride())


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _local_grad(p: torch.Tensor) -> torch.Tensor | None:
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor):
        if grad.placements != p.placements:  # partial sums, or sharded along another dimension
            grad = grad.redistribute(placements=p.placements)
        grad = grad._local_tensor
    if isinstance(grad, AsyncCollectiveTensor):
        return grad.wait()
    return grad
