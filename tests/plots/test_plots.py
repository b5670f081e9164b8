"""Plots of training and of trained models draw the given data. Their appearance is not tested."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedopt import plots

EPOCHS = np.arange(1, 31)
HISTORY = {
    "step": EPOCHS * 10,
    "loss": np.exp(-EPOCHS / 5),
    "val_loss": np.exp(-EPOCHS / 8),
    "val_accuracy": 1 - np.exp(-EPOCHS / 4),
    "lr": 0.1 * 0.9**EPOCHS,
    "seconds": EPOCHS / 10,
}
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, 50)
CLASSES = RNG.integers(0, 3, 60)

DRAWINGS: dict[str, Callable[[Any], Any]] = {
    "history": lambda path: plots.history(HISTORY, path),
    "compare": lambda path: plots.compare({"a": HISTORY, "b": {"loss": [1.0, 0.5]}}, "loss", path),
    "surface": lambda path: plots.surface(
        lambda x, y: x**2 + y**2, {"one": [[1.0, 1.0], [0.0, 0.0]]}, path, xlim=(-1, 2), ylim=(-1, 2), minimum=(0, 0)
    ),
    "fit": lambda path: plots.fit(X, 3 * X, lambda x: 3 * x[:, 0], path),
    "predictions": lambda path: plots.predictions(X, X + 0.1, path),
    "confusion_matrix": lambda path: plots.confusion_matrix(CLASSES, CLASSES[::-1], path),
    "roc": lambda path: plots.roc({"model": (CLASSES == 1, CLASSES)}, path),
    "grid": lambda path: plots.grid([[0.1, 0.2], [0.3, 0.4]], ["a", "b"], ["1", "2"], path, xlabel="n"),
    "schedule": lambda path: plots.schedule(lambda t: 1 / (t + 1), 10, path),
    "losses": lambda path: plots.losses({"a": [1.0, 0.5]}, path),
}


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_returned_and_saved_if_there_is_a_path(name: str, tmp_path: Path) -> None:
    figure = DRAWINGS[name](tmp_path / "picture.png")
    assert type(figure).__name__ == "Figure"
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    DRAWINGS[name](None)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_every_public_picture_is_tested_and_documented() -> None:
    assert set(DRAWINGS) | {"bandwidth", "save_all", "sizes", "speedups"} == set(plots.__all__)
    for name in plots.__all__:
        assert (getattr(plots, name).__doc__ or "").strip(), name


def test_a_history_has_a_panel_for_losses_scores_and_rate() -> None:
    panels = plots.history(HISTORY).axes
    assert len(panels) == 3
    for axes, names in zip(panels, (["loss", "val_loss"], ["val_accuracy"], ["lr"]), strict=True):
        assert len(axes.get_lines()) == len(names)
        for line, name in zip(axes.get_lines(), names, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), HISTORY[name])
            np.testing.assert_array_equal(line.get_xdata(), HISTORY["step"])
    only = plots.history({"loss": [1.0, 0.9], "score": [0.1, 0.2]}).axes
    assert [axes.get_xlabel() for axes in only] == ["epoch", "epoch"]
    with pytest.raises(ValueError, match="columns"):
        plots.history({"seconds": [1.0]})


def test_compared_histories_are_drawn_by_name() -> None:
    drawn = lines(plots.compare({"a": HISTORY, "b": {"loss": [1.0, 0.5]}, "c": {"lr": [1.0]}}).axes[0])
    assert set(drawn) == {"a", "b"}
    np.testing.assert_array_equal(drawn["b"].get_ydata(), [1.0, 0.5])
    assert plots.compare({"a": {"loss": [1.0, -1.0]}}).axes[0].get_yscale() == "linear"
    with pytest.raises(ValueError, match="nothing"):
        plots.compare({"a": HISTORY}, "nothing")


def test_paths_and_predictions_are_drawn_as_they_are() -> None:
    path = [[1.0, 1.0], [0.5, 0.2], [0.0, 0.0]]
    axes = plots.surface(lambda x, y: x**2 + y**2, {"one": path}, xlim=(-1, 2), ylim=(-1, 2)).axes[0]
    np.testing.assert_array_equal(lines(axes)["one"].get_xydata(), path)
    axes = plots.predictions(X, X + 1).axes[0]
    np.testing.assert_array_equal(axes.get_lines()[1].get_ydata(), X + 1)
    axes = plots.fit(X[:, None], 3 * X, lambda x: 3 * x[:, 0]).axes[0]
    line = lines(axes)["fit"]
    np.testing.assert_allclose(line.get_ydata(), 3 * line.get_xdata())
    with pytest.raises(ValueError, match="one feature"):
        plots.fit(np.ones((5, 2)), np.ones(5), lambda x: x)


def boxes(figure: Any, texts: Any) -> list[Any]:
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]


def test_a_confusion_matrix_of_many_classes_stays_readable() -> None:
    names = [f"class number {i}" for i in range(35)]
    truth = np.repeat(names, 30)
    axes = plots.confusion_matrix(truth, np.where(RNG.random(len(truth)) < 0.9, truth, truth[::-1]), labels=names).axes[
        0
    ]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == names
        found = boxes(axes.figure, labels)
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(found))
    cells = boxes(axes.figure, axes.texts)
    assert 35 <= len(cells) < 35 * 35
    assert all(box.width < axes.get_window_extent().width / 35 for box in cells)
    many = np.arange(300)
    figure = plots.confusion_matrix(many, many)
    assert max(figure.get_size_inches()) < 31
    found = boxes(figure, figure.axes[0].get_xticklabels())
    assert len(found) <= 31
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(found))


def test_the_legend_of_many_series_stays_within_the_plot() -> None:
    histories = {f"an optimizer with a long name {i}, lr 0.0001": {"loss": [1.0, 1 / (i + 2)]} for i in range(12)}
    figure = plots.compare(histories)
    figure.draw_without_rendering()
    (box,) = (legend.get_window_extent() for legend in figure.legends)
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    drawn = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert len(set(drawn)) == 12
    several = plots.schedule({f"s{i}": lambda t: 1.0 for i in range(12)}, 3).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in several}) == 12
    assert not box.overlaps(figure.axes[0].get_window_extent())


def test_a_million_points_are_drawn_as_a_density() -> None:
    x = RNG.standard_normal(1_000_000)
    for figure in (plots.predictions(x, x + 0.1), plots.fit(x, 3 * x, lambda g: 3 * g[:, 0])):
        points = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 1000]
        assert not points
        (cells,) = figure.axes[0].collections
        assert cells.get_array().sum() == 1_000_000


def test_confusion_and_area_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    predicted = np.where(np.arange(60) % 4 == 0, 0, CLASSES)
    axes = plots.confusion_matrix(CLASSES, predicted).axes[0]
    shown = sorted(int(text.get_text()) for text in axes.texts)
    assert shown == sorted(metrics.confusion_matrix(CLASSES, predicted).ravel())
    score = RNG.standard_normal(60) + (CLASSES == 1)
    (label,) = [name for name in lines(plots.roc({"m": (CLASSES == 1, score)}).axes[0]) if name.startswith("m")]
    assert label == f"m: area {metrics.roc_auc_score(CLASSES == 1, score):.4f}"
