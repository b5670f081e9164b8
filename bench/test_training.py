"""Whole iterations of small networks."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "training"


def test_training(report: Callable[[], None]) -> None:
    report()
