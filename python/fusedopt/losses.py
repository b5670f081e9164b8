"""Losses for NumPy: value and gradient in one pass over memory. The kernels are in cpp/network/losses.h.

Every loss takes predictions and targets of the same shape and dtype, float64 or float32, and returns
``(value, gradient)``; the gradient is with respect to the predictions. Common arguments:

* ``reduction``: ``"mean"`` divides by the number of elements (rows, for :func:`softmax_cross_entropy`), or by the sum
  of their weights; ``"sum"`` adds; ``"none"`` returns one value per element, and the gradient of their sum.
* ``sample_weight``: weights >= 0 that multiply the loss, one per row (first dimension) or per element.
* ``out``: C-contiguous array of the predictions' shape and dtype that receives the gradient.

Raises ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape or a target or option out of its range.
The message names the argument, and nothing has been written. Inputs may have any strides and are never written. Results
are bit-identical for every instruction set and number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .config import get_num_threads

__all__ = [
    "binary_cross_entropy",
    "epsilon_insensitive",
    "half_mse",
    "hinge",
    "huber",
    "l1_penalty",
    "l2_penalty",
    "mae",
    "modified_huber",
    "mse",
    "perceptron",
    "poisson",
    "softmax_cross_entropy",
    "squared_epsilon_insensitive",
    "squared_hinge",
]

Array = NDArray[Any]
Value = Any  # a float, or an array with reduction="none"
_INDEX: dict[str, int] = _core.element_losses()


def _contiguous(x: Any, name: str) -> Array:
    """A contiguous, aligned array; the kernels check dtypes and shapes."""
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a NumPy array of float64 or float32, got {type(x).__name__}")
    if not isinstance(x.dtype.type(), np.float64 | np.float32) or not x.dtype.isnative:
        raise TypeError(f"{name}: expected float64 or float32, got {x.dtype.str if x.dtype.kind == 'f' else x.dtype}")
    return x if x.flags.c_contiguous and x.flags.aligned else np.array(x, order="C", subok=False)


def _weights(weight: Any, like: Array, name: str) -> Array | None:
    if weight is None:
        return None
    w = np.asarray(weight)
    if w.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected numbers, got {w.dtype}")
    w = np.ascontiguousarray(w, like.dtype)
    if not bool(np.all(w >= 0)) or not bool(np.all(np.isfinite(w))):
        raise ValueError(f"{name}: expected finite numbers >= 0")
    return w


def _gradient(out: Any, prediction: Array, inputs: tuple[Any, ...]) -> Array:
    if out is None:
        return np.empty_like(prediction, order="C", subok=False)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    if any(isinstance(x, np.ndarray) and np.may_share_memory(out, x) for x in inputs):
        raise ValueError("out: shares memory with an input")
    return out


def _scale(reduction: str, count: int, total: float | None) -> float:
    """The factor of the sum of weighted losses."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction != "mean":
        return 1.0
    by = count if total is None else total
    if by > 0:
        return 1.0 / by
    raise ValueError("sample_weight: expected a positive sum" if count else "expected at least one element to average")


def _element(
    name: str, prediction: Any, target: Any, weight: Any, reduction: str, out: Any, parameter: float = 0.0
) -> tuple[Value, Array]:
    p, y = _contiguous(prediction, "prediction"), _contiguous(target, "target")
    w = _weights(weight, p, "sample_weight")
    per = 1 if w is None or w.size == 0 else p.size // w.size
    total = None if w is None else float(w.sum(dtype=np.float64)) * per
    scale = _scale(reduction, p.size, total)
    value = np.empty_like(p) if reduction == "none" else None
    gradient = _gradient(out, p, (prediction, target, weight))
    added = _core.element_loss(_INDEX[name], p, y, w, value, gradient, parameter, scale, get_num_threads())
    return (added * scale if value is None else value), gradient


def _positive(value: Any, name: str, zero: bool = False) -> float:
    x = float(value)
    if not (x >= 0 if zero else x > 0) or math.isinf(x):
        raise ValueError(f"{name}: expected a number {'>=' if zero else '>'} 0, got {value!r}")
    return x


