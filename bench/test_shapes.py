"""Adam on the shapes of real networks and on those that cost the most per tensor."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "shapes"


def test_shapes(report: Callable[[], None]) -> None:
    report()
