"""The NumPy functions against the best in-place NumPy."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "numpy"


def test_numpy(report: Callable[[], None]) -> None:
    report()
