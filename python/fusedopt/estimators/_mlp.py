"""MLPClassifier and MLPRegressor: networks with scikit-learn's arguments and attributes, trained by the fused step."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels
from sklearn.utils.validation import validate_data

from .. import _core
from ..config import get_num_threads
from ._base import FLOATS, POSITIVE, check_choice, check_number, targets_like
from ._fit import Data
from ._mlp_base import MLP
from ._network import ACTIVATIONS, Array, ElementLoss, predict, softmax_loss


class MLPClassifier(ClassifierMixin, MLP):
    r"""Multi-layer perceptron classifier; drop-in replacement for scikit-learn's, trained by the fused step.

    .. math::
        h_0 = x, \qquad h_k = f(h_{k-1} W_k + b_k), \qquad p = \operatorname{softmax}(h_{K-1} W_K + b_K)

    The loss of a batch of n rows is the mean cross-entropy plus :math:`\frac{1}{n}(\alpha / 2 \, ||W||_2^2 +
    l_1 ||W||_1)`. Binary and multilabel targets use logistic outputs.

    Arguments, defaults and attributes are those of ``sklearn.neural_network.MLPClassifier``, with these additions:

    Args:
        activation: also ``"gelu"``.
        solver: also the name of any rule of fusedopt (``"adamw"``, ``"lion"``, ...), or a function of the parameters
            that returns an optimizer: ``lambda params: fusedopt.Lion(params, lr=1e-4)``. A rule has its own defaults
            except for ``learning_rate_init``, ``momentum`` (SGD) and ``beta_1, beta_2, epsilon`` (Adam's family).
        batch_size: from 1 to ``"full"``.
        learning_rate: also a schedule, any function of the step, counted from 0; it replaces ``learning_rate_init``. A
            schedule with ``observe`` receives the loss of every epoch. As in scikit-learn, the strings apply only to
            ``solver="sgd"``.
        class_weight: a dict, ``"balanced"`` or None, as in other classifiers.
        l1: strength of the L1 penalty, >= 0.
        dropout: probability in [0, 1) of dropping an output of a hidden layer during training.
        batch_norm: normalise every hidden layer over the batch; folded into ``coefs_`` and ``intercepts_``.
        max_grad_norm: clip the gradient to this norm, within the step.
        ema_decay: predict with an exponential moving average of the parameters; its decay, in [0, 1).
        augment: a function of a batch, or of a batch and a ``RandomState``, that returns the augmented batch; see
            :class:`Shift`, :class:`Flip`, :class:`Rotate`, :class:`Noise`.
        tol_params: stop when an epoch changes the parameters by at most this fraction of their norm.
        restore_best: with ``early_stopping``, restore the parameters of the best score at the end.
        checkpoint: path of a checkpoint, written after every epoch. A fit with the same settings and data resumes from
            it, with the same bits as an uninterrupted fit.
        progress: show a tqdm progress bar.

    Attributes:
        history_: name -> array with one entry per epoch: ``loss, lr, seconds``; ``score`` and ``grad_norm`` if they
            are computed.

    Raises:
        ValueError: a setting is out of its range; the data contain NaN; there is only one class; the loss is not
            finite; the checkpoint is damaged or belongs to another fit.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from fusedopt.estimators import MLPClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> model = MLPClassifier((64,), batch_size=32, tol=1e-2, random_state=0).fit(X / 16, y)
        >>> bool(model.score(X / 16, y) > 0.9)
        True
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: Any = "adam",
        alpha: float = 0.0001,
        batch_size: Any = "auto",
        learning_rate: Any = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float | None = 1e-4,
        verbose: Any = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: int = 10,
        max_fun: int = 15000,
        class_weight: Any = None,
        l1: float = 0.0,
        dropout: float = 0.0,
        batch_norm: bool = False,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        augment: Any = None,
        tol_params: float | None = None,
        restore_best: bool = True,
        checkpoint: Any = None,
        progress: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.class_weight = class_weight
        self.l1 = l1
        self.dropout = dropout
        self.batch_norm = batch_norm
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.augment = augment
        self.tol_params = tol_params
        self.restore_best = restore_best
        self.checkpoint = checkpoint
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _encode(self, y: Any, incremental: bool) -> None:
        """Sets or checks ``classes_`` and the label encoder."""
        if not hasattr(self, "classes_") or (not self.warm_start and not incremental):
            self._binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._binarizer.classes_
            if len(self.classes_) < 2 and self._binarizer.y_type_ != "multilabel-indicator":
                raise ValueError(f"y: expected at least two classes, got one class only: {self.classes_.tolist()}")
            return
        classes = unique_labels(y)
        if self.warm_start and not incremental and set(classes) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {classes}"
            )
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
            )

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        incremental: bool,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> MLPClassifier:
        self._check_settings()
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        X, y = validate_data(self, X, y, accept_sparse=["csr"], multi_output=True, dtype=FLOATS, order="C", reset=first)
        X = self._in_fit_dtype(X, first)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        weight = self._weights(sample_weight, X)
        self._encode(y, incremental)
        if self.class_weight is not None:
            by_class = compute_sample_weight(self.class_weight, y).astype(X.dtype)
            weight = by_class if weight is None else weight * by_class
        multiclass = self._binarizer.y_type_ == "multiclass"
        self.out_activation_ = "softmax" if multiclass else "logistic"
        coded = self._coded(y, X)
        if multiclass:
            loss, outputs = softmax_loss(), len(self.classes_)
        else:
            loss, outputs = ElementLoss("binary_cross_entropy"), coded.shape[1]
        watch = self._watch(validation_data, callbacks, self._encoded_validation, X.dtype)
        stratify = coded if outputs == 1 else None  # as in scikit-learn
        # As in scikit-learn, the reported loss is summed over outputs.
        self._learn_network(X, coded, weight, loss, outputs, 1, incremental, stratify, watch)
        return self

    def _coded(self, y: Any, X: Any) -> Array:
        """Integer labels for the softmax, or one column of 0 and 1 per output."""
        if self._binarizer.y_type_ == "multiclass":
            return np.asarray(np.searchsorted(self.classes_, y), np.int64)
        dense = self._binarizer.transform(y)
        return np.ascontiguousarray(dense.toarray() if hasattr(dense, "toarray") else dense, X.dtype)

    def _encoded_validation(self, y: Any, X: Any) -> Array:
        y = np.asarray(y)
        if y.ndim == 1 and len(new := np.setdiff1d(y, self.classes_)):
            raise ValueError(f"validation_data: expected classes of the training data, {self.classes_}, got {new}")
        return self._coded(y, X)

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation_data: Any = None, callbacks: Any = ()
    ) -> MLPClassifier:
        """Fits to rows ``X`` (array or CSR matrix) and their classes ``y``; rows may have weights >= 0.

        Args:
            X, y, sample_weight: as in scikit-learn's.
            validation_data: ``(X, y)`` or ``(X, y, sample_weight)``. Its score is recorded in ``history_["score"]``;
                ``early_stopping`` uses it instead of held-out rows.
            callbacks: functions called after every epoch with a dict (``epoch, loss, lr, score, ...``); the fit ends
                when one returns True.
        """
        return self._fit(X, y, sample_weight, False, validation_data, callbacks)

    @available_if(lambda est: est._partial())
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> MLPClassifier:
        """Trains one epoch on these rows. The first call needs ``classes``, all of them."""
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            self._binarizer = LabelBinarizer()
            kind = type_of_target(y)
            self._binarizer.fit(y if kind.startswith("multilabel") else np.asarray(classes))
            self.classes_ = self._binarizer.classes_
        elif classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {self.classes_!r}"
            )
        return self._fit(X, y, sample_weight, incremental=True)

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        raw = predict(data.x, weights, biases, self.activation)
        if not np.isfinite(raw).all():
            return float("nan")
        guess = raw.argmax(1) if self.out_activation_ == "softmax" else (raw > 0).astype(int)
        return float(accuracy_score(data.y.astype(int), guess, sample_weight=data.weight))

    def predict(self, X: Any) -> Array:
        """The most probable class of every row; for multilabel targets, rows of 0 and 1."""
        raw = self._raw(X)
        if self.out_activation_ == "softmax":
            classes: Array = self.classes_[raw.argmax(1)]
            return classes
        out: Array = self._binarizer.inverse_transform(raw > 0 if raw.shape[1] > 1 else raw.ravel() > 0, threshold=0.5)
        return out

    def predict_proba(self, X: Any) -> Array:
        """Probabilities, with one column per entry of ``classes_``."""
        raw = self._raw(X)
        if self.out_activation_ == "softmax":
            return np.asarray(softmax(raw, axis=1))
        _core.layer_forward(ACTIVATIONS["logistic"], raw, None, None, raw, get_num_threads())
        return raw if raw.shape[1] > 1 else np.hstack([1 - raw, raw])

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of :meth:`predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))


class MLPRegressor(RegressorMixin, MLP):
    r"""Multi-layer perceptron regressor; drop-in replacement for scikit-learn's, trained by the fused step.

    .. math::
        h_0 = x, \qquad h_k = f(h_{k-1} W_k + b_k), \qquad \hat y = h_{K-1} W_K + b_K

    Arguments, defaults and attributes are those of ``sklearn.neural_network.MLPRegressor``, with the additions and
    exceptions of :class:`MLPClassifier`. The default loss is half the squared error; ``loss`` may also be
    ``"absolute_error"``, ``"huber"`` (with ``delta``) or ``"epsilon_insensitive"`` (with ``delta`` as its epsilon).

    Example:
        >>> import numpy as np
        >>> from fusedopt.estimators import MLPRegressor
        >>> X = np.linspace(-1, 1, 200)[:, None]
        >>> y = np.sin(3 * X[:, 0])
        >>> model = MLPRegressor(batch_size=32, learning_rate_init=0.01, random_state=0).fit(X, y)
        >>> bool(model.score(X, y) > 0.95)
        True
    """

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: Any = "adam",
        alpha: float = 0.0001,
        batch_size: Any = "auto",
        learning_rate: Any = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float | None = 1e-4,
        verbose: Any = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: int = 10,
        max_fun: int = 15000,
        delta: float = 1.0,
        l1: float = 0.0,
        dropout: float = 0.0,
        batch_norm: bool = False,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        augment: Any = None,
        tol_params: float | None = None,
        restore_best: bool = True,
        checkpoint: Any = None,
        progress: bool = False,
    ) -> None:
        self.loss = loss
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.delta = delta
        self.l1 = l1
        self.dropout = dropout
        self.batch_norm = batch_norm
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.augment = augment
        self.tol_params = tol_params
        self.restore_best = restore_best
        self.checkpoint = checkpoint
        self.progress = progress

    _LOSSES = {  # noqa: RUF012
        "squared_error": "half_mse",
        "poisson": "poisson",
        "absolute_error": "mae",
        "huber": "huber",
        "epsilon_insensitive": "epsilon_insensitive",
    }

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        incremental: bool,
        validation_data: Any = None,
        callbacks: Any = (),
    ) -> MLPRegressor:
        self._check_settings()
        check_choice("loss", self.loss, self._LOSSES)
        check_number("delta", self.delta, POSITIVE)
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        X, y = validate_data(
            self, X, y, accept_sparse=["csr"], multi_output=True, y_numeric=True, dtype=FLOATS, order="C", reset=first
        )
        X = self._in_fit_dtype(X, first)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        weight = self._weights(sample_weight, X)
        target = np.ascontiguousarray(y.reshape(len(y), -1), X.dtype)
        self.out_activation_ = "exp" if self.loss == "poisson" else "identity"
        loss = ElementLoss(self._LOSSES[self.loss], float(self.delta))
        watch = self._watch(validation_data, callbacks, lambda y, X: targets_like(target, y), X.dtype)
        outputs = target.shape[1]
        self._learn_network(X, target, weight, loss, outputs, outputs, incremental, None, watch)
        return self

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation_data: Any = None, callbacks: Any = ()
    ) -> MLPRegressor:
        """Fits to rows ``X`` (array or CSR matrix) and their values ``y`` (n,) or (n, outputs).

        Args:
            X, y, sample_weight: as in scikit-learn's.
            validation_data, callbacks: as in :meth:`MLPClassifier.fit`.
        """
        return self._fit(X, y, sample_weight, False, validation_data, callbacks)

    @available_if(lambda est: est._partial())
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """Trains one epoch on these rows."""
        return self._fit(X, y, sample_weight, incremental=True)

    def _values(self, raw: Array) -> Array:
        values = np.exp(raw) if self.out_activation_ == "exp" else raw
        return values.ravel() if values.shape[1] == 1 else values

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        values = self._values(predict(data.x, weights, biases, self.activation))
        if not np.isfinite(values).all():
            return float("nan")
        return float(r2_score(data.y.reshape(values.shape), values, sample_weight=data.weight))

    def predict(self, X: Any) -> Array:
        """The value of every row, (n,) or (n, outputs)."""
        return self._values(self._raw(X))
