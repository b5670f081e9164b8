"""A fully connected network whose parameters are one flat vector: forward, backward, and reusable buffers.

Matrix products are NumPy's BLAS; everything else is in cpp/network/layers.h and losses.h. A linear model is a network
without hidden layers. This file is independent of scikit-learn, and a step allocates nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from .. import _core
from ..config import get_num_threads

Array = NDArray[Any]
ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2, "logistic": 3, "gelu": 4}
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # for the running statistics, as in torch
_LOSSES: dict[str, int] = _core.element_losses()

# Matrix products of fewer multiply-adds than this run on one BLAS thread. Up to this size one thread is as fast as two
# on two idle cores, and 4 to 5 times faster if a core is busy, since BLAS threads wait for each other.
SMALL_PRODUCT = 100_000_000

# A batch of a linear model with fewer multiply-adds than this in a product is trained by the core's loop over the whole
# epoch. Above, BLAS is faster than the core's products by more than a step called from Python costs.
SMALL_BATCH = 150_000

# (output, targets, weights, array for the gradient, scale) -> sum of the rows' losses
LossFunction = Callable[[Array, Array, Array | None, Array, float], float]


class ElementLoss:
    """The elementwise loss with this name in fusedopt.losses."""

    def __init__(self, name: str, parameter: float = 0.0) -> None:
        self.index, self.parameter, self.threads = _LOSSES[name], parameter, get_num_threads()

    def __call__(self, output: Array, target: Array, weight: Array | None, gradient: Array, scale: float) -> float:
        return _core.element_loss(
            self.index, output, target, weight, None, gradient, self.parameter, scale, self.threads
        )


def softmax_loss() -> LossFunction:
    """Softmax cross-entropy from logits, with integer labels as targets."""
    threads = get_num_threads()

    def run(output: Array, target: Array, weight: Array | None, gradient: Array, scale: float) -> float:
        return _core.softmax_loss(output, target, None, None, weight, None, gradient, 0.0, scale, threads)

    return run


def blas_threads(widths: Sequence[int], rows: int) -> contextlib.AbstractContextManager[Any]:
    """A context in which BLAS uses one thread, if all matrix products of the network are small."""
    if rows * max(i * o for i, o in pairwise(widths)) >= SMALL_PRODUCT:
        return contextlib.nullcontext()
    return _controller().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


class _Buffers:
    """The arrays for a batch of a given number of rows: views of those for the largest batch."""

    def __init__(self, owner: Network, rows: int, whole: _Buffers | None) -> None:
        def make(k: int, kind: str) -> Array:
            if whole is not None:
                part: Array = getattr(whole, kind)[k][:rows]
                return part
            return np.empty((rows, owner.widths[k + 1]), owner.dtype)

        layers = range(len(owner.widths) - 1)
        hidden = layers[:-1]
        self.z = [make(k, "z") for k in layers]  # x W + b, or the activation's output unless backward needs its input
        separate = owner.activation == ACTIVATIONS["gelu"] or owner.batch_norm
        self.a = [make(k, "a") if separate and k in hidden else self.z[k] for k in layers]
        self.normal = [make(k, "normal") for k in hidden] if owner.batch_norm else []
        self.out = [make(k, "out") if owner.dropout and k in hidden else self.a[k] for k in layers]
        self.delta = [make(k, "delta") for k in layers]


class Network:
    """A network: weights W_k and intercepts b_k are views of one vector, their gradients views of another.

    With ``batch_norm`` the intercepts of hidden layers are the shifts of the normalisation, and each has a gain.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str,
        dtype: Any,
        batch_norm: bool = False,
        dropout: float = 0.0,
        intercepts: bool = True,
    ) -> None:
        self.widths, self.dtype = list(widths), np.dtype(dtype)
        self.activation = ACTIVATIONS[activation]
        self.batch_norm, self.dropout, self.intercepts = batch_norm, dropout, intercepts
        self.shapes = list(pairwise(self.widths))
        self.n_weights = sum(i * o for i, o in self.shapes)
        gains = sum(self.widths[1:-1]) if batch_norm else 0
        size = self.n_weights + sum(self.widths[1:]) + gains
        self.params, self.grads = np.zeros(size, dtype), np.zeros(size, dtype)
        hidden = self.widths[1:-1] if batch_norm else []
        self.means = [np.zeros(w, dtype) for w in hidden]  # running statistics
        self.variances = [np.ones(w, dtype) for w in hidden]
        self._attach()
        for gain in self.gains:
            gain.fill(1)

    def _attach(self) -> None:
        self.weights, self.biases, self.gains = self.split(self.params)
        self.weight_grads, self.bias_grads, self.gain_grads = self.split(self.grads)
        self._batch = [[np.empty(w, self.dtype) for w in self.widths[1:-1]] for _ in range(3)]
        self._buffers: dict[int, _Buffers] = {}

    def __getstate__(self) -> dict[str, Any]:
        left = ("grads", "weights", "biases", "gains", "weight_grads", "bias_grads", "gain_grads", "_batch", "_buffers")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.grads = np.zeros_like(self.params)
        self._attach()

    def split(self, flat: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """Weights, intercepts and gains as views of a parameter vector."""
        at, out = 0, []
        hidden = self.widths[1:-1] if self.batch_norm else []
        for shapes in (self.shapes, [(w,) for w in self.widths[1:]], [(w,) for w in hidden]):
            views = []
            for shape in shapes:
                size = int(np.prod(shape))
                views.append(flat[at : at + size].reshape(shape))
                at += size
            out.append(views)
        return out[0], out[1], out[2]

    def initialize(self, random: np.random.RandomState) -> None:
        """Initialises weights and intercepts uniformly (Glorot, Bengio 2010), with scikit-learn's random numbers."""
        factor = 2.0 if self.activation == ACTIVATIONS["logistic"] else 6.0
        for k, (i, o) in enumerate(self.shapes):
            bound = np.sqrt(factor / (i + o))
            self.weights[k][...] = random.uniform(-bound, bound, (i, o))
            self.biases[k][...] = random.uniform(-bound, bound, o)
            if k < len(self.shapes) - 1 and self.batch_norm:
                self.biases[k].fill(0)

    def _of(self, rows: int) -> _Buffers:
        if rows not in self._buffers:
            largest = max(self._buffers, default=0)
            if rows > largest:
                self._buffers = {rows: _Buffers(self, rows, None)}
            else:
                whole = self._buffers[largest]
                if len(self._buffers) > 4:  # partial_fit with batches of many sizes
                    self._buffers = {largest: whole}
                self._buffers[rows] = _Buffers(self, rows, whole)
        return self._buffers[rows]

    def loss_and_gradient(
        self, x: Any, y: Array, weight: Array | None, loss: LossFunction, scale: float, seed: int = 0, step: int = 0
    ) -> float:
        """Returns the sum of the rows' losses; ``grads`` receives its gradient times ``scale``."""
        b, threads = self._of(x.shape[0]), get_num_threads()
        last = len(self.weights) - 1
        dense = isinstance(x, np.ndarray)
        h = x
        for k, w in enumerate(self.weights):
            z = b.z[k]
            if k or dense:
                np.matmul(h, w, out=z)
            else:
                z[...] = h @ w
            if k == last:
                _core.layer_forward(0, z, self.biases[k], None, z, threads)
                break
            a = b.a[k]
            if self.batch_norm:
                mean, variance, rate = (part[k] for part in self._batch)
                normal = b.normal[k]
                _core.batch_norm_forward(
                    z, self.gains[k], self.biases[k], mean, variance, rate, normal, z, BATCH_NORM_EPS, threads
                )
                self._run_along(k, x.shape[0])
                _core.layer_forward(self.activation, z, None, None, a, threads)
            elif a is z:
                _core.layer_forward(self.activation, z, self.biases[k], None, a, threads)
            else:
                _core.layer_forward(self.activation, z, self.biases[k], z, a, threads)
            h = b.out[k]
            if self.dropout:
                _core.dropout(a, h, self.dropout, seed, step * len(self.weights) + k, threads)
        value = loss(b.z[last], y, weight, b.delta[last], scale)
        from_input = self.activation == ACTIVATIONS["gelu"]
        for k in range(last, -1, -1):
            delta = b.delta[k]
            if k < last:
                np.matmul(b.delta[k + 1], self.weights[k + 1].T, out=delta)
                if self.dropout:
                    _core.dropout(delta, delta, self.dropout, seed, step * len(self.weights) + k, threads)
                kept = b.z[k] if from_input else b.a[k]
                if self.batch_norm:
                    _core.layer_backward(self.activation, kept, delta, None, threads)
                    rate = self._batch[2][k]
                    _core.batch_norm_backward(
                        delta, b.normal[k], rate, self.gains[k], self.gain_grads[k], self.bias_grads[k], threads
                    )
                else:
                    _core.layer_backward(self.activation, kept, delta, self.bias_grads[k], threads)
            else:
                _core.layer_backward(0, None, delta, self.bias_grads[k] if self.intercepts else None, threads)
            if k:
                np.matmul(b.out[k - 1].T, delta, out=self.weight_grads[k])
            elif dense:
                np.matmul(x.T, delta, out=self.weight_grads[0])
            else:
                self.weight_grads[0][...] = x.T @ delta
        return value

    def _run_along(self, k: int, rows: int) -> None:
        """Updates the running mean and (unbiased) variance with those of the batch."""
        part = self._batch
        for running, now, factor in (
            (self.means[k], part[0][k], 1.0),
            (self.variances[k], part[1][k], rows / max(rows - 1, 1)),
        ):
            running *= 1 - BATCH_NORM_MOMENTUM
            running += BATCH_NORM_MOMENTUM * factor * now

    def folded(self, params: Array) -> tuple[list[Array], list[Array]]:
        """Copies of weights and intercepts for predictions, with batch normalisation (running statistics) folded in."""
        weights, biases, gains = self.split(params)
        weights, biases = [w.copy() for w in weights], [b.copy() for b in biases]
        for w, b, gain, mean, variance in zip(weights, biases, gains, self.means, self.variances, strict=False):
            rate = gain / np.sqrt(variance + self.dtype.type(BATCH_NORM_EPS))
            w *= rate
            b -= mean * rate
        return weights, biases


def predict(x: Any, weights: Sequence[Array], biases: Sequence[Array], activation: str, block: int = 8192) -> Array:
    """The output of the last layer, without its activation, for every row."""
    n, threads, last = x.shape[0], get_num_threads(), len(weights) - 1
    dtype = weights[0].dtype
    out = np.empty((n, weights[-1].shape[1]), dtype)
    with blas_threads([weights[0].shape[0], *(w.shape[1] for w in weights)], min(n, block)):
        for begin in range(0, n, block):
            h = x[begin : begin + block]
            for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
                z = np.ascontiguousarray(h @ w, dtype)
                _core.layer_forward(ACTIVATIONS[activation] if k < last else 0, z, b, None, z, threads)
                h = z
            out[begin : begin + block] = h
    return out
