"""Settings of the whole test run: hypothesis profile, engine settings put back after each test. No data."""

from collections.abc import Iterator

import hypothesis
import pytest

import fusedopt
import integrations

# The examples are the same in every run, so a red build can be repeated; no deadline, as shared machines stall.
hypothesis.settings.register_profile("fusedopt", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("fusedopt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--integrations", action="store_true", help="write docs/integrations-table.md from the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--integrations"):
        config.pluginmanager.register(integrations.Outcomes())


@pytest.fixture(autouse=True)
def _engine_settings() -> Iterator[None]:
    """A test may force an instruction set or a thread count; the next one finds the defaults."""
    yield
    fusedopt.set_isa(None)
    fusedopt.set_num_threads(None)
