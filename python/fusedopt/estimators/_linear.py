"""LinearClassifier and LinearRegressor: scikit-learn's SGD estimators as networks without hidden layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import validate_data

from .. import _core
from ..config import get_num_threads
from ._base import FLOATS, POSITIVE, check_number, targets_like
from ._fit import Data
from ._linear_base import Linear
from ._network import ACTIVATIONS, Array, predict


class LinearClassifier(ClassifierMixin, Linear):
    r"""Linear classifier trained by gradient descent: logistic regression, linear support vector machine, perceptron.

    .. math::
        \min_{w, b} \frac{1}{\sum_i s_i} \sum_i s_i \, \ell(y_i, w \cdot x_i + b)
            + \alpha \left( (1 - \rho) / 2 \, ||w||_2^2 + \rho ||w||_1 \right), \qquad y_i = \pm 1

    Arguments, defaults and attributes are those of ``sklearn.linear_model.SGDClassifier``. With more than two classes
    each one is separated from the rest. A step uses a mini-batch of ``batch_size`` rows and momentum, not a single row.

    Args:
        loss: ``"hinge"`` (support vector machine), ``"log_loss"`` (logistic regression), ``"squared_hinge"``,
            ``"modified_huber"`` or ``"perceptron"``.
        learning_rate: ``"optimal"``: 1 / (alpha (t0 + step)); ``"constant"``, ``"invscaling"`` or ``"adaptive"``, which
            start at ``eta0``; or a schedule, any function of the step, counted from 0. The initial rates of
            ``"optimal"`` and ``"invscaling"`` are limited by the curvature of the loss on the data.
        solver: the name of any rule of fusedopt, or a function of the parameters that returns an optimizer. ``"sgd"``
            applies the L1 penalty by soft thresholding after the step, which sets weights to exactly zero; other
            solvers use its subgradient.
        batch_size: from 1 to ``"full"``, which is plain gradient descent. ``"auto"`` is a 32nd of the rows, at least 16
            and at most 200; all rows of a table of up to 64. The limit of the initial rate is proportional to it.
        momentum, nesterovs_momentum: for SGD.
        n_iter_no_change: the fit stops after this many epochs without improvement; with momentum not before
            10 / (1 - momentum) steps without improvement.
        l1: strength of an L1 penalty in addition to ``penalty``, >= 0.
        n_jobs: accepted and ignored: all classes are fitted together.

    ``max_grad_norm, ema_decay, augment, tol_params, restore_best, checkpoint, progress`` are those of
    :class:`MLPClassifier`, all other arguments those of SGDClassifier. X may be a CSR matrix.

    Attributes:
        coef_: (1, features) for two classes, else (classes, features).
        intercept_, classes_, n_iter_, loss_, history_: as in SGDClassifier and :class:`MLPClassifier`.

    Raises:
        ValueError: a setting is out of its range; the data contain NaN; there is only one class; the loss is not
            finite.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> from sklearn.preprocessing import scale
        >>> from fusedopt.estimators import LinearClassifier
        >>> X, y = load_breast_cancer(return_X_y=True)
        >>> model = LinearClassifier("log_loss", random_state=0).fit(scale(X), y)
        >>> bool(model.score(scale(X), y) > 0.95)
        True

    Bottou: Stochastic Gradient Descent Tricks (2012).
    """

    _LOSSES = {  # noqa: RUF012
        "hinge": "hinge",
        "log_loss": "binary_cross_entropy",
        "squared_hinge": "squared_hinge",
        "modified_huber": "modified_huber",
        "perceptron": "perceptron",
    }

    classes_: Array

    def __init__(
        self,
        loss: str = "hinge",
        *,
        penalty: str | None = "l2",
        alpha: float = 0.0001,
        l1_ratio: float = 0.15,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float | None = 1e-3,
        shuffle: bool = True,
        verbose: Any = 0,
        epsilon: float = 0.1,
        n_jobs: int | None = None,
        random_state: Any = None,
        learning_rate: Any = "optimal",
        eta0: float = 0.01,
        power_t: float = 0.5,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        class_weight: Any = None,
        warm_start: bool = False,
        average: bool | int = False,
        solver: Any = "sgd",
        batch_size: Any = "auto",
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        l1: float = 0.0,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        augment: Any = None,
        tol_params: float | None = None,
        restore_best: bool = True,
        checkpoint: Any = None,
        progress: bool = False,
    ) -> None:
        self.loss = loss
        self.penalty = penalty
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.shuffle = shuffle
        self.verbose = verbose
        self.epsilon = epsilon
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.eta0 = eta0
        self.power_t = power_t
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.average = average
        self.solver = solver
        self.batch_size = batch_size
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.l1 = l1
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.augment = augment
        self.tol_params = tol_params
        self.restore_best = restore_best
        self.checkpoint = checkpoint
        self.progress = progress

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        incremental: bool,
        coef_init: Any = None,
        intercept_init: Any = None,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> LinearClassifier:
        self._check_settings()
        first = not hasattr(self, "coef_") or (not self.warm_start and not incremental)
        X, y = validate_data(self, X, y, accept_sparse=["csr"], dtype=FLOATS, order="C", reset=first)
        X = self._in_fit_dtype(X, first)
        check_classification_targets(y)
        weight = self._weights(sample_weight, X)
        found, index = np.unique(y, return_inverse=True)
        if not incremental:
            if len(found) < 2:
                raise ValueError(f"y: expected at least two classes, got one class only: {found.tolist()}")
            if self.warm_start and hasattr(self, "coef_") and not np.array_equal(found, self.classes_):
                raise ValueError(f"warm_start: expected the classes of the previous fit, {self.classes_}, got {found}")
            self.classes_ = found
        elif len(np.setdiff1d(found, self.classes_)):
            raise ValueError(f"y: expected the classes of the first call, {self.classes_}, got {found}")
        index = np.searchsorted(self.classes_, found)[index]
        if incremental and self.class_weight == "balanced":
            raise ValueError("class_weight='balanced' needs all rows: pass a dict of weights for partial_fit")
        if self.class_weight is not None:
            by_class = compute_class_weight(self.class_weight, classes=self.classes_, y=y).astype(X.dtype)[index]
            weight = by_class if weight is None else weight * by_class
        watch = self._watch(validation_data, callbacks, self._encoded_validation, X.dtype)
        target = self._sides(index, X.dtype)
        self._learn_linear(Data(X, target, weight), incremental, index, coef_init, intercept_init, watch)
        return self

    def _sides(self, index: Array, dtype: Any) -> Array:
        """One column of targets per class against the rest, or one column for two classes, as the loss expects them."""
        low = 0 if self.loss == "log_loss" else -1
        many = len(self.classes_) > 2
        sides = index[:, None] == (np.arange(len(self.classes_)) if many else np.array([1]))
        return np.asarray(np.where(sides, np.dtype(dtype).type(1), np.dtype(dtype).type(low)))

    def _encoded_validation(self, y: Any, X: Any) -> Array:
        y = column_or_1d(y)
        if len(new := np.setdiff1d(y, self.classes_)):
            raise ValueError(f"validation_data: expected classes of the training data, {self.classes_}, got {new}")
        return self._sides(np.searchsorted(self.classes_, y), X.dtype)

    def fit(
        self,
        X: Any,
        y: Any,
        coef_init: Any = None,
        intercept_init: Any = None,
        sample_weight: Any = None,
        *,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> LinearClassifier:
        """Fits to rows ``X`` (array or CSR matrix) and their classes ``y``; rows may have weights >= 0.

        Args:
            X, y, coef_init, intercept_init, sample_weight: as in SGDClassifier.
            validation_data: ``(X, y)`` or ``(X, y, sample_weight)``. Its score is recorded in ``history_["score"]``;
                ``early_stopping`` uses it instead of held-out rows.
            callbacks: functions called after every epoch with a dict (``epoch, loss, lr, score, ...``); the fit ends
                when one returns True.
        """
        return self._fit(X, y, sample_weight, False, coef_init, intercept_init, validation_data, callbacks)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> LinearClassifier:
        """Trains one epoch on these rows. The first call needs ``classes``, all of them."""
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            self.classes_ = unique_labels(classes)
        elif classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {self.classes_!r}"
            )
        return self._fit(X, y, sample_weight, True)

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        raw = predict(data.x, weights, biases, "identity")
        if not np.isfinite(raw).all():
            return float("nan")
        many = raw.shape[1] > 1
        guess, truth = (raw.argmax(1), data.y.argmax(1)) if many else (raw > 0, data.y > 0)
        return float(accuracy_score(truth, guess, sample_weight=data.weight))

    def decision_function(self, X: Any) -> Array:
        """Decision values: shape (n,) for the second of two classes, else (n, classes)."""
        raw = self._raw(X)
        return raw.ravel() if raw.shape[1] == 1 else raw

    def predict(self, X: Any) -> Array:
        """The class of every row."""
        raw = self._raw(X)
        index = (raw[:, 0] > 0).astype(int) if raw.shape[1] == 1 else raw.argmax(1)
        classes: Array = self.classes_[index]
        return classes

    def _has_probabilities(self) -> bool:
        if self.loss in ("log_loss", "modified_huber"):
            return True
        raise AttributeError(f"probability estimates are not available for loss={self.loss!r}")

    @available_if(lambda est: est._has_probabilities())
    def predict_proba(self, X: Any) -> Array:
        """Probabilities, with one column per entry of ``classes_``; for several classes normalised to sum to 1."""
        raw = self._raw(X)
        if self.loss == "modified_huber":
            raw = (np.clip(raw, -1, 1) + 1) / 2
        else:
            _core.layer_forward(ACTIVATIONS["logistic"], raw, None, None, raw, get_num_threads())
        if raw.shape[1] == 1:
            return np.hstack([1 - raw, raw])
        total = raw.sum(1, keepdims=True)
        return np.where(total > 0, raw / np.where(total > 0, total, 1), 1 / raw.shape[1]).astype(raw.dtype)

    @available_if(lambda est: est._has_probabilities())
    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of :meth:`predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))


class LinearRegressor(RegressorMixin, Linear):
    r"""Linear regression by gradient descent, with squared, Huber or epsilon-insensitive loss.

    .. math::
        \min_{w, b} \frac{1}{\sum_i s_i} \sum_i s_i \, \ell(y_i, w \cdot x_i + b)
            + \alpha \left( (1 - \rho) / 2 \, ||w||_2^2 + \rho ||w||_1 \right)

    Arguments, defaults and attributes are those of ``sklearn.linear_model.SGDRegressor``. A step uses a mini-batch and
    momentum, not a single row. With several targets, y of shape (n, outputs), ``coef_`` is (outputs, features).

    Args:
        loss: ``"squared_error"`` (half of it), ``"huber"``, ``"epsilon_insensitive"`` (support vector regression) or
            ``"squared_epsilon_insensitive"``; ``epsilon`` is the parameter of all but the first.

    Other arguments are those of :class:`LinearClassifier`.

    Example:
        >>> import numpy as np
        >>> from fusedopt.estimators import LinearRegressor
        >>> X = np.linspace(-1, 1, 100)[:, None]
        >>> model = LinearRegressor(alpha=0, learning_rate="constant", eta0=0.1, tol=1e-6).fit(X, 3 * X[:, 0] + 2)
        >>> model.coef_.round(1), model.intercept_.round(1)
        (array([3.]), array([2.]))
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    _LOSSES = {  # noqa: RUF012
        "squared_error": "half_mse",
        "huber": "huber",
        "epsilon_insensitive": "epsilon_insensitive",
        "squared_epsilon_insensitive": "squared_epsilon_insensitive",
    }

    def __init__(
        self,
        loss: str = "squared_error",
        *,
        penalty: str | None = "l2",
        alpha: float = 0.0001,
        l1_ratio: float = 0.15,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float | None = 1e-3,
        shuffle: bool = True,
        verbose: Any = 0,
        epsilon: float = 0.1,
        random_state: Any = None,
        learning_rate: Any = "invscaling",
        eta0: float = 0.01,
        power_t: float = 0.25,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        average: bool | int = False,
        solver: Any = "sgd",
        batch_size: Any = "auto",
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        l1: float = 0.0,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        augment: Any = None,
        tol_params: float | None = None,
        restore_best: bool = True,
        checkpoint: Any = None,
        progress: bool = False,
    ) -> None:
        self.loss = loss
        self.penalty = penalty
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.shuffle = shuffle
        self.verbose = verbose
        self.epsilon = epsilon
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.eta0 = eta0
        self.power_t = power_t
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.average = average
        self.solver = solver
        self.batch_size = batch_size
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.l1 = l1
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.augment = augment
        self.tol_params = tol_params
        self.restore_best = restore_best
        self.checkpoint = checkpoint
        self.progress = progress

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        incremental: bool,
        coef_init: Any = None,
        intercept_init: Any = None,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> LinearRegressor:
        self._check_settings()
        if self.loss == "huber":
            check_number("epsilon", self.epsilon, POSITIVE)
        first = not hasattr(self, "coef_") or (not self.warm_start and not incremental)
        X, y = validate_data(
            self, X, y, accept_sparse=["csr"], dtype=FLOATS, order="C", y_numeric=True, multi_output=True, reset=first
        )
        X = self._in_fit_dtype(X, first)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        weight = self._weights(sample_weight, X)
        target = np.ascontiguousarray(y.reshape(len(y), -1), X.dtype)
        watch = self._watch(validation_data, callbacks, lambda y, X: targets_like(target, y), X.dtype)
        self._learn_linear(Data(X, target, weight), incremental, None, coef_init, intercept_init, watch)
        if y.ndim == 1:
            self.coef_ = self.coef_.ravel()
        return self

    def fit(
        self,
        X: Any,
        y: Any,
        coef_init: Any = None,
        intercept_init: Any = None,
        sample_weight: Any = None,
        *,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> LinearRegressor:
        """Fits to rows ``X`` (array or CSR matrix) and their values ``y``, (n,) or (n, outputs).

        Args:
            X, y, coef_init, intercept_init, sample_weight: as in SGDRegressor.
            validation_data, callbacks: as in :meth:`LinearClassifier.fit`.
        """
        return self._fit(X, y, sample_weight, False, coef_init, intercept_init, validation_data, callbacks)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> LinearRegressor:
        """Trains one epoch on these rows."""
        return self._fit(X, y, sample_weight, True)

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        values = predict(data.x, weights, biases, "identity")
        if not np.isfinite(values).all():
            return float("nan")
        return float(r2_score(data.y, values, sample_weight=data.weight))

    def predict(self, X: Any) -> Array:
        """The value of every row, (n,) or (n, outputs)."""
        raw = self._raw(X)
        return raw.ravel() if raw.shape[1] == 1 else raw
