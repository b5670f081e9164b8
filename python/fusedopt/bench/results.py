"""Runs cases; their results: times, ratios, GB/s, the share of the ceiling, and the bars."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fusedopt.bench import gpu
from fusedopt.bench.cases import BEST_NUMPY, BUILT_IN, CEILING, EXTRA, NUMPY, Case
from fusedopt.bench.contenders import DENORMAL, OURS, builder, ceiling_bytes, contender_names
from fusedopt.bench.peers import PEERS
from fusedopt.bench.suites import SECONDS, SUITES
from fusedopt.bench.timing import HOST, WARMUP, Times, race


@dataclass(frozen=True)
class Bar:
    """A promised limit and the measured value; None, which misses the bar, if the baseline could not be run."""

    against: str
    least: float  # of EXTRA: the most
    measured: float | None

    @property
    def ok(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.least if self.against == EXTRA else self.measured >= self.least

    @property
    def limit(self) -> str:
        return f"at most {self.least:g}" if self.against == EXTRA else f"{self.least:.2f}"

    def __str__(self) -> str:
        return "not measured" if self.measured is None else f"{self.measured:.2f}"


@dataclass
class Result:
    """The times of one case. A ratio is a contender's median over ours."""

    suite: str
    case: Case
    times: dict[str, Times]
    first_seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def seconds(self, name: str = OURS) -> float | None:
        if name == BEST_NUMPY:
            return min((self.times[n].median for n in NUMPY if n in self.times), default=None)
        return self.times[name].median if name in self.times else None

    def ratio(self, name: str) -> float | None:
        theirs, ours = self.seconds(name), self.seconds()
        return None if theirs is None or ours is None else theirs / ours

    def bandwidth(self, name: str = OURS) -> float | None:
        """GB/s of the minimum memory traffic of a step, whatever this contender moves."""
        seconds = self.seconds(name)
        size = ceiling_bytes(self.case) if name == CEILING else self.case.bytes
        return None if seconds is None or size is None else size / seconds * 1e-9

    @property
    def share(self) -> float | None:
        ours, top = self.bandwidth(), self.bandwidth(CEILING)
        return None if ours is None or top is None else ours / top

    @property
    def bars(self) -> list[Bar]:
        special = {CEILING: self.share, EXTRA: self.extra}
        return [
            Bar(name, least, special[name] if name in special else self.ratio(name))
            for name, least in self.case.bars.items()
        ]

    @property
    def extra(self) -> float | None:
        """Nanoseconds by tensor that our step takes longer than the built-in one."""
        ours, theirs = self.seconds(), self.seconds(BUILT_IN)
        return None if ours is None or theirs is None else (ours - theirs) / len(self.case.shapes) * 1e9

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        contenders = {}
        for name, times in self.times.items():
            low, high = times.quartiles
            contenders[name] = {
                "median_seconds": times.median,
                "quartiles_seconds": [low, high],
                "samples": len(times.samples),
                "calls_per_sample": times.calls,
                "ratio_to_ours": self.ratio(name),
                "first_calls_seconds": self.first_seconds.get(name),
            }
        return {
            "suite": self.suite,
            "case": case.label,
            "rule": case.rule,
            "options": dict(case.options),
            "format": str(case.format),
            "elements": case.elements,
            "tensors": len(case.shapes),
            "floor_bytes": case.bytes,
            "gb_per_s": self.bandwidth(),
            "ceiling_gb_per_s": self.bandwidth(CEILING),
            "share_of_ceiling": self.share,
            "contenders": contenders,
            "bars": [{**dataclasses.asdict(bar), "ok": bar.ok} for bar in self.bars],
            "notes": self.notes,
        }


def run_case(
    case: Case,
    suite: str = "",
    *,
    seconds: float = 4.0,
    rounds: int | None = None,
    compiled: bool = False,
    with_peers: bool = False,
    tick: Callable[[str], object] = lambda what: None,
) -> Result:
    """Builds and times the contenders of a case, and frees their memory."""
    build, contenders, notes = builder(case), {}, []
    for name in contender_names(case, compiled=compiled, with_peers=with_peers):
        tick(name)
        try:
            contender = build(name)
        except ImportError as error:
            if name in (OURS, *case.against) and name not in PEERS.get(case.kind, {}):
                raise
            notes.append(f"{name}: not installed ({error})")
        except Exception as error:  # a peer or torch.compile's compiler may raise anything
            no_room = type(error).__name__ == "OutOfMemoryError"
            if name == OURS or (name in ("default", "foreach", "fused") and not no_room):
                raise
            notes.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        else:
            if contender is not None:
                contenders[name] = contender
    first = {name: c.first_seconds for name, c in contenders.items() if c.first_seconds is not None}
    tick("timing")
    sample_seconds = 5e-3 if case.kind in ("training", "estimators") else 2e-4
    warmup = 1 if case.kind == "estimators" else WARMUP  # fits take seconds
    clock = gpu.clock() if case.kind == "gpu" else HOST
    times = race(contenders, seconds=seconds, rounds=rounds, sample_seconds=sample_seconds, warmup=warmup, clock=clock)
    notes += [f"{case.label}, {name}: {c.note()}" for name, c in contenders.items() if c.note is not None]
    contenders.clear()
    del build
    gc.collect()
    if case.kind == "gpu":
        gpu.let_go()
    return Result(suite, case, times, first, notes)


def _split(result: Result) -> Iterator[Result]:
    """Splits a case on normal and denormal moments into two results, with a note of their ratio."""
    for name in [n for n in result.times if n + DENORMAL in result.times]:
        normal, denormal = result.times[name].median, result.times[name + DENORMAL].median
        result.notes.append(f"{name}: denormal moments take {denormal / normal:.2f} of the time of normal ones")
    for suffix, words in (("", "normal"), (DENORMAL, "denormal")):
        times = {n.removesuffix(suffix): t for n, t in result.times.items() if n.endswith(DENORMAL) == bool(suffix)}
        case = dataclasses.replace(result.case, label=f"{result.case.label}, {words} moments")
        yield Result(result.suite, case, times, notes=result.notes if suffix else [])


def run_suites(
    names: Iterable[str],
    large: int,
    *,
    only: str = "",
    seconds: float | None = None,
    progress: bool = True,
    **how: Any,
) -> list[Result]:
    """Runs suites, or only the case named ``only``, or if there is none the cases whose names contain it.

    Shows a progress bar if tqdm is installed.
    """
    todo = [(name, case) for name in names for case in SUITES[name](large) if only.lower() in case.label.lower()]
    todo = [(name, case) for name, case in todo if case.label == only] or todo
    results: list[Result] = []
    with _bar(len(todo), progress and bool(todo)) as bar:
        for suite, case in todo:
            bar.set_description(case.label)
            budget = SECONDS.get(suite, 4.0) if seconds is None else seconds
            result = run_case(case, suite, seconds=budget, tick=bar.set_postfix_str, **how)
            results += _split(result) if case.kind == "denormals" else [result]
            bar.update()
    return results


class _NoBar:
    """Stands in for tqdm."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None: ...
    def set_description(self, text: str) -> None: ...
    def set_postfix_str(self, text: str) -> None: ...
    def update(self) -> None: ...


def _bar(total: int, wanted: bool) -> Any:
    if not wanted:
        return _NoBar()
    try:
        tqdm = importlib.import_module("tqdm").tqdm  # untyped
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit="case", disable=None, file=sys.stderr, dynamic_ncols=True, leave=False)
