"""Estimators: scikit-learn's own checks, fits equal to scikit-learn's, settings, and what is refused. Gradients of
networks are checked against finite differences. Stopping, checkpoints and copies: test_estimators_fit.py."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import fusedopt

pytest.importorskip("sklearn")

from sklearn import linear_model, neural_network
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_multilabel_classification
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import estimator_checks_generator

from fusedopt import estimators
from fusedopt.estimators import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor
from fusedopt.estimators._network import ElementLoss, Network, softmax_loss
from fusedopt.rules import RULES

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


@pytest.fixture(scope="module")
def diabetes() -> tuple[Array, Array]:
    x, y = load_diabetes(return_X_y=True)
    return scale(x), y / 100


# ---- scikit-learn's own checks


CHECKED = [
    MLPClassifier(),
    MLPRegressor(),
    LinearClassifier(),
    LinearClassifier("log_loss"),
    LinearRegressor(),
    LinearRegressor("huber", solver="adam", learning_rate="constant", eta0=0.1),
]
CHECKS = [(e, check) for model in CHECKED for e, check in estimator_checks_generator(model)]


@pytest.mark.parametrize(
    ("model", "check"), CHECKS, ids=[f"{e}-{getattr(c, 'func', c).__name__}-{i}" for i, (e, c) in enumerate(CHECKS)]
)
def test_scikit_learns_checks_pass(model: Any, check: Callable[[Any], None]) -> None:
    from sklearn.exceptions import SkipTestWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("ignore", SkipTestWarning)
        try:
            check(model)
        except Exception as error:
            if type(error).__name__ != "SkipTest":
                raise
            pytest.skip(str(error))


# ---- the same fits


SAME: list[dict[str, Any]] = [
    {"learning_rate_init": 0.1},
    {"activation": "tanh", "nesterovs_momentum": False},
    {"activation": "logistic", "momentum": 0.0, "batch_size": 50, "alpha": 0.1},
    {"activation": "identity", "shuffle": False},
    {"early_stopping": True, "n_iter_no_change": 3, "learning_rate_init": 0.1},
]


@pytest.mark.parametrize("options", SAME, ids=str)
def test_a_network_is_fitted_as_scikit_learn_fits_it(options: dict[str, Any], digits: tuple[Array, Array]) -> None:
    x, y = digits
    weight = None if options.get("early_stopping") else 1.0 + np.arange(len(y)) % 3
    settings: dict[str, Any] = {"solver": "sgd", "max_iter": 8, "random_state": 3, **options}
    ours = MLPClassifier((30, 20), **settings).fit(x, y, sample_weight=weight)
    theirs = neural_network.MLPClassifier((30, 20), **settings).fit(x, y, sample_weight=weight)
    for mine, his in zip([*ours.coefs_, *ours.intercepts_], [*theirs.coefs_, *theirs.intercepts_], strict=True):
        np.testing.assert_allclose(mine, his, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.predict_log_proba(x), theirs.predict_log_proba(x), rtol=1e-6, atol=1e-9)
    names = ["n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_", "validation_scores_"]
    for name in names:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
    if weight is None:
        np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)
        assert ours.loss_ == pytest.approx(theirs.loss_)


def test_a_network_with_adam_ends_where_scikit_learns_does(digits: tuple[Array, Array]) -> None:
    """Not bit for bit: eps enters differently."""
    x, y = digits
    x = x[:, x.std(0) > 0.1]  # eps decides the steps of pixels that are always 0
    ours = MLPClassifier((30,), max_iter=20, random_state=3).fit(x, y)
    theirs = neural_network.MLPClassifier((30,), max_iter=20, random_state=3).fit(x, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=5e-3)
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.99


@pytest.mark.parametrize("loss", ["squared_error", "poisson"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regression_is_fitted_as_scikit_learn_fits_it(loss: str, outputs: int, diabetes: tuple[Array, Array]) -> None:
    x, y = diabetes
    y = y if outputs == 1 else np.c_[y, y**2]
    settings: dict[str, Any] = {"solver": "sgd", "max_iter": 10, "random_state": 1}
    ours = MLPRegressor(loss, (20,), **settings).fit(x, y)
    theirs = neural_network.MLPRegressor(loss, (20,), **settings).fit(x, y)
    assert ours.predict(x).shape == theirs.predict(x).shape
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-9)
    if loss == "squared_error":
        np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)


def test_lbfgs_ends_where_scikit_learns_does(digits: tuple[Array, Array]) -> None:
    x, y = digits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = MLPClassifier((15,), solver="lbfgs", max_iter=15, random_state=0).fit(x, y)
        theirs = neural_network.MLPClassifier((15,), solver="lbfgs", max_iter=15, random_state=0).fit(x, y)
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=1e-6)
    with pytest.raises(AttributeError, match="partial_fit"):
        _ = ours.partial_fit


def test_several_labels_at_once() -> None:
    x, y = make_multilabel_classification(300, random_state=0)
    settings: dict[str, Any] = {"solver": "sgd", "max_iter": 10, "random_state": 1, "learning_rate_init": 0.05}
    ours = MLPClassifier((20,), **settings).fit(x, y)
    theirs = neural_network.MLPClassifier((20,), **settings).fit(x, y)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (MLPClassifier, neural_network.MLPClassifier),
        (MLPRegressor, neural_network.MLPRegressor),
        (LinearClassifier, linear_model.SGDClassifier),
        (LinearRegressor, linear_model.SGDRegressor),
    ],
)
def test_arguments_and_defaults_are_scikit_learns(ours: Any, theirs: Any) -> None:
    mine, his = ours().get_params(), theirs().get_params()
    if (
        theirs is linear_model.SGDClassifier and his["eta0"] == 0.0
    ):  # before scikit-learn 1.8; rates that use it refuse it
        his["eta0"] = linear_model.SGDRegressor().eta0
    assert {k: mine.get(k, "missing") for k in his} == his


@pytest.mark.parametrize("loss", ["hinge", "log_loss", "squared_hinge", "modified_huber", "perceptron"])
def test_a_linear_classifier_is_as_good_as_scikit_learns(loss: str, digits: tuple[Array, Array]) -> None:
    for x, y in (load_breast_cancer(return_X_y=True), digits):
        x = scale(x) if x.max() > 1 else x
        train, test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
        ours = LinearClassifier(loss, random_state=0).fit(train, y_train)
        theirs = linear_model.SGDClassifier(loss, random_state=0).fit(train, y_train)
        assert ours.score(test, y_test) >= theirs.score(test, y_test) - 0.015
        assert ours.coef_.shape == theirs.coef_.shape
        assert ours.intercept_.shape == theirs.intercept_.shape
        assert ours.decision_function(test).shape == theirs.decision_function(test).shape
        if loss in ("log_loss", "modified_huber"):
            np.testing.assert_allclose(ours.predict_proba(test).sum(1), 1)
        else:
            assert not hasattr(ours, "predict_proba")


def test_logistic_regression_comes_to_the_minimum(digits: tuple[Array, Array]) -> None:
    """Full-batch gradient descent, run to convergence, against the exact solver."""
    x, y = load_breast_cancer(return_X_y=True)
    x, n = scale(x), len(y)
    exact = linear_model.LogisticRegression(C=1 / (0.01 * n), tol=1e-10, max_iter=10_000).fit(x, y)
    ours = LinearClassifier(
        "log_loss", alpha=0.01, batch_size="full", tol=None, max_iter=3000, random_state=0, learning_rate="constant",
        eta0=0.5,
    ).fit(x, y)  # fmt: skip
    np.testing.assert_allclose(ours.coef_, exact.coef_, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.intercept_, exact.intercept_, rtol=1e-3, atol=2e-3)


def test_linear_regression_comes_to_least_squares(diabetes: tuple[Array, Array]) -> None:
    x, y = diabetes
    exact = linear_model.Ridge(alpha=0.1 * len(y)).fit(x, y)
    ours = LinearRegressor(
        alpha=0.1, batch_size="full", tol=None, max_iter=3000, learning_rate="constant", eta0=0.05
    ).fit(x, y)
    np.testing.assert_allclose(ours.coef_, exact.coef_, rtol=1e-6, atol=1e-9)
    assert ours.intercept_ == pytest.approx(exact.intercept_)


def test_an_l1_penalty_gives_zeros_where_lasso_has_them(diabetes: tuple[Array, Array]) -> None:
    x, y = diabetes
    lasso = linear_model.Lasso(alpha=0.1, tol=1e-10).fit(x, y)
    how: dict[str, Any] = {
        "batch_size": "full",
        "tol": None,
        "max_iter": 3000,
        "learning_rate": "constant",
        "eta0": 0.05,
    }
    for settings in ({"penalty": "l1", "alpha": 0.1}, {"penalty": None, "l1": 0.1}):
        ours = LinearRegressor(**how, **settings).fit(x, y)
        np.testing.assert_array_equal(ours.coef_ == 0, lasso.coef_ == 0)
        np.testing.assert_allclose(ours.coef_, lasso.coef_, rtol=1e-5, atol=1e-7)
    assert 0 < (lasso.coef_ == 0).sum() < 10


# ---- the network's gradient


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "logistic", "gelu"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_of_a_network_is_its_slope(activation: str, batch_norm: bool, dropout: float) -> None:
    rng = np.random.default_rng(0)
    net = Network([5, 7, 6, 3], activation, np.float64, batch_norm, dropout)
    net.initialize(np.random.RandomState(0))
    for b in net.biases:
        b += rng.standard_normal(b.shape) * 0.1
    x, y, weight = rng.standard_normal((11, 5)), rng.integers(0, 3, 11), rng.random(11)
    loss = softmax_loss()

    def value() -> float:
        return net.loss_and_gradient(x, y, weight, loss, 0.3, seed=5, step=2) * 0.3

    value()
    gradient = net.grads.copy()
    assert abs(gradient).max() > 1e-3
    for i in range(net.params.size):
        kept, h = net.params[i], 1e-6
        net.params[i] = kept + h
        up = value()
        net.params[i] = kept - h
        down = value()
        net.params[i] = kept
        assert gradient[i] == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-7), i


def test_running_statistics_follow_the_batch_as_torchs_do() -> None:
    x = np.random.default_rng(0).standard_normal((6, 4))
    net = Network([4, 3, 1], "relu", np.float64, batch_norm=True)
    net.initialize(np.random.RandomState(0))
    z = x @ net.weights[0]
    net.loss_and_gradient(x, np.zeros((6, 1)), None, ElementLoss("mse"), 1.0)
    np.testing.assert_allclose(net.means[0], 0.1 * z.mean(0))
    np.testing.assert_allclose(net.variances[0], 0.9 + 0.1 * z.var(0, ddof=1))


def test_a_network_steps_without_new_arrays() -> None:
    import tracemalloc

    net = Network([200, 300, 10], "relu", np.float32, dropout=0.5)
    net.initialize(np.random.RandomState(0))
    x, y = np.ones((64, 200), np.float32), np.zeros(64, np.int64)
    loss = softmax_loss()
    net.loss_and_gradient(x, y, None, loss, 1.0)
    tracemalloc.start()
    for _ in range(5):
        net.loss_and_gradient(x, y, None, loss, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000  # the smallest of the arrays has 64 x 10 x 4 bytes, the others from 76,800


# ---- beyond scikit-learn


@pytest.mark.parametrize("rule", [name.lower() for name in RULES])
def test_every_rule_fits(rule: str, digits: tuple[Array, Array]) -> None:
    x, y = digits
    rate = {"sgd": 0.1, "adagrad": 0.05, "adadelta": 1.0, "lion": 1e-3, "rmsprop": 5e-3}.get(rule, 5e-3)
    model = MLPClassifier((40,), solver=rule, learning_rate_init=rate, batch_size=32, max_iter=8, random_state=0)
    assert model.fit(x, y).score(x, y) > 0.93
    how: dict[str, Any] = {"learning_rate": "constant", "eta0": rate, "batch_size": 32, "max_iter": 8}
    linear = LinearClassifier("log_loss", solver=rule, random_state=0, **how)
    assert linear.fit(x, y).score(x, y) > 0.7


def test_a_function_makes_the_optimizer(digits: tuple[Array, Array]) -> None:
    x, y = digits
    made: list[Any] = []

    def factory(params: Any) -> Any:
        made.append(fusedopt.Lion(params, lr=3e-3))
        return made[-1]

    model = MLPClassifier((40,), solver=factory, max_iter=10, random_state=0).fit(x, y)
    assert isinstance(made[0], fusedopt.Lion)
    assert model.history_["lr"][0] == 3e-3
    assert model.score(x, y) > 0.93
    with pytest.raises(TypeError, match="solver: expected a function that returns an optimizer of fusedopt"):
        MLPClassifier(solver=lambda params: None).fit(x, y)
    with pytest.raises(ValueError, match="solver: expected an optimizer over exactly the array passed to the function"):
        MLPClassifier(solver=lambda params: fusedopt.SGD(params.copy())).fit(x, y)


def test_a_schedule_sets_the_rate_of_every_step(digits: tuple[Array, Array]) -> None:
    x, y = digits
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 / (1 + step)

    model = MLPClassifier((10,), solver="sgd", learning_rate=schedule, batch_size=600, max_iter=4, random_state=0)
    model.fit(x, y)
    assert asked == list(range(12))
    np.testing.assert_allclose(model.history_["lr"], [0.1 / (1 + s) for s in (2, 5, 8, 11)])
    adam = MLPClassifier((10,), learning_rate=schedule, batch_size=600, max_iter=2, random_state=0).fit(x, y)
    np.testing.assert_allclose(adam.history_["lr"], [0.1 / 3, 0.1 / 6])


class Plateau:
    """A schedule that observes a metric, as fusedopt.schedules.ReduceOnPlateau does."""

    def __init__(self, mode: str = "min") -> None:
        self.mode, self.seen, self.value = mode, [], 0.01

    def __call__(self, step: int) -> float:
        return float(self.value)

    def observe(self, metric: float) -> None:
        self.seen.append(metric)
        self.value /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.value = state["seen"], state["value"]


def test_a_schedule_that_listens_is_told_loss_or_score(digits: tuple[Array, Array]) -> None:
    x, y = digits
    given = Plateau()
    model = MLPClassifier((10,), learning_rate=given, max_iter=3, random_state=0).fit(x, y)
    np.testing.assert_allclose(model.history_["lr"], [0.01, 0.005, 0.0025])
    assert given.seen == []  # an estimator's parameter is not modified
    assert model._fitted.rate.how.seen == model.loss_curve_
    model = MLPClassifier((10,), learning_rate=Plateau("max"), max_iter=3, early_stopping=True, random_state=0).fit(
        x, y
    )
    assert model._fitted.rate.how.seen == model.validation_scores_
    with pytest.raises(ValueError, match="needs the validation score: set early_stopping=True"):
        MLPClassifier((10,), learning_rate=Plateau("max"), max_iter=3).fit(x, y)


def test_batch_normalisation_is_folded_into_the_weights(digits: tuple[Array, Array]) -> None:
    x, y = digits
    for activation in ("relu", "gelu"):
        model = MLPClassifier((30, 20), activation, batch_norm=True, batch_size=64, max_iter=15, random_state=0).fit(
            x, y
        )
        assert model.score(x, y) > 0.97
        net = model._fitted.net
        h = x
        for k in range(3):
            z = h @ net.weights[k]
            if k == 2:
                z = z + net.biases[k]
                break
            z = (z - net.means[k]) / np.sqrt(net.variances[k] + 1e-5) * net.gains[k] + net.biases[k]
            from scipy.special import ndtr

            h = np.maximum(z, 0) if activation == "relu" else z * ndtr(z)
        p = np.exp(z - z.max(1, keepdims=True))
        np.testing.assert_allclose(model.predict_proba(x), p / p.sum(1, keepdims=True), rtol=1e-7, atol=1e-12)


def test_dropout_l1_clipping_ema_and_average_do_what_they_say(digits: tuple[Array, Array]) -> None:
    x, y = digits
    how: dict[str, Any] = {"max_iter": 12, "batch_size": 64, "random_state": 0}
    plain = MLPClassifier((60,), **how).fit(x, y)
    dropped = MLPClassifier((60,), dropout=0.5, **how).fit(x, y)
    assert dropped.loss_ > 2 * plain.loss_  # while training; predictions use all
    assert dropped.score(x, y) > 0.9
    small = MLPClassifier((60,), l1=0.05, **how).fit(x, y)
    assert abs(small.coefs_[0]).sum() < 0.7 * abs(plain.coefs_[0]).sum()
    clipped = MLPClassifier((60,), max_grad_norm=0.01, solver="sgd", momentum=0, learning_rate_init=1.0, **how).fit(
        x, y
    )
    assert (clipped.history_["grad_norm"] > 0.01).all()
    free = MLPClassifier((60,), solver="sgd", momentum=0, learning_rate_init=1.0, **how).fit(x, y)
    assert clipped.loss_curve_[0] > 1.5 * free.loss_curve_[0]
    ema = MLPClassifier((60,), ema_decay=0.99, **how).fit(x, y)
    assert not np.array_equal(ema.coefs_[0], ema._fitted.net.weights[0])
    assert ema.loss_ == plain.loss_  # the same trajectory, predictions from another point of it
    assert ema.score(x, y) > 0.92
    mean = LinearClassifier("log_loss", average=True, random_state=0, max_iter=20).fit(x, y)
    assert not np.allclose(mean.coef_, mean._fitted.net.weights[0].T)
    assert mean.score(x, y) > 0.93


def test_ema_is_the_mean_it_says(digits: tuple[Array, Array]) -> None:
    x, y = digits
    seen: list[Array] = []

    class Watched(fusedopt.SGD):
        def step(self, grads: Any) -> None:
            super().step(grads)
            seen.append(self.param_groups[0]["params"][0].copy())

    model = MLPClassifier((5,), solver=lambda p: Watched(p, lr=0.1), ema_decay=0.8, max_iter=3, batch_size=600).fit(
        x, y
    )
    want = seen[0]
    for t, p in enumerate(seen[1:], start=2):
        decay = min(0.8, t / (t + 9))
        want = decay * want + (1 - decay) * p
    np.testing.assert_allclose(model._fitted.in_force, want, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 50, "full"])
def test_batches_of_every_size(size: Any, digits: tuple[Array, Array]) -> None:
    x, y = digits[0][:200], digits[1][:200]
    model = LinearClassifier("log_loss", batch_size=size, max_iter=30, tol=None, random_state=0).fit(x, y)
    assert model.score(x, y) > 0.9
    assert model._fitted.step == 30 * -(-200 // (200 if size == "full" else size))


def test_sparse_rows_give_what_dense_ones_give(digits: tuple[Array, Array]) -> None:
    x, y = digits
    for model in (
        LinearClassifier("hinge", max_iter=5, random_state=0),
        LinearRegressor(max_iter=5, random_state=0),
        MLPClassifier((10,), max_iter=5, random_state=0, early_stopping=True),
    ):
        dense = model.fit(x, y).predict(x)
        for sparse in (scipy.sparse.csr_matrix(x), scipy.sparse.csr_array(x), scipy.sparse.csc_matrix(x)):
            np.testing.assert_allclose(model.fit(sparse, y).predict(sparse), dense, rtol=1e-8)


def test_class_weights_move_the_border() -> None:
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(0, 1, (400, 2)), rng.normal(1, 1, (40, 2))]
    y = np.repeat(["many", "few"], [400, 40])
    for make in (lambda **k: LinearClassifier("log_loss", **k), lambda **k: MLPClassifier((8,), max_iter=100, **k)):
        plain, even = (make(random_state=0, class_weight=w).fit(x, y) for w in (None, "balanced"))
        by_hand = make(random_state=0, class_weight={"few": 5.5, "many": 0.55}).fit(x, y)
        found = [(m.predict(x[400:]) == "few").mean() for m in (plain, even)]
        assert found[1] > found[0] + 0.2
        np.testing.assert_allclose(even.predict_proba(x), by_hand.predict_proba(x), rtol=1e-6)


def test_float32_stays_float32(digits: tuple[Array, Array]) -> None:
    x, y = digits[0].astype(np.float32), digits[1]
    model = MLPClassifier((20,), max_iter=5, random_state=0).fit(x, y)
    assert {c.dtype for c in [*model.coefs_, *model.intercepts_]} == {np.dtype(np.float32)}
    assert model.predict_proba(x).dtype == np.float32
    assert LinearRegressor(max_iter=3).fit(x, y).predict(x).dtype == np.float32


def test_they_work_in_pipelines_and_searches(digits: tuple[Array, Array]) -> None:
    x, y = digits[0][:400], digits[1][:400]
    pipe = make_pipeline(StandardScaler(), MLPClassifier((20,), max_iter=15, learning_rate_init=0.01, random_state=0))
    assert cross_val_score(pipe, x, y, cv=3).mean() > 0.8
    grid = {"mlpclassifier__solver": ["adam", "sgd"], "mlpclassifier__dropout": [0.0, 0.2]}
    search = GridSearchCV(pipe, grid, cv=2).fit(x, y)
    assert search.best_score_ > 0.7
    assert len(search.cv_results_["params"]) == 4


# ---- augmentation


SHAPE = (8, 8)
CHANGES = [
    estimators.Shift(SHAPE, 1),
    estimators.Flip(SHAPE),
    estimators.Rotate(SHAPE, 15),
    estimators.Noise(0.05),
    estimators.Compose(estimators.Shift(SHAPE, 1), estimators.Noise(0.05)),
]


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_a_change_of_images_is_drawn_anew_and_repeatable(change: Any, digits: tuple[Array, Array]) -> None:
    batch = digits[0][:40].astype(np.float32)
    kept = batch.copy()
    random = np.random.RandomState(0)
    one, two = change(batch, random), change(batch, random)
    assert one.shape == batch.shape
    assert one.dtype == batch.dtype
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(batch, kept)
    np.testing.assert_array_equal(change(batch, np.random.RandomState(0)), one)
    model = MLPClassifier((60,), augment=change, batch_size=32, max_iter=10, random_state=0).fit(*digits)
    assert model.score(*digits) > 0.8


def test_shift_and_flip_move_whole_pixels() -> None:
    image = np.arange(12.0).reshape(1, 12)
    moved = {tuple(estimators.Shift((3, 4), 1)(image, np.random.RandomState(s))[0]) for s in range(40)}
    assert len(moved) == 9
    assert tuple(image[0]) in moved
    assert (0, 0, 0, 0, 0, 0, 1, 2, 0, 4, 5, 6) in moved
    flipped = estimators.Flip((3, 4), probability=1.0)(image, np.random.RandomState(0))
    assert flipped.reshape(3, 4).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]


def test_a_plain_function_of_a_batch_augments(digits: tuple[Array, Array]) -> None:
    seen: list[tuple[int, ...]] = []

    def double(batch: Array) -> Array:
        seen.append(batch.shape)
        return batch * 2

    MLPClassifier((5,), augment=double, max_iter=1, batch_size=1000, random_state=0).fit(*digits)
    assert seen == [(1000, 64), (797, 64)]
    with pytest.raises(ValueError, match=r"augment: expected a batch of shape \(200, 64\), got \(100, 64\)"):
        MLPClassifier((5,), augment=lambda b: b[:100], max_iter=1).fit(*digits)


# ---- bad input


X, Y = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 3
BAD: list[tuple[str, Callable[[], Any]]] = [
    ("hidden_layer_sizes must be > 0, got [0]", lambda: MLPClassifier(0)),
    (
        "activation: expected one of identity, relu, tanh, logistic, gelu, got 'elu'",
        lambda: MLPClassifier(activation="elu"),
    ),
    ("solver: expected one of sgd, adagrad,", lambda: MLPClassifier(solver="newton")),
    ("solver: expected one of", lambda: LinearClassifier(solver="newton")),
    (
        "learning_rate: expected one of constant, invscaling, adaptive, got 'best'",
        lambda: MLPClassifier(learning_rate="best"),
    ),
    ("learning_rate_init: expected a number in (0, inf), got 0", lambda: MLPClassifier(learning_rate_init=0)),
    ("alpha: expected a number in [0, inf), got -1", lambda: MLPClassifier(alpha=-1)),
    ("batch_size: expected an integer in [1, inf), got 0", lambda: MLPClassifier(batch_size=0)),
    ("batch_size: expected an integer >= 1, 'auto' or 'full', got 'all'", lambda: MLPClassifier(batch_size="all")),
    ("max_iter: expected an integer in [1, inf), got 1.5", lambda: MLPClassifier(max_iter=1.5)),  # type: ignore[arg-type]
    ("dropout: expected a number in [0, 1), got 1.0", lambda: MLPClassifier(dropout=1.0)),
    ("ema_decay: expected a number in [0, 1) or None, got 1", lambda: MLPClassifier(ema_decay=1)),
    ("max_grad_norm: expected a number in (0, inf) or None, got 0", lambda: MLPClassifier(max_grad_norm=0)),
    ("validation_fraction: expected a number in (0, 1), got 1", lambda: MLPClassifier(validation_fraction=1)),
    ("shuffle: expected True or False, got 1", lambda: MLPClassifier(shuffle=1)),  # type: ignore[arg-type]
    ("augment: expected a function of a batch, or None, got 'shift'", lambda: MLPClassifier(augment="shift")),
    ("solver='lbfgs' does not support dropout", lambda: MLPClassifier(solver="lbfgs", dropout=0.5)),
    ("loss: expected one of squared_error, poisson,", lambda: MLPRegressor("mse")),
    ("loss: expected one of hinge, log_loss,", lambda: LinearClassifier("log")),
    ("penalty: expected one of l2, l1, elasticnet, got 'l3'", lambda: LinearClassifier(penalty="l3")),
    ("alpha must be > 0 since learning_rate is 'optimal'", lambda: LinearClassifier(alpha=0)),
    ("average and ema_decay: expected at most one of them", lambda: LinearClassifier(average=True, ema_decay=0.9)),
    ("epsilon: expected a number in (0, inf), got 0", lambda: LinearRegressor("huber", epsilon=0)),
]


@pytest.mark.parametrize(("message", "make"), BAD, ids=[m for m, _ in BAD])
def test_a_setting_out_of_its_range_is_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make().fit(X, Y)


@pytest.mark.parametrize("make", ALL)
def test_nan_in_the_data_is_refused(make: Any) -> None:
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        make().fit(bad, Y)
    fitted = make(max_iter=2).fit(X, Y)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        fitted.predict(bad)
    if make in (MLPRegressor, LinearRegressor):
        with pytest.raises(ValueError, match="Input y contains NaN"):
            make().fit(X, np.where(Y == 0, np.nan, Y))


@pytest.mark.parametrize("make", [MLPClassifier, LinearClassifier])
def test_a_single_class_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"y: expected at least two classes, got one class only: \[7\]"):
        make().fit(X, np.full(30, 7))


@pytest.mark.parametrize("make", [MLPClassifier, LinearClassifier])
def test_labels_that_were_not_announced_are_refused(make: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        model.partial_fit(X, Y)
    model.partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"(has classes not in|expected the classes of the first call)"):
        model.partial_fit(X, Y + 1)
    with pytest.raises(ValueError, match="is not the same as on last call"):
        model.partial_fit(X, Y, classes=[0, 1])


@pytest.mark.parametrize("make", ALL)
def test_a_batch_larger_than_the_data_is_clipped_with_a_warning(make: Any) -> None:
    with pytest.warns(UserWarning, match="batch_size: 31 is larger than the 30 training rows; it is clipped"):
        model = make(batch_size=31, max_iter=2).fit(X, Y)
    assert model._fitted.step == 2


def test_a_diverging_fit_stops_and_says_what_to_try() -> None:
    with pytest.raises(
        ValueError, match=r"the loss is (inf|nan) at step \d+ .*lower learning_rate_init .*max_grad_norm"
    ):
        MLPRegressor(activation="identity", solver="sgd", learning_rate_init=1e3, random_state=0).fit(X, Y * 1e3)
    with pytest.raises(ValueError, match=r"the fit diverges. Try a lower eta0"):
        LinearRegressor(learning_rate="constant", eta0=1e3).fit(X, Y * 1e3)


@pytest.mark.parametrize("make", ALL)
def test_weights_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match="sample_weight"):
        make().fit(X, Y, sample_weight=np.ones(29))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        make().fit(X, Y, sample_weight=-np.ones(30))
    with pytest.raises(ValueError, match=r"sample_weight: expected a positive sum|[Ss]ample weights"):
        make().fit(X, Y, sample_weight=np.zeros(30))


def test_a_warm_start_with_other_layers_or_classes_is_refused() -> None:
    model = MLPClassifier((5,), warm_start=True, max_iter=2).fit(X, Y)
    with pytest.raises(ValueError, match=r"warm_start: expected layers of \[4, 5, 3\] .* got \[4, 6, 3\]"):
        model.set_params(hidden_layer_sizes=(6,)).fit(X, Y)
    with pytest.raises(ValueError, match="warm_start can only be used where `y` has the same classes"):
        model.set_params(hidden_layer_sizes=(5,)).fit(X, Y % 2)
    linear = LinearClassifier(warm_start=True, max_iter=2).fit(X, Y)
    with pytest.raises(ValueError, match="warm_start: expected the classes of the previous fit"):
        linear.fit(X, Y % 2)


def test_a_network_of_a_loss_by_name_is_that_loss() -> None:
    """The estimators' losses are those of fusedopt.losses."""
    from fusedopt import losses

    rng = np.random.default_rng(0)
    p, y = rng.standard_normal((9, 2)), rng.standard_normal((9, 2))
    gradient = np.empty_like(p)
    for name, parameter in itertools.product(("mse", "huber"), (0.5,)):
        value = ElementLoss(name, parameter)(p, y, None, gradient, 1.0)
        extra = {"delta": parameter} if name == "huber" else {}
        want = getattr(losses, name)(p, y, reduction="sum", **extra)
        assert value == want[0]
        np.testing.assert_array_equal(gradient, want[1])
