"""``fusedopt train`` and ``fusedopt compare``: from arguments to the files they write."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")
pytest.importorskip("skops")

import scipy.sparse  # noqa: E402
import sklearn.datasets  # noqa: E402
from sklearn.base import is_classifier  # noqa: E402
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.metrics import f1_score, r2_score, roc_auc_score  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from sklearn.neural_network import MLPClassifier, MLPRegressor  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler  # noqa: E402

import fusedopt  # noqa: E402
from fusedopt.cli import arguments as command_line  # noqa: E402
from fusedopt.cli import models  # noqa: E402
from fusedopt.cli import train as train_cli  # noqa: E402
from fusedopt.data import load  # noqa: E402
from fusedopt.estimators._fit import Fit  # noqa: E402
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
    assert "60 training rows, 20 test rows" in capsys.readouterr().out


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
    assert "every learning rate" in capsys.readouterr().err


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
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


# ---- a model that can be used


def table_of_flats(path: Path, rows: int = 400, seed: int = 0, target: bool = True) -> Any:
    """What tables in the wild have: gaps, texts, dates, truth values, thousands, per cent, Unicode, an index."""
    rng = np.random.default_rng(seed)
    area, town = rng.uniform(30, 200, rows), rng.choice(["Köln", "Łódź", "東京"], rows)
    sold = np.datetime64("2020-01-01") + rng.integers(0, 1500, rows).astype("timedelta64[D]")
    lift, tax = rng.random(rows) < 0.5, rng.integers(1, 9, rows)
    income = rng.integers(20_000, 90_000, rows)
    price = 3 * area + 90 * (town == "東京") + 0.1 * (sold - np.datetime64("2020-01-01")).astype(int) + 40 * lift
    frame = pd.DataFrame({
        "": np.arange(rows), "area": area.round(1).astype(str), "town": town, "sold": sold.astype(str),
        "lift": lift.astype(str), "tax": [f"{t}%" for t in tax], "income": [f"{i:,}" for i in income],
        "price": (price + rng.normal(0, 5, rows)).round(2).astype(str),
    })  # fmt: skip
    for name, gap in (("area", 17), ("town", 23), ("sold", 29), ("lift", 31), ("income", 19)):
        frame.loc[rng.integers(0, rows, rows // gap), name] = ""
    frame if target else frame.pop("price")
    frame.to_csv(path, index=False)
    return frame


@pytest.mark.parametrize("form", ["skops", "joblib"])
def test_a_model_predicts_another_table(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    table_of_flats(tmp_path / "flats.csv")
    truth = table_of_flats(tmp_path / "new.csv", seed=1)
    result = train(
        tmp_path / "out", "--data", tmp_path / "flats.csv", "--lr", 0.01, "--epochs", 40, "--format", form
    )  # fmt: skip
    shown = capsys.readouterr().out
    for words in (
        "Unnamed: 0 index 0 not used: row numbers",
        "town category", "sold date", "lift category", "tax number", "income number", "price target: number",
    ):  # fmt: skip
        pattern = r"\s+(?:\d+\s+)?".join(map(re.escape, words.split(" ")))
        assert re.search(pattern, shown), words
    assert result["metrics"]["r2"] > 0.9
    without_target = truth.drop(columns=["price"])
    without_target.sample(frac=1, axis=1, random_state=0).to_csv(tmp_path / "bare.csv", index=False)
    model = ["--model", tmp_path / "out" / f"model.{form}"]
    for name in ("new", "bare"):
        assert run("predict", *model, "--data", tmp_path / f"{name}.csv", "--output", tmp_path / f"{name}-p.csv") == 0
    said = capsys.readouterr().err
    assert ("can run code" in said) == (form == "joblib")
    predicted = pd.read_csv(tmp_path / "new-p.csv")["prediction"]
    np.testing.assert_array_equal(predicted, pd.read_csv(tmp_path / "bare-p.csv")["prediction"])
    assert r2_score(truth["price"].astype(float), predicted) > 0.9
    # The DataFrame that pandas makes by itself gives the same.
    pipeline = models.load(tmp_path / "out" / f"model.{form}")
    np.testing.assert_allclose(pipeline.predict(pd.read_csv(tmp_path / "new.csv")), predicted, rtol=1e-9)


def test_columns_are_found_by_name_and_a_lacking_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "out", "--data", "breast_cancer", "--epochs", 5, "--lr", 0.01)
    pipeline = models.load(tmp_path / "out" / "model.skops")
    table = load("breast_cancer")
    accuracy = pipeline.score(table.x, table.y)
    assert accuracy > 0.95
    assert pipeline.score(table.x[table.x.columns[::-1]], table.y) == accuracy
    swapped = table.x.rename(columns={"mean radius": "mean area", "mean area": "radius"})
    with pytest.raises(ValueError, match="mean radius"):
        pipeline.predict(swapped)
    swapped.to_csv(tmp_path / "swapped.csv", index=False)
    arguments = ["--model", tmp_path / "out" / "model.skops", "--data", tmp_path / "swapped.csv"]
    assert run("predict", *arguments, "--output", tmp_path / "p.csv") == 2
    assert "needs the columns mean radius, which" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_gaps_truth_values_and_new_categories_are_taken_as_in_training(tmp_path: Path) -> None:
    frame = table_of_flats(tmp_path / "flats.csv")
    train(tmp_path / "out", "--data", tmp_path / "flats.csv", "--epochs", 2)
    pipeline = models.load(tmp_path / "out" / "model.skops")
    row = {"area": 100.0, "town": "Köln", "sold": "2021-05-06", "lift": True, "tax": "5%", "income": "50,000"}
    variants = pd.DataFrame([
        row, row | {"lift": "True", "tax": 5, "income": 50_000}, row | {"sold": pd.Timestamp("2021-05-06")},
        row | {"town": None}, row | {"town": "?"}, row | {"town": "Trier"}, row | {"area": None},
    ])  # fmt: skip
    found = pipeline.predict(variants)
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4]
    assert np.isfinite(found).all()
    assert found[5] != found[0]
    most = frame["town"].replace("", np.nan).value_counts().index[0]
    assert found[3] == pipeline.predict(pd.DataFrame([row | {"town": most}]))[0]
    with pytest.raises(ValueError, match="column 'tax': expected numbers, got 'much'"):
        pipeline.predict(pd.DataFrame([row | {"tax": "much"}]))


@pytest.mark.parametrize("labels", [["1", "2"], ["None", "NA"], ["yes", "no"], ["True", "False"], ["-1", "1"]])
def test_predicted_classes_are_labelled_as_in_the_data(tmp_path: Path, labels: list[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(120)
    frame = pd.DataFrame({"x": x, "z": rng.standard_normal(120), "label": np.where(x > 0, *labels)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    result = train(tmp_path / "out", "--data", tmp_path / "t.csv", "--lr", 0.05, "--epochs", 10)
    assert result["settings"]["task"] == "classification"
    out = tmp_path / "deep" / "p.csv"
    arguments = ["--model", tmp_path / "out" / "model.skops", "--data", tmp_path / "t.csv", "--output", out]
    assert run("predict", *arguments, "--probabilities") == 0
    found = pd.read_csv(out, dtype=str, keep_default_na=False)
    assert set(found["prediction"]) == set(labels)
    assert (found["prediction"] == frame["label"]).mean() > 0.95
    assert set(found.columns[1:]) == {f"probability of {label}" for label in labels}
    np.testing.assert_allclose(found[found.columns[1:]].astype(float).sum(axis=1), 1, rtol=1e-6)
    assert run("predict", *arguments) == 2  # the file exists
    assert run("predict", *arguments, "--overwrite") == 0


@pytest.mark.parametrize("source", ["digits", "x.npz", "mnist"])
def test_models_of_arrays_predict_arrays(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((50, 3)), y=np.arange(50) % 2)
    np.savez(tmp_path / "bare.npz", x=rng.standard_normal((20, 3)))
    (tmp_path / "mnist").mkdir()
    mnist(tmp_path / "mnist")
    data = source if source == "digits" else tmp_path / source
    train(tmp_path / "out", "--data", data, "--epochs", 1)
    new = tmp_path / "bare.npz" if source == "x.npz" else data
    arguments = ["--model", tmp_path / "out" / "model.skops", "--output", tmp_path / "p.csv"]
    assert run("predict", *arguments, "--data", new) == 0
    assert len(pd.read_csv(tmp_path / "p.csv")) == {"digits": 1797, "x.npz": 20, "mnist": 20}[source]
    np.savez(tmp_path / "other.npz", x=rng.standard_normal((20, 5)))
    assert run("predict", *arguments, "--data", tmp_path / "other.npz", "--overwrite") == 2
    assert "numbers per row, as in training, got 5" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_a_model_file_of_other_types_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression

    foreign = {
        "function": make_pipeline(FunctionTransformer(print), LogisticRegression()),
        "other": LogisticRegression(),
    }
    for name, model in foreign.items():
        skops.io.dump(model, tmp_path / f"{name}.skops")
    (tmp_path / "damaged.skops").write_bytes(b"PK\x03\x04 no zip file")
    arguments = ["--data", "iris", "--output", tmp_path / "p.csv"]
    for name, message in {
        "function": "contains builtins.print", "other": "does not contain a model", "damaged": "cannot be loaded",
        "nothing": "there is no file",
    }.items():  # fmt: skip
        assert run("predict", "--model", tmp_path / f"{name}.skops", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_many_categories_stay_sparse_and_have_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    n = 40_000
    user = np.minimum(rng.zipf(1.3, n), 10**9)
    frame = pd.DataFrame({"user": [f"u{u}" for u in user], "a": rng.standard_normal(n)})
    frame["y"] = 3.0 * (user == 1) + frame["a"]
    frame.to_csv(tmp_path / "t.csv", index=False)
    distinct = frame["user"].nunique()
    assert distinct > 4000
    options = ["--model", "linear", "--epochs", 1, "--max-categories", 500, "--batch-size", 500]
    train(tmp_path / "out", "--data", tmp_path / "t.csv", "--optimizer", "adam", "--lr", 0.01, *options)
    assert f"user: of {distinct:,} categories the 499 most frequent are kept" in capsys.readouterr().out
    pipeline = models.load(tmp_path / "out" / "model.skops")
    x = pipeline["prepare"].transform(frame[["user", "a"]])
    assert x.shape == (n, 501)
    assert scipy.sparse.issparse(x)
    assert x.nnz == 2 * n


# ---- the folder of results


def test_an_earlier_run_is_not_mixed_with_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("train-output", "train-output-2"):
        assert run("train", "--quiet", "--data", "iris", "--epochs", 1) == 0
        assert (tmp_path / folder / "model.skops").exists()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in Path("train-output").iterdir())
    diabetes = ["train", "--quiet", "--data", "diabetes", "--epochs", 1, "--output", "train-output"]
    assert run(*diabetes) == 2
    assert "train-output is not empty" in capsys.readouterr().err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in Path("train-output").iterdir()) == before
    (tmp_path / "train-output" / "notes.txt").write_text("mine")
    assert run(*diabetes, "--overwrite", "--format", "joblib") == 0
    found = {p.name for p in Path("train-output").iterdir()}
    assert found == {"model.joblib", "metrics.json", "history.csv", "history.png", "predictions.png", "notes.txt"}


def test_the_folder_is_tested_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command in ("train", "compare"):
        assert run(command, "--data", "nothing.csv", "--output", tmp_path / "file" / "x") == 2
        assert "nothing can be written" in capsys.readouterr().err
    assert run("train", "--data", "nothing.csv", "--output", tmp_path / "a" / "b") == 2
    assert not (tmp_path / "a").exists()


def test_json_is_json_and_says_what_was_in_force(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((4, 2)), y=[1.5, 2.5, 3.5, 9.5])
    with pytest.warns(UserWarning, match="R\\^2 score is not well-defined"):
        train(tmp_path / "out", "--data", tmp_path / "x.npz", "--epochs", 1, "--test-size", 0.25)
    text = (tmp_path / "out" / "metrics.json").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(text, parse_constant=refuse)
    assert found["metrics"]["r2"] is None  # of a single row
    settings = found["settings"]
    assert (settings["lr"], settings["hidden"], settings["activation"]) == (0.001, [100], "relu")
    assert None not in settings.values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "linear", "--hidden", 8, "--dropout", 0.1],
            "--hidden, --dropout: does not apply to --model linear",
        ),
        (["--model", "linear", "--batch-norm"], "--batch-norm: does not apply"),
        (["--model", "mlp", "--loss", "log"], "--loss: does not apply to --model mlp"),
        (
            ["--model", "linear", "--loss", "log", "--task", "regression", "--target", "alcohol"],
            "--loss: does not apply",
        ),
        (["--separator", ";"], "separator: does not apply to 'wine'"),
        (["--max-categories", 5], "--max-categories: does not apply"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    tmp_path: Path, arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--data", "wine", "--output", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


# ---- interruptions


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C in the step with this number, counted over all fits."""
    seen = 0
    step = Fit._one_step

    def counted(self: Fit, *args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == steps:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Fit, "_one_step", counted)


