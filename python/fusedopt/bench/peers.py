"""Optimizers of other projects, timed if installed; none is a dependency.

A factory raises ImportError if its project is missing, and returns None if the project lacks the rule. Imports use
``import_module``, since these projects are untyped or absent where this file is type-checked.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from fusedopt.bench.cases import REFERENCE, Case

Step = Callable[[], object]
Arrays = Sequence[np.ndarray[Any, Any]]


def deepspeed(case: Case, params: Any) -> Any:
    """DeepSpeed's CPU optimizers, which are compiled at first use."""
    ops = import_module("deepspeed.ops")
    if case.rule in ("Adam", "AdamW"):
        return ops.adam.DeepSpeedCPUAdam(params, adamw_mode=case.rule == "AdamW", **case.options)
    if case.rule == "Adagrad":
        return ops.adagrad.DeepSpeedCPUAdagrad(params, **case.options)
    return ops.lion.DeepSpeedCPULion(params, **case.options) if case.rule == "Lion" else None


def bitsandbytes(case: Case, params: Any) -> Any:
    """bitsandbytes with 32-bit states; it ignores RMSprop's momentum."""
    optim = import_module("bitsandbytes.optim")
    names = ("Adam", "AdamW", "Adagrad", "RMSprop", "Lion") + (("SGD",) if case.options.get("momentum") else ())
    if case.rule not in names or case.options.get("centered"):
        return None
    options = {"lr": 1e-3, **case.options} if case.rule == "SGD" else dict(case.options)
    return getattr(optim, case.rule)(params, optim_bits=32, **options)


def torchao(case: Case, params: Any) -> Any:
    """torchao's AdamW in full precision; compiled at first use, and again for every new shape."""
    if case.rule not in ("Adam", "AdamW"):
        return None
    decay = {"weight_decay": 0.0} if case.rule == "Adam" else {}  # without decay both are the same
    return import_module("torchao.optim.adam")._AdamW(params, **decay, **case.options)


def bitsandbytes_8bit(case: Case, params: Any) -> Any:
    """bitsandbytes with 8-bit states."""
    optim = import_module("bitsandbytes.optim")
    return optim.AdamW8bit(params, **case.options) if case.rule == "AdamW" else None


def torchao_8bit(case: Case, params: Any) -> Any:
    """torchao with 8-bit states and stochastic rounding of bfloat16 weights; compiled at first use."""
    if case.rule != "AdamW":
        return None
    return import_module("torchao.optim").AdamW8bit(params, bf16_stochastic_round=True, **case.options)


def flashoptim(case: Case, params: Any) -> Any:
    """FlashOptim: 24-bit weights and 8-bit states if ours has 8-bit states, else the case's dtypes."""
    names = {"SGD": "FlashSGD", "Adam": "FlashAdam", "AdamW": "FlashAdamW", "Lion": "FlashLion"}
    if case.rule not in names:
        return None
    small = case.format.state == "int8"
    kept = {"quantize": small, "master_weight_bits": 24 if small else None}
    return getattr(import_module("flashoptim"), names[case.rule])(params, **kept, **case.options)


def numba(row: str, params: Arrays, grads: Arrays) -> Step | None:
    """A loop in numba: Adam, exact arithmetic, parallel for large arrays."""
    nb = import_module("numba")
    if row != "Adam":
        return None

    def kernel(
        p: Any, g: Any, m: Any, v: Any, beta1: Any, beta2: Any, rest1: Any, rest2: Any, lr: Any, eps: Any
    ) -> None:
        for i in nb.prange(p.size):
            m[i] = beta1 * m[i] + rest1 * g[i]
            v[i] = beta2 * v[i] + rest2 * g[i] * g[i]
            p[i] -= lr * m[i] / (np.sqrt(v[i]) + eps)

    large = max(p.size for p in params) > 1 << 16  # for short arrays threads cost more than they gain
    compiled = nb.njit(parallel=large, error_model="numpy")(kernel)
    flat = [(p.ravel(), g.ravel()) for p, g in zip(params, grads, strict=True)]
    tensors = [(p, g, np.zeros_like(p), np.zeros_like(p)) for p, g in flat]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        root = (1 - 0.999**count) ** 0.5
        constants = (0.9, 0.999, 0.1, 0.001, 1e-3 * root / (1 - 0.9**count), 1e-8 * root)
        c = [np.float32(x) for x in constants]
        for arrays in tensors:
            compiled(*arrays, *c)

    return step


