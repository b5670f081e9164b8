"""Runs the CPU tests of PyTorch's own test/test_optim.py with our classes in place of torch.optim's.

    python tests/support/torch_suite.py PATH/TO/test_optim.py [--torch] [--verbose]

prints passed, failed and skipped per class; `--torch` leaves torch's classes in, for comparison. PyTorch's wheel does
not ship that file: take it from its repository, of a version near the installed one. Needs expecttest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import types
import unittest
from pathlib import Path
from typing import Any

WORDS = ("passed", "failed", "skipped")


def put_ours_in_place() -> list[str]:
    """Our classes under torch.optim's names, everywhere the suite looks; the names."""
    import torch
    from torch.testing._internal import common_optimizers

    import fusedopt.torch as ours

    names = []
    for info in common_optimizers.optim_db:
        name = info.optim_cls.__name__
        cls = vars(ours).get(name)
        if cls is None:
            continue
        names.append(name)
        info.optim_cls = cls
        setattr(torch.optim, name, cls)
        if hasattr(common_optimizers, name):
            setattr(common_optimizers, name, cls)
    return names


def load(path: Path) -> Any:
    """The suite as a module; its neighbours (schedulers, SWA) are of no interest here and are left out."""
    for name, words in (("test_lrscheduler", "TestLRScheduler"), ("test_swa_utils", "TestSWAUtils")):
        stub = types.ModuleType(f"optim.{name}")
        setattr(stub, words, object)
        sys.modules[f"optim.{name}"] = stub
    stub = types.ModuleType("optim.test_optim")
    stub.TestDifferentiableOptimizer = object  # type: ignore[attr-defined]
    sys.modules.update({"optim": types.ModuleType("optim"), "optim.test_optim": stub})
    spec = importlib.util.spec_from_file_location("torch_test_optim", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torch_test_optim"] = module
    spec.loader.exec_module(module)
    return module


def run(path: Path, names: list[str], verbose: bool) -> dict[str, dict[str, list[str]]]:
    """{class: {"passed": [...], "failed": [...], "skipped": [...]}} of the tests made for the CPU."""
    suite = unittest.TestSuite()
    pattern = re.compile(rf"_({'|'.join(names)})_cpu(_|$)")
    for test in unittest.defaultTestLoader.loadTestsFromTestCase(load(path).TestOptimRenewedCPU):
        if pattern.search(test.id()):
            suite.addTest(test)
    results: dict[str, dict[str, list[str]]] = {n: {w: [] for w in WORDS} for n in names}

    class Result(unittest.TestResult):
        def note(self, test: unittest.TestCase, word: str) -> None:
            found = pattern.search(test.id())
            assert found is not None
            results[found[1]][word].append(test.id().rsplit(".", 1)[-1])

        def addSuccess(self, test: Any) -> None:
            self.note(test, "passed")

        def addExpectedFailure(self, test: Any, err: Any) -> None:
            self.note(test, "passed")

        def addUnexpectedSuccess(self, test: Any) -> None:
            self.note(test, "failed")

        def addSkip(self, test: Any, reason: str) -> None:
            self.note(test, "skipped")

        def addError(self, test: Any, err: Any) -> None:
            self.note(test, "failed")
            if verbose:
                print(f"-- {test.id()}\n{self._exc_info_to_string(err, test)}", file=sys.stderr)  # type: ignore[attr-defined]

        addFailure = addError

    suite.run(Result())
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--torch", action="store_true", help="torch's own classes")
    parser.add_argument("--json", action="store_true", help="every test by name")
    parser.add_argument("--verbose", action="store_true", help="the trace of every failure")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # torch's test helpers parse it too

    import fusedopt.torch as ours

    names = [n for n in ours.__all__ if isinstance(getattr(ours, n), type) and n in _in_torch()]
    if not args.torch:
        names = [n for n in put_ours_in_place() if n in names]
    results = run(args.path, names, args.verbose)
    if args.json:
        print(json.dumps(results))
    else:
        print(f"{'':10s}" + "".join(f"{w:>9s}" for w in WORDS))
        for name, result in results.items():
            print(f"{name:10s}" + "".join(f"{len(result[w]):9d}" for w in WORDS))
            for test in result["failed"]:
                print(f"    failed: {test}")
    return 0


def _in_torch() -> set[str]:
    from torch.testing._internal import common_optimizers

    return {info.optim_cls.__name__ for info in common_optimizers.optim_db}


if __name__ == "__main__":
    sys.exit(main())
