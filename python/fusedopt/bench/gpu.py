"""The suite ``gpu``: cases, clock, and a description of the GPU. torch is imported on first use; no timing here.

The cases can be listed on any machine. They run if torch finds a GPU and fusedopt was built with CUDA.
``main`` (``make bench-gpu``) runs each case in its own process and rewrites the results file after each.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fusedopt.bench.cases import CEILING, FUSED_F32, FUSED_LERP, LARGE, Case, rows
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

    bf16, int8 = Format("bf16", "bf16", "bf16"), Format("bf16", "bf16", "int8")
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
        case(f"Adam bf16, {human(each)}", ((each,),), (*TORCH, CEILING), format=bf16),
        case(
            f"AdamW bf16 + split8 + int8 states, {human(each)}", ((each,),), eight_bit, rule="AdamW", format=int8,
            ours={"master": "split8"}, bars={"FlashOptim": 1.3, "bitsandbytes 8-bit": 3.0},
        ),
        case(
            f"AdamW f32 + EMA of the weights, {human(each)}", ((each,),), (FUSED_LERP, CEILING), rule="AdamW",
            ours={"ema_decay": 0.999},
        ),
        case("Adam f32, gradients replaced, 1,000 of 64", MANY, TORCH, fresh=True),
        case("Adam f32, clipping, GPT-2 small", gpt2(), TORCH, max_grad_norm=1.0),
        case("Adam f32, clipping, gradients replaced, GPT-2 small", gpt2(), TORCH, max_grad_norm=1.0, fresh=True),
        case("Adam f32, misaligned gradients, GPT-2 small", gpt2(), (*TORCH, CEILING), misaligned=True),
        case(f"Adam bf16, misaligned gradients, {human(each)}", ((each,),), TORCH, format=bf16, misaligned=True),
        *(
            case(f"Adam f32, graph replay, {label}", tensors, TORCH, options={"capturable": True}, graph=True)
            for label, tensors in (("1,000 of 64", MANY), ("GPT-2 small", gpt2()))
        ),
    ]  # fmt: skip


def fitting(n: int, others: Iterable[str] = PEERS.values()) -> int:
    """n, halved until Adam on so many elements fits into device memory with all its contenders."""
    if missing():
        return n
    import torch

    contenders = 1 + len(TORCH) + sum(importlib.util.find_spec(module) is not None for module in others)
    # Each contender has parameter, gradient and two states. Add the initial data, the ceiling's two tensors, and the
    # temporaries of torch's foreach step.
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


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A replay of the step, captured in a CUDA graph after a few steps outside it."""
    import torch

    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def let_go() -> None:
    """Releases unused memory, including torch's cache, to the device."""
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


def labels(large: int = LARGE) -> list[str]:
    """Labels of the cases on this machine, from a process that leaves nothing on the GPU."""
    listing = f"import json; from fusedopt.bench.gpu import cases; print(json.dumps([str(c) for c in cases({large})]))"
    found = subprocess.run([sys.executable, "-c", listing], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [str(label) for label in json.loads(found.splitlines()[-1])]


def each(wanted: Sequence[str], to: Path, *options: str, limit: float = 300.0) -> dict[str, str]:
    """Runs every case in its own process and rewrites the file after each. Returns case -> error."""
    to.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"machine": None, "results": [], "failed": {}}
    for label in wanted:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-m", "fusedopt", "bench", "--suite", "gpu", "--case", label, "--quiet"]
            try:
                subprocess.run([*command, "--json", str(result), *options], check=True, timeout=limit)
                one = json.loads(result.read_text())
            except (subprocess.SubprocessError, OSError) as error:
                data["failed"][label] = str(error)
            else:
                data["machine"] = one["machine"]
                data["results"] += one["results"]
        partial = to.with_name(to.name + ".part")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(to)
    return dict(data["failed"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite. Options not listed here are passed to ``fusedopt bench``."""
    parser = argparse.ArgumentParser(prog="bench-gpu", allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rewritten after each case")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases whose names contain this text")
    args, options = parser.parse_known_args(argv)
    if why := missing():
        print(f"skipped gpu: {why}", file=sys.stderr)
        return 2
    wanted = [label for label in labels() if args.case.lower() in label.lower()]
    failed = each(wanted, args.json, *options)
    for label, why in failed.items():
        print(f"{label}: {why}", file=sys.stderr)
    return 0 if wanted and not failed else 1
