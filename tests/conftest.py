"""Settings of the test run: the hypothesis profile; engine settings are restored after each test."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

import fusedopt
import integrations

# Fixed examples, so that failures are reproducible; no deadline, since shared machines stall.
hypothesis.settings.register_profile("fusedopt", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("fusedopt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--integrations", action="store_true", help="write docs/integrations-table.md from the outcomes")
    parser.addoption("--gpu", action="store_true", help="fail unless a test has run: on no GPU they are all skipped")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--integrations"):
        config.pluginmanager.register(integrations.Outcomes())


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--gpu") and not reporter.stats.get("passed") and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("")
        reporter.write_line("no test has run: all were skipped", red=True)


@pytest.fixture(autouse=True)
def _engine_settings() -> Iterator[None]:
    """A test may set an instruction set or thread count; the defaults are restored after it."""
    yield
    fusedopt.set_isa(None)
    fusedopt.set_num_threads(None)
