"""``fusedopt train`` and ``fusedopt compare``: from arguments to the files they write."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")
pytest.importorskip("skops")

from sklearn.metrics import f1_score, roc_auc_score  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402

from fusedopt.cli import arguments as command_line  # noqa: E402
from fusedopt.cli import models  # noqa: E402
from fusedopt.cli import train as train_cli  # noqa: E402
from fusedopt.data import load  # noqa: E402
from fusedopt.rules import RULES  # noqa: E402
from test_data import mnist  # noqa: E402


def run(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


def train(folder: Path, *arguments: object) -> dict[str, Any]:
    assert run("train", "--quiet", "--output", folder, *arguments) == 0
    result: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return result


def table_of_houses(path: Path, rows: int = 300) -> None:
    """Numbers and texts, with gaps."""
    rng = np.random.default_rng(0)
    area, age, town = rng.uniform(40, 200, rows), rng.uniform(0, 80, rows), rng.choice(["Ulm", "Bonn", "Jena"], rows)
    price = 3 * area - age + 80 * (town == "Bonn") + 5 * rng.standard_normal(rows)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["area", "town", "age", "price"])
        for i in range(rows):
            known = [f"{area[i]:.2f}" if i % 17 != 3 else "", town[i] if i % 23 != 5 else ""]
            writer.writerow([*known, f"{age[i]:.1f}", f"{price[i]:.2f}"])


# ---- train


@pytest.mark.parametrize(
    ("arguments", "metric", "least"),
    [
        (["--data", "digits", "--lr", 0.01], "accuracy", 0.9),
        (["--data", "breast_cancer", "--model", "linear", "--optimizer", "sgd", "--lr", 0.01], "auc", 0.98),
        (["--data", "breast_cancer", "--model", "linear", "--loss", "hinge", "--lr", 0.01], "f1", 0.9),
        (["--data", "iris", "--lr", 0.03, "--schedule", "onecycle"], "accuracy", 0.9),
        (["--data", "diabetes", "--model", "linear", "--lr", 0.01], "r2", 0.3),
        (["--data", "diabetes", "--lr", 0.003, "--dropout", 0.1, "--early-stopping"], "r2", 0.2),
        (["--data", "wine", "--batch-norm", "--hidden", 16, 8, "--activation", "tanh", "--lr", 0.02], "f1", 0.9),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_model_is_trained_evaluated_and_saved(
    tmp_path: Path, arguments: list[object], metric: str, least: float
) -> None:
    result = train(tmp_path, "--epochs", 15, *arguments)
    assert result["metrics"][metric] > least
    regression = "diabetes" in arguments
    found = {path.name for path in tmp_path.iterdir()}
    expected = {"model.skops", "metrics.json", "history.csv", "history.png"}
    expected |= {"predictions.png"} if regression else {"confusion.png"}
    expected |= {"roc.png"} if "breast_cancer" in arguments else set()
    assert found == expected
    assert set(result["metrics"]) >= ({"mse", "r2"} if regression else {"accuracy", "precision", "recall", "f1"})
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < losses[0]
    assert len(rows) <= 15
    if "--schedule" not in arguments and "--lr" in arguments:
        assert float(rows[0]["lr"]) == arguments[arguments.index("--lr") + 1]


def test_the_saved_model_gives_the_metrics_on_the_held_out_part(tmp_path: Path) -> None:
    result = train(tmp_path, "--data", "breast_cancer", "--epochs", 5, "--seed", 3, "--test-size", 0.25)
    table = load("breast_cancer")
    _, x, _, y = train_test_split(table.x, table.y, test_size=0.25, random_state=3, stratify=table.y)
    model = models.load(tmp_path / "model.skops")
    assert result["metrics"]["accuracy"] == model.score(x, y)
    assert result["metrics"]["f1"] == f1_score(y, model.predict(x), pos_label="malignant")
    assert result["metrics"]["auc"] == roc_auc_score(y == "malignant", model.predict_proba(x)[:, 1])
    assert result["settings"]["epochs"] == 5


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / folder, "--data", "iris", "--epochs", 3, "--seed", seed)
    a, b, c = ((tmp_path / folder / "history.csv").read_text().splitlines() for folder in "abc")
    columns = a[0].split(",")
    keep = [i for i, name in enumerate(columns) if name != "seconds"]
    strip = [[[line.split(",")[i] for i in keep] for line in lines] for lines in (a, b, c)]
    assert strip[0] == strip[1] != strip[2]


def test_preprocessing_is_fitted_on_the_training_part_alone(tmp_path: Path) -> None:
    """Test rows from another distribution must not affect means, medians or known categories."""
    path = tmp_path / "houses.csv"
    table_of_houses(path)
    result = train(tmp_path / "out", "--data", path, "--lr", 0.01, "--epochs", 40, "--task", "regression")
    assert result["metrics"]["r2"] > 0.85
    table = load(path, task="regression")
    assert table.of_kind("category") == ["town"]
    x_train, *_ = train_test_split(table.x, table.y, test_size=0.2, random_state=0)
    prepare = models.load(tmp_path / "out" / "model.skops")["prepare"]
    numbers, texts = prepare.named_transformers_["number"], prepare.named_transformers_["category"]
    columns = x_train[["area", "age"]].to_numpy(float)
    np.testing.assert_allclose(numbers["impute"].statistics_, np.nanmedian(columns, axis=0))
    filled = np.where(np.isnan(columns), numbers["impute"].statistics_, columns)
    np.testing.assert_allclose(numbers["scale"].mean_, filled.mean(axis=0))
    assert list(texts["encode"].categories_[0]) == ["Bonn", "Jena", "Ulm"]
    never_seen = pd.DataFrame({"area": [100.0], "town": ["Trier"], "age": [3.0]})
    assert prepare.transform(never_seen).shape == (1, 5)


def test_classes_are_split_in_equal_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((100, 3)), y=np.repeat([0, 1], [90, 10]))
    _, _, y_train, y_test = train_cli.split(load(path), 0.2, 0)
    assert (y_train.sum(), y_test.sum(), len(y_test)) == (8, 2, 20)


def test_mnists_files_are_trained_on_and_tested_with_their_own_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mnist(tmp_path, compressed=True)
    train(tmp_path / "out", "--data", tmp_path, "--epochs", 2, "--hidden", 10)
    assert "60 rows to train on, 20 to test with" in capsys.readouterr().out


def test_a_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    whole = train(tmp_path / "a", "--data", "iris", "--epochs", 6)
    file = tmp_path / "fit.npz"
    for folder in "bc":
        part = train(tmp_path / folder, "--data", "iris", "--epochs", 6, "--checkpoint", file)
        assert file.exists()
        assert part["metrics"] == whole["metrics"]


# ---- compare


def test_every_optimizer_trains_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "--data", "iris", "--epochs", 3, "--output", tmp_path, "--lrs", 0.001, 0.01, 0.1) == 0
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert set(results) == {name.lower() for name in RULES}
    assert {result["lr"] for result in results.values()} <= {0.001, 0.01, 0.1}
    assert (tmp_path / "compare.png").exists()
    shown = capsys.readouterr().out
    for name in results:
        assert name in shown
    best = results["adam"]
    for lr in (0.001, 0.01, 0.1):
        train(tmp_path / str(lr), "--data", "iris", "--epochs", 3, "--lr", lr)
        with open(tmp_path / str(lr) / "history.csv") as file:
            assert best["loss"] <= float(list(csv.DictReader(file))[-1]["loss"])


def test_a_rate_that_diverges_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "diabetes", "--model", "linear", "--epochs", 30, "--optimizers", "sgd", "--output", tmp_path]
    assert run("compare", *arguments, "--lrs", 1e30, 1e-2) == 0
    assert json.loads((tmp_path / "compare.json").read_text())["results"]["sgd"]["lr"] == 0.01
    assert run("compare", *arguments, "--lrs", 1e30, "--overwrite") == 2
    assert "every rate" in capsys.readouterr().err


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.csv"], "expected digits"),
        (["--data", "one.npz"], "two or more classes"),
        (["--data", "rare.npz"], "two or more rows of each class"),
        (["--data", "digits", "--dropout", "2"], "dropout"),
        (["--data", "diabetes", "--optimizer", "sgd", "--lr", "1e30"], "diverges"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("one.npz", x=np.ones((10, 2)), y=np.zeros(10, int))
    np.savez("rare.npz", x=np.ones((10, 2)), y=np.repeat([0, 1], [9, 1]))
    assert run("train", "--quiet", *arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fusedopt train: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "train-output").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lr", "-1"],
        ["--test-size", "1"],
        ["--epochs", "0"],
        ["--optimizer", "newton"],
        ["--schedule", "up"],
        ["--model", "tree"],
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_before_anything_is_loaded(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("train", "--data", "digits", *arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_schedules_of_the_command_line_exist_and_end_where_they_should() -> None:
    assert set(command_line.SCHEDULES) == set(models.SCHEDULES)
    for name, make in models.SCHEDULES.items():
        for steps in (1, 2, 10, 1000):
            values = [make(0.1, steps)(t) for t in range(steps)]
            assert max(values) <= 0.1 + 1e-12, name
            assert min(values) >= 0, name


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    arguments = ["-W", "error", "-m", "fusedopt", "train", "--data", "iris", "--epochs", "2", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
