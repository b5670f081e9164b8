"""The promises: a case fails where a ratio or the share of the ceiling is missed. For a quiet machine."""

from __future__ import annotations

from fusedopt.bench import Result

SUITE = "bars"


def test_bar(result: Result) -> None:
    assert result.bars
    missed = [f"{bar.against}: {bar}, at least {bar.least}" for bar in result.bars if not bar.ok]
    assert not missed, f"{result.case.label}: {'; '.join(missed)}"
