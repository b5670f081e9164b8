"""The estimators and the softmax loss against scikit-learn, torch and NumPy; their promises. For a quiet machine."""

from __future__ import annotations

from fusedopt.bench import Result

SUITE = "estimators"


def test_estimator(result: Result) -> None:
    assert result.bars
    missed = [f"{bar.against}: {bar}, at least {bar.least}" for bar in result.bars if not bar.ok]
    assert not missed, f"{result.case.label}: {'; '.join(missed)}"
