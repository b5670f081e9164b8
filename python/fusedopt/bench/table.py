"""Results as a terminal table and as JSON, with the machine and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedopt.bench import gpu
from fusedopt.bench.cases import CEILING, EXTRA
from fusedopt.bench.contenders import OURS, ceiling_name
from fusedopt.bench.results import Result

PACKAGES = ("fusedopt", "numpy", "torch", "deepspeed", "bitsandbytes", "torchao", "flashoptim", "optax", "jax", "numba")


def machine() -> dict[str, Any]:
    """Description of the machine and versions of the packages."""
    import torch

    import fusedopt

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "fusedopt": fusedopt.config(),
        **({"gpu": found} if (found := gpu.machine()) else {}),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first column is left-aligned, the others right-aligned."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[k]) for line in table) for k in range(len(header))]
    table.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(text.rjust(w) if k else text.ljust(w) for k, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in table
    )


def _times(results: Sequence[Result]) -> str:
    names = [n for n in dict.fromkeys(n for r in results for n in r.times) if n not in (OURS, CEILING)]
    first = {n: any(n in r.first_seconds for r in results) for n in names}
    bandwidth, share = (any(f(r) is not None for r in results) for f in (Result.bandwidth, lambda r: r.share))

    def line(r: Result) -> list[str]:
        cells = [r.case.label, duration(r.seconds())]
        for n in names:
            ratio = r.ratio(n)
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
            if first[n]:
                cells.append(duration(r.first_seconds.get(n)))
        if bandwidth:
            cells.append("-" if (b := r.bandwidth()) is None else f"{b:.1f}")
        if share:
            cells.append("-" if r.share is None else f"{r.share:.0%}")
        return [*cells, str(len(r.times[OURS].samples))]

    header = ["case", "ours"]
    for n in names:
        header += [f"{n} / ours", f"{n}: first calls"][: 1 + first[n]]
    header += ["GB/s"] * bandwidth + [f"of {ceiling_name(results[0].case)}"] * share + ["rounds"]
    return _grid(header, map(line, results))


def _bars(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        for bar in r.bars:
            what = {CEILING: f"share of {ceiling_name(r.case)} (GB/s)", EXTRA: EXTRA}.get(
                bar.against, f"{bar.against} / ours"
            )
            verdict = "ok" if bar.ok else "missed" if bar.measured is not None else "-"
            lines.append([r.case.label, what, bar.limit, str(bar), verdict, duration(r.seconds())])
    return _grid(["case", "", "at least", "measured", "", "ours"], lines)


def render(results: Sequence[Result]) -> str:
    """Text tables, one per suite; if bars say all of it, only the bars are shown."""
    texts = []
    for suite, group in groupby(results, key=lambda r: r.suite):
        rows = list(group)
        # A share of the ceiling that is not promised is in the table of times alone.
        times = any(not r.case.bars or (r.share is not None and CEILING not in r.case.bars) for r in rows)
        tables = [_times(rows)] * times + [_bars(rows)] * any(r.case.bars for r in rows)
        texts.append(f"{suite}\n" + "\n\n".join(tables))
        texts += ["\n".join(dict.fromkeys(note for r in rows for note in r.notes))]
    about = machine()
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    device = ""
    if "gpu" in about:
        device = "{name}, driver {driver}, CUDA {cuda}; ".format(**about["gpu"])
    ceilings = {
        "mul_": "mul_: an in-place multiplication of 32M float32",
        "copy_": "copy_: a copy, on the GPU, of as many float32 as the case has",
    }
    timed = dict.fromkeys(ceilings[ceiling_name(r.case)] for r in results)
    texts.append(
        f"{about['processor']}, {about['cores']} cores, {about['torch_threads']} torch threads; {device}{versions}\n"
        "x / ours: ratio of medians, turn by turn in one run, above 1 where ours is faster. "
        f"GB/s: the bytes a step must move / its time; {'; '.join(timed)} in the same run."
    )
    return "\n\n".join(text for text in texts if text)


def save(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Writes the results as JSON."""
    data = {"machine": machine(), "results": [r.as_dict() for r in results]}
    Path(path).write_text(json.dumps(data, indent=1, default=str) + "\n")