def mse(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Mean squared error: :math:`\ell(p, y) = (p - y)^2`, as ``torch.nn.functional.mse_loss``.

    Args:
        prediction: any shape, float64 or float32.
        target: of the same shape and dtype.
        sample_weight, reduction, out: see the module.

    Example:
        >>> import numpy as np
        >>> from fusedopt import losses
        >>> losses.mse(np.array([1.0, 2.0]), np.array([0.0, 4.0]))
        (2.5, array([ 1., -2.]))
    """
    return _element("mse", prediction, target, sample_weight, reduction, out)


def half_mse(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Half the squared error: :math:`\ell(p, y) = (p - y)^2 / 2`.

    With ``reduction="mean"`` it is :math:`\frac{1}{2n} \sum (p_i - y_i)^2`, the loss of scikit-learn's SGDRegressor
    and MLPRegressor. Arguments as in :func:`mse`.
    """
    return _element("half_mse", prediction, target, sample_weight, reduction, out)


def mae(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Mean absolute error: :math:`\ell(p, y) = |p - y|`, with gradient 0 at p = y, as ``torch.nn.functional.l1_loss``.

    Arguments as in :func:`mse`.
    """
    return _element("mae", prediction, target, sample_weight, reduction, out)


def huber(
    prediction: Array,
    target: Array,
    *,
    delta: float = 1.0,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Huber loss: quadratic near the target, linear far from it, as ``torch.nn.functional.huber_loss``.

    .. math::
        \ell(p, y) = (p - y)^2 / 2 \text{ if } |p - y| \le \delta, \qquad \delta (|p - y| - \delta / 2) \text{ else}

    Args:
        delta: :math:`\delta > 0`, the error beyond which the loss is linear, in units of the target. Other arguments as
            in :func:`mse`.

    Huber: Robust Estimation of a Location Parameter (Annals of Statistics 53, 1964).
    """
    parameter = _positive(delta, "delta")
    return _element("huber", prediction, target, sample_weight, reduction, out, parameter)


def epsilon_insensitive(
    prediction: Array,
    target: Array,
    *,
    epsilon: float = 0.1,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Epsilon-insensitive loss, of support vector regression: :math:`\ell(p, y) = \max(0, |p - y| - \epsilon)`.

    Args:
        epsilon: :math:`\epsilon \ge 0`, the error below which the loss is 0, in units of the target. Other arguments
            as in :func:`mse`.

    Vapnik: The Nature of Statistical Learning Theory (1995).
    """
    parameter = _positive(epsilon, "epsilon", zero=True)
    return _element("epsilon_insensitive", prediction, target, sample_weight, reduction, out, parameter)


def squared_epsilon_insensitive(
    prediction: Array,
    target: Array,
    *,
    epsilon: float = 0.1,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""The square of :func:`epsilon_insensitive`: :math:`\ell(p, y) = \max(0, |p - y| - \epsilon)^2`."""
    parameter = _positive(epsilon, "epsilon", zero=True)
    return _element("squared_epsilon_insensitive", prediction, target, sample_weight, reduction, out, parameter)


def poisson(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Poisson negative log-likelihood, from the logarithm of the rate: :math:`\ell(p, y) = e^p - y p`.

    As ``torch.nn.functional.poisson_nll_loss`` with ``log_input=True``; terms that depend on y alone are omitted.

    Args:
        prediction: :math:`p`, the log of the expected count.
        target: :math:`y \ge 0`. Other arguments as in :func:`mse`.
    """
    return _element("poisson", prediction, target, sample_weight, reduction, out)


def binary_cross_entropy(
    prediction: Array,
    target: Array,
    *,
    pos_weight: Any = None,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Binary cross-entropy from logits, as ``torch.nn.functional.binary_cross_entropy_with_logits``.

    .. math::
        \ell(p, y) = -y \log s(p) - (1 - y) \log(1 - s(p)) = \max(p, 0) - p y + \log(1 + e^{-|p|}), \qquad
            s(p) = 1 / (1 + e^{-p})

    Args:
        prediction: logits :math:`p`; large values do not overflow.
        target: probabilities :math:`y \in [0, 1]`.
        pos_weight: multiplies the first term: a number >= 0, or an array that broadcasts to the target's shape, such as
            one number per column. As in torch it does not change the divisor of a mean.
        sample_weight, reduction, out: as in :func:`mse`.
    """
    if pos_weight is not None:
        return _weighted_binary_cross_entropy(prediction, target, pos_weight, sample_weight, reduction, out)
    return _element("binary_cross_entropy", prediction, target, sample_weight, reduction, out)


def _weighted_binary_cross_entropy(
    prediction: Any, target: Any, pos_weight: Any, weight: Any, reduction: str, out: Any
) -> tuple[Value, Array]:
    """Expresses ``pos_weight`` a by weights w and targets t: a y f + (1 - y) g = w (t f + (1 - t) g).

    Here f and g are the two terms of the loss, w = a y + 1 - y and t = a y / w.
    """
    p, y = _contiguous(prediction, "prediction"), _contiguous(target, "target")
    if y.size and not (y.min() >= 0 and y.max() <= 1):
        raise ValueError("target: expected probabilities in [0, 1]")
    positive = _weights(pos_weight, p, "pos_weight")
    assert positive is not None
    try:
        positive = np.broadcast_to(positive, y.shape)
    except ValueError:
        raise ValueError(f"pos_weight: expected a shape that broadcasts to {y.shape}, got {positive.shape}") from None
    w = _weights(weight, p, "sample_weight")
    if w is not None and w.shape not in (y.shape, y.shape[:1]):
        raise ValueError(f"sample_weight: expected shape {y.shape[:1]} or {y.shape}, got {w.shape}")
    rows = None if w is None else np.broadcast_to(w.reshape(w.shape + (1,) * (y.ndim - w.ndim)), y.shape)
    scale = _scale(reduction, y.size, None if rows is None else float(rows.sum(dtype=np.float64)))
    combined = positive * y + (1 - y)
    shifted = np.divide(positive * y, combined, out=np.zeros_like(y), where=combined > 0)
    if rows is not None:
        combined = combined * rows
    value = np.empty_like(p) if reduction == "none" else None
    gradient = _gradient(out, p, (prediction, target, weight))
    index, threads = _INDEX["binary_cross_entropy"], get_num_threads()
    combined = np.ascontiguousarray(combined, p.dtype)
    added = _core.element_loss(index, p, shifted, combined, value, gradient, 0.0, scale, threads)
    return (added * scale if value is None else value), gradient


def hinge(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Hinge loss, of support vector machines: :math:`\ell(p, y) = \max(0, 1 - y p)`, with gradient 0 at y p = 1.

    Args:
        prediction: decision values :math:`p`.
        target: labels :math:`y \in \{-1, 1\}`. Other arguments as in :func:`mse`.

    Cortes, Vapnik: Support-Vector Networks (Machine Learning 20, 1995).
    """
    return _element("hinge", prediction, target, sample_weight, reduction, out)


def squared_hinge(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""The square of :func:`hinge`: :math:`\ell(p, y) = \max(0, 1 - y p)^2`."""
    return _element("squared_hinge", prediction, target, sample_weight, reduction, out)


def modified_huber(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Modified Huber loss: :func:`squared_hinge`, but linear for outliers.

    .. math::
        \ell(p, y) = \max(0, 1 - y p)^2 \text{ if } y p \ge -1, \qquad -4 y p \text{ else}

    Arguments as in :func:`hinge`.

    Zhang: Solving Large Scale Linear Prediction Problems Using Stochastic Gradient Descent Algorithms (ICML 2004).
    """
    return _element("modified_huber", prediction, target, sample_weight, reduction, out)


def perceptron(
    prediction: Array,
    target: Array,
    *,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Perceptron loss: :math:`\ell(p, y) = \max(0, -y p)`. Arguments as in :func:`hinge`."""
    return _element("perceptron", prediction, target, sample_weight, reduction, out)


def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    ignore_index: int | None = None,
    sample_weight: Any = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> tuple[Value, Array]:
    r"""Softmax cross-entropy from logits, as ``torch.nn.functional.cross_entropy``.

    .. math::
        p_{ic} = e^{x_{ic}} / \sum_k e^{x_{ik}}, \qquad t_{ic} = w_c ((1 - \epsilon) y_{ic} + \epsilon / C), \qquad
        \ell_i = -\sum_c t_{ic} \log p_{ic}

    Args:
        logits: :math:`x`, of shape (n, C) or, for sequences, (n, ..., C); large values do not overflow.
        labels: integers in [0, C) of shape (n,) or (n, ...), or distributions :math:`y` of the logits' shape and dtype.
        label_smoothing: :math:`\epsilon \in [0, 1]`, the share of each target spread over all classes.
        class_weight: :math:`w`, of shape (C,).
        ignore_index: rows with this label contribute neither to the loss nor to the divisor of a mean.
        sample_weight: of shape (n,), or (n, ...) of sequences.
        reduction, out: see the module. As in torch, the mean is over rows, and with integer labels a row's weight is
            that of its class.

    Example:
        >>> import numpy as np
        >>> from fusedopt import losses
        >>> value, gradient = losses.softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
        >>> round(value, 4), gradient
        (0.6931, array([[ 0.5, -0.5]]))

    Label smoothing: Szegedy et al.: Rethinking the Inception Architecture, arXiv 1512.00567.
    """
    x = _contiguous(logits, "logits")
    if x.ndim > 2:
        return _of_sequences(
            x, logits, labels, out, sample_weight, label_smoothing=label_smoothing, class_weight=class_weight,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    smoothing = float(label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    if not isinstance(labels, np.ndarray) or isinstance(labels, np.ma.MaskedArray):
        raise TypeError(f"labels: expected a NumPy array of integers or of distributions, got {type(labels).__name__}")
    integers, targets = None, None
    if labels.dtype.kind in "iu":
        integers = np.ascontiguousarray(labels, np.int64)
    else:
        targets = _contiguous(labels, "labels")
        if not bool(np.all(targets >= 0)):
            raise ValueError("labels: expected probabilities >= 0")
    w, classes = _weights(sample_weight, x, "sample_weight"), _weights(class_weight, x, "class_weight")
    n = len(x) if x.ndim else 0
    if ignore_index is not None:
        if integers is None:
            raise ValueError("ignore_index: expected labels that are integers, got distributions")
        if integers.shape == (n,) and (ignored := integers == ignore_index).any():
            if reduction == "mean" and ignored.all():
                raise ValueError(f"labels: all are {ignore_index}, the ignore_index: the mean is undefined")
            integers = np.where(ignored, 0, integers)
            w = np.ones(n, x.dtype) if w is None else w
            w = np.where(ignored, x.dtype.type(0), w) if w.shape == (n,) else w  # else the kernel raises the error
            if not np.isfinite(x[ignored]).all():  # zero times NaN is NaN
                x = np.where(ignored[:, None], x.dtype.type(0), x)
    total = None
    if integers is not None and classes is not None and integers.shape == (n,) and classes.ndim == 1:
        inside = integers[(integers >= 0) & (integers < classes.size)]
        if inside.size == n:  # else the kernel raises a better message
            rows = classes[inside].astype(np.float64)
            total = float(rows.sum() if w is None or w.shape != (n,) else rows @ w)
    elif w is not None:
        total = float(w.sum(dtype=np.float64))
    scale = _scale(reduction, n, total)
    value = np.empty(n, x.dtype) if reduction == "none" else None
    gradient = _gradient(out, x, (logits, labels))
    added = _core.softmax_loss(x, integers, targets, classes, w, value, gradient, smoothing, scale, get_num_threads())
    return (added * scale if value is None else value), gradient


def _of_sequences(x: Array, logits: Any, labels: Any, out: Any, weight: Any, **options: Any) -> tuple[Value, Array]:
    """Computes the loss of sequences as one of rows: all axes but the last are flattened."""
    if not isinstance(labels, np.ndarray):
        raise TypeError(f"labels: expected a NumPy array of integers or of distributions, got {type(labels).__name__}")
    expected = x.shape[:-1] if labels.dtype.kind in "iu" else x.shape
    if labels.shape != expected:
        raise ValueError(f"labels: expected shape {expected}, got {labels.shape}")
    if weight is not None:
        weight = np.asarray(weight)
        if weight.shape != x.shape[:-1]:
            raise ValueError(f"sample_weight: expected shape {x.shape[:-1]}, got {weight.shape}")
        weight = weight.reshape(-1)
    gradient = _gradient(out, x, (logits, labels))
    if gradient.shape != x.shape or not gradient.flags.c_contiguous:
        raise ValueError(f"out: expected a C-contiguous array of shape {x.shape}, got {gradient.shape}")
    flat = labels.reshape(-1, *labels.shape[x.ndim - 1 :])
    rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
    value, _ = softmax_cross_entropy(rows, flat, sample_weight=weight, out=slopes, **options)
    return (value.reshape(x.shape[:-1]) if options["reduction"] == "none" else value), gradient


def _penalty(weights: Any, alpha: Any, out: Any, l1: float, l2: float) -> tuple[float, Array]:
    w = _contiguous(weights, "weights")
    strength = _positive(alpha, "alpha", zero=True)
    fresh = out is None
    gradient = _gradient(out, w, (weights,))
    if fresh:
        gradient.fill(0)
    value = _core.penalty(w, gradient, l1 * strength, l2 * strength, 1.0, get_num_threads())
    return value, gradient


def l1_penalty(weights: Array, alpha: float, *, out: Array | None = None) -> tuple[float, Array]:
    r"""The L1 penalty :math:`\alpha \sum |w|` and its (sub)gradient :math:`\alpha \operatorname{sign}(w)`.

    Args:
        weights: any shape, float64 or float32.
        alpha: :math:`\alpha \ge 0`.
        out: gradient to which the penalty's gradient is added; None: a new array.
    """
    return _penalty(weights, alpha, out, 1.0, 0.0)


def l2_penalty(weights: Array, alpha: float, *, out: Array | None = None) -> tuple[float, Array]:
    r"""The L2 penalty :math:`\alpha / 2 \sum w^2` and its gradient :math:`\alpha w`.

    Args:
        weights: any shape, float64 or float32.
        alpha: :math:`\alpha \ge 0`.
        out: gradient to which the penalty's gradient is added; None: a new array.
    """
    return _penalty(weights, alpha, out, 0.0, 1.0)
