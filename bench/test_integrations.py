"""The step within DDP, FSDP2 and a compiled iteration."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "integrations"


def test_integrations(report: Callable[[], None]) -> None:
    report()
