"""Every suite of ``fusedopt.bench`` through pytest-benchmark. A missed bar fails, so the machine must be idle.

``--suite bars`` selects a suite, ``-k "GPT-2 and fused"`` selects cases by name.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedopt.bench import Result
from fusedopt.bench.contenders import OURS

PROMISES = ("bars", "estimators")
"""Suites in which every case has a bar."""


def test_suite(suite: str, contender: str, result: Result, report: Callable[[], None]) -> None:
    report()
    if contender == OURS:  # once for a case
        assert result.bars or suite not in PROMISES
        missed = [f"{bar.against}: {bar}, at least {bar.least}" for bar in result.bars if not bar.ok]
        assert not missed, f"{result.case.label}: {'; '.join(missed)}"
