"""A pytest plugin: ``--integrations`` writes docs/integrations-table.md from the outcomes of the tests marked
``integration(place, what, *packages)``. Rows of tests that were not selected are kept. conftest.py loads it."""

from __future__ import annotations

import ast
import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "integrations-table.md"
HEAD = "<!-- Made by `make integrations` from the outcomes of the tests: do not edit. -->\n\n# Tested integrations"
COLUMNS = "| where | what is shown | outcome | with |\n| --- | --- | --- | --- |"

Row = tuple[str, str]


def marked_rows() -> list[Row]:
    """(place, what) of every marker in the sources, in order of files and lines."""
    rows: list[Row] = []
    for path in sorted(TESTS.rglob("test_*.py"), key=lambda path: path.name):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.integration":
                place, what = (ast.literal_eval(arg) for arg in node.args[:2])
                rows.append((place, what))
    return rows


def table_rows(text: str) -> list[tuple[str, ...]]:
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


class Outcomes:
    """Collects the outcomes of all marked tests."""

    def __init__(self) -> None:
        self.rows: dict[Row, dict[str, Any]] = {}
        self.by_test: dict[str, list[Row]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("integration"):
                place, what, *packages = marker.args
                self.rows.setdefault((place, what), {"passed": 0, "failed": 0, "skipped": set(), "packages": packages})
                self.by_test.setdefault(item.nodeid, []).append((place, what))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for row in self.by_test.get(report.nodeid, ()):
            entry = self.rows[row]
            if report.failed:
                entry["failed"] += 1
            elif report.skipped and isinstance(report.longrepr, tuple):
                entry["skipped"].add(report.longrepr[2].removeprefix("Skipped: "))
            elif report.when == "call" and report.passed:
                entry["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(self.text())

    def text(self) -> str:
        versions = f"torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"
        today = datetime.datetime.now(tz=datetime.timezone.utc).date()
        lines = [
            HEAD,
            "",
            f"{versions}, {platform.system()} {platform.machine()}, {today}; no accelerator.",
            "",
            COLUMNS,
        ]
        before = {row[:2]: row for row in table_rows(TABLE.read_text())} if TABLE.exists() else {}
        for place, what in dict.fromkeys(marked_rows()):
            entry = self.rows.get((place, what))
            if entry is not None and (entry["passed"] or entry["failed"] or entry["skipped"]):
                lines.append(f"| {place} | {what} | {outcome(entry)} | {installed(entry['packages'])} |")
            elif (place, what) in before:  # not among the tests of this run
                lines.append(f"| {' | '.join(before[place, what])} |")
            else:
                lines.append(f"| {place} | {what} | not run: not selected | |")
        return "\n".join(lines) + "\n"


def outcome(entry: dict[str, Any]) -> str:
    """One cell: works, fails, or the reason for a skip."""
    if entry["failed"]:
        return f"**fails** ({entry['failed']} of {entry['failed'] + entry['passed']})"
    if entry["passed"]:
        return "works"
    return f"not run: {'; '.join(sorted(entry['skipped']))}"


def installed(packages: list[str]) -> str:
    """Names and versions of the packages that the test used besides torch."""
    found = []
    for package in packages or ["torch"]:
        try:
            found.append(f"{package} {importlib.metadata.version(package).split('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}: not installed")
    return ", ".join(found)
