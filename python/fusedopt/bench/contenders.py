"""Builds the contenders of a case: ours, torch's, the memory ceiling, NumPy. Other projects' are in peers.py.

Every contender has its own copies of the same parameters and gradients. A builder returns None if a contender does not
exist (torch has no fused RMSprop, and no Lion).
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedopt import zoo
from fusedopt.bench import estimators, gpu, numpy_best, own, peers, sparse
from fusedopt.bench.cases import BUILT_IN, CEILING, COMPILED, FUSED_F32, FUSED_LERP, LARGE, NUMPY, Case
from fusedopt.bench.timing import Contender
from fusedopt.rules import RULES

if TYPE_CHECKING:
    import torch

Builder = Callable[[str], "Contender | None"]

OURS = "ours"
DENORMAL = " denormal"  # suffix of a contender on denormal moments
COMPILING_CALLS = 3


def builder(case: Case) -> Builder:
    """Creates the shared data of a case; returns a function from a contender's name to the contender."""
    builders = {"torch": _torch, "denormals": _torch, "training": _training, "compiled": _training, "numpy": _numpy}
    builders |= {"estimators": estimators.builder, "ddp": _pair, "fsdp": _pair, "gpu": _torch, "sparse": _sparse}
    builders |= {"own": _torch, "zoo": _torch}
    return builders[case.kind](case)


def contender_names(case: Case, *, compiled: bool = False, with_peers: bool = False) -> list[str]:
    """Names of the contenders, ours first. Compilation takes minutes and peers may be missing: both are opt-in."""
    names = [OURS, *(n for n in case.against if compiled or n != COMPILED)]
    if with_peers:
        names += [n for n in peers.PEERS.get(case.kind, {}) if n not in names]
    if case.kind == "denormals":
        names += [n + DENORMAL for n in names]
    return names


def ceiling_name(case: Case) -> str:
    """The operation whose throughput is the ceiling: one read and one write per element."""
    return "copy_" if case.kind == "gpu" else "mul_"


def ceiling_bytes(case: Case) -> int:
    return 2 * 4 * (case.elements if case.kind == "gpu" else LARGE)


def ceiling(case: Case) -> Contender:
    """Multiplies a large float32 tensor in place; on a GPU, copies one of as many elements as the case has."""
    import torch

    if case.kind == "gpu":
        x = torch.ones(case.elements, device=gpu.DEVICE)
        y = torch.empty_like(x)
        return Contender(lambda: y.copy_(x))
    x = torch.ones(LARGE)
    return Contender(lambda: x.mul_(1.0))


def _dtype(word: str) -> torch.dtype:
    import torch

    names = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "int8"}
    dtype: torch.dtype = getattr(torch, names[word])
    return dtype


def optimizer(name: str, case: Case, params: Any) -> torch.optim.Optimizer | None:
    """The optimizer of a contender: ours, or torch's default, foreach or fused."""
    import torch

    form, options = case.format, dict(case.options)
    if name in (OURS, BUILT_IN):
        import fusedopt.torch

        options |= case.ours
        if form.state != form.param:
            options["state_dtype"] = _dtype(form.state)
        if case.max_grad_norm is not None:
            options["max_grad_norm"] = case.max_grad_norm
        if case.kind == "zoo":
            made: torch.optim.Optimizer = getattr(zoo, case.rule).torch(params, **options)
            return made
        if name == OURS and case.kind == "own":
            rule, options = own.own_rule(RULES[case.rule], options)
            written: torch.optim.Optimizer = rule.torch(params, **options)
            return written
        ours: torch.optim.Optimizer = getattr(fusedopt.torch, case.rule)(params, **options)
        return ours
    cls = getattr(torch.optim, case.rule, None)
    if cls is None or form.state != form.param:
        return None
    if name == "fused":
        # torch's fused SGD skips every full vector in 16 bits (<= 2.13): no baseline.
        if "fused" not in inspect.signature(cls).parameters or (case.rule == "SGD" and form.param in ("bf16", "f16")):
            return None
        options["fused"] = True
    else:
        options["foreach"] = name != "default"
    theirs: torch.optim.Optimizer = cls(params, **options)
    return theirs


