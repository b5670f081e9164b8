"""Checks the formula of docs/performance.md: what a step costs, predicted from three numbers of the machine.

``python bench/predict.py`` measures the three (the throughput of ``mul_``, the cost of a step and of a tensor in it)
and steps of several models, turn by turn in one run, and writes the ratios of measured to predicted time into
docs/performance.md. Takes a minute and 6 GB.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fusedopt
from fusedopt.bench.cases import Case
from fusedopt.bench.contenders import builder, ceiling, ceiling_bytes
from fusedopt.bench.shapes import FORMATS, Shapes, gpt2, human, mlp, resnet50

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SECTION = re.compile(r"(?<=<!-- predict:begin -->\n).*(?=<!-- predict:end -->)", re.DOTALL)
BF16 = next(form for form in FORMATS if str(form) == "bf16")
ONE = Case("one element", (), shapes=((1,),))
MANY = Case("4,000 tensors of 64", (), shapes=((64,),) * 4000)  # too many objects for the second cache


def case(label: str, shapes: Shapes, rule: str = "Adam", **rest: object) -> Case:
    return Case(label, (), rule=rule, shapes=shapes, **rest)  # type: ignore[arg-type]


def cases(large: int) -> list[Case]:
    return [
        case(f"Adam, one tensor of {human(large)}", ((large,),)),
        case(f"SGD, one tensor of {human(large)}", ((large,),), "SGD"),
        case(f"Adam in bfloat16, one tensor of {human(large)}", ((large,),), format=BF16),
        case("Adam, GPT-2 small", gpt2()),
        case("Adam, GPT-2 small, clipped", gpt2(), max_grad_norm=1.0),
        case("Adam, ResNet-50", resnet50()),
        case("Adam, MLP 784-2048-2048-10", mlp(784, 2048, 2048, 10)),
        case("Adam, MLP 784-128-10 (stays in the cache)", mlp(784, 128, 10)),
        case("Adam, 1,000 tensors of 64 (stays in the cache)", ((64,),) * 1000),
        case("Adam, 10,000 tensors of 64", ((64,),) * 10_000),
    ]


def sample(step: Callable[[], object]) -> float:
    """Seconds of a call: the mean of calls that take 20 ms together."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 0.02 or not calls:
        step()
        calls += 1
    return passed / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large", type=int, default=1 << 25, help="elements of the largest tensor")
    parser.add_argument("--print", action="store_true", help="write no page")
    args = parser.parse_args()
    copy = Case("", (), shapes=((args.large,),))
    every = [ONE, MANY, *cases(args.large)]
    steps = [ceiling(copy).step]
    for each in every:
        contender = builder(each)("ours")
        assert contender is not None
        steps.append(contender.step)
    for step in steps * 2:
        step()
    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(args.rounds):
        for step, of in zip(steps, samples, strict=True):
            of.append(sample(step))
    moving, one, many, *measured = [statistics.median(of) for of in samples]
    throughput = ceiling_bytes(copy) / moving
    assert MANY.bytes is not None
    a_tensor = (many - one - MANY.bytes / throughput) / len(MANY.shapes)
    lines = ["| model | bytes | tensors | measured / predicted |", "| --- | ---: | ---: | ---: |"]
    for each, seconds in zip(every[2:], measured, strict=True):
        assert each.bytes is not None
        predicted = one + a_tensor * len(each.shapes) + each.bytes / throughput
        lines.append(f"| {each.label} | {each.bytes / 1e6:.3g} MB | {len(each.shapes)} | {seconds / predicted:.2f} |")
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    where = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {fusedopt.get_isa()}"
    units = (
        f"A tensor costs as much as moving {a_tensor * throughput / 1e3:.1f} kB, a call as much as "
        f"{one * throughput / 1e3:.0f} kB."
    )
    text = "\n" + "\n".join(lines) + f"\n\n{where}; torch {torch.__version__}; {today}. {units}\n\n"
    print(text)
    if not args.print:
        page, found = SECTION.subn(lambda _: text, PAGE.read_text())
        assert found == 1, f"{PAGE}: expected one pair of predict marks"
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
