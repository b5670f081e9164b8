"""Every rule on a GPU, by its own clock; and what is promised there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fusedopt.bench import Result
from fusedopt.bench.gpu import missing

SUITE = "gpu"
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs a GPU: {missing()}")


def test_gpu(report: Callable[[], None]) -> None:
    report()


def test_bar(result: Result) -> None:
    missed = [f"{bar.against}: {bar}, at least {bar.least}" for bar in result.bars if not bar.ok]
    assert not missed, f"{result.case.label}: {'; '.join(missed)}"
