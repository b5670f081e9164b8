"""The suites of cases; the GPU suite is in gpu.py. No timing and no torch here.

A suite is a function of ``large``, the size of a large tensor (32M elements by default), that returns its cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusedopt import zoo
from fusedopt.bench import gpu, peers
from fusedopt.bench.cases import (
    BEST_NUMPY,
    BUILT_IN,
    CEILING,
    DENSE,
    EXTRA,
    FUSED_F32,
    FUSED_LERP,
    LARGE,
    MOVED,
    NUMPY,
    REFERENCE,
    TORCH,
    Case,
    rows,
)  # fmt: skip
from fusedopt.bench.numpy_best import BODIES
from fusedopt.bench.shapes import F32, FORMATS, MANY, Format, Shapes, gpt2, human, mlp, resnet50
from fusedopt.bench.training import MODELS
from fusedopt.rules import RULES


def bars(large: int) -> list[Case]:
    """The promised ratios: each case with its minimum."""
    promised: dict[str, dict[str, float]] = {
        "Momentum": {"default": 1.5, "fused": 0.97},
        "Adagrad": {"default": 5, "fused": 0.97},
        "RMSprop": {"default": 8},
        "RMSprop centered + momentum": {"default": 6},
        "Adam": {"default": 5, "fused": 0.97},
        "AdamW": {"default": 5, "fused": 0.97},
    }
    size, alone = human(large), ((large,),)

    def case(label: str, promise: dict[str, float], tensors: Shapes = (), **rest: Any) -> Case:
        return Case(label, tuple(promise), shapes=tensors, bars=promise, **rest)

    return [
        *(
            case(f"{label} f32, {size}", promised.get(label, {}) | {CEILING: 0.90}, alone, rule=rule, options=options)
            for label, rule, options in rows()
        ),
        case("Adam, 1,000 of 64, gradients replaced", {"fused": 12, "default": 45}, MANY, fresh=True),
        case("Adam, 1,000 of 64, a group per tensor", {"fused": 8}, MANY, grouped=True),
        case("Adam, 4-tensor MLP 10-10-1", {"fused": 2.5}, mlp(10, 10, 1)),
        case("Adam, ResNet-50", {"fused": 1.1}, resnet50()),
        case("Adam, GPT-2 small", {"fused": 0.97}, gpt2()),
        case("Adam + clipping, GPT-2 small, gradients replaced", {"fused": 1.2}, gpt2(), fresh=True, max_grad_norm=1.0),
        case(f"Adam bf16, {size}", {"fused": 1.2}, alone, format=FORMATS[2]),
        *(
            case(f"training, {model}", promise, kind="training", model=model)
            for model, promise in {
                "MLP 784-128-10": {"default": 1.6, "fused": 1.15},
                "MLP 784-2048-2048-2048-10": {"default": 1.8, "fused": 1.05},
            }.items()
        ),
        *(
            Case(label, NUMPY, shapes=tensors, kind="numpy", bars={BEST_NUMPY: promise})
            for label, tensors, promise in (
                (f"NumPy Adam f32, {size}", alone, 4.5),
                ("NumPy adam_ on 4 arrays of 1,000", ((1000,),) * 4, 3.0),
            )
        ),
    ]


def rules(large: int) -> list[Case]:
    """Every rule in f32, one large tensor."""
    return [Case(label, (*TORCH, CEILING), rule, options, shapes=((large,),)) for label, rule, options in rows()]


def short(large: int) -> list[Case]:
    """Every rule at an eighth of the large size, against torch's default and fused steps, for the demo."""
    return [
        Case(label, ("default", "fused", CEILING), rule, options, shapes=((large // 8,),))
        for label, rule, options in rows()
    ]


def formats(large: int) -> list[Case]:
    """Adam in every format, from the L1 cache to main memory."""
    sizes = [n for n in (1 << 10, 32 << 10, 512 << 10, 4 << 20) if n < large] + [large]
    return [
        Case(f"Adam {form}, {human(n)}", ("default", "fused", CEILING), format=form, shapes=((n,),))
        for form in FORMATS
        for n in sizes
    ]


def shapes(large: int) -> list[Case]:
    """Adam on the shapes of real networks, and on many small tensors."""
    table: dict[str, tuple[Shapes, dict[str, Any]]] = {
        f"one tensor of {human(large)}": (((large,),), {}),
        "1,000 of 64": (MANY, {}),
        "1,000 of 64, gradients replaced": (MANY, {"fresh": True}),
        "1,000 of 64, a group per tensor": (MANY, {"grouped": True}),
        "4-tensor MLP 10-10-1": (mlp(10, 10, 1), {}),
        "ResNet-50": (resnet50(), {}),
        "GPT-2 small": (gpt2(), {}),
        "ResNet-50, clipping, gradients replaced": (resnet50(), {"fresh": True, "max_grad_norm": 1.0}),
    }
    return [Case(f"Adam, {name}", TORCH, shapes=s, **rest) for name, (s, rest) in table.items()]


def numpy(large: int) -> list[Case]:
    """The NumPy functions against in-place NumPy: whole, blocked, threaded."""
    return [
        Case(f"NumPy {label}, {name}", (*NUMPY, "NumPy threads"), rule, options, shapes=s, kind="numpy")
        for label, rule, options in rows()
        if label in BODIES
        for name, s in ((human(large), ((large,),)), ("4 of 1,000", ((1000,),) * 4))
    ]


def training(large: int) -> list[Case]:
    """Whole iterations, forward + backward + step; their size does not depend on ``large``."""
    return [Case(f"training, {name}", TORCH, kind="training", model=name, shapes=()) for name in MODELS]


def estimators(large: int) -> list[Case]:
    """Fits and losses for NumPy against scikit-learn, a torch loop and NumPy; sizes do not depend on ``large``."""
    table: dict[str, tuple[str, dict[str, float]]] = {
        "MLPClassifier 784-128-10, batch 32": ("MLP 32", {"scikit-learn": 1.8, "torch": 1.2}),
        "MLPClassifier 784-128-10, batch 128": ("MLP 128", {"scikit-learn": 1.2, "torch": 1.1}),
        "softmax_cross_entropy (4096, 1000)": ("softmax", {BEST_NUMPY: 3.0, "torch": 1.0}),
        "logistic regression 1M x 50, 50 epochs": ("logistic", {"scikit-learn": 1.0}),
        "logistic regression, breast cancer": ("table breast_cancer", {"scikit-learn": 0.5}),
        "logistic regression, wine": ("table wine", {"scikit-learn": 0.5}),
        "logistic regression, digits": ("table digits", {"scikit-learn": 2.0}),
        "linear regression, diabetes": ("table diabetes", {"scikit-learn": 0.5}),
    }
    return [
        Case(
            label,
            tuple(n for name in promise for n in (NUMPY if name == BEST_NUMPY else (name,))),
            shapes=(),
            kind="estimators",
            model=model,
            bars=promise,
        )
        for label, (model, promise) in table.items()
    ]


def sparse(large: int) -> list[Case]:
    """Embedding tables whose gradients name few rows, and a lazy step against a dense one."""
    promised = {"SparseAdam": 10.0, "Adagrad": 7.0, "SGD": 2.0}
    tables: list[tuple[str, int, int, int, float]] = [
        ("1M x 64, 65,536 lookups", 1_000_000, 64, 65_536, 0),
        ("1M x 16, 200,000 lookups", 1_000_000, 16, 200_000, 0),
        ("1M x 64, 65,536 lookups by Zipf", 1_000_000, 64, 65_536, 1.15),
        ("10M x 32, 1,000,000 lookups", 10_000_000, 32, 1_000_000, 0),
    ]

    def case(
        rule: str, name: str, rows: int, width: int, n: int, zipf: float, bars: dict[str, float], **ours: Any
    ) -> Case:
        return Case(
            f"{rule}, {name}", (*bars, MOVED, CEILING), rule, shapes=((rows * large // LARGE, width),), kind="sparse",
            lookups=n * large // LARGE, zipf=zipf, bars=bars, ours=ours,
        )  # fmt: skip

    return [
        *(case(rule, *table, {"default": bar}) for table in tables for rule, bar in promised.items()),
        case("AdamW", "lazy, 1M x 64, 10,000 lookups", 1_000_000, 64, 10_000, 0, {DENSE: 5.0}, lazy=True),
    ]


def denormals(large: int) -> list[Case]:
    """Adam on normal and on denormal moments, which are not flushed to zero."""
    return [Case("Adam", ("default", "fused"), shapes=((large // 8,),), kind="denormals")]


def bytes_(large: int) -> list[Case]:
    """AdamW in the forms that move fewer bytes, and with EMA, against torch's fused step in float32."""
    bf16, f32 = Format("bf16", "bf16", "bf16"), F32
    int8, f32_int8 = Format("bf16", "bf16", "int8"), Format("f32", "f32", "int8")
    table: list[tuple[str, Format, dict[str, Any], dict[str, float]]] = [
        ("bf16, stochastic rounding", bf16, {"stochastic_rounding": True}, {FUSED_F32: 1.7}),
        ("bf16 + split16 + bf16 states", bf16, {"master": "split16", "state_dtype": "bfloat16"}, {FUSED_F32: 1.35}),
        ("bf16 + split8 + int8 states", int8, {"master": "split8"}, {FUSED_F32: 1.3}),
        ("f32 + int8 states", f32_int8, {}, {FUSED_F32: 1.15}),
        ("f32, EMA of the weights", f32, {"ema_decay": 0.999}, {FUSED_LERP: 1.07}),
    ]

    def case(label: str, n: int, form: Format, ours: dict[str, Any], bars: dict[str, float]) -> Case:
        name = f"AdamW {label}, {human(n)}"
        return Case(name, tuple(bars), "AdamW", format=form, shapes=((n,),), ours=ours, bars=bars)

    eight_bit = {"bitsandbytes 8-bit": 35.0, "torchao 8-bit": 30.0}
    return [
        *(case(name, large, form, ours, {**bars, CEILING: 0.85}) for name, form, ours, bars in table),
        case("bf16 + split8 + int8 states", large // 16, int8, {"master": "split8"}, eight_bit),
    ]


def own(large: int) -> list[Case]:
    """Rules written in Python against the same rules compiled, and against torch's default step; rules of the zoo."""
    bf16, int8 = Format("bf16", "bf16", "bf16"), Format("f32", "f32", "int8")

    def case(label: str, rule: str, options: dict[str, Any], bars: dict[str, float], **rest: Any) -> Case:
        against = tuple(name for name in bars if name != EXTRA) or (BUILT_IN,)
        return Case(f"own {label}", against, rule, options, kind="own", bars=bars, **rest)

    def quantised(rule: str, options: dict[str, Any]) -> bool:
        kernel = RULES[rule].kernel({**RULES[rule].defaults, **options})
        return bool(kernel.codes) and all(kernel.codes)

    alone = {"shapes": ((large,),)}
    return [
        *(
            case(f"{label} f32, {human(large)}", rule, options, {BUILT_IN: 0.75, **default}, **alone)
            for label, rule, options in rows()
            for default in ({"default": 4.0} if label == "Adam" else {},)
        ),
        *(
            case(f"{label} {form}, {human(large)}", rule, options, {BUILT_IN: 0.6}, format=stored, **alone)
            for form, stored in (("bf16", bf16), ("f32 + int8 states", int8))
            for label, rule, options in rows()
            if stored is bf16 or quantised(rule, options)
        ),
        case(
            f"Adam bf16 + split8 + int8 states, {human(large)}", "Adam", {}, {BUILT_IN: 0.6},
            format=Format("bf16", "bf16", "int8"), ours={"master": "split8"}, **alone,
        ),
        case("Adam, 1,000 of 64", "Adam", {}, {EXTRA: 150}, shapes=MANY),
        *(
            Case(
                f"zoo {name} f32, {human(large)}", (REFERENCE, CEILING), name, options, kind="zoo",
                shapes=((large,),), bars={CEILING: 0.4 if getattr(zoo, name).reduces else 0.6, REFERENCE: 1.0},
            )
            for name, (_, _, options, _) in peers.ZOO.items()
        ),
    ]  # fmt: skip


def integrations(large: int) -> list[Case]:
    """The step in two processes under DDP and FSDP2, and in a compiled iteration."""
    parallel: list[tuple[str, str, Shapes, dict[str, float]]] = [
        ("DDP, GPT-2 small", "ddp", gpt2(), {"fused": 1, "default": 3}),
        ("FSDP2, GPT-2 small", "fsdp", gpt2(), {"fused": 1, "default": 3}),
        ("DDP, 1,000 of 64", "ddp", MANY, {"default": 5}),
        ("FSDP2, 1,000 of 64", "fsdp", MANY, {"default": 5}),
    ]
    return [
        Case(f"AdamW, 2 processes, {label}", ("default", "fused"), "AdamW", shapes=tensors, kind=kind, bars=bars)
        for label, kind, tensors, bars in parallel
    ] + [
        Case(
            f"compiled iteration, {model}", ("default", "fused"), kind="compiled", model=model, shapes=(),
            bars={"default": 1, "fused": 1},
        )
        for model in ("MLP 784-128-10", "transformer, 4 layers of 128")
    ]  # fmt: skip


_SUITES = (bars, rules, formats, shapes, bytes_, numpy, training, estimators, sparse, denormals, integrations, own)
SUITES: dict[str, Callable[[int], list[Case]]] = {f.__name__.rstrip("_"): f for f in _SUITES}
SUITES |= {"gpu": gpu.cases, "short": short}
# Seconds per case; the default is 4.
SECONDS = {"bars": 8.0, "estimators": 12.0, "short": 1.5, "formats": 2.5, "integrations": 40.0, "own": 2.5}
