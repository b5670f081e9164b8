"""PyTorch's own optimizer tests, ours against torch's classes; skipped unless FUSEDOPT_TORCH_TEST_OPTIM names it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torch_suite

PATH = os.environ.get("FUSEDOPT_TORCH_TEST_OPTIM", "")


def results(*extra: str) -> dict[str, dict[str, list[str]]]:
    script = Path(torch_suite.__file__)
    done = subprocess.run(
        [sys.executable, str(script), PATH, "--json", *extra], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not PATH, reason="FUSEDOPT_TORCH_TEST_OPTIM names no test_optim.py of PyTorch")
def test_our_classes_pass_what_torchs_pass() -> None:
    pytest.importorskip("expecttest")
    ours, theirs = results(), results("--torch")
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 5
    for name, result in ours.items():
        passed = set(theirs[name]["passed"])
        assert len(passed) >= 30, f"{name}: only {len(passed)} tests of this file fit the installed torch"
        missing = sorted(passed - set(result["passed"]))
        assert not missing, f"{name}: {missing}"
        assert set(result["skipped"]) <= set(theirs[name]["skipped"]), "a test was skipped only for ours"