def test_ctrl_c_in_the_first_epoch_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(monkeypatch, 2)
    assert run("train", "--data", "digits", "--quiet", "--output", tmp_path / "out") == 130
    assert capsys.readouterr().err == "fusedopt train: interrupted in the first epoch; nothing was saved\n"
    assert not (tmp_path / "out").exists()


def test_ctrl_c_marks_what_is_saved_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole", "--data", "iris", "--epochs", 6)
    command = ["train", "--quiet", "--data", "iris", "--epochs", 6, "--output", tmp_path / "out"]
    command += ["--checkpoint", tmp_path / "fit.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)  # 4 steps an epoch
        assert run(*command) == 130
    said = capsys.readouterr().err
    assert "interrupted after 2 of 6 epochs" in said
    assert f"the same command resumes from {tmp_path / 'fit.ckpt'}" in said
    cut = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (cut["interrupted"], cut["epochs"]) == (True, 2)
    assert run(*command) == 0
    done = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (done["interrupted"], done["epochs"]) == (False, 6)
    assert done["metrics"] == whole["metrics"]
    assert run(*command) == 2  # it is not cut any more


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_from_the_keyboard_stops_a_training_cleanly(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "fit.ckpt", tmp_path / "out"
    words = ["train", "--quiet", "--data", "iris", "--epochs", "1000000", "--output", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedopt", *words, "--checkpoint", str(checkpoint)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits SIG_IGN
    )
    try:
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted after" in said
    assert "Traceback" not in said
    assert json.loads((out / "metrics.json").read_text())["interrupted"] is True
    assert not list(tmp_path.glob("*.tmp*"))


def test_compare_leaves_out_the_fit_that_ctrl_c_has_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", "iris", "--epochs", 2, "--lrs", 0.01, "--optimizers", "adam", "sgd", "lion"]
    command += ["--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 14)  # the second epoch of the second optimizer
        assert run(*command) == 130
    assert "interrupted; 1 of 3 optimizers are saved" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (set(found["results"]), found["interrupted"]) == ({"adam"}, True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert run(*command, "--overwrite") == 130
    assert "nothing was saved" in capsys.readouterr().err


def test_ctrl_c_elsewhere_is_a_line_and_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cli, "load", pressed)
    assert run("train", "--data", "iris", "--output", tmp_path / "out") == 130
    assert capsys.readouterr().err == "fusedopt train: interrupted; nothing was saved\n"
    assert not (tmp_path / "out").exists()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fusedopt {fusedopt.__version__}\n"


@pytest.mark.parametrize("command", ["train", "compare", "predict"])
def test_what_is_missing_is_named_with_what_installs_it(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no release yet: the message is for somebody who has a checkout."""
    monkeypatch.setattr(command_line, "_missing", lambda modules: ["pandas"])
    more = ["--model", "m.skops", "--output", "p.csv"] if command == "predict" else []
    assert run(command, "--data", "iris", *more) == 2
    said = capsys.readouterr().err
    assert said == f"fusedopt {command} needs pandas: pip install '.[train]' in a checkout of fusedopt\n"


# ---- against scikit-learn


def by_hand(x: Any, y: Any, seed: int, prepare: Any, model: Any) -> float:
    """The score of a pipeline that a user of scikit-learn would write."""
    stratify = y if is_classifier(model) else None
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=stratify)
    pipeline: Any = make_pipeline(prepare, model)
    if stratify is None:
        pipeline = TransformedTargetRegressor(pipeline, transformer=StandardScaler())
    return float(pipeline.fit(x_train, y_train).score(x_test, y_test))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["digits", "breast_cancer", "diabetes", "flats.csv"])
def test_the_score_is_that_of_a_pipeline_by_hand(tmp_path: Path, source: str) -> None:
    prepare: Any = FunctionTransformer(lambda x: x / 16) if source == "digits" else StandardScaler()
    data: object = source
    if source == "flats.csv":
        data = tmp_path / source
        table_of_flats(tmp_path / source, 2000)
        x = pd.read_csv(data)
        x["sold"] = (pd.to_datetime(x["sold"]) - pd.Timestamp(0)).dt.days
        x["tax"], x["income"] = x["tax"].str.rstrip("%").astype(float), x["income"].str.replace(",", "").astype(float)
        x["lift"] = x["lift"].map({True: 1.0, False: 0.0})
        y = x.pop("price")
        numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
        towns = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
        prepare = ColumnTransformer([
            ("numbers", numbers, ["area", "sold", "tax", "income", "lift"]), ("towns", towns, ["town"]),
        ])  # fmt: skip
    else:
        x, y = getattr(sklearn.datasets, f"load_{source}")(return_X_y=True)
    regression = source in ("diabetes", "flats.csv")
    ours, theirs = [], []
    for seed in range(3):
        result = train(tmp_path / str(seed), "--data", data, "--lr", 0.003, "--epochs", 20, "--seed", seed)
        ours.append(result["metrics"]["r2" if regression else "accuracy"])
        make = MLPRegressor if regression else MLPClassifier
        model = make(
            max_iter=20, tol=0, n_iter_no_change=20, batch_size=32, learning_rate_init=0.003, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.append(by_hand(x, y, seed, prepare, model))
    assert np.mean(ours) > np.mean(theirs) - max(np.std(theirs), 0.005), (ours, theirs)


# ---- progress


def test_what_takes_more_than_two_seconds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2.3)
        return load(*args, **kwargs)

    monkeypatch.setattr(train_cli, "load", slow)
    assert run("train", "--data", "iris", "--epochs", 1, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "fusedopt train: reading ..." in said
    assert run("train", "--data", "iris", "--epochs", 1, "--output", tmp_path / "quiet", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_reading_a_large_file_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_csv = pd.read_csv

    def slow(file: Any, **options: Any) -> Any:
        begin = file.read(100)
        time.sleep(2.2)
        return read_csv(io.BytesIO(begin + file.read()), **options)

    (tmp_path / "x.csv").write_text("a,y\n" + "".join(f"{i},{i / 7}\n" for i in range(100)))
    monkeypatch.setattr(pd, "read_csv", slow)
    assert len(load(tmp_path / "x.csv", progress=True).y) == 100
    assert "reading x.csv" in capsys.readouterr().err
    load(tmp_path / "x.csv")
    assert capsys.readouterr().err == ""


def test_compare_shows_how_many_fits_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = train_cli._fit

    def slow(*args: Any) -> Any:
        time.sleep(1.2)
        return fit(*args)

    monkeypatch.setattr(train_cli, "_fit", slow)
    command = ["compare", "--data", "iris", "--epochs", 1, "--lrs", 0.1, 0.01, "--optimizers", "adam", "sgd"]
    assert run(*command, "--output", tmp_path / "out") == 0
    assert "/4 [" in capsys.readouterr().err
