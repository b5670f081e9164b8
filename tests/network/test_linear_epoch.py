"""An epoch of a linear model in the core: its gradient steps, and what it refuses. The fits that use it are tested with
the estimators."""

from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt import _core

N, FEATURES, OUTPUTS = 20, 3, 2
LOSSES = _core.element_losses()
VALUES, INDICES, STARTS = np.ones(4), np.array([0, 1, 2, 0]), np.r_[np.zeros(17, np.int64), [1, 2, 3, 4]]
CSR = {"x": VALUES, "indices": INDICES, "indptr": STARTS}


def epoch(owner: Any = None, **changed: Any) -> tuple[Any, dict[str, Any]]:
    """The result of an epoch of plain SGD over the array ``owner``, by default ``params``; and the arguments."""
    size = (FEATURES + 1) * OUTPUTS
    given: dict[str, Any] = {
        "x": np.random.default_rng(0).normal(size=(N, FEATURES)), "indices": None, "indptr": None, "features": FEATURES,
        "y": np.ones((N, OUTPUTS)), "weight": None, "order": np.arange(N), "params": np.zeros(size),
        "grads": np.zeros(size), "batch_size": 6, "loss": LOSSES["half_mse"], "parameter": 0.0, "divisor": 1.0,
        "intercepts": True, "l1": 0.0, "l2": 0.0, "per_row": False, "proximal": 0.0, "rates": [0.1] * 4,
        "max_norm": 0.0, "mean": None, "follow": [],
    }  # fmt: skip
    given.update(changed)
    opt: Any = fusedopt.SGD(given["params"] if owner is None else owner, lr=1.0)
    opt._open(given["grads"])
    try:
        return _core.linear_epoch(opt._batch, **given), given
    finally:
        opt._close()


def test_batches_are_gradient_steps_in_the_given_order() -> None:
    rng = np.random.default_rng(1)
    order, weight, y = rng.permutation(N), rng.random(N), rng.normal(size=(N, OUTPUTS))
    result, given = epoch(order=order, weight=weight, y=y, l2=0.1, rates=[0.1, 0.2, 0.3, 0.4])
    w, b, total = np.zeros((FEATURES, OUTPUTS)), np.zeros(OUTPUTS), 0.0
    for k, begin in enumerate(range(0, N, 6)):
        rows = order[begin : begin + 6]
        error, by = given["x"][rows] @ w + b - y[rows], weight[rows, None]
        last = (by * error**2).sum() / 2 / by.sum() + 0.1 / 2 * (w**2).sum()
        total += last * by.sum()
        grad = given["x"][rows].T @ (by * error) / by.sum() + 0.1 * w
        b -= (k + 1) / 10 * (by * error).sum(0) / by.sum()
        w -= (k + 1) / 10 * grad
    np.testing.assert_allclose(given["params"], np.r_[w.ravel(), b], 1e-12)
    loss, weights, steps, last_loss, norm = result
    np.testing.assert_allclose([loss, weights, last_loss], [total, weight.sum(), last], 1e-12)
    assert (steps, norm) == (4, None)


def test_values_of_one_element_of_a_sparse_row_are_added() -> None:
    dense = np.zeros((N, FEATURES))
    dense[3, 1] = 5.0
    starts = np.r_[np.zeros(4, np.int32), np.full(N - 3, 2, np.int32)]
    for index in (np.int32, np.int64):
        sparse = {"x": np.array([2.0, 3.0]), "indices": np.array([1, 1], index), "indptr": starts.astype(index)}
        assert epoch(**sparse)[0] == epoch(x=dense)[0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"order": np.arange(N) + 1}, r"order: expected integers in \[0, 20\), got 20 at index 19"),
    ({"order": np.arange(N) - 1}, r"order: expected integers in \[0, 20\), got -1 at index 0"),
    ({"order": np.arange(N, dtype=np.int32)}, r"order: expected contiguous int64 of shape \(20,\)"),
    ({"order": np.arange(N - 1)}, r"order: expected contiguous int64 of shape \(20,\)"),
    ({"rates": [0.1] * 3}, "expected a number for each batch"),
    ({"mean": np.zeros(8), "follow": [0.5]}, "expected a number for each batch"),
    ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
    ({"loss": len(LOSSES)}, "no such loss"),
    ({"loss": -1}, "no such loss"),
    ({"features": 4}, "x: expected one row of features"),
    ({"y": np.ones((N - 1, OUTPUTS))}, "x: expected one row of features"),
    ({"y": np.ones((N, OUTPUTS), np.float32)}, "expected dtype float32 like y, got float64"),
    ({"x": np.ones((N, FEATURES), order="F")}, "x: expected a C-contiguous array"),
    ({"weight": np.ones(N - 1)}, r"weight: expected shape \(20,\)"),
    ({"loss": LOSSES["binary_cross_entropy"], "y": np.full((N, OUTPUTS), 3.0)}, "y: expected targets that"),
    ({**CSR, "indices": INDICES + 1}, r"indices: expected integers in \[0, 3\), got 3 at index 2"),
    ({**CSR, "indptr": np.r_[np.zeros(17, np.int64), [3, 2, 3, 4]]}, "indptr: .* decrease, got 2 at index 18"),
    ({**CSR, "indptr": np.r_[np.zeros(17, np.int64), [1, 2, 3, 5]]}, r"indptr: .* \[0, 5\) .*, got 5 at index 20"),
    ({**CSR, "indices": INDICES.astype(np.int32)}, "indices, indptr: expected arrays of one dtype"),
    ({**CSR, "indices": None}, "indices, indptr: expected arrays of one dtype"),
    ({"owner": np.zeros(8)}, "batch: expected one tensor, params with grads"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_arguments_are_refused_before_anything_changes(changed: dict[str, Any], message: str) -> None:
    params = np.zeros((FEATURES + 1) * OUTPUTS)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        epoch(params=params, **changed)
    assert not params.any()
