"""Parameters and gradients on an accelerator, master weights and state on the CPU: ``fusedopt.torch.Offload``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ._engine import engine_of
from ._optimizer import Fused

__all__ = ["Offload"]

_HALVES = (torch.bfloat16, torch.float16)


class Offload(Optimizer):
    """Updates parameters that are on another device on the CPU; state and master weights take host memory only.

    Every step copies the gradients to the CPU, in their own dtype, updates there, and copies the weights back. A 16-bit
    parameter has a float32 master (``master="float32"``), and the kernel writes the 16-bit weight to copy back in the
    same pass. ``param_groups`` hold the parameters themselves, so ``zero_grad``, schedulers, clipping and GradScaler
    work as usual. An Offload cannot be copied or pickled; its ``state_dict`` can.

    Arguments:
        params: tensors, named tensors or groups, as for any optimizer; on any device.
        optimizer_class: a class of ``fusedopt.torch``.
        pin_memory: whether the buffers are page-locked, so that copies overlap; by default if a parameter is on CUDA.
        options: those of ``optimizer_class``. 16-bit parameters get ``master="float32", state_dtype="float32"`` unless
            these say otherwise.

    Attributes:
        inner: the optimizer on the CPU, whose parameters are the buffers.

    If a parameter was written to between steps (a checkpoint of the model was loaded), which its version counter shows,
    the next step reads it again.

    Example:
        >>> import torch
        >>> from fusedopt.torch import AdamW, Offload
        >>> model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)  # .to("cuda") where there is one
        >>> opt = Offload(model.parameters(), AdamW, lr=1e-3)
        >>> model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
        >>> opt.step()
    """

    __module__ = "fusedopt.torch"

    def __init__(
        self, params: Any, optimizer_class: type[Optimizer], *, pin_memory: bool | None = None, **options: Any
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Fused)):
            raise TypeError(f"optimizer_class: expected a class of fusedopt.torch, got {optimizer_class!r}")
        super().__init__(params, {})
        everything = [p for group in self.param_groups for p in group["params"]]
        if pin_memory is None:
            pin_memory = any(p.device.type == "cuda" for p in everything)
        if any(p.dtype in _HALVES for p in everything):
            options.setdefault("master", "float32")
            if options["master"] == "float32":
                options.setdefault("state_dtype", "float32")
        self._pin = pin_memory
        self._buffers: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}  # p -> weight, gradient on the CPU
        for p in everything:
            weight, grad = (torch.empty(p.shape, dtype=p.dtype, pin_memory=pin_memory) for _ in range(2))
            self._buffers[p] = (weight.copy_(p.detach()), grad)
        mirrored = [{**group, "params": [self._buffers[p][0] for p in group["params"]]} for group in self.param_groups]
        self.inner: Any = optimizer_class(mirrored, **options)
        self.defaults = {**self.inner.defaults}
        for group, twin in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in twin.items() if key != "params"})
        self._versions = {p: p._version for p in everything}
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """The norm that ``max_grad_norm`` found in the last step."""
        norm: torch.Tensor | None = self.inner.last_grad_norm
        return norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; ``closure`` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self.inner
        for key in ("grad_scale", "found_inf"):
            inner.__dict__.pop(key, None)
            if getattr(self, key, None) is not None:
                setattr(inner, key, getattr(self, key))
        devices = set()
        with torch.no_grad():
            for group, twin in zip(self.param_groups, inner.param_groups, strict=True):
                twin.update({key: value for key, value in group.items() if key != "params"})
                for p, weight in zip(group["params"], twin["params"], strict=True):
                    weight.grad = None
                    if p.grad is None:
                        continue
                    if p._version != self._versions[p]:
                        self._reread(p, weight)
                    if p.grad.is_sparse:
                        raise RuntimeError("Offload: expected dense gradients, got a sparse one")
                    weight.grad = self._buffers[p][1].copy_(p.grad, non_blocking=self._pin)
                    devices.add(p.device)
            for device in devices:  # wait for the copies
                if device.type != "cpu":
                    getattr(torch, device.type).synchronize(device)
            engine_of(inner).run(inner)
            for p, (weight, _) in self._buffers.items():
                if weight.grad is not None and not inner.last_step_skipped:
                    p.copy_(weight, non_blocking=self._pin)
                    self._versions[p] = p._version
        return loss

    def _reread(self, p: torch.Tensor, weight: torch.Tensor) -> None:
        """Reads a parameter that was written to from outside."""
        weight.copy_(p)
        master = self.inner.state.get(weight, {}).get("master")
        if master is not None and master.dtype == torch.float32:
            master.copy_(p)
        elif master is not None:  # the residual of a split weight
            master.zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "inner" in self.__dict__:
            raise NotImplementedError("Offload: groups can be given to the constructor only")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("Offload: it belongs to the parameters on their device and cannot be copied: use state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer on the CPU: masters included, without a copy of the weights."""
        out: dict[str, Any] = self.inner.state_dict()
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this or of the plain optimizer; load the model's first."""
        with torch.no_grad():
            for p, (weight, _) in self._buffers.items():
                weight.copy_(p)
                self._versions[p] = p._version
        self.inner.load_state_dict(state_dict)
        for group, twin in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in twin.items() if key != "params"})
