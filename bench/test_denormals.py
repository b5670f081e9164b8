"""What denormal moments cost."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "denormals"


def test_denormals(report: Callable[[], None]) -> None:
    report()
