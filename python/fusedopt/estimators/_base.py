"""Base class of all estimators: checks of the settings, held-out rows, fitted attributes."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, validate_data

from .. import _core
from ..config import get_num_threads
from . import _checkpoint
from ._fit import Augment, Data, Fit, Split, Task, earlier_split
from ._network import Array, LossFunction, Network, blas_threads
from ._rates import Rate, make_optimizer, solver_names

FLOATS = (np.float64, np.float32)

# Settings that may change when a fit is resumed.
_FREE = ("checkpoint", "progress", "verbose", "max_iter", "n_jobs", "warm_start")

# Lower bound, whether it is included, upper bound, whether it is included.
Range = tuple[float, bool, float, bool]
POSITIVE: Range = (0.0, False, math.inf, False)
NOT_NEGATIVE: Range = (0.0, True, math.inf, False)
UNIT: Range = (0.0, True, 1.0, True)
BELOW_ONE: Range = (0.0, True, 1.0, False)
OPEN_UNIT: Range = (0.0, False, 1.0, False)
COUNT: Range = (1.0, True, math.inf, False)
ANY: Range = (-math.inf, False, math.inf, False)


def check_number(name: str, value: Any, allowed: Range, *, integer: bool = False, none: bool = False) -> None:
    """Raises ValueError, naming the setting, unless the value is a number in its range."""
    low, low_in, high, high_in = allowed
    if value is None and none:
        return
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool | np.bool_):
        x = float(value)
        if (low < x or (low_in and x == low)) and (x < high or (high_in and x == high)):
            return
    what = "an integer" if integer else "a number"
    bounds = f" in {'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}" if low > -math.inf else ""
    raise ValueError(f"{name}: expected {what}{bounds}{' or None' if none else ''}, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError, naming the setting, unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError, naming the setting, unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def targets_like(like: Array, y: Any) -> Array:
    """The targets of ``validation_data``, with the number of columns and the dtype of the training targets."""
    target = np.asarray(y, like.dtype)
    target = np.ascontiguousarray(target.reshape(len(target), -1))
    if target.shape[1] != like.shape[1]:
        raise ValueError(f"validation_data: expected {like.shape[1]} targets per row, got {target.shape[1]}")
    return target


@dataclass
class Watch:
    """Validation rows, and functions to call after every epoch."""

    data: Data | None
    callbacks: tuple[Callable[[dict[str, float]], Any], ...]


class Estimator(BaseEstimator):
    """Base class: the fit. As in scikit-learn, the settings of a subclass are the arguments of ``__init__``."""

    _per_row_penalty = True
    _lr_name = "learning_rate_init"
    _rates: tuple[str, ...] = ("constant", "invscaling", "adaptive")
    _extra_patience = 0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # ---- settings

    def _check_settings(self) -> None:
        s: Any = self
        if not callable(s.solver):
            check_choice("solver", s.solver, (*solver_names(), "lbfgs"))
        if not callable(s.learning_rate):
            check_choice("learning_rate", s.learning_rate, self._rates)
        if s.batch_size not in ("auto", "full"):
            if isinstance(s.batch_size, str):
                raise ValueError(f"batch_size: expected an integer >= 1, 'auto' or 'full', got {s.batch_size!r}")
            check_number("batch_size", s.batch_size, COUNT, integer=True)
        check_number("max_iter", s.max_iter, COUNT, integer=True)
        check_number("n_iter_no_change", s.n_iter_no_change, COUNT, integer=True)
        check_number("alpha", s.alpha, NOT_NEGATIVE)
        check_number("l1", s.l1, NOT_NEGATIVE)
        check_number("tol", s.tol, (-math.inf, True, math.inf, True), none=True)
        check_number("tol_params", s.tol_params, NOT_NEGATIVE, none=True)
        check_number("momentum", s.momentum, UNIT)
        check_number("power_t", s.power_t, ANY)
        check_number("validation_fraction", s.validation_fraction, OPEN_UNIT)
        check_number("max_grad_norm", s.max_grad_norm, POSITIVE, none=True)
        check_number("ema_decay", s.ema_decay, BELOW_ONE, none=True)
        for name in ("shuffle", "early_stopping", "restore_best", "warm_start", "nesterovs_momentum"):
            check_flag(name, getattr(s, name))
        if s.augment is not None and not callable(s.augment):
            raise ValueError(f"augment: expected a function of a batch, or None, got {s.augment!r:.80}")

    def _adam(self) -> tuple[tuple[float, float], float]:
        """betas and eps, for rules that have both."""
        return (0.9, 0.999), 1e-8

    def _fewest_steps(self) -> float:
        """Minimum number of steps without improvement before the fit stops, however few steps an epoch has."""
        return 0.0

    def _refuse_with_lbfgs(self, **more: Any) -> None:
        """Raises ValueError for settings that need a stepwise solver."""
        names = ("augment", "max_grad_norm", "ema_decay", "l1", "early_stopping", "checkpoint")
        given = {name: getattr(self, name) for name in names} | more
        if wrong := [name for name, value in given.items() if value not in (None, False, 0)]:
            raise ValueError(f"solver='lbfgs' does not support {', '.join(wrong)}")

    def _batch_size(self, n: int) -> int:
        size: Any = self.batch_size
        if size == "auto":
            return min(200, n)
        if size == "full":
            return n
        if size > n:
            warnings.warn(f"batch_size: {size} is larger than the {n} training rows; it is clipped", stacklevel=4)
        return int(min(size, n))

    def _augment(self) -> Augment | None:
        function: Any = self.augment
        if function is None:
            return None
        try:
            taken = sum(p.default is p.empty for p in inspect.signature(function).parameters.values())
        except ValueError:  # a built-in function
            taken = 1
        return function if taken >= 2 else lambda batch, random: function(batch)

    # ---- the fit

    def _in_fit_dtype(self, X: Any, first: bool) -> Any:
        """The rows, converted to the dtype of the fit that ``partial_fit`` or a warm start continues."""
        old: Fit | None = None if first else getattr(self, "_fitted", None)
        return X if old is None or old.net.dtype == X.dtype else X.astype(old.net.dtype)

    def _watch(
        self, validation_data: Any, callbacks: Any, encode: Callable[[Any, Any], Array], dtype: Any
    ) -> Watch | None:
        """Checks ``validation_data`` and ``callbacks`` of a fit; ``encode`` maps y to targets."""
        callbacks = tuple(callbacks)
        if wrong := [one for one in callbacks if not callable(one)]:
            raise TypeError(f"callbacks: expected functions of a dict, got {wrong[0]!r:.80}")
        if validation_data is None:
            return Watch(None, callbacks) if callbacks else None
        if not isinstance(validation_data, tuple) or len(validation_data) not in (2, 3):
            raise TypeError("validation_data: expected a tuple (X, y) or (X, y, sample_weight)")
        X, y, *rest = validation_data
        X = validate_data(self, X, accept_sparse=["csr"], dtype=FLOATS, order="C", reset=False).astype(dtype)
        check_consistent_length(X, y)
        return Watch(Data(X, encode(y, X), self._weights(rest[0] if rest else None, X)), callbacks)

    def _weights(self, sample_weight: Any, X: Any) -> Array | None:
        if sample_weight is None:
            return None
        weight: Array = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        if not weight.sum() > 0:
            raise ValueError("sample_weight: expected a positive sum")
        return weight

    def _refuse_watching(self, watch: Watch | None) -> None:
        if watch is not None:
            raise ValueError("solver='lbfgs' has no epochs: it does not support validation_data and callbacks")

    def _new_fit(self, net: Network, random: np.random.RandomState, rate: Rate) -> Fit:
        s: Any = self
        betas, eps = self._adam()
        opt = make_optimizer(
            s.solver,
            net.params,
            rate.first,
            momentum=s.momentum,
            nesterov=s.nesterovs_momentum,
            betas=betas,
            eps=eps,
            max_grad_norm=s.max_grad_norm,
        )
        return Fit(net, opt, rate, random)

    def _learn(
        self,
        fit: Fit,
        task: Task,
        data: Data,
        score: Callable[[Data, Any, Any], float],
        *,
        once: bool = False,
        stratify: Any = None,
        watch: Watch | None = None,
    ) -> None:
        """Splits off held-out rows if needed, runs the fit, and sets the fitted attributes."""
        s: Any = self
        task.max_iter, task.shuffle, task.restore_best = int(s.max_iter), bool(s.shuffle), bool(s.restore_best)
        task.tol = -math.inf if s.tol is None else float(s.tol)
        task.tol_params, task.ema_decay = s.tol_params, s.ema_decay
        task.patience = int(s.n_iter_no_change) - 1 + self._extra_patience
        task.progress, task.verbose, task.advice = bool(s.progress), s.verbose, self._lr_name
        task.augment, task.per_row = self._augment(), self._per_row_penalty
        if fit.net.dropout:
            task.seed = int(fit.random.randint(2**31 - 1))
        if s.checkpoint is not None and not once:
            task.checkpoint = Path(s.checkpoint)
            settings = {k: v for k, v in self.get_params(deep=False).items() if k not in _FREE}
            arrays = [data.x, data.y, data.weight]
            if watch is not None and watch.data is not None:
                arrays += [watch.data.x, watch.data.y, watch.data.weight]
            task.mark = _checkpoint.fingerprint({**settings, "estimator": type(self).__name__}, *arrays)
            task.details = _checkpoint.details(settings)
        split: Split | None = None
        if watch is not None:
            task.callbacks = watch.callbacks
        if watch is not None and watch.data is not None:
            given = watch.data
            task.score, task.by_score = lambda weights, biases: score(given, weights, biases), bool(s.early_stopping)
        elif s.early_stopping:
            if once:
                raise ValueError("partial_fit does not support early_stopping=True")
            split = earlier_split(task)
            drawn = train_test_split(
                np.arange(data.x.shape[0]),
                random_state=fit.random,
                test_size=s.validation_fraction,
                stratify=stratify,
            )
            split = split or (drawn[0], drawn[1])
            if len(split[1]) < 2:
                raise ValueError(
                    "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
                )
            held_out, data = data.rows(split[1]), data.rows(split[0])
            task.score = lambda weights, biases: score(held_out, weights, biases)
        task.batch_size = self._batch_size(data.x.shape[0])
        task.patience = max(task.patience, math.ceil(self._fewest_steps() * task.batch_size / data.x.shape[0]) - 1)
        fit.run(task, data, split, once)
        self._show(fit)

    def _learn_lbfgs(self, net: Network, data: Data, loss: LossFunction, reported: int, l2: float) -> Fit:
        """Minimises the loss over all rows with scipy's L-BFGS-B."""
        s: Any = self
        total = float(data.x.shape[0] if data.weight is None else data.weight.sum(dtype=np.float64))
        factor = 1 / total if self._per_row_penalty else 1.0

        def value_and_gradient(flat: Array) -> tuple[float, Array]:
            net.params[...] = flat
            value = net.loss_and_gradient(data.x, data.y, data.weight, loss, 1 / total) / total / reported
            weights, grads = net.params[: net.n_weights], net.grads[: net.n_weights]
            value += _core.penalty(weights, grads, 0.0, l2, factor, get_num_threads()) * factor
            return value, net.grads.astype(np.float64)

        with blas_threads(net.widths, data.x.shape[0]):
            result = scipy.optimize.minimize(
                value_and_gradient,
                net.params.astype(np.float64),
                method="L-BFGS-B",
                jac=True,
                options={
                    "maxfun": getattr(s, "max_fun", 15000),
                    "maxiter": s.max_iter,
                    "gtol": 1e-4 if s.tol is None else s.tol,
                },
            )
        if result.status != 0:
            warnings.warn(f"lbfgs failed to converge: {result.message}", ConvergenceWarning, stacklevel=4)
        net.params[...] = result.x
        rate = Rate("constant", 1.0)
        fit = Fit(net, None, rate, check_random_state(s.random_state))  # type: ignore[arg-type]
        fit.progress.loss.append(float(result.fun))
        fit.progress.best_loss = float(result.fun)
        fit.progress.epoch = min(int(result.nit), int(s.max_iter))
        self._show(fit)
        return fit

    def _show(self, fit: Fit) -> None:
        """Sets the fitted attributes that all estimators have."""
        p = fit.progress
        self.interrupted_ = fit.interrupted
        self.n_iter_, self.t_ = p.epoch, fit.samples
        self.loss_curve_, self.loss_ = list(p.loss), p.loss[-1] if p.loss else math.nan
        scored = bool(p.score)
        self.best_loss_ = None if scored else p.best_loss
        self.validation_scores_ = list(p.score) if scored else None
        self.best_validation_score_ = p.best_score if scored else None
        self.history_: Mapping[str, Array] = p.history()
        if not np.isfinite(fit.in_force).all():
            raise ValueError("the fitted parameters are not finite: scale the data, or lower the learning rate")
        self._fitted = fit
