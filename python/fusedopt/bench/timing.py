"""Interleaved timing: every contender is set up once, then all run in rotating order, round after round.

Noise affects all contenders alike, so quote ratios of medians. Nothing here depends on what is timed or by which clock,
or changes the number of threads.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WARMUP = 6  # untimed calls; RAdam changes branch after its fifth step
FEWEST = 5  # minimum number of rounds, whatever the time budget


@dataclass(frozen=True)
class Clock:
    """How time is measured. A mark may be asynchronous, such as a CUDA event."""

    mark: Callable[[], Any]
    seconds: Callable[[Any, Any], float]  # between two marks; waits for both
    settle: Callable[[], object]  # synchronises


HOST = Clock(time.perf_counter_ns, lambda start, end: (end - start) * 1e-9, lambda: None)


@dataclass
class Contender:
    """A callable to time; ``setup`` runs untimed before every call of ``step``."""

    step: Callable[[], object]
    setup: Callable[[], object] | None = None
    measure: Callable[[int], float] | None = None  # seconds of n calls, timed in another process
    first_seconds: float | None = None  # duration of the first calls, if reported (compilation)
    note: Callable[[], str] | None = None  # called after timing, for the report (accuracy)


@dataclass
class Times:
    """Seconds per call; one sample is the mean of ``calls`` consecutive calls."""

    calls: int
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples, n=4) if len(self.samples) > 1 else self.samples * 3
        return low, high


def _sample(contender: Contender, calls: int, clock: Clock) -> float:
    """Mean seconds of ``calls`` consecutive calls, without ``setup``."""
    if contender.measure is not None:
        return contender.measure(calls) / calls
    step, setup, mark = contender.step, contender.setup, clock.mark
    if setup is None:
        clock.settle()
        start = mark()
        for _ in range(calls):
            step()
        return clock.seconds(start, mark()) / calls
    spent = 0.0
    for _ in range(calls):
        setup()
        clock.settle()
        start = mark()
        step()
        spent += clock.seconds(start, mark())
    return spent / calls


def _calls(contenders: Sequence[Contender], sample_seconds: float, clock: Clock) -> int:
    """Calls per sample, the same for all contenders: the fastest contender's sample takes ``sample_seconds``, which is
    long compared with the clock's resolution and with refilling the caches."""
    fastest = min(_sample(c, 1, clock) for c in contenders)
    if fastest < sample_seconds:  # else one measurement is enough
        fastest = min(fastest, *(_sample(c, 1, clock) for c in contenders for _ in range(2)))
    return max(1, min(1000, round(sample_seconds / max(fastest, 1e-9))))


def race(
    contenders: Mapping[str, Contender],
    *,
    seconds: float = 4.0,
    rounds: int | None = None,
    sample_seconds: float = 2e-2,
    warmup: int = WARMUP,
    clock: Clock = HOST,
) -> dict[str, Times]:
    """Times the contenders for ``seconds`` in total, or for exactly ``rounds`` rounds."""
    runners = list(contenders.values())
    for contender in runners:
        for _ in range(warmup):
            _sample(contender, 1, clock)
    calls = _calls(runners, sample_seconds, clock)
    times = {name: Times(calls) for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < (FEWEST if rounds is None else rounds) or (
            rounds is None and time.perf_counter() - start < seconds
        ):
            turn = done % len(names)
            order = names[turn:] + names[:turn]
            # Reversed in every second cycle, so that no contender always follows the same one.
            for name in reversed(order) if done // len(names) % 2 else order:
                times[name].samples.append(_sample(contenders[name], calls, clock))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return times
