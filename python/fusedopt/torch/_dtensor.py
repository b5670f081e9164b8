"""Steps on DTensors (FSDP2's ``fully_shard``, tensor parallelism): the kernels work on the shards of this process.

Every rule here is elementwise, so the step of a sharded parameter is the step of its shards. An inner optimizer of the
same class holds the local tensors and does all that an optimizer does; the outer one keeps state as DTensors, which is
what checkpoints and resharding want. Only the norm for clipping crosses the mesh.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["Shards", "any_dtensor"]


def any_dtensor(groups: list[dict[str, Any]]) -> bool:
    """Whether a parameter among the groups is a DTensor."""
    return any(isinstance(p, DTensor) for group in groups for p in group["params"])


class Shards:
    """The local side of an optimizer over DTensors."""

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        self.inner: Any = None
        self._plan: Any = None  # the inner one's, when its state was last looked at
        self._params: list[list[torch.Tensor]] = []  # the outer ones that the inner optimizer was made for
        self._local: dict[torch.Tensor, torch.Tensor] = {}
        self._wrapped: dict[torch.Tensor, dict[str, tuple[Any, Any]]] = {}  # param -> name -> (outer's, inner's) state

    def step(self, unscale: float, max_norm: float) -> torch.Tensor | None:
        """One step on the local shards; the norm of all gradients over the whole mesh where it clips."""
        outer = self.outer
        self._follow()
        inner = self.inner
        for theirs, ours in zip(outer.param_groups, inner.param_groups, strict=True):
            for p, local in zip(theirs["params"], ours["params"], strict=True):
                local.grad = _local_grad(p)
        norm, factor = None, 1.0
        if max_norm:
            norm = self._norm() * abs(unscale)
            clip = max_norm / (norm + 1e-6)
            factor = 1.0 if clip >= 1 else float(clip)
        inner.__dict__.pop("grad_scale", None)
        if unscale * factor != 1.0:
            inner.grad_scale = 1.0 / (unscale * factor) if unscale * factor != 0 else float("inf")
        try:
            inner._step()
        finally:
            for group in inner.param_groups:
                for local in group["params"]:
                    local.grad = None
        if inner._foreign or inner._plan is not self._plan:  # only then may there be new state
            self._plan = inner._plan
            self._publish()
        return norm

    # --- the two sides ---

    def _follow(self) -> None:
        """Brings the inner optimizer up to what the outer one holds now."""
        outer = self.outer
        params = [group["params"] for group in outer.param_groups]
        moved = any(_local(p) is not local for p, local in self._local.items())
        if (
            moved
            or len(params) != len(self._params)
            or any(
                len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))
                for a, b in zip(params, self._params, strict=True)
            )
        ):
            self._rebuild(params)
        for theirs, ours in zip(outer.param_groups, self.inner.param_groups, strict=True):
            for key, value in theirs.items():
                if key not in ("params", "max_grad_norm"):
                    ours[key] = value
        for p, local in self._local.items():
            entry = outer.state.get(p)
            known = self._wrapped.get(p, {})
            if entry is None:
                self.inner.state.pop(local, None)
                self._wrapped.pop(p, None)
            elif len(entry) != len(known) or any(entry.get(name) is not pair[0] for name, pair in known.items()):
                self._wrapped[p] = pairs = {name: (value, _local(value)) for name, value in entry.items()}
                self.inner.state[local] = {name: pair[1] for name, pair in pairs.items()}

    def _rebuild(self, params: list[list[torch.Tensor]]) -> None:
        outer = self.outer
        self._params = [list(group) for group in params]
        self._local = {p: _local(p) for group in params for p in group}
        self._wrapped = {}
        self.inner = inner = object.__new__(type(outer))
        groups = [
            {**group, "params": [self._local[p] for p in group["params"]], "max_grad_norm": None}
            for group in outer.param_groups
        ]
        defaults = {**outer.defaults, "max_grad_norm": None}
        inner.__setstate__({"defaults": defaults, "state": defaultdict(dict), "param_groups": groups})
        inner._said = outer._said

    def _publish(self) -> None:
        """Gives the outer optimizer, as DTensors, the state that the step has created."""
        for p, local in self._local.items():
            entry = self.inner.state.get(local)
            if entry is None:
                continue
            known = self._wrapped.setdefault(p, {})
            if len(known) == len(entry) and all(known[n][1] is v for n, v in entry.items() if n in known):
                continue
            for name, value in entry.items():
                if name not in known or known[name][1] is not value:
                    spread = isinstance(p, DTensor) and name not in self.outer._rule.scalars
                    known[name] = (_like(value, p) if spread else value, value)
            self.outer.state[p] = {name: known[name][0] for name in entry}

    # --- the norm ---

    def _norm(self) -> torch.Tensor:
        """The norm of all gradients: squares summed over local shards in float64, then over the meshes that split them.

        A dimension of the mesh that holds copies is counted once.
        """
        sums: dict[Any, torch.Tensor] = {}
        for theirs, ours in zip(self.outer.param_groups, self.inner.param_groups, strict=True):
            for p, local in zip(theirs["params"], ours["params"], strict=True):
                if local.grad is None:
                    continue
                key: Any = None
                if isinstance(p, DTensor):
                    split = tuple(i for i, place in enumerate(p.placements) if not isinstance(place, Replicate))
                    key = (p.device_mesh, split)
                square = torch.linalg.vector_norm(local.grad, dtype=torch.float64).square()
                sums[key] = sums[key] + square if key in sums else square
        total = torch.zeros((), dtype=torch.float64)
        for key, value in sums.items():
            if key is not None:
                mesh, split = key
                for dim in split:
                    dist.all_reduce(value, group=mesh.get_group(dim))
            total = total + value.cpu()
        return total.sqrt()


def _like(value: Any, p: Any) -> Any:
    """A local state tensor as a DTensor that is laid out like its parameter; block scales are local."""
    if not isinstance(value, torch.Tensor) or value.shape != p._local_tensor.shape:
        return value
    mesh, places = p.device_mesh, p.placements
    return DTensor.from_local(value, mesh, places, run_check=False, shape=p.shape, stride=p.stride())


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _local_grad(p: torch.Tensor) -> torch.Tensor | None:
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor):
        if grad.placements != p.placements:  # sums that are still to be made, or another split
            grad = grad.redistribute(placements=p.placements)
        grad = grad._local_tensor
    if isinstance(grad, AsyncCollectiveTensor):
        return grad.wait()
    return grad
