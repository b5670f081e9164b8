"""Every rule in float32 on one large tensor."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "rules"


def test_rules(report: Callable[[], None]) -> None:
    report()