def _compiled(step: Callable[[], object]) -> Contender:
    """A compiled step; the duration of the first calls, which compile with an empty cache, is reported separately."""
    import torch
    from torch._inductor import utils

    empty_cache: Any = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # before torch 2.8
    torch._dynamo.reset()
    compiled = torch.compile(step)
    with empty_cache():
        start = time.perf_counter()
        for _ in range(COMPILING_CALLS):
            compiled()
        return Contender(compiled, first_seconds=time.perf_counter() - start)


def _data(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    import torch

    device = gpu.DEVICE if case.kind == "gpu" else "cpu"
    make = torch.Generator(device).manual_seed(0)

    def normal(size: float, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(s, generator=make, device=device).mul_(size).to(dtype) for s in case.shapes]

    return normal(1.0, _dtype(case.format.param)), normal(1e-2, _dtype(case.format.grad))


def _bucket(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the gradients in one buffer, from its second element on, so that they need not be aligned."""
    import torch

    buffer = torch.empty(1 + sum(g.numel() for g in grads), dtype=grads[0].dtype, device=grads[0].device)
    parts, begin = [], 1
    for g in grads:
        parts.append(buffer[begin : begin + g.numel()].view(g.shape).copy_(g))
        begin += g.numel()
    return parts


def _works(contender: Contender, name: str) -> bool:
    """Calls the step once before timing, to check that it exists on a GPU. Ours must not fall back to torch's."""
    from fusedopt.torch import FallbackWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        try:
            contender.step()
        except NotImplementedError:  # a fused step that torch has on the CPU only
            if name != "fused":
                raise
            return False
    return True


def _torch(case: Case) -> Builder:
    """Steps of torch optimizers on tensors with given gradients."""
    import torch

    base_params, base_grads = _data(case)

    def build(name: str) -> Contender | None:
        if name == CEILING:
            return ceiling(case)
        name, denormal = name.removesuffix(DENORMAL), name.endswith(DENORMAL)
        if name in (FUSED_F32, FUSED_LERP):
            return _fused_f32(case, base_params, base_grads, name == FUSED_LERP)
        params = [p.clone().requires_grad_() for p in base_params]
        grouped: Any = [{"params": [p]} for p in params] if case.grouped else params
        others = peers.PEERS.get(case.kind, {})
        if name in others:
            opt = others[name](case, grouped)
        else:
            opt = optimizer(name, case, grouped)
        if opt is None:
            return None
        step: Callable[[], object] = opt.step
        mixed = case.format.grad != case.format.param
        theirs = mixed and name not in (
            OURS,
            BUILT_IN,
        )  # torch requires the parameter's dtype: its time includes the cast
        grads = [torch.zeros_like(g) if denormal else g.clone() for g in base_grads]  # zeros keep a moment denormal
        if case.misaligned:
            grads = _bucket(grads)
        for p, g in zip(params, grads, strict=True):
            if mixed and not theirs:
                p.grad_dtype = None  # torch >= 2.9: any type may be assigned
            p.grad = torch.empty_like(p) if theirs else g
        if case.graph:
            contender = Contender(gpu.captured(step))
        elif name == COMPILED:
            contender = _compiled(step)
        elif theirs:
            wide = [p.grad for p in params]

            def cast_and_step() -> None:
                torch._foreach_copy_(wide, grads)  # type: ignore[arg-type]
                step()

            contender = Contender(cast_and_step)
        elif case.max_grad_norm is not None and name != OURS:
            limit = case.max_grad_norm

            def clip_and_step() -> None:
                torch.nn.utils.clip_grad_norm_(params, limit)
                step()

            contender = Contender(clip_and_step)
        else:
            contender = Contender(step)

        def replace() -> None:
            for p, g in zip(params, base_grads, strict=True):
                p.grad = g.clone()

        def put_back() -> None:
            for state in opt.state.values():
                state["exp_avg"].fill_(1e-39 if denormal else 1e-4)
                state["exp_avg_sq"].fill_(1e-39 if denormal else 1e-4)

        if case.fresh:
            contender.setup = replace
        elif case.kind == "denormals":
            contender.setup = put_back
        return None if case.kind == "gpu" and not _works(contender, name) else contender

    return build


def _fused_f32(
    case: Case, base_params: list[torch.Tensor], base_grads: list[torch.Tensor], lerp: bool
) -> Contender | None:
    """torch's fused step on float32 copies, followed by a moving average of the weights if ``lerp``."""
    import torch

    params = [p.to(torch.float32, copy=True).requires_grad_() for p in base_params]
    for p, g in zip(params, base_grads, strict=True):
        p.grad = g.to(torch.float32, copy=True)
    opt = getattr(torch.optim, case.rule)(params, fused=True, **case.options)
    if not lerp:
        return Contender(opt.step)
    averages, decay = [p.detach().clone() for p in params], case.ours["ema_decay"]

    def step_and_lerp() -> None:
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - decay)

    return Contender(step_and_lerp)


def _training(case: Case) -> Builder:
    """Whole iterations: zero_grad, forward, backward, step, with the same model and batches."""
    from fusedopt.bench.training import iteration

    def build(name: str) -> Contender | None:
        def make(params: Any) -> torch.optim.Optimizer | None:
            return optimizer(name, case, params)

        parts = iteration(case.model, make, compiled=case.kind == "compiled")
        if parts is None:
            return None
        run, opt = parts
        if name != COMPILED:
            return Contender(run)
        run()
        compiled = _compiled(opt.step)
        vars(opt)["step"] = compiled.step
        return Contender(run, first_seconds=compiled.first_seconds)

    return build


def _sparse(case: Case) -> Builder:
    """Steps with sparse gradients."""
    build = sparse.builder(case)
    return lambda name: ceiling(case) if name == CEILING else build(name)


def _pair(case: Case) -> Builder:
    """Steps within data-parallel training; the processes live as long as the builder."""
    from fusedopt.bench.pair import Pair

    return Pair(case, optimizer).contender


def _numpy(case: Case) -> Builder:
    """The in-place function against in-place NumPy, with the rule's default options."""
    row = "Momentum" if case.options.get("momentum") else case.rule
    make = np.random.default_rng(0)
    dtype: Any = {"f64": np.float64, "f32": np.float32}[case.format.param]
    base_params = [make.standard_normal(s, dtype) for s in case.shapes]
    base_grads = [make.standard_normal(s, dtype) * dtype(1e-2) for s in case.shapes]

    def build(name: str) -> Contender | None:
        params, grads = ([a.copy() for a in arrays] for arrays in (base_params, base_grads))
        if name == OURS:
            return Contender(_our_function(case, params, grads))
        if name in NUMPY:
            block = None if name == NUMPY[0] else 0
            if block == 0 and max(p.size for p in params) <= min(numpy_best.BLOCKS):
                return None  # nothing to block
            return Contender(numpy_best.Best(row, params, grads, block).step)
        if name == "NumPy threads":
            import torch

            if max(p.size for p in params) <= min(numpy_best.BLOCKS):
                return None
            return Contender(numpy_best.Best(row, params, grads, 0, torch.get_num_threads()).step)
        step = peers.PEERS["numpy"][name](row, params, grads)
        return None if step is None else Contender(step)

    return build


def _our_function(case: Case, params: Sequence[Any], grads: Sequence[Any]) -> Callable[[], None]:
    import fusedopt
    from fusedopt.rules import RULES

    rule = RULES[case.rule]
    function = getattr(fusedopt, rule.function)
    states = [[np.zeros_like(p) for p in params] for _ in rule.states({**rule.defaults, **case.options})]
    options, counted, step = dict(case.options), "step" in rule.scalars, 0

    def run() -> None:
        nonlocal step
        step += 1
        if counted:
            function(params, grads, *states, step=step, **options)
        else:
            function(params, grads, *states, **options)

    return run
