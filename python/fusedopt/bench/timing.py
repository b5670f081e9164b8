"""Turn-by-turn timing: every contender is set up once, then all run in rotating order, round after round.

Noise of the machine hits all contenders alike, so the ratio of their medians is what is worth quoting. Nothing here
knows what it times or by which clock, and nothing here touches the number of threads.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WARMUP = 6  # untimed calls; RAdam changes branch after its fifth step
FEWEST = 5  # rounds, whatever the time budget says


@dataclass(frozen=True)
class Clock:
    """How a span is timed. A mark may be set before what precedes it is done, as a GPU's event is."""

    mark: Callable[[], Any]
    seconds: Callable[[Any, Any], float]  # between two marks; waits for both
    settle: Callable[[], object]  # waits for all that is under way


HOST = Clock(time.perf_counter_ns, lambda start, end: (end - start) * 1e-9, lambda: None)


@dataclass
class Contender:
    """Something that can run again and again; ``setup`` runs untimed before every call of ``step``."""

    step: Callable[[], object]
    setup: Callable[[], object] | None = None
    measure: Callable[[int], float] | None = None  # seconds of so many calls that are made and timed elsewhere
    first_seconds: float | None = None  # what the first calls cost, where that is worth a column (compilation)
    note: Callable[[], str] | None = None  # asked once all is timed: what came of it (an accuracy)


@dataclass
class Times:
    """Seconds per call: one sample is the mean of ``calls`` calls in a row."""

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
    """Mean seconds of so many calls in a row; what ``setup`` takes is not counted."""
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
    """So many calls that the fastest contender's turn is long against the clock and what the turns before it left in
    the caches; the same number for all."""
    fastest = min(_sample(c, 1, clock) for c in contenders)
    if fastest < sample_seconds:  # else once is enough
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
    """Times the contenders for ``seconds`` in all, or for exactly ``rounds`` rounds."""
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
            # The other way round in every second cycle, so that nobody always follows the same neighbour.
            for name in reversed(order) if done // len(names) % 2 else order:
                times[name].samples.append(_sample(contenders[name], calls, clock))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return times
