"""Hands the suites of ``fusedopt.bench`` to pytest-benchmark, one test per contender.

pytest-benchmark would time one test after the other, and the noise of minutes would lie between ours and a baseline.
So each case is raced once, turn by turn, and a clock that stands still but for the recorded samples replays every
contender's times to the plugin: its table, comparison and JSON then hold what the race measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fusedopt.bench import LARGE, SUITES, Case, Result, gpu, run_case
from fusedopt.bench.contenders import contender_names


class Clock:
    """Advances only when told."""

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
    group.addoption("--suite", choices=SUITES, action="append", help="only this one; may be given several times")
    group.addoption("--elements", type=int, default=LARGE, help="size of a large tensor")
    group.addoption("--seconds", type=float, default=4.0, help="time for each case")
    group.addoption("--compile", action="store_true", help="torch.compile(opt.step), too")
    group.addoption("--peers", action="store_true", help="other projects' optimizers, too")


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
    """The race of this case, run by the first test that asks."""
    if (suite, case.label) not in LAST:
        LAST.clear()
        seconds: float = request.config.getoption("--seconds")
        LAST[suite, case.label] = run_case(case, suite, seconds=seconds, **_how(request.config))
    return LAST[suite, case.label]


@pytest.fixture
def report(request: pytest.FixtureRequest, result: Result, case: Case, contender: str) -> Callable[[], None]:
    """Gives pytest-benchmark the times of one contender."""

    def run() -> None:
        if contender not in result.times:
            pytest.skip(f"{contender} has no such step here")
        benchmark = request.getfixturevalue("benchmark")  # only now: it warns of tests that leave it unused
        samples = result.times[contender].samples
        benchmark.group = case.label
        benchmark.extra_info.update(ratio_to_ours=result.ratio(contender), share_of_ceiling=result.share)
        benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples))

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
