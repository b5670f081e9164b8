"""Base class of LinearClassifier and LinearRegressor: settings, penalties, initial learning rate, fit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.extmath import row_norms
from sklearn.utils.validation import check_is_fitted, validate_data

from ._base import FLOATS, NOT_NEGATIVE, POSITIVE, UNIT, Estimator, Watch, check_choice, check_flag, check_number
from ._fit import Data, Fit, Task
from ._network import Array, ElementLoss, LossFunction, Network, predict
from ._rates import Rate, first_optimal_rate, highest_rate

_LARGEST_BATCH = 200  # of batch_size="auto"
_SMALL, _LARGE = 0.5, 100.0  # for the largest absolute value; standardised, one-hot and [0, 1] features are within


class Linear(Estimator):
    _per_row_penalty = False
    _lr_name = "eta0"
    _rates = ("constant", "optimal", "invscaling", "adaptive")
    _LOSSES: dict[str, str] = {}  # noqa: RUF012

    def _check_settings(self) -> None:
        super()._check_settings()
        s: Any = self
        check_choice("loss", s.loss, self._LOSSES)
        if s.penalty is not None:
            check_choice("penalty", s.penalty, ("l2", "l1", "elasticnet"))
        check_number("l1_ratio", s.l1_ratio, UNIT)
        check_number("epsilon", s.epsilon, NOT_NEGATIVE)
        check_number("eta0", s.eta0, POSITIVE)
        check_flag("fit_intercept", s.fit_intercept)
        if not isinstance(s.average, bool):
            check_number("average", s.average, NOT_NEGATIVE, integer=True)
        if s.average and s.ema_decay is not None:
            raise ValueError("average and ema_decay: expected at most one of them")
        if s.learning_rate == "optimal" and s.solver != "lbfgs" and not s.alpha > 0:
            raise ValueError("alpha must be > 0 since learning_rate is 'optimal'. alpha is used to compute the rate.")
        if s.solver == "lbfgs":
            self._refuse_with_lbfgs(average=s.average, penalty=s.penalty not in ("l2", None))
            if s.loss in ("hinge", "perceptron", "epsilon_insensitive"):
                raise ValueError(f"solver='lbfgs' needs a loss with a continuous gradient, got loss={s.loss!r}")

    def _fewest_steps(self) -> float:
        s: Any = self
        # With momentum and full batches the loss oscillates as it decreases: that must not stop the fit.
        return 10 / (1 - float(s.momentum)) if s.solver == "sgd" and 0 < s.momentum < 1 else 0.0

    def _batch_size(self, n: int) -> int:
        s: Any = self
        if s.batch_size != "auto":
            return super()._batch_size(n)
        # At least 32 steps per epoch of a small table, which otherwise needs many epochs. A few rows are one batch: a
        # weight of 2 is then a row given twice. Of the perceptron the rate only scales the weights, not the noise.
        return min(_LARGEST_BATCH, n if n <= 64 or s.loss == "perceptron" else max(16, n // 32))

    def _loss(self) -> LossFunction:
        s: Any = self
        return ElementLoss(self._LOSSES[s.loss], float(s.epsilon))

    def _penalties(self) -> tuple[float, float]:
        """The strengths of the L1 and L2 penalties."""
        s: Any = self
        part = {"l1": 1.0, "l2": 0.0, "elasticnet": float(s.l1_ratio), None: 0.0}[s.penalty]
        alpha = float(s.alpha) if s.penalty is not None else 0.0
        return part * alpha + float(s.l1), (1 - part) * alpha

    def _first_rate(self, data: Data) -> float:
        s: Any = self
        if s.learning_rate not in ("optimal", "invscaling"):
            return float(s.eta0)
        squares = row_norms(data.x, squared=True)
        mean = float(np.average(squares, weights=data.weight)) + float(s.fit_intercept)
        first = first_optimal_rate(s.loss, float(s.alpha)) if s.learning_rate == "optimal" else float(s.eta0)
        highest = highest_rate(s.loss, mean)
        if s.batch_size == "auto":  # the noise of a small batch grows with the rate
            n = data.x.shape[0]
            highest *= self._batch_size(n) / min(n, _LARGEST_BATCH)
        return min(first, highest)

    def _warn_of_scale(self, x: Any) -> None:
        """Warns of features far from unit scale, on which the default rates need many more epochs than max_iter."""
        s: Any = self
        if not isinstance(x, np.ndarray) or s.solver != "sgd" or s.learning_rate not in ("optimal", "invscaling"):
            return
        sizes = np.abs(x).max(0)
        sizes = sizes[sizes > 0]
        if len(sizes) and (sizes.max() > _LARGE or sizes.max() < _SMALL):
            warnings.warn(
                f"the features' largest absolute values are between {sizes.min():.3g} and {sizes.max():.3g}: gradient "
                "descent at the default rate converges slowly. Scale them to unit variance "
                "(sklearn.preprocessing.StandardScaler), or use solver='lbfgs'",
                stacklevel=5,
            )

    def _learn_linear(
        self,
        data: Data,
        incremental: bool,
        stratify: Any,
        coef_init: Any = None,
        intercept_init: Any = None,
        watch: Watch | None = None,
    ) -> None:
        s: Any = self
        if incremental and s.solver == "lbfgs":
            raise ValueError("solver='lbfgs' needs all rows at once: use another solver with partial_fit")
        old: Fit | None = getattr(self, "_fitted", None) if incremental or s.warm_start else None
        widths = [data.x.shape[1], data.y.shape[1]]
        if old is None and not incremental:
            self._warn_of_scale(data.x)
        if old is not None and old.net.widths != widths:
            raise ValueError(f"warm_start: expected {old.net.widths[0]} features and {old.net.widths[1]} outputs")
        if old is not None and incremental:
            fit = old
        else:
            net = old.net if old else Network(widths, "identity", data.x.dtype, intercepts=bool(s.fit_intercept))
            if coef_init is not None:
                net.weights[0][...] = np.asarray(coef_init).reshape(widths[1], widths[0]).T
            if intercept_init is not None and s.fit_intercept:
                net.biases[0][...] = np.asarray(intercept_init).reshape(-1)
            if s.solver == "lbfgs":
                self._refuse_watching(watch)
                fit = self._learn_lbfgs(net, data, self._loss(), 1, self._penalties()[1])
                self.coef_, self.intercept_ = np.ascontiguousarray(net.weights[0].T), net.biases[0].copy()
                return
            rate = Rate(
                s.learning_rate,
                self._first_rate(data),
                float(s.power_t),
                alpha=float(s.alpha),
                per_step=True,
                follows_solver=callable(s.solver),
            )
            fit = self._new_fit(net, check_random_state(s.random_state), rate)
            if old is not None:
                fit.progress, fit.step, fit.samples = old.progress, old.step, old.samples
        fit.progress.epoch, fit.progress.finished, fit.progress.stale = 0, "", 0
        l1, l2 = self._penalties()
        # With momentum a constant gradient moves a weight by rate / (1 - momentum) times the gradient per step.
        proximal = 1 / (1 - float(s.momentum)) if s.solver == "sgd" and s.momentum < 1 else 0.0
        task = Task(self._loss(), l1=l1, l2=l2, proximal=proximal, average=int(s.average))
        self._learn(fit, task, data, self._score_of, once=incremental, stratify=stratify, watch=watch)
        weights, biases = fit.net.folded(fit.in_force)
        self.coef_, self.intercept_ = np.ascontiguousarray(weights[0].T), biases[0]

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        raise NotImplementedError

    def _raw(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr"], dtype=FLOATS, reset=False)
        coef = np.atleast_2d(self.coef_).T
        if X.dtype != coef.dtype:
            X = X.astype(coef.dtype)
        return predict(X, [coef], [np.ascontiguousarray(self.intercept_, coef.dtype)], "identity")
