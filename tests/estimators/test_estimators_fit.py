"""The fitting loop: stop rules, early stopping, bit-identical repetition, warm starts, copies. Checkpoints survive a
killed process; damaged ones are refused."""

import contextlib
import copy
import functools
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt
import fusedopt.schedules
from helpers import engine

pytest.importorskip("sklearn")

import scipy.sparse
import threadpoolctl
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from fusedopt.estimators import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor, Noise

Array = np.ndarray[Any, Any]
ALL = [MLPClassifier, MLPRegressor, LinearClassifier, LinearRegressor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Stochastic Optimizer: Maximum iterations")
        yield


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    x, y = load_digits(return_X_y=True)
    return x / 16, y


def params(model: Any) -> list[Array]:
    return [*model.coefs_, *model.intercepts_] if hasattr(model, "coefs_") else [model.coef_, model.intercept_]


def assert_same(one: Any, two: Any) -> None:
    for a, b in zip(params(one), params(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.loss_curve_ == two.loss_curve_
    assert one.validation_scores_ == two.validation_scores_


# ---- stopping


@pytest.mark.parametrize("make", ALL)
def test_max_iter_stops_with_a_warning(make: Any, digits: tuple[Array, Array]) -> None:
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(3\) reached"):
        model = make(max_iter=3, random_state=0).fit(*digits)
    assert model.n_iter_ == 3
    assert len(model.loss_curve_) == len(model.history_["loss"]) == 3


@pytest.mark.parametrize("make", ALL)
def test_without_tol_max_iter_is_no_cause_for_a_warning(make: Any, digits: tuple[Array, Array]) -> None:
    assert make(max_iter=2, tol=None, random_state=0).fit(*digits).n_iter_ == 2


@pytest.mark.parametrize("make", ALL)
def test_tol_stops_when_the_loss_no_longer_falls(make: Any, digits: tuple[Array, Array]) -> None:
    mlp = make in (MLPClassifier, MLPRegressor)
    model = make(tol=1e3, n_iter_no_change=4, random_state=0, momentum=0.9 if mlp else 0.0).fit(*digits)
    assert model.n_iter_ == 4 + 1 + mlp  # the first epoch is better than none; scikit-learn's networks wait one more
    if not mlp:  # oscillations of momentum are tolerated: 100 steps, 9 per epoch
        assert make(tol=1e3, n_iter_no_change=4, random_state=0, batch_size=200).fit(*digits).n_iter_ == 12 + 1
    never = make(tol=None, max_iter=30, random_state=0).fit(*digits)
    assert never.n_iter_ == 30


def test_tol_params_stops_when_the_parameters_rest(digits: tuple[Array, Array]) -> None:
    x, y = digits
    kept: list[Array] = []

    class Watched(fusedopt.SGD):
        def step(self, grads: Any) -> None:
            super().step(grads)
            kept.append(self.param_groups[0]["params"][0].copy())

    how: dict[str, Any] = {"tol": None, "batch_size": "full", "max_iter": 400, "random_state": 0}
    model = LinearClassifier(
        "log_loss", solver=lambda p: Watched(p, lr=1.0), learning_rate="constant", tol_params=1e-3, **how
    )
    model.fit(x, y)
    moved = [float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in itertools.pairwise(kept)]
    assert 2 < model.n_iter_ == len(kept) < 400
    assert moved[-1] <= 1e-3 < min(moved[:-1])


def test_adaptive_divides_the_rate_until_it_is_tiny(digits: tuple[Array, Array]) -> None:
    model = MLPClassifier((5,), solver="sgd", learning_rate="adaptive", tol=1e3, n_iter_no_change=1, random_state=0)
    model.fit(*digits)
    rates = model.history_["lr"]
    np.testing.assert_allclose(np.unique(rates)[::-1], [1e-3 / 5**k for k in range(6)])


@pytest.mark.parametrize("make", ALL)
def test_early_stopping_ends_with_the_best_parameters(make: Any, digits: tuple[Array, Array]) -> None:
    from sklearn.model_selection import train_test_split

    x, y = digits
    y = y > 4 if make in (MLPClassifier, LinearClassifier) else y
    noisy: dict[str, Any] = {"early_stopping": True, "n_iter_no_change": 5, "random_state": 0, "max_iter": 200}
    noisy.update({"learning_rate_init": 0.05} if make in (MLPClassifier, MLPRegressor) else {"eta0": 0.1})
    if make in (LinearRegressor,):
        noisy.update(learning_rate="constant")
    best, last = make(**noisy).fit(x, y), make(restore_best=False, **noisy).fit(x, y)
    scores = best.validation_scores_
    assert best.best_validation_score_ == max(scores)
    assert len(scores) == best.n_iter_ < 200
    random = np.random.RandomState(0)
    if make in (MLPClassifier, MLPRegressor):  # the weights are drawn before the rows
        twin = make(max_iter=1, **{k: v for k, v in noisy.items() if k == "learning_rate_init"}, random_state=random)
        from fusedopt.estimators._network import Network

        Network([64, 100, 1], twin.activation, x.dtype).initialize(random)
    rows = train_test_split(
        np.arange(len(y)), random_state=random, test_size=0.1, stratify=y if y.dtype == bool else None
    )[1]
    assert best.score(x[rows], y[rows]) == pytest.approx(max(scores))
    assert last.score(x[rows], y[rows]) == pytest.approx(scores[-1])
    assert last.validation_scores_ == scores


def test_a_validation_part_that_is_too_small_is_refused() -> None:
    x, y = np.random.default_rng(0).standard_normal((10, 2)), np.arange(10.0)
    with pytest.raises(ValueError, match="The validation set is too small"):
        MLPRegressor(early_stopping=True).fit(x, y)
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
        MLPRegressor(early_stopping=True).partial_fit(x, y)


def test_verbose_and_progress_tell(digits: tuple[Array, Array], capsys: pytest.CaptureFixture[str]) -> None:
    MLPClassifier((5,), max_iter=2, early_stopping=True, verbose=True, progress=True, random_state=0).fit(*digits)
    out, err = capsys.readouterr()
    assert re.search(r"Iteration 2, loss = \d\.\d{8}\nValidation score: 0\.\d+", out)
    if "tqdm" in sys.modules:
        for word in ("2/2", "loss=", "lr=0.001", "score="):
            assert word in err


# ---- repeatability, continuation, copies


OPTIONS: list[dict[str, Any]] = [{}, {"early_stopping": True}, {"ema_decay": 0.9, "max_grad_norm": 0.1}]
NETWORK: list[dict[str, Any]] = [
    {"dropout": 0.3, "batch_norm": True},
    {"activation": "gelu", "augment": Noise(0.1), "l1": 1e-3},
    {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.05, "n_iter_no_change": 1},
]


def settings() -> Iterator[Any]:
    for make in ALL:
        for options in OPTIONS + (NETWORK if make in (MLPClassifier, MLPRegressor) else [{"average": 5}]):
            if make is MLPRegressor:
                options = {**options, "learning_rate_init": 1e-4}
            yield pytest.param(make, options, id=f"{make.__name__}-{options}")


@pytest.mark.parametrize(("make", "options"), list(settings()))
def test_random_state_fixes_every_bit(make: Any, options: dict[str, Any], digits: tuple[Array, Array]) -> None:
    how: dict[str, Any] = {"max_iter": 4, "batch_size": 64, **options}
    one = make(random_state=5, **how).fit(*digits)
    assert_same(one, make(random_state=5, **how).fit(*digits))
    assert_same(one, clone(one).fit(*digits))
    other = make(random_state=6, **how).fit(*digits)
    assert not np.array_equal(params(one)[0], params(other)[0])
    with engine(threads=1):
        assert_same(one, make(random_state=5, **how).fit(*digits))


@pytest.mark.parametrize(("make", "options"), list(settings()))
def test_copies_predict_and_go_on_alike(make: Any, options: dict[str, Any], digits: tuple[Array, Array]) -> None:
    x, y = digits
    model = make(random_state=5, max_iter=3, batch_size=64, **options).fit(x, y)
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for other in copies:
        np.testing.assert_array_equal(other.predict(x), model.predict(x))
        assert_same(other, model)
    if not options.get("early_stopping"):
        for m in (model, *copies):
            for _ in range(2):
                m.partial_fit(x, y)
        for other in copies:
            assert_same(other, model)


@pytest.mark.parametrize("make", ALL)
def test_partial_fit_is_an_epoch_of_fit(make: Any, digits: tuple[Array, Array]) -> None:
    x, y = digits
    whole = make(random_state=0, max_iter=5, tol=None, shuffle=False).fit(x, y)
    parts = make(random_state=0, shuffle=False)
    for _ in range(5):
        if make in (MLPClassifier, LinearClassifier):
            parts.partial_fit(x, y, classes=np.arange(10))
        else:
            parts.partial_fit(x, y)
        assert parts.n_iter_ == 1
    assert_same(whole, parts)
    assert parts.t_ == 5 * len(y)


@pytest.mark.parametrize("make", ALL)
def test_a_warm_start_goes_on_from_where_it_was(make: Any, digits: tuple[Array, Array]) -> None:
    model = make(random_state=0, max_iter=3, warm_start=True, tol=None).fit(*digits)
    first = [p.copy() for p in params(model)]
    before = list(model.loss_curve_)
    model.fit(*digits)
    assert model.loss_curve_[:3] == before
    assert len(model.loss_curve_) == 6
    assert model.loss_ < before[-1]
    assert not np.array_equal(params(model)[0], first[0])
    cold = make(random_state=0, max_iter=3, tol=None).fit(*digits).fit(*digits)
    assert cold.loss_curve_ == before


# ---- L-BFGS


def test_lbfgs_gives_the_fit_of_scikit_learns_logistic_regression() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8).fit(x, y)
    ours = LinearClassifier("log_loss", solver="lbfgs", alpha=0.01, tol=1e-8).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-3)
    x, y = load_digits(return_X_y=True)
    x = x / 16
    theirs = LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(x, y)
    softmax = MLPClassifier((), solver="lbfgs", alpha=1.0, tol=1e-7, max_iter=1000, random_state=0).fit(x, y)
    np.testing.assert_allclose(softmax.predict_proba(x), theirs.predict_proba(x), atol=2e-3)
    assert (softmax.predict(x) == theirs.predict(x)).mean() > 0.999
    one_against_rest = LinearClassifier("log_loss", solver="lbfgs", tol=1e-4).fit(x, y)
    assert one_against_rest.score(x, y) > 0.98


def test_lbfgs_gives_least_squares() -> None:
    x, y = load_diabetes(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    theirs = Ridge(alpha=0.01 * len(x)).fit(x, y)
    ours = LinearRegressor(solver="lbfgs", alpha=0.01, tol=1e-6).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-3)
    weight = np.linspace(0, 2, len(x))
    theirs = Ridge(alpha=0.01 * weight.sum()).fit(x, y, weight)
    np.testing.assert_allclose(ours.fit(x, y, sample_weight=weight).coef_, theirs.coef_, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "continuous gradient"),
        ({"penalty": "l1"}, "penalty"),
        ({"early_stopping": True, "average": True}, "early_stopping, average"),
    ],
)
def test_lbfgs_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    x, y = np.eye(4), [0, 1, 0, 1]
    with pytest.raises(ValueError, match=message):
        LinearClassifier(**{"loss": "log_loss", "solver": "lbfgs"} | options).fit(x, y)
    with pytest.raises(ValueError, match="use another solver with partial_fit"):
        LinearClassifier("log_loss", solver="lbfgs").partial_fit(x, y, classes=[0, 1])


