"""Every example runs in its short form, without warnings, and writes its plots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"

PICTURES = {
    "classification": ["classification-roc", "linear-svm", "logistic-regression"],
    "data_parallel": ["data-parallel"],
    "grid_search": ["grid-search"],
    "house_prices": ["house-prices", "house-prices-losses"],
    "linear_regression": ["linear-regression-fit", "linear-regression-losses"],
    "loss_surface": ["loss-surface"],
    "mnist": ["mnist-confusion", "mnist-history"],
    "overfitting": ["overfitting"],
    "ratings": ["ratings"],
    "schedules": ["schedules", "schedules-losses"],
    "torch_optimizers": ["torch-optimizers"],
}
SAYS = {
    "classification": "AUC 0.99",
    "data_parallel": "2 processes",
    "grid_search": "best of 4",
    "house_prices": "scaled, lr 0.3: R2 0.9",
    "linear_regression": "y = 2.9",
    "loss_surface": "Adam: after 100 steps at (",
    "mnist": "64-10-10 on digits",
    "overfitting": "batch normalisation",
    "ratings": "NumPy, fusedopt.Adam",
    "schedules": "polynomial decay",
    "torch_optimizers": "Adam, lr 0.01",
}


def test_every_example_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"digits", *PICTURES}  # `make demo` runs digits
    assert set(SAYS) == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_an_example_runs_and_leaves_its_pictures(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout
    assert sorted(path.stem for path in tmp_path.iterdir()) == PICTURES[name]
    for picture in tmp_path.iterdir():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 10_000
