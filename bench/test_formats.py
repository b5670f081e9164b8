"""Adam in every format, from the first cache to main memory."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "formats"


def test_formats(report: Callable[[], None]) -> None:
    report()