# ---- the scale of the data


@pytest.mark.parametrize("make", [LinearClassifier, LinearRegressor])
@pytest.mark.parametrize("size", [0.1, 1000.0])
def test_features_far_from_unit_size_are_warned_of(make: Any, size: float) -> None:
    x, y = np.random.default_rng(0).uniform(-1, 1, (50, 3)), np.arange(50) % 2
    with pytest.warns(UserWarning, match=r"Scale them to unit variance \(sklearn.preprocessing.StandardScaler\)"):
        make(max_iter=5, tol=None).fit(size * x, y)
    for options, data in (
        ({}, x), ({"solver": "lbfgs", "tol": 1e9}, size * x), ({"learning_rate": "constant", "eta0": 1e-9}, size * x),
    ):  # fmt: skip
        loss = {"loss": "log_loss"} if make is LinearClassifier else {}
        make(**{"max_iter": 5, "tol": None} | loss | options).fit(data, y)
    make().partial_fit(size * x, y, **({"classes": [0, 1]} if make is LinearClassifier else {}))


def test_the_advice_on_scale_helps() -> None:
    x, y = load_diabetes(return_X_y=True)
    with pytest.warns(UserWarning, match="Scale them"):
        raw = LinearRegressor(random_state=0).fit(x, y)
    scaled = StandardScaler().fit_transform(x)
    assert LinearRegressor(random_state=0).fit(scaled, y).score(scaled, y) > max(0.5, raw.score(x, y))
    assert LinearRegressor(solver="lbfgs", alpha=0).fit(x, y).score(x, y) > 0.5


