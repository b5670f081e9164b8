"""What MLPClassifier and MLPRegressor share: settings, the network, its fit, scipy's L-BFGS."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .. import _core
from ..config import get_num_threads
from ._base import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Estimator, check_choice, check_flag, check_number
from ._fit import Data, Fit, Task
from ._network import ACTIVATIONS, Array, LossFunction, Network, predict
from ._rates import Rate

FLOATS = (np.float64, np.float32)


class MLP(Estimator):
    _extra_patience = 1  # scikit-learn stops only once *more* epochs than n_iter_no_change were no better

    def _more_solvers(self) -> tuple[str, ...]:
        return ("lbfgs",)

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
            given = {"dropout": s.dropout, "augment": s.augment, "max_grad_norm": s.max_grad_norm}
            given.update(ema_decay=s.ema_decay, l1=s.l1, early_stopping=s.early_stopping, checkpoint=s.checkpoint)
            if wrong := [k for k, v in given.items() if v not in (None, False, 0)]:
                raise ValueError(f"solver='lbfgs' does not go with {', '.join(wrong)}")

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
    ) -> None:
        s: Any = self
        old: Fit | None = getattr(self, "_fitted", None) if incremental or s.warm_start else None
        widths = [x.shape[1], *self._hidden(), outputs]
        if old is not None and old.net.widths != widths:
            raise ValueError(f"warm_start: expected layers of {old.net.widths} as in the fit before, got {widths}")
        if old is None or not incremental:
            random = check_random_state(s.random_state)
            if old is None:
                net = Network(widths, s.activation, x.dtype, bool(s.batch_norm), float(s.dropout))
                net.initialize(random)
            else:
                net = old.net
            words = isinstance(s.learning_rate, str) and s.solver != "sgd" and not callable(s.solver)
            rate = Rate(
                "constant" if words else s.learning_rate,  # scikit-learn's words are about SGD
                float(s.learning_rate_init),
                float(s.power_t),
                follows_solver=callable(s.solver),
            )
            if s.solver == "lbfgs":
                self._learn_lbfgs(net, Data(x, y, weight), loss, reported)
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
        self._learn(fit, task, Data(x, y, weight), self._score_of, once=incremental, stratify=stratify)
        self.coefs_, self.intercepts_ = fit.net.folded(fit.in_force)

    def _learn_lbfgs(self, net: Network, data: Data, loss: LossFunction, reported: int) -> None:
        """scipy's L-BFGS-B over the whole data."""
        s: Any = self
        total = float(data.x.shape[0] if data.weight is None else data.weight.sum(dtype=np.float64))

        def value_and_gradient(flat: Array) -> tuple[float, Array]:
            net.params[...] = flat
            value = net.loss_and_gradient(data.x, data.y, data.weight, loss, 1 / total) / total / reported
            weights, grads = net.params[: net.n_weights], net.grads[: net.n_weights]
            value += _core.penalty(weights, grads, 0.0, float(s.alpha), 1 / total, get_num_threads()) / total
            return value, net.grads.astype(np.float64)

        result = scipy.optimize.minimize(
            value_and_gradient,
            net.params.astype(np.float64),
            method="L-BFGS-B",
            jac=True,
            options={"maxfun": s.max_fun, "maxiter": s.max_iter, "gtol": 1e-4 if s.tol is None else s.tol},
        )
        if result.status != 0:
            warnings.warn(f"lbfgs failed to converge: {result.message}", ConvergenceWarning, stacklevel=4)
        net.params[...] = result.x
        self.n_layers_, self.n_outputs_ = len(net.widths), net.widths[-1]
        rate = Rate("constant", float(s.learning_rate_init))
        fit = Fit(net, None, rate, check_random_state(s.random_state))  # type: ignore[arg-type]
        fit.progress.loss.append(float(result.fun))
        fit.progress.best_loss = float(result.fun)
        fit.progress.epoch = min(int(result.nit), int(s.max_iter))
        self._show(fit)
        self.coefs_, self.intercepts_ = net.folded(net.params)

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