def optax(row: str, params: Arrays, grads: Arrays) -> Step | None:
    """optax under jit with donated arguments, on JAX arrays; synchronised."""
    jax, ox = import_module("jax"), import_module("optax")
    rules = {"Adam": ox.adam, "AdamW": ox.adamw, "Adagrad": ox.adagrad, "RMSprop": ox.rmsprop}
    if row not in rules:
        return None
    rule = rules[row](1e-3)
    p, g = [jax.numpy.array(a) for a in params], [jax.numpy.array(a) for a in grads]
    state = rule.init(p)

    def update(p: Any, state: Any, g: Any) -> Any:
        change, state = rule.update(g, state, p)
        return ox.apply_updates(p, change), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal p, state
        p, state = jax.block_until_ready(jitted(p, state, g))

    return step


# Rule of fusedopt.zoo -> module and class of another implementation, options of both, and those of the class alone.
ZOO: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Adan": ("timm.optim.adan", "Adan", {"weight_decay": 0.1}, {}),
    "ASGD": ("torch.optim", "ASGD", {"weight_decay": 0.1}, {}),
    "Rprop": ("torch.optim", "Rprop", {}, {}),
    "CautiousAdamW": ("timm.optim.adamw", "AdamWLegacy", {"weight_decay": 0.1}, {"caution": True}),
    "CautiousLion": ("timm.optim.lion", "Lion", {"weight_decay": 0.1}, {"caution": True}),
    "LAMB": ("timm.optim.lamb", "Lamb", {"weight_decay": 0.1}, {"max_grad_norm": None}),
    "LARS": ("timm.optim.lars", "Lars", {"weight_decay": 0.1, "momentum": 0.9}, {}),
    "MARS": ("timm.optim.mars", "Mars", {"weight_decay": 0.1, "betas": (0.95, 0.99)}, {}),
    "StableAdamW": ("optimi", "StableAdamW", {"weight_decay": 0.1}, {}),
}


def module_alone(name: str) -> Any:
    """A module, imported without the packages that contain it: timm's import its models, which need torchvision.

    Raises:
        ImportError: it is not installed.
    """
    package, *inner = name.split(".")
    if package != "timm":
        return pkgutil.resolve_name(name)
    found = importlib.util.find_spec(package)
    if found is None:
        raise ImportError(f"No module named {package!r}")
    for k in range(len(inner)):
        made = types.ModuleType(".".join([package, *inner[:k]]))
        made.__path__ = [os.path.join(root, *inner[:k]) for root in found.submodule_search_locations or ()]
        sys.modules[made.__name__] = made
    try:
        return pkgutil.resolve_name(name)
    finally:
        for one in [one for one in sys.modules if one.split(".")[0] == package]:
            del sys.modules[one]


def reference(case: Case, params: Any) -> Any:
    """Another implementation of a rule of the zoo, for torch."""
    module, name, options, more = ZOO[case.rule]
    return getattr(module_alone(module), name)(params, **{"lr": 1e-3, **options, **more})


PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "training": {},
    "denormals": {},
    "torch": {
        "DeepSpeed": deepspeed,
        "bitsandbytes": bitsandbytes,
        "torchao": torchao,
        "bitsandbytes 8-bit": bitsandbytes_8bit,
        "torchao 8-bit": torchao_8bit,
    },
    "gpu": {
        "bitsandbytes": bitsandbytes,
        "torchao": torchao,
        "FlashOptim": flashoptim,
        "bitsandbytes 8-bit": bitsandbytes_8bit,
        "torchao 8-bit": torchao_8bit,
    },
    "numpy": {"numba": numba, "optax": optax},
    "zoo": {REFERENCE: reference},
}
