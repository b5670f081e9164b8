"""Base class of MLPClassifier and MLPRegressor: settings, the network, its fit, scipy's L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ._base import BELOW_ONE, FLOATS, NOT_NEGATIVE, POSITIVE, Estimator, Watch, check_choice, check_flag, check_number
from ._fit import Data, Fit, Task
from ._network import ACTIVATIONS, Array, LossFunction, Network, predict
from ._rates import Rate


class MLP(Estimator):
    _extra_patience = 1  # scikit-learn stops after *more* than n_iter_no_change epochs without improvement

    def _adam(self) -> tuple[tuple[float, float], float]:
        s: Any = self
        return (s.beta_1, s.beta_2), s.epsilon

    def _hidden(self) -> list[int]:
        sizes: Any = self.hidden_layer_sizes
        sizes = list(sizes) if isinstance(sizes, Sequence | np.ndarray) else [sizes]
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size <= 0:
                raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return [int(size) for size in sizes]

    def _check_settings(self) -> None:
        super()._check_settings()
        s: Any = self
        check_choice("activation", s.activation, ACTIVATIONS)
        check_number("learning_rate_init", s.learning_rate_init, POSITIVE)
        check_number("beta_1", s.beta_1, BELOW_ONE)
        check_number("beta_2", s.beta_2, BELOW_ONE)
        check_number("epsilon", s.epsilon, POSITIVE)
        check_number("dropout", s.dropout, BELOW_ONE)
        check_number("max_fun", s.max_fun, NOT_NEGATIVE, integer=True)
        check_flag("batch_norm", s.batch_norm)
        if s.solver == "lbfgs":
            self._refuse_with_lbfgs(dropout=s.dropout)

    def _learn_network(
        self,
        x: Any,
        y: Array,
        weight: Array | None,
        loss: LossFunction,
        outputs: int,
        reported: int,
        incremental: bool,
        stratify: Any,
        watch: Watch | None = None,
    ) -> None:
        s: Any = self
        old: Fit | None = getattr(self, "_fitted", None) if incremental or s.warm_start else None
        widths = [x.shape[1], *self._hidden(), outputs]
        if old is not None and old.net.widths != widths:
            raise ValueError(f"warm_start: expected layers of {old.net.widths} as in the previous fit, got {widths}")
        if old is None or not incremental:
            random = check_random_state(s.random_state)
            if old is None:
                net = Network(widths, s.activation, x.dtype, bool(s.batch_norm), float(s.dropout))
                net.initialize(random)
            else:
                net = old.net
            words = isinstance(s.learning_rate, str) and s.solver != "sgd" and not callable(s.solver)
            rate = Rate(
                "constant" if words else s.learning_rate,  # as in scikit-learn, the strings apply to SGD only
                float(s.learning_rate_init),
                float(s.power_t),
                follows_solver=callable(s.solver),
            )
            if s.solver == "lbfgs":
                self._refuse_watching(watch)
                self.n_layers_, self.n_outputs_ = len(widths), outputs
                fit = self._learn_lbfgs(net, Data(x, y, weight), loss, reported, float(s.alpha))
                self.coefs_, self.intercepts_ = fit.net.folded(fit.in_force)
                return
            fit = self._new_fit(net, random, rate)
            if old is not None:
                fit.progress, fit.samples = old.progress, old.samples
        else:
            fit = old
        fit.progress.epoch, fit.progress.finished = 0, ""
        if not incremental and old is None:
            fit.progress.stale = 0
        self.n_layers_, self.n_outputs_ = len(widths), outputs
        task = Task(loss, outputs=reported, l1=float(s.l1), l2=float(s.alpha))
        self._learn(fit, task, Data(x, y, weight), self._score_of, once=incremental, stratify=stratify, watch=watch)
        self.coefs_, self.intercepts_ = fit.net.folded(fit.in_force)

    def _raw(self, X: Any, check: bool = True) -> Array:
        check_is_fitted(self)
        if check:
            X = validate_data(self, X, accept_sparse=["csr"], dtype=FLOATS, reset=False)
        if X.dtype != self.coefs_[0].dtype:
            X = X.astype(self.coefs_[0].dtype)
        return predict(X, self.coefs_, self.intercepts_, self.activation)

    def _score_of(self, data: Data, weights: Any, biases: Any) -> float:
        raise NotImplementedError

    def _partial(self) -> bool:
        solver: Any = self.solver
        if solver == "lbfgs":
            raise AttributeError("partial_fit is only available for stochastic optimizers. lbfgs is not stochastic.")
        return True
