"""Runs the suites of ``fusedopt.bench`` through pytest-benchmark, one test per contender.

pytest-benchmark times one test after the other, minutes apart. Here each case is timed once, interleaved, and a
simulated clock replays the samples of every contender to the plugin, whose tables, comparisons and JSON then hold those
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fusedopt.bench import LARGE, SUITES, Case, Result, gpu, run_case
from fusedopt.bench.contenders import contender_names


class Clock:
    """A clock that advances by the replayed samples only."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, samples: Sequence[float]) -> Callable[[], None]:
        left: Iterator[float] = iter(samples)

        def step() -> None:
            self.now += next(left)

        return step


CLOCK = Clock()
LAST: dict[tuple[str, str], Result] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedopt")
    group.addoption("--suite", choices=SUITES, action="append", help="run only this suite; may be repeated")
    group.addoption("--elements", type=int, default=LARGE, help="size of a large tensor")
    group.addoption("--seconds", type=float, default=4.0, help="seconds per case")
    group.addoption("--compile", action="store_true", help="also time torch.compile(opt.step)")
    group.addoption("--peers", action="store_true", help="also time optimizers of other projects")


def _how(config: pytest.Config) -> dict[str, Any]:
    return {"compiled": config.getoption("--compile"), "with_peers": config.getoption("--peers")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suites = metafunc.config.getoption("--suite") or [suite for suite in SUITES if suite != "short"]
    large, how = metafunc.config.getoption("--elements"), _how(metafunc.config)
    no_gpu = pytest.mark.skipif(bool(gpu.missing()), reason=f"needs a GPU: {gpu.missing()}")
    rows = [
        pytest.param(suite, case, contender, id=f"{suite}-{case}-{contender}", marks=[no_gpu] * (suite == "gpu"))
        for suite in suites
        for case in SUITES[suite](large)
        for contender in contender_names(case, **how)
    ]
    metafunc.parametrize(("suite", "case", "contender"), rows)


@pytest.fixture
def result(suite: str, case: Case, request: pytest.FixtureRequest) -> Result:
    """The result of this case, timed by the first test that needs it."""
    if (suite, case.label) not in LAST:
        LAST.clear()
        seconds: float = request.config.getoption("--seconds")
        LAST[suite, case.label] = run_case(case, suite, seconds=seconds, **_how(request.config))
    return LAST[suite, case.label]


@pytest.fixture
def report(request: pytest.FixtureRequest, result: Result, case: Case, contender: str) -> Callable[[], None]:
    """Passes the times of one contender to pytest-benchmark."""

    def run() -> None:
        if contender not in result.times:
            pytest.skip(f"{contender} has no such step here")
        benchmark = request.getfixturevalue("benchmark")  # not earlier: pytest-benchmark warns if it is unused
        samples = result.times[contender].samples
        benchmark.group = case.label
        benchmark.extra_info.update(ratio_to_ours=result.ratio(contender), share_of_ceiling=result.share)
        benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples))

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
