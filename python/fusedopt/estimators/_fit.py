"""The training loop of all estimators: batches, steps, stopping criteria, history, checkpoints.

No code for particular models here: the settings in which they differ are in a Task.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from .. import _core
from ..config import get_num_threads
from ..numpy import Optimizer
from . import _checkpoint
from ._network import SMALL_BATCH, Array, ElementLoss, LossFunction, Network, blas_threads
from ._rates import Rate

Augment = Callable[[Array, np.random.RandomState], Array]
Split = tuple[Array, Array]  # indices of the training rows and of the held-out rows


@dataclass
class Data:
    """Training data; y is in the form that the loss expects, weight may be None."""

    x: Any
    y: Array
    weight: Array | None

    def rows(self, index: Array) -> Data:
        return Data(self.x[index], self.y[index], None if self.weight is None else self.weight[index])


@dataclass
class Task:
    """The checked settings of one fit: the objective and the stopping criteria."""

    loss: LossFunction
    outputs: int = 1  # divisor of the reported loss
    l1: float = 0.0
    l2: float = 0.0
    per_row: bool = True  # divide penalties by the batch's weight, as MLPClassifier does and SGDClassifier does not
    proximal: float = 0.0  # if > 0: l1 by soft thresholding after the step, by this times learning rate times l1
    batch_size: int = 200
    shuffle: bool = True
    max_iter: int = 200
    tol: float = 1e-4
    tol_params: float | None = None
    patience: int = 10  # epochs without improvement that are tolerated
    score: Callable[[Any, Any], float] | None = None  # (weights, intercepts) -> score on the held-out rows
    by_score: bool = True  # stop by the score and keep the parameters of the best one; else only record it
    callbacks: Sequence[Callable[[dict[str, float]], Any]] = ()  # called with each epoch's row; True stops the fit
    restore_best: bool = True
    ema_decay: float | None = None
    average: int = 0  # step from which parameters are averaged; 0: never
    augment: Augment | None = None
    seed: int = 0
    checkpoint: Path | None = None
    mark: str = ""  # fingerprint of settings and data
    details: dict[str, str] = field(default_factory=dict)
    progress: bool = False
    verbose: bool | int = False
    advice: str = "learning_rate_init"  # setting that the error of a diverging fit names

    @property
    def averages(self) -> bool:
        return self.ema_decay is not None or self.average > 0


_COLUMNS = ("loss", "lr", "score", "grad_norm", "seconds")


@dataclass
class Progress:
    """The state of a fit apart from its arrays, as stored in checkpoints."""

    epoch: int = 0
    best_loss: float = math.inf
    best_score: float = -math.inf
    stale: int = 0
    finished: str = ""  # the stopping criterion that was met
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def history(self) -> dict[str, Array]:
        return {name: np.array(getattr(self, name)) for name in _COLUMNS if getattr(self, name)}

    def last_row(self) -> dict[str, float]:
        return {"epoch": self.epoch} | {name: getattr(self, name)[-1] for name in _COLUMNS if getattr(self, name)}


_NOT_PICKLED = ("_gathered", "_spare", "_opened", "_threads", "_weights", "_grads")  # created again by _revive


class Fit:
    """Network, optimizer, rate and counters, kept between calls of ``partial_fit``."""

    def __init__(self, net: Network, opt: Optimizer, rate: Rate, random: np.random.RandomState) -> None:
        self.net, self.opt, self.rate, self.random = net, opt, rate, random
        self.step = self.samples = 0
        self.last_lr = math.nan
        self.mean: Array | None = None  # EMA or average of the parameters
        self.averaged = 0
        self.interrupted = False  # Ctrl-C ended the last run
        self.progress = Progress()
        self._revive()

    def _revive(self) -> None:
        self._gathered: dict[tuple[str, int], Array] = {}
        self._spare: Array | None = None
        self._opened: list[dict[str, Any]] | None = None  # states of the optimizer, prepared for the core's epochs
        self._threads = get_num_threads()
        self._weights, self._grads = (flat[: self.net.n_weights] for flat in (self.net.params, self.net.grads))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_PICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._revive()

    @property
    def in_force(self) -> Array:
        """The parameters used for predictions: the averaged ones if there are any."""
        return self.net.params if self.mean is None else self.mean

    # ---- one epoch

    def _take(self, name: str, source: Any, index: Array) -> Any:
        if not isinstance(source, np.ndarray):
            return source[index]
        key = (name, len(index))
        if key not in self._gathered:
            self._gathered[key] = np.empty((len(index), *source.shape[1:]), source.dtype)
        # Without mode="clip" NumPy would write to a temporary array first.
        return source.take(index, axis=0, out=self._gathered[key], mode="clip")

    def _batches(self, data: Data, order: Array | None, size: int) -> Iterator[Data]:
        n = data.x.shape[0]
        for begin in range(0, n, size):
            end = min(begin + size, n)
            if end - begin == n:
                yield data
            elif order is None:
                yield data.rows(slice(begin, end))  # type: ignore[arg-type]
            else:
                index, weight = order[begin:end], data.weight
                yield Data(
                    self._take("x", data.x, index),
                    self._take("y", data.y, index),
                    None if weight is None else self._take("weight", weight, index),
                )

    def _one_step(self, task: Task, batch: Data) -> tuple[float, float]:
        """One step on a batch. Returns its loss with penalties, and its weight."""
        net, n = self.net, batch.x.shape[0]
        weight = float(n) if batch.weight is None else float(batch.weight.sum(dtype=np.float64))
        if weight <= 0:
            return 0.0, 0.0
        x = batch.x
        if task.augment is not None:
            x = np.ascontiguousarray(task.augment(x, self.random), net.dtype)
            if x.shape != batch.x.shape:
                raise ValueError(f"augment: expected a batch of shape {batch.x.shape}, got {x.shape}")
        lr = self.last_lr = self.rate.apply(self.opt, self.step)
        scale = 1.0 / weight
        value = net.loss_and_gradient(x, batch.y, batch.weight, task.loss, scale, task.seed, self.step)
        loss = value * scale / task.outputs
        factor = scale if task.per_row else 1.0
        if task.l1 or task.l2:
            l1 = 0.0 if task.proximal else task.l1
            loss += factor * _core.penalty(self._weights, self._grads, l1, task.l2, factor, self._threads)
            if l1 != task.l1:
                loss += factor * _core.penalty(self._weights, None, task.l1, 0.0, 0.0, self._threads)
        if not math.isfinite(loss):
            raise self._diverged(task, f"the loss is {loss}")
        self.opt.step(net.grads)
        if task.proximal and task.l1:
            self._shrink(lr * task.l1 * factor * task.proximal)
        if task.averages:
            self._follow(self._parts(task, 1)[0])
        self.step += 1
        return loss, weight

    def _diverged(self, task: Task, what: str) -> ValueError:
        return ValueError(
            f"{what} at step {self.step} (epoch {self.progress.epoch}): the fit diverges. Try a lower {task.advice} "
            f"(now {self.last_lr:.3g}), max_grad_norm=1.0, or data scaled to unit variance"
        )

    def _shrink(self, by: float) -> None:
        weights, spare = self._weights, self._buffer()[: self.net.n_weights]
        np.clip(weights, -by, by, out=spare)
        np.subtract(weights, spare, out=weights)

    def _buffer(self) -> Array:
        if self._spare is None:
            self._spare = np.empty_like(self.net.params)
        return self._spare

    def _parts(self, task: Task, steps: int) -> list[float]:
        """The share of the parameters in their average after each of the next steps; 0 before the average begins."""
        after = range(self.step + 1, self.step + steps + 1)
        if task.ema_decay is not None:  # less decay at first, so that the average forgets the initial weights
            parts = [1 - min(task.ema_decay, step / (step + 9)) for step in after]
            return parts if self.mean is not None else [1.0, *parts[1:]]
        before = self.averaged + 1 - max(task.average, self.step + 1)
        return [0.0 if step < task.average else 1.0 / (before + step) for step in after]

    def _follow(self, part: float) -> None:
        if part == 0:
            return
        self.averaged += 1
        if self.mean is None:
            self.mean = self.net.params.copy()
            return
        spare = self._buffer()
        np.subtract(self.net.params, self.mean, out=spare)
        spare *= part
        self.mean += spare

    def _epoch(self, task: Task, data: Data, order: Array | None) -> float:
        if self._opened is not None:
            return self._epoch_in_core(task, data, order)
        total = weights = 0.0
        with np.errstate(all="ignore"):  # a loss that is not finite raises an error below
            for batch in self._batches(data, order, task.batch_size):
                loss, weight = self._one_step(task, batch)
                total += loss * weight
                weights += weight
        if weights == 0:
            raise ValueError("sample_weight: expected a positive sum")
        return total / weights

    def _in_core(self, task: Task, data: Data) -> bool:
        """Whether the core's loop for linear models applies to a whole epoch."""
        net, x = self.net, data.x
        opt: Any = self.opt
        return (
            len(net.widths) == 2
            and isinstance(task.loss, ElementLoss)
            and task.augment is None
            and x.dtype == net.dtype
            and (x.flags.c_contiguous if isinstance(x, np.ndarray) else x.format == "csr")
            and min(task.batch_size, x.shape[0]) * net.n_weights < SMALL_BATCH
            and type(opt).step is Optimizer.step
            and not opt._has_timed_options()
        )

    @contextlib.contextmanager
    def _epochs_in_core(self, task: Task, data: Data) -> Iterator[None]:
        """A context in which the optimizer is prepared for :meth:`_epoch_in_core`, if that applies."""
        if not self._in_core(task, data):
            yield
            return
        self.rate.apply(self.opt, self.step)
        opt: Any = self.opt
        self._opened = opt._open(self.net.grads)
        try:
            yield
        finally:
            self._opened = None
            opt._close()

    def _epoch_in_core(self, task: Task, data: Data, order: Array | None) -> float:
        """:meth:`_epoch` in one call of the core."""
        net, loss, x = self.net, task.loss, data.x
        opt: Any = self.opt
        assert isinstance(loss, ElementLoss)
        assert self._opened is not None
        rates = self.rate.rates(opt, self.step, -(-x.shape[0] // task.batch_size))
        for rate in rates:
            if not 0 <= rate < math.inf:
                opt._check({**opt.param_groups[0], "lr": rate}, self.step)  # raises
        parts = self._parts(task, len(rates)) if task.averages else []
        mean = np.zeros_like(net.params) if task.averages and self.mean is None else self.mean
        values, indices, indptr = (x, None, None) if isinstance(x, np.ndarray) else (x.data, x.indices, x.indptr)
        total, weights, done, last, opt.last_grad_norm = _core.linear_epoch(
            opt._batch,
            values,
            indices,
            indptr,
            x.shape[1],
            data.y,
            data.weight,
            order,
            net.params,
            net.grads,
            task.batch_size,
            loss.index,
            loss.parameter,
            task.outputs,
            net.intercepts,
            task.l1,
            task.l2,
            task.per_row,
            task.proximal,
            rates,
            opt.max_grad_norm or 0.0,
            mean if parts else None,
            parts,
        )
        for state in self._opened:
            state["step"] += done
        failed = not math.isfinite(last)
        if done or failed:
            self.last_lr = self.rate.apply(opt, self.step + done - (not failed))
        self.step += done
        if averaged := sum(part > 0 for part in parts[:done]):
            self.averaged += averaged
            self.mean = mean
        if failed:
            raise self._diverged(task, f"the loss is {last}")
        if weights == 0:
            raise ValueError("sample_weight: expected a positive sum")
        return total / weights

    # ---- the loop

    def run(self, task: Task, data: Data, split: Split | None = None, once: bool = False) -> None:
        """Runs epochs until a stopping criterion is met, or one if ``once``. ``split`` is stored in checkpoints."""
        with blas_threads(self.net.widths, min(task.batch_size, data.x.shape[0])):
            self._run(task, data, split, once)

    def _run(self, task: Task, data: Data, split: Split | None, once: bool) -> None:
        p, n = self.progress, data.x.shape[0]
        self.interrupted = False
        order = np.arange(n, dtype=np.int64) if task.shuffle and task.batch_size < n else None
        best: Array | None = None
        if task.checkpoint is not None:
            order, best = self._resume(task, order)
            p = self.progress
        bar = _bar(task)
        try:
            with self._epochs_in_core(task, data):
                while not p.finished and (once or p.epoch < task.max_iter):
                    start = time.perf_counter()
                    if order is not None:
                        self.random.shuffle(order)
                    before = self.net.params.copy() if task.tol_params is not None else None
                    p.loss.append(self._epoch(task, data, order))
                    p.epoch += 1
                    self.samples += n
                    best = self._check_stop(task, best)
                    self.rate.count(self.samples + 1)
                    if before is not None and task.tol_params is not None and not p.finished:
                        moved = float(np.linalg.norm(self.net.params - before))
                        if moved <= task.tol_params * float(np.linalg.norm(before)):
                            p.finished = "tol_params"
                    p.lr.append(self.last_lr)
                    if self.opt.last_grad_norm is not None:
                        p.grad_norm.append(self.opt.last_grad_norm)
                    p.seconds.append(time.perf_counter() - start)
                    row = p.last_row()
                    if [True for callback in task.callbacks if callback(row) is True]:
                        p.finished = "callback"
                    if task.checkpoint is not None:
                        self._save(task, order, best, split)
                    self._report(task, bar)
                    if once:
                        break
        except KeyboardInterrupt:
            self.interrupted = True
            warnings.warn("Training interrupted by user.", stacklevel=2)
        finally:
            if bar is not None:
                bar.close()
        if (
            not once and not self.interrupted and not p.finished and p.epoch >= task.max_iter and task.tol > -math.inf
        ):  # tol was given
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({task.max_iter}) reached and the optimization hasn't "
                "converged yet.",
                ConvergenceWarning,
                stacklevel=2,
            )
        if best is not None and task.restore_best:
            self._put(best)

    def _check_stop(self, task: Task, best: Array | None) -> Array | None:
        """Counts epochs without improvement; sets ``finished`` after too many. Returns the best parameters."""
        p = self.progress
        if task.score is not None:
            score = task.score(*self.net.folded(self.in_force))
            p.score.append(score)
            if task.by_score:
                p.stale = p.stale + 1 if not score >= p.best_score + task.tol else 0
            if score > p.best_score:
                p.best_score = score
                best = self._snapshot() if task.by_score else best
        if task.score is None or not task.by_score:
            p.stale = p.stale + 1 if p.loss[-1] > p.best_loss - task.tol else 0
        p.best_loss = min(p.best_loss, p.loss[-1])
        self.rate.observe(p.loss[-1], p.score[-1] if p.score else None)
        if p.stale > task.patience:
            if p.loss[-1] > 1e3 * abs(p.loss[0]) + 1e3:
                raise self._diverged(task, f"the loss has grown from {p.loss[0]:.3g} to {p.loss[-1]:.3g}")
            if self.rate.no_better():
                p.finished = "score" if task.score is not None and task.by_score else "tol"
            else:
                p.stale = 0
        return best

    def _snapshot(self) -> Array:
        return np.concatenate([self.in_force, *self.net.means, *self.net.variances])

    def _put(self, snapshot: Array) -> None:
        at = self.net.params.size
        self.net.params[...] = snapshot[:at]
        if self.mean is not None:
            self.mean[...] = snapshot[:at]
        for part in (*self.net.means, *self.net.variances):
            part[...] = snapshot[at : at + part.size]
            at += part.size

    # ---- checkpoints

    def _save(self, task: Task, order: Array | None, best: Array | None, split: Split | None) -> None:
        assert task.checkpoint is not None
        state: Any = self.random.get_state(legacy=True)
        name, keys, position, has_gauss, gauss = state
        arrays: dict[str, Any] = {"params": self.net.params, "keys": keys}
        arrays.update({"optimizer." + k: v for k, v in self.opt.state_dict().items()})
        arrays.update({f"mean.{i}": v for i, v in enumerate(self.net.means)})
        arrays.update({f"variance.{i}": v for i, v in enumerate(self.net.variances)})
        optional = {"order": order, "best": best, "followed": self.mean}
        if split is not None:
            optional.update(train=split[0], held_out=split[1])
        arrays.update({k: v for k, v in optional.items() if v is not None})
        meta = {
            "fingerprint": task.mark,
            "details": task.details,
            "progress": vars(self.progress),
            "counts": [self.step, self.samples, self.averaged, task.seed],
            "rate": self.rate.state_dict(),
            "random": [name, position, has_gauss, gauss],
        }
        _checkpoint.save(task.checkpoint, meta, arrays)

    def _resume(self, task: Task, order: Array | None) -> tuple[Array | None, Array | None]:
        assert task.checkpoint is not None
        found = _checkpoint.load(task.checkpoint, task.mark, task.details)
        if found is None:
            return order, None
        meta, arrays = found
        self.progress = Progress(**meta["progress"])
        self.step, self.samples, self.averaged, task.seed = meta["counts"]
        self.rate.load_state_dict(meta["rate"])
        name, position, has_gauss, gauss = meta["random"]
        self.random.set_state((name, arrays["keys"], position, has_gauss, gauss))
        self.net.params[...] = arrays["params"]
        self.opt.load_state_dict({k[10:]: v for k, v in arrays.items() if k.startswith("optimizer.")})
        for kind, parts in (("mean", self.net.means), ("variance", self.net.variances)):
            for i, part in enumerate(parts):
                part[...] = arrays[f"{kind}.{i}"]
        self.mean = arrays.get("followed")
        return (arrays["order"].copy() if "order" in arrays else order), arrays.get("best")

    # ---- reporting

    def _report(self, task: Task, bar: Any) -> None:
        p = self.progress
        if task.verbose:
            print(f"Iteration {p.epoch}, loss = {p.loss[-1]:.8f}")
            if p.score:
                print(f"Validation score: {p.score[-1]:f}")
            if p.finished:
                print(f"Stopped by {p.finished} after {p.epoch} epochs.")
        if bar is not None:
            bar.set_postfix({"loss": p.loss[-1], "lr": p.lr[-1]} | ({"score": p.score[-1]} if p.score else {}))
            bar.update()


def earlier_split(task: Task) -> Split | None:
    """The split of the rows stored in the checkpoint, or None without a checkpoint or split."""
    found = None if task.checkpoint is None else _checkpoint.load(task.checkpoint, task.mark, task.details)
    return None if found is None or "train" not in found[1] else (found[1]["train"], found[1]["held_out"])


def _bar(task: Task) -> Any:
    if not task.progress:
        return None
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        warnings.warn("progress: needs tqdm: pip install tqdm", stacklevel=2)
        return None
    return tqdm(total=task.max_iter, unit="epoch", file=sys.stderr, dynamic_ncols=True)