# ---- BLAS threads


@pytest.mark.parametrize(("features", "hidden", "inside"), [(64, 100, 1), (1500, 400, 2)])
def test_small_products_run_on_one_blas_thread(features: int, hidden: int, inside: int) -> None:
    def blas() -> set[int]:
        return {info["num_threads"] for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"}

    seen = []

    def watch(batch: Array) -> Array:
        seen.append(blas())
        return batch

    x, y = np.random.default_rng(0).standard_normal((200, features)), np.arange(200) % 2
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas()
        MLPClassifier((hidden,), max_iter=1, tol=None, augment=watch, random_state=0).fit(x, y)
        assert blas() == before
    assert seen == [{inside} if inside == 1 else before]


# ---- checkpoints


def options_of(make: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"max_iter": 8, "batch_size": 64, "random_state": 5, "tol": None, "early_stopping": True}
    if make in (MLPClassifier, MLPRegressor):
        base.update(hidden_layer_sizes=(20,), dropout=0.2, batch_norm=True, ema_decay=0.9, learning_rate_init=1e-4)
    return base


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("random_state", [5, None])
def test_an_interrupted_fit_goes_on_to_the_same_bits(
    make: Any, random_state: Any, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    how, path = {**options_of(make), "random_state": random_state}, tmp_path / "fit.ckpt"
    make(**{**how, "max_iter": 3}, checkpoint=path).fit(*digits)  # the state of an interrupted fit
    saved = path.read_bytes()
    resumed = make(**how, checkpoint=path).fit(*digits)
    path.write_bytes(saved)
    again = make(**how, checkpoint=path).fit(*digits)
    assert_same(resumed, again)
    assert resumed.n_iter_ == 8
    if random_state is not None:
        assert_same(resumed, make(**how).fit(*digits))


KILLED = """
import sys, warnings, numpy as np
warnings.simplefilter("ignore")
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from fusedopt.estimators import MLPClassifier
x, y = load_digits(return_X_y=True)
model = MLPClassifier((64,), max_iter=60, batch_size=32, tol=None, dropout=0.2, random_state=3,
                      checkpoint=sys.argv[1], early_stopping=True, n_iter_no_change=1000)
model.fit(x / 16, y)
np.savez(sys.argv[2], *model.coefs_, *model.intercepts_, np.array(model.loss_curve_))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, epochs: int, delay: float) -> bool:
        """Runs to the end, or until SIGKILL shortly after the checkpoint has changed so often; returns whether it
        ended."""
        path = tmp_path / f"{name}.ckpt"
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(tmp_path / f"{name}.npz")]) as process:
            changes, last, now, limit = 0, -1, -1, time.monotonic() + 200
            while process.poll() is None and time.monotonic() < limit:
                with contextlib.suppress(FileNotFoundError):  # the old file is briefly renamed
                    now = path.stat().st_ino
                changes, last = changes + (now != last), now
                if epochs and changes > epochs:
                    time.sleep(delay)
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.0005)
            return process.wait() == 0

    assert run("whole", 0, 0)
    random, kills = np.random.default_rng(0), 0
    while kills < 6 and not run("killed", int(random.integers(1, 5)), float(random.uniform(0, 0.02))):
        kills += 1
    assert kills >= 2
    assert run("killed", 0, 0)
    with np.load(tmp_path / "whole.npz") as want, np.load(tmp_path / "killed.npz") as got:
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def damage(how: str) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))

    def head(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[40] ^= 1
        path.write_bytes(bytes(raw))

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    return {"cut": cut, "flip": flip, "head": head, "empty": empty}[how]


@pytest.mark.parametrize("how", ["cut", "flip", "head", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    how: str, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    options, path = options_of(MLPClassifier), tmp_path / "fit.ckpt"
    MLPClassifier(**{**options, "max_iter": 3}, checkpoint=path).fit(*digits)
    previous = tmp_path / "fit.ckpt.previous"
    assert previous.exists()
    damage(how)(path)
    bad = path.read_bytes()
    with pytest.warns(UserWarning, match=r"fit\.ckpt: .*(damaged|head).*resuming from the previous one"):
        resumed = MLPClassifier(**options, checkpoint=path).fit(*digits)
    assert_same(resumed, MLPClassifier(**options).fit(*digits))
    assert (tmp_path / "fit.ckpt.damaged").read_bytes() == bad

    damage(how)(path)
    damage(how)(previous)
    kept = path.read_bytes(), previous.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint: .*fit\.ckpt.*damaged.*Delete it to start over"):
        MLPClassifier(**options, checkpoint=path).fit(*digits)
    assert (path.read_bytes(), previous.read_bytes()) == kept


def test_a_checkpoint_of_another_fit_is_refused(digits: tuple[Array, Array], tmp_path: Path) -> None:
    x, y = digits
    options, path = options_of(MLPClassifier), tmp_path / "fit.ckpt"
    MLPClassifier(**options, checkpoint=path).fit(x, y)
    kept = path.read_bytes()
    for model, data in (
        (MLPClassifier(**{**options, "alpha": 0.5}, checkpoint=path), (x, y)),
        (MLPClassifier(**options, checkpoint=path), (x + 1e-9, y)),
        (MLPClassifier(**options, checkpoint=path), (x, (y + 1) % 10)),
    ):
        with pytest.raises(ValueError, match="was written by a fit with other settings or other data"):
            model.fit(*data)
    assert path.read_bytes() == kept
    finished = MLPClassifier(**options, checkpoint=path).fit(x, y)  # nothing is left to do
    assert_same(finished, MLPClassifier(**options).fit(x, y))


def shift(by: int) -> Any:
    return lambda batch: np.roll(batch, by, axis=1)


def half(batch: Array) -> Array:
    return batch / 2


class Scaled:
    """A setting with a state, and a text that has an address in it."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, batch: Array) -> Array:
        return batch * self.by


@pytest.mark.parametrize(
    ("name", "value", "same", "other"),
    [
        ("learning_rate", lambda step: 0.01, lambda step: 0.01, lambda step: 0.02),
        ("augment", shift(1), shift(1), shift(2)),
        ("augment", half, half, lambda batch: batch),
        ("augment", Scaled(0.5), Scaled(0.5), Scaled(0.25)),
        ("augment", functools.partial(np.roll, shift=1), functools.partial(np.roll, shift=1), np.copy),
        ("solver", lambda p: fusedopt.Adam(p, lr=0.1), lambda p: fusedopt.Adam(p, lr=0.1), lambda p: fusedopt.SGD(p)),
        ("random_state", np.random.RandomState(1), np.random.RandomState(1), np.random.RandomState(2)),
        ("learning_rate", fusedopt.schedules.Cosine(0.1, 99), fusedopt.schedules.Cosine(0.1, 99), lambda step: 0.1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_function_or_generator_is_refused(
    digits: tuple[Array, Array], tmp_path: Path, name: str, value: Any, same: Any, other: Any
) -> None:
    x, y = digits[0][:200], digits[1][:200]
    options: dict[str, Any] = {"max_iter": 1, "tol": None, "random_state": 0, "checkpoint": tmp_path / "fit.ckpt"}
    MLPClassifier((4,), **{**options, name: value}).fit(x, y)
    kept = (tmp_path / "fit.ckpt").read_bytes()
    with pytest.raises(ValueError, match=f"another {name}|other settings"):
        MLPClassifier((4,), **{**options, name: other}).fit(x, y)
    assert (tmp_path / "fit.ckpt").read_bytes() == kept
    MLPClassifier((4,), **{**options, name: same}).fit(x, y)  # nothing is left to do
    assert (tmp_path / "fit.ckpt").read_bytes() == kept


def test_a_function_is_known_again_in_another_process(digits: tuple[Array, Array], tmp_path: Path) -> None:
    program = """
import sys
import numpy as np
from fusedopt.estimators import MLPRegressor
model = MLPRegressor("huber", (3,), learning_rate=lambda t: 0.1 / (t + 1), augment=lambda b: b * ("x" in {"x", "y"}),
                     max_iter=int(sys.argv[2]), tol=None, random_state=np.random.RandomState(3), checkpoint=sys.argv[1])
print(model.fit(np.eye(6), np.arange(6.0)).n_iter_)
"""
    for epochs, seed in (("2", "1"), ("4", "2")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "fit.ckpt"), epochs], capture_output=True, text=True,
            timeout=120, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.strip() == epochs


def test_a_write_that_fails_leaves_the_checkpoint(
    digits: tuple[Array, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, path = options_of(MLPClassifier), tmp_path / "fit.ckpt"
    MLPClassifier(**{**options, "max_iter": 3}, checkpoint=path).fit(*digits)
    kept = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"fit\.ckpt cannot be written: No space left on device; [\d,]+ bytes are free"):
        MLPClassifier(**options, checkpoint=path).fit(*digits)
    monkeypatch.undo()
    assert path.read_bytes() == kept
    assert list(tmp_path.glob("*.writing")) == []
    assert_same(MLPClassifier(**options, checkpoint=path).fit(*digits), MLPClassifier(**options).fit(*digits))


# ---- validation data, callbacks, several targets, batches of another dtype


@pytest.mark.parametrize("make", ALL)
def test_validation_data_are_scored_every_epoch_and_change_nothing(make: Any, digits: tuple[Array, Array]) -> None:
    x, y = digits
    options = {"max_iter": 4, "tol": None, "random_state": 0}
    model = make(**options).fit(x[:300], y[:300], validation_data=(x[300:500], y[300:500]))
    plain = make(**options).fit(x[:300], y[:300])
    for a, b in zip(params(model), params(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.loss_curve_ == plain.loss_curve_
    assert len(model.history_["score"]) == 4
    assert model.history_["score"][-1] == pytest.approx(model.score(x[300:500], y[300:500]))
    weight = np.arange(200) % 2
    weighted = make(**options).fit(x[:300], y[:300], validation_data=(x[300:500], y[300:500], weight))
    assert weighted.history_["score"][-1] == pytest.approx(model.score(x[300:500][1::2], y[300:500][1::2]))


@pytest.mark.parametrize("make", ALL)
def test_early_stopping_listens_to_validation_data(make: Any, digits: tuple[Array, Array]) -> None:
    x, y = digits
    options = {"max_iter": 300, "early_stopping": True, "n_iter_no_change": 3, "tol": 1e-3, "random_state": 0}
    options |= {"batch_size": 20, "momentum": 0.0}
    model = make(**options).fit(x[:300], y[:300], validation_data=(x[300:500], y[300:500]))
    scores = model.history_["score"]
    assert len(scores) < 300
    assert model.score(x[300:500], y[300:500]) == pytest.approx(scores.max())
    whole = make(**{**options, "early_stopping": False, "max_iter": len(scores), "tol": None}).fit(x[:300], y[:300])
    assert whole.loss_curve_ == model.loss_curve_  # no row is held out


@pytest.mark.parametrize("make", ALL)
def test_callbacks_are_told_every_epoch_and_may_end_the_fit(
    make: Any, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    x, y = digits[0][:200], digits[1][:200]
    rows: list[dict[str, float]] = []
    options = {"max_iter": 6, "tol": None, "random_state": 0, "checkpoint": tmp_path / "fit.ckpt"}

    def stop(row: dict[str, float]) -> bool:
        rows.append(row)
        return row["epoch"] == 3

    model = make(**options).fit(x, y, callbacks=[stop, lambda row: None])
    assert model.n_iter_ == 3
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == model.loss_curve_
    assert make(**options).fit(x, y).n_iter_ == 3  # it has ended
    assert make(**{**options, "checkpoint": None}).fit(x, y).n_iter_ == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"validation_data": [1, 2]}, TypeError, "validation_data: expected a tuple"),
        ({"validation_data": (np.ones((2, 3)), [0, 1])}, ValueError, "3 features"),
        ({"validation_data": (np.ones((2, 64)), [0, 11])}, ValueError, "validation_data: expected classes of"),
        ({"validation_data": (np.ones((2, 64)), [0])}, ValueError, "inconsistent numbers of samples"),
        ({"callbacks": [3]}, TypeError, "callbacks: expected functions"),
    ],
)
@pytest.mark.parametrize("make", [MLPClassifier, LinearClassifier])
def test_wrong_validation_data_and_callbacks_are_refused(
    make: Any, arguments: dict[str, Any], error: Any, message: str, digits: tuple[Array, Array]
) -> None:
    with pytest.raises(error, match=message):
        make().fit(*digits, **arguments)
    if "callbacks" not in arguments:
        return
    with pytest.raises(ValueError, match="has no epochs"):
        MLPClassifier(solver="lbfgs").fit(*digits, callbacks=[print])


def test_a_linear_regressor_has_several_targets() -> None:
    x = np.random.default_rng(0).standard_normal((300, 4))
    y = x @ np.arange(12.0).reshape(4, 3) + [1, 2, 3]
    for solver in ("sgd", "lbfgs"):
        options = {"alpha": 0.0, "solver": solver, "tol": 1e-8, "max_iter": 3000, "random_state": 0}
        model = LinearRegressor(**options).fit(x, y)
        assert (model.coef_.shape, model.intercept_.shape, model.predict(x).shape) == ((3, 4), (3,), (300, 3))
        np.testing.assert_allclose(model.coef_, np.arange(12.0).reshape(4, 3).T, atol=1e-2)
        np.testing.assert_allclose(model.intercept_, [1, 2, 3], atol=1e-2)
        assert model.score(x, y) > 0.9999
        alone = LinearRegressor(**options).fit(x, y[:, 1])
        assert alone.coef_.shape == (4,)
        np.testing.assert_allclose(alone.coef_, model.coef_[1], atol=1e-2)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("first", "later"), [(np.float64, np.float32), (np.float32, np.float64)])
def test_later_batches_may_have_another_dtype(make: Any, first: Any, later: Any, digits: tuple[Array, Array]) -> None:
    x, y = digits
    classes = {"classes": np.arange(10)} if "Classifier" in make.__name__ else {}
    model, same = make(random_state=0), make(random_state=0)
    for one, dtypes in ((model, (first, later)), (same, (first, first))):
        one.partial_fit(x[:50].astype(dtypes[0]), y[:50], **classes)
        one.partial_fit(x[50:57].astype(np.float32).astype(dtypes[1]), y[50:57])
        one.partial_fit(x[57:58].astype(np.float32).astype(dtypes[1]), y[57:58])
    if first == np.float64:
        same.partial_fit(x[58:60], y[58:60])
        model.partial_fit(x[58:60], y[58:60])
    assert model._fitted.net.dtype == first
    assert_same(model, same)
    warm = make(random_state=0, warm_start=True, max_iter=2, tol=None).fit(x.astype(first), y)
    assert warm.fit(x.astype(later), y)._fitted.net.dtype == first


LINEAR_SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_size": 50, "penalty": "elasticnet", "alpha": 0.01},
    {"batch_size": 7, "shuffle": False, "momentum": 0.0, "penalty": None},
    {"batch_size": 33, "average": True},
    {"batch_size": 33, "average": 40, "fit_intercept": False},
    {"batch_size": 64, "ema_decay": 0.9, "max_grad_norm": 0.1},
    {"batch_size": 64, "solver": "nadam", "learning_rate": lambda step: 0.01 / (1 + step)},
    {"batch_size": 64, "solver": "adamw", "learning_rate": "adaptive", "l1": 0.01},
    {"batch_size": 64, "solver": lambda params: fusedopt.Adam(params, lr=lambda step: 0.1 / (1 + step))},
    {"batch_size": "full", "early_stopping": True},
]


@pytest.mark.parametrize("settings", LINEAR_SETTINGS, ids=lambda settings: ",".join(settings) or "defaults")
@pytest.mark.parametrize("make", [LinearClassifier, LinearRegressor])
def test_an_epoch_in_the_core_trains_as_one_step_after_another(
    make: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products are rounded differently, so the last bits are not the same."""
    x, y = load_wine(return_X_y=True) if make is LinearClassifier else load_diabetes(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    if callable(settings.get("solver")):
        settings = {**settings, "learning_rate": "constant"}
    weight = np.where(np.arange(len(x)) % 3, 1.0, 2.5)
    weight[:7] = 0
    for sample_weight in (None, weight):
        fits = {}
        for small in (0, 10**9):
            monkeypatch.setattr("fusedopt.estimators._fit.SMALL_BATCH", small)
            model = make(random_state=0, max_iter=7, tol=None, **settings).fit(x, y, sample_weight=sample_weight)
            if not model.early_stopping:
                model.partial_fit(x[:90], y[:90])
            fits[small] = model
        stepwise, core = fits.values()
        np.testing.assert_allclose(core.coef_, stepwise.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(core.intercept_, stepwise.intercept_, rtol=1e-7, atol=1e-9)
        assert core.history_.keys() == stepwise.history_.keys()
        for name in core.history_.keys() - {"seconds"}:
            np.testing.assert_allclose(core.history_[name], stepwise.history_[name], rtol=1e-7)
        ours, theirs = (m._fitted.opt.state_dict() for m in (core, stepwise))
        assert ours.keys() == theirs.keys()
        assert ours["state.0.step"] == theirs["state.0.step"] > 0
        monkeypatch.setattr("fusedopt.estimators._fit.SMALL_BATCH", 10**9)
        for index in (np.int32, np.int64):
            rows = scipy.sparse.csr_array(np.where(np.abs(x) < 0.5, 0, x))
            rows.indices, rows.indptr = rows.indices.astype(index), rows.indptr.astype(index)
            sparse, dense = (
                make(random_state=0, max_iter=3, tol=None, **settings).fit(part, y, sample_weight=sample_weight)
                for part in (rows, rows.toarray())
            )
            for ours, theirs in zip(
                params(sparse), params(dense), strict=True
            ):  # the initial rates are not the same bits
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_epoch_in_the_core_is_what_small_linear_models_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a step from Python")

    monkeypatch.setattr("fusedopt.estimators._fit.Fit._one_step", refuse)
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    for settings in LINEAR_SETTINGS[:7]:
        LinearClassifier(max_iter=2, **settings).fit(x, y)
        LinearRegressor(max_iter=2, **settings).fit(x.astype(np.float32), y)
    with pytest.raises(AssertionError, match="a step from Python"):
        LinearClassifier(max_iter=2, augment=Noise(0.1)).fit(x, y)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_small_linear_models_have_the_same_bits_on_every_processor(dtype: Any) -> None:
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x).astype(dtype)

    def fitted() -> list[bytes]:
        model = LinearClassifier("log_loss", penalty="elasticnet", random_state=0, max_iter=5, average=True).fit(x, y)
        return [model.coef_.tobytes(), model.intercept_.tobytes(), model.history_["loss"].tobytes()]

    with engine("baseline", 1):
        want = fitted()
    for isa in fusedopt.isas():
        for threads in (1, 3):
            with engine(isa, threads):
                assert fitted() == want


@pytest.mark.parametrize("batch_size", ["auto", 20])
def test_a_linear_fit_that_diverges_says_at_which_step(batch_size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = load_diabetes(return_X_y=True)
    messages = []
    for small in (0, 10**9):
        monkeypatch.setattr("fusedopt.estimators._fit.SMALL_BATCH", small)
        model = LinearRegressor(learning_rate=lambda step: 1.0 if step < 30 else 1e200, batch_size=batch_size)
        with pytest.raises(
            ValueError, match=r"the loss is (inf|nan) at step 3\d \(epoch \d\): the fit diverges"
        ) as error:
            model.fit(x, y)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_schedule_that_returns_no_learning_rate_is_refused(digits: tuple[Array, Array]) -> None:
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="lr"):
            LinearClassifier(learning_rate=lambda step, rate=rate: rate).fit(digits[0][:, :20].copy(), digits[1] > 4)


def test_small_tables_are_trained_in_small_batches() -> None:
    for n, size in ((10, 10), (64, 64), (65, 16), (640, 20), (6400, 200), (10**6, 200)):
        assert LinearRegressor()._batch_size(n) == LinearClassifier()._batch_size(n) == size
    assert LinearClassifier("perceptron")._batch_size(640) == 200
