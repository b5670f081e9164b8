"""The suite ``gpu``: cases, clock, and a description of the GPU. torch is imported on first use; no timing here.

The cases can be listed on any machine. They run if torch finds a GPU and fusedopt was built with CUDA.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
from collections.abc import Iterable
from typing import Any

from fusedopt.bench.cases import CEILING, FUSED_F32, Case, rows
from fusedopt.bench.shapes import MANY, Format, Shapes, count, gpt2, human, llama, resnet50
from fusedopt.bench.timing import Clock

DEVICE = "cuda"  # replaced by "cpu" in tests
TORCH = ("default", "foreach", "fused")
# Name -> module. torchao compiles for every shape, so it is timed on one tensor only.
PEERS = {"bitsandbytes": "bitsandbytes", "FlashOptim": "flashoptim", "torchao": "torchao"}
LISTS = ("bitsandbytes", "FlashOptim")


def missing() -> str:
    """Why no step can run on a GPU on this machine; empty if one can."""
    import torch

    from fusedopt import _core

    if not torch.cuda.is_available():
        return "torch finds no GPU" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"
    return _core.device_refusal("cuda")


def cases(large: int) -> list[Case]:
    """Adam on 1G elements, every rule on 256M, small tensors, networks, AdamW in the fewest bytes; sizes that fit."""
    one, each, network = fitting(32 * large), fitting(8 * large), llama()
    alone, beside = (*TORCH, *PEERS, CEILING), (*TORCH, *LISTS)
    promised = {"RMSprop": {"foreach": 3.0}}

    def case(label: str, tensors: Shapes, against: tuple[str, ...], **rest: Any) -> Case:
        return Case(label, against, shapes=tensors, kind="gpu", **rest)

    bf16 = Format("bf16", "bf16", "int8")
    eight_bit = ("FlashOptim", "bitsandbytes 8-bit", "torchao 8-bit", FUSED_F32, CEILING)
    return [
        case(f"Adam f32, {human(one)}", ((one,),), alone, bars={CEILING: 0.92, "fused": 1.0}),
        *(
            case(f"{label} f32, {human(each)}", ((each,),), alone, rule=rule, options=options,
                 bars=promised.get(label, {}))
            for label, rule, options in rows()
        ),
        case("Adam f32, 1,000 of 64", MANY, beside, bars={"fused": 1.5}),
        case("Adam f32, 10,000 of 64", MANY * 10, beside),
        case("Adam f32, ResNet-50", resnet50(), (*beside, CEILING)),
        case("Adam f32, GPT-2 small", gpt2(), (*beside, CEILING)),
        *[case("Adam f32, Llama 1B", network, (*TORCH, CEILING))] * (fitting(count(network), ()) == count(network)),
        case(
            f"AdamW bf16 + split8 + int8 states, {human(each)}", ((each,),), eight_bit, rule="AdamW", format=bf16,
            ours={"master": "split8"}, bars={"FlashOptim": 1.3, "bitsandbytes 8-bit": 3.0},
        ),
    ]  # fmt: skip


def fitting(n: int, others: Iterable[str] = PEERS.values()) -> int:
    """n, halved until Adam on so many elements fits into device memory with all its contenders."""
    if missing():
        return n
    import torch

    contenders = 1 + len(TORCH) + sum(importlib.util.find_spec(module) is not None for module in others)
    # Each has parameter, gradient and two states. Add the initial data, the ceiling's two tensors, and the temporaries
    # of torch's foreach step.
    each = 4 * (4 * contenders + 2 + 2 + 2)
    free = torch.cuda.mem_get_info()[0]
    while n > 1 and n * each > 0.95 * free:
        n //= 2
    return n


def events(cuda: Any) -> Clock:
    """A clock of CUDA events on the current stream; ``cuda`` is ``torch.cuda``."""

    def mark() -> Any:
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return Clock(mark, seconds, cuda.synchronize)


def clock() -> Clock:
    import torch

    return events(torch.cuda)


def let_go() -> None:
    """Releases unused memory, also torch's cache, to the device."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def machine() -> dict[str, Any] | None:
    """The current GPU, its driver and CUDA version; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n", 1)[0].strip() or None
