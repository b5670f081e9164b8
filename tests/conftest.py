"""Settings of the test run: the hypothesis profile; engine settings are restored after each test."""

import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import fusedopt
import integrations

TESTS = Path(__file__).parent
# The extras of pyproject.toml: without them the tests of what needs nothing but NumPy run.
OPTIONAL = {"expecttest", "joblib", "matplotlib", "pandas", "pytest_benchmark", "scipy", "sklearn", "torch", "tqdm"}

# Fixed examples, so that failures are reproducible; no deadline, since shared machines stall.
hypothesis.settings.register_profile("fusedopt", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("fusedopt")


class _Module(pytest.Module):
    """A file of tests, which is skipped if it imports an optional package that is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL:
                frames = [frame.filename for frame in traceback.extract_tb(cause.__traceback__)]
                importer = Path(next(f for f in reversed(frames) if not f.startswith("<frozen ")))
                if importer.is_relative_to(TESTS):  # not the package, which is to do without it
                    pytest.skip(f"{cause.name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _Module.from_parent(parent, path=module_path)
    return module


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
