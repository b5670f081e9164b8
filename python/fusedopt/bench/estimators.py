"""Contenders of the suite ``estimators``: a network against scikit-learn and a torch loop, linear models on a large
and on small tables against scikit-learn, the softmax loss against NumPy and torch.

Notes report accuracies: of the network and on the large table for test rows after equally many epochs, on small tables
for the training rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusedopt.bench.timing import Contender

if TYPE_CHECKING:
    from fusedopt.bench.cases import Case

Array = NDArray[Any]
OURS, SKLEARN, TORCH = "ours", "scikit-learn", "torch"
ROWS, TEST_ROWS, CHUNK = 60_000, 10_000, 6_000  # images, as in MNIST; one step trains on a CHUNK
LOGISTIC_ROWS, LOGISTIC_COLUMNS, EPOCHS = 1_000_000, 50, 50


@cache
def images() -> tuple[Array, Array, Array, Array]:
    """Digits enlarged to 24 x 24, shifted within 28 x 28, with noise. Training and test rows use different digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    large = np.kron((x / 16).astype(np.float32).reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
    make = np.random.default_rng(0)
    out: list[Array] = []
    for sources, n in ((np.arange(1400), ROWS), (np.arange(1400, len(y)), TEST_ROWS)):
        chosen, place = make.choice(sources, n), make.integers(0, 25, n)
        image = np.zeros((n, 28, 28), np.float32)
        for k in range(25):
            here = np.flatnonzero(place == k)
            image[here, k // 5 : k // 5 + 24, k % 5 : k % 5 + 24] = large[chosen[here]]
        image += np.float32(0.15) * make.standard_normal(image.shape, np.float32)
        out += [image.reshape(n, 784), y[chosen]]
    return out[0], out[1], out[2], out[3]


def _chunks() -> Callable[[], slice]:
    turn = iter(range(10**9))
    return lambda: slice((k := next(turn) * CHUNK % ROWS), k + CHUNK)


def network(batch: int, name: str, seed: int = 0) -> Contender:
    """A step trains on the next CHUNK rows; the note is the test accuracy."""
    x, y, x_test, y_test = images()
    part, classes = _chunks(), np.arange(10)
    if name == TORCH:
        return _torch_network(batch, seed)
    module = importlib.import_module("fusedopt.estimators" if name == OURS else "sklearn.neural_network")
    model = module.MLPClassifier((128,), batch_size=batch, random_state=seed)

    def step() -> None:
        rows = part()
        model.partial_fit(x[rows], y[rows], classes=classes)

    return Contender(step, note=lambda: f"test accuracy {model.score(x_test, y_test):.2%}")


def _torch_network(batch: int, seed: int) -> Contender:
    """The same network in torch, with scikit-learn's initialisation and L2 penalty."""
    import torch
    from torch import nn

    x, y, x_test, y_test = (torch.from_numpy(a) for a in images())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(784, 128), nn.Linear(128, 10)
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        for layer in layers:
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            for p in layer.parameters():
                nn.init.uniform_(p, -bound, bound)
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    alpha = 1e-4 / batch
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": alpha}, {"params": biases}]
    opt = torch.optim.Adam(groups, fused=True)
    part, random = _chunks(), torch.Generator().manual_seed(seed)

    def step() -> None:
        rows = part()
        order = torch.randperm(CHUNK, generator=random) + rows.start
        for begin in range(0, CHUNK, batch):
            index = order[begin : begin + batch]
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            opt.step()

    def accuracy() -> str:
        with torch.no_grad():
            return f"test accuracy {(model(x_test).argmax(1) == y_test).double().mean().item():.2%}"

    return Contender(step, note=accuracy)


@cache
def _rows_of_logistic() -> tuple[Array, Array]:
    make = np.random.default_rng(0)
    x = make.standard_normal((LOGISTIC_ROWS + 100_000, LOGISTIC_COLUMNS), np.float32)
    score = x @ make.standard_normal(LOGISTIC_COLUMNS).astype(np.float32) + 0.5
    return x, (score + make.logistic(size=len(x)) > 0).astype(np.int64)


def _logistic(name: str) -> Contender:
    x, y = _rows_of_logistic()
    train, test = slice(LOGISTIC_ROWS), slice(LOGISTIC_ROWS, None)
    how: dict[str, Any] = {"loss": "log_loss", "max_iter": EPOCHS, "tol": None, "random_state": 0}
    if name == OURS:
        from fusedopt.estimators import LinearClassifier

        model: Any = LinearClassifier(batch_size="full", **how)
    else:
        from sklearn.linear_model import SGDClassifier

        model = SGDClassifier(**how)

    def step() -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ConvergenceWarning: the number of epochs is fixed on purpose
            model.fit(x[train], y[train])

    return Contender(step, note=lambda: f"test accuracy {model.score(x[test], y[test]):.2%}")


def _table(data: str, name: str) -> Contender:
    """Fits of linear models with default settings, which stop by themselves, to a small table of scikit-learn."""
    from sklearn import datasets, linear_model
    from sklearn.preprocessing import scale

    import fusedopt.estimators

    x, y = getattr(datasets, f"load_{data}")(return_X_y=True)
    x = scale(x)
    how: dict[str, Any] = {"random_state": 0} if data == "diabetes" else {"random_state": 0, "loss": "log_loss"}
    kind = "Regressor" if data == "diabetes" else "Classifier"
    model: Any = (
        getattr(fusedopt.estimators, f"Linear{kind}") if name == OURS else getattr(linear_model, f"SGD{kind}")
    )(**how)
    return Contender(
        lambda: model.fit(x, y),
        note=lambda: f"score {model.score(x, y):.3f}, {model.n_iter_} epochs",
    )


def _softmax(name: str) -> Contender:
    """Value and gradient of softmax cross-entropy; the blocked NumPy version uses cache-sized blocks of rows."""
    make = np.random.default_rng(0)
    x = 3 * make.standard_normal((4096, 1000), np.float32)
    labels, out = make.integers(0, 1000, 4096), np.empty_like(x)
    if name == OURS:
        from fusedopt.losses import softmax_cross_entropy

        return Contender(lambda: softmax_cross_entropy(x, labels, out=out))
    if name == TORCH:
        import torch

        logits, target = torch.from_numpy(x).requires_grad_(), torch.from_numpy(labels)

        def torch_step() -> None:
            logits.grad = None
            torch.nn.functional.cross_entropy(logits, target).backward()  # type: ignore[no-untyped-call]

        return Contender(torch_step)
    block = len(x) if name == "NumPy whole" else 64

    def step() -> float:
        total = 0.0
        for begin in range(0, len(x), block):
            g, y = out[begin : begin + block], labels[begin : begin + block]
            rows = np.arange(len(y))
            np.subtract(x[begin : begin + block], x[begin : begin + block].max(1, keepdims=True), out=g)
            chosen = g[rows, y]
            np.exp(g, out=g)
            sums = g.sum(1, keepdims=True)
            total += float((np.log(sums[:, 0]) - chosen).sum())
            g *= 1 / (sums * len(x))
            g[rows, y] -= np.float32(1 / len(x))
        return total / len(x)

    return Contender(step)


def builder(case: Case) -> Callable[[str], Contender]:
    """A function from a contender's name to the contender."""
    if case.model.startswith("table"):
        return lambda name: _table(case.model.split()[1], name)
    if case.model.startswith("MLP"):
        return lambda name: network(int(case.model.split()[1]), name)
    return _logistic if case.model == "logistic" else _softmax
