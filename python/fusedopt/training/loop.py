"""``fusedopt.torch.fit`` and ``fusedopt.torch.Trainer``: a training loop for torch models, short enough to read.

Random generators, checkpoint files and sharding of the data are in ``state.py``; logs and the progress bar in
``log.py``. For sharded models and many devices use Lightning or Accelerate.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .._files import previous
from ..torch._schedule import ScheduledLR
from .log import Logger, loggers, progress_bar
from .state import (
    PRECISIONS,
    PathLike,
    are_arrays,
    as_loader,
    check_counts,
    check_options,
    distribute,
    gathered,
    length_of,
    parts_of,
    processes,
    read_checkpoint,
    rng_state,
    scheduler_of,
    set_rng_state,
    share,
    size_of,
    write_checkpoint,
)


class Callback:
    """Base class of callbacks; setting ``trainer.stop = True`` in one ends training after the step."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """Called after each step of the optimizer, with its training loss."""

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Called after each row of the history. A function passed as a callback is called at this point."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last step."""


class Trainer:
    """Trains a torch model: runs the steps, records the history, writes logs and checkpoints.

    The history gets a row at the end of each epoch, or every ``every`` steps: training loss, learning rate, and the
    loss and metrics on the validation data. Each row updates metric-driven schedules and early stopping, and is logged;
    then the checkpoint is written. Under ``torchrun`` each process trains on its shard of the data, and
    DistributedDataParallel averages the gradients. Rows cover all processes; rank 0 writes logs and checkpoints.

    Args:
        model: maps the inputs of a batch to outputs.
        loss: function of outputs and targets that returns the mean over the batch.
        optimizer: torch or fusedopt optimizer over the model's parameters.
        schedule: learning rate: a fusedopt schedule, any other function of the step, or a torch scheduler.
        schedule_by: ``"step"`` or ``"epoch"``, the unit in which the schedule counts.
        metrics: name -> function of all outputs and all targets of the validation data, as tensors on the CPU.
        precision: ``"bfloat16"`` or ``"float16"`` for autocast, float16 with a GradScaler; None for no autocast.
        accumulate: number of batches per step; the gradient is that of one large batch.
        max_grad_norm: clips the gradients to this global norm; within the step for fusedopt's optimizers.
        ema_decay: decay of an exponential moving average of weights and buffers, ``trainer.ema.module``, which is
            validated. If a fusedopt optimizer with ``ema_decay`` averages the weights within its step, these averages
            are validated, and ``restore_best`` restores them.
        every: number of steps between rows; None for one row per epoch.
        monitor: column that early stopping and metric-driven schedules use; by default ``val_loss``, or ``loss``
            without validation data.
        mode: ``"min"`` if lower is better, or ``"max"``.
        patience: training stops after this many consecutive rows without improvement; None never stops.
        min_delta: minimum change that counts as an improvement.
        restore_best: restore the weights of the best row at the end; by default only with a patience.
        checkpoint: file that is written atomically at every row.
        checkpoint_every: also write the checkpoint every so many steps.
        log: ``.csv`` or ``.jsonl`` files or a folder for TensorBoard, one or several.
        callbacks: :class:`Callback` objects, or functions of the trainer and a row.
        progress: show a progress bar; None shows one if tqdm is installed and the output is a terminal.

    A batch is ``(input, ..., target)`` or a dict; for others override :meth:`forward`.

    Attributes:
        epoch, step: number of completed epochs and steps.
        history: name -> list, one list per column of the rows.
        best: value and step of the best row, and its weights if they are to be restored.
        stop: set it to True to end training.

    Raises:
        ValueError, TypeError: an argument is out of its range or has the wrong type.

    Example:
        >>> import torch
        >>> from fusedopt.schedules import Cosine
        >>> from fusedopt.torch import AdamW, Trainer
        >>> data = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(10)]
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = Trainer(model, torch.nn.MSELoss(), AdamW(model.parameters()), schedule=Cosine(1e-2, 50))
        >>> trainer.fit(data, epochs=5).step
        50
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Callable[[int], float] | LRScheduler | None = None,
        schedule_by: str = "step",
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        precision: str | None = None,
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        every: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
        patience: int | None = None,
        min_delta: float = 0.0,
        restore_best: bool | None = None,
        checkpoint: PathLike | None = None,
        checkpoint_every: int | None = None,
        log: PathLike | Logger | Sequence[PathLike | Logger] | None = None,
        callbacks: Sequence[Callback | Callable[[Trainer, dict[str, float]], Any]] = (),
        progress: bool | None = None,
    ) -> None:
        check_options(locals())
        if "loss" in (metrics or {}):
            raise ValueError("metrics: 'loss' is reserved for the loss; rename the metric")
        self.model, self.loss, self.optimizer, self.metrics = model, loss, optimizer, dict(metrics or {})
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.schedule = scheduler_of(schedule, optimizer)
        self.ema: AveragedModel | None = None
        if ema_decay is not None:
            average = get_ema_multi_avg_fn(ema_decay)  # type: ignore[no-untyped-call, unused-ignore]
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._net = distribute(model, self.device)
        self._dtype = PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._clip = max_grad_norm
        if max_grad_norm is not None and hasattr(optimizer, "max_grad_norm"):
            optimizer.max_grad_norm, self._clip = max_grad_norm, None
        self._by, self._accumulate, self._every, self._save_every = schedule_by, accumulate, every, checkpoint_every
        self._monitor, self._sign, self._patience = monitor, 1 if mode == "min" else -1, patience
        self._min_delta = min_delta
        self._restore = patience is not None if restore_best is None else restore_best
        self._checkpoint, self._loggers, self._callbacks = checkpoint, loggers(log), list(callbacks)
        self._progress = progress
        self.epoch = self.step = self._batch = self._bad = 0
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.stop = False
        self._sum = self._rows_seen = 0.0  # sum of the losses since the last row, and the number of samples
        self._norm = math.nan
        self._epoch_rng: dict[str, Any] = {}
        self._saved_rng: dict[str, Any] = {}

    @property
    def history(self) -> dict[str, list[float]]:
        """The rows as columns: epoch, step, loss, lr, ...; NaN if a row lacks the column."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return {name: [row.get(name, math.nan) for row in self.rows] for name in names}

    def forward(self, net: nn.Module, batch: Any) -> tuple[torch.Tensor, Any, Any]:
        """Loss, outputs and targets of a batch. Override it for other kinds of batches.

        A batch is ``(input, ..., target)``, or a dict with the target under ``target``, ``targets``, ``label``,
        ``labels`` or ``y``. The other entries of a dict are the model's keyword arguments.
        """
        inputs, named, target = parts_of(batch)
        output = net(*inputs, **named)
        return self.loss(output, target), output, target

    def predict(self, data: Any, *, targets: bool | None = None, batch_size: int = 32) -> Any:
        """The outputs for all rows, on the CPU; of the averaged weights if there are any, else of the model.

        Args:
            data: a DataLoader or another iterable of batches, or one array or tensor of rows.
            targets: whether the last part of a batch is a target, as in training; None: if there are several parts.
            batch_size: rows per batch of an array or tensor.

        Returns:
            The outputs of all batches, concatenated. With several processes, each returns those of its own batches.
        """
        check_counts({"batch_size": batch_size})
        if isinstance(data, torch.Tensor | np.ndarray):
            data = as_loader((data,), batch_size, self.model, shuffle=False)
        net: nn.Module = self.model if self.ema is None else self.ema.module
        was_training, outputs = net.training, list[Any]()
        net.eval()
        with self._averaged(), torch.no_grad():
            for batch in data:
                inputs, named, _ = parts_of(self._moved(batch), targets)
                with self._autocast():
                    outputs.append(tree_map_only(torch.Tensor, lambda t: t.cpu(), net(*inputs, **named)))
        net.train(was_training)
        if not outputs:
            raise ValueError("data: no batch; expected at least one")
        return tree_map(lambda *parts: torch.cat(parts), *outputs)

    # --- training ---

    def fit(
        self,
        train: Iterable[Any],
        validation: Iterable[Any] | None = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int = 32,
        resume: bool = False,
    ) -> Trainer:
        """Trains until ``epochs`` or ``steps`` are completed, whichever comes first.

        Args:
            train: a DataLoader or another iterable of batches that can be iterated once per epoch; or arrays or
                tensors ``(input, ..., target)`` of all rows, which are shuffled.
            validation: the same kinds of data, for the columns ``val_...``.
            epochs: total number of epochs, including completed ones.
            steps: total number of optimizer steps, including completed ones.
            batch_size: rows per batch of arrays and tensors.
            resume: resume from the file ``checkpoint``, if it exists. With the same data the result has the same bits
                as uninterrupted training. Batches of the unfinished epoch are drawn again and skipped.

        Returns:
            The trainer itself.

        Raises:
            FloatingPointError: the loss is not finite; the message suggests a remedy.
            ValueError: the checkpoint is damaged or was not written by this Trainer, the data have no batch, or
                neither epochs nor steps are given.
            FileExistsError: the checkpoint of an earlier run exists, and ``resume`` is False.
        """
        if epochs is None and steps is None:
            raise ValueError("epochs, steps: expected at least one of the two")
        check_counts({"epochs": epochs, "steps": steps, "batch_size": batch_size})
        train = as_loader(train, batch_size, self.model, shuffle=True) if are_arrays(train) else train
        if validation is not None and are_arrays(validation):
            validation = as_loader(validation, batch_size, self.model, shuffle=False)
        self.stop = False
        if resume:
            self._resume()
        else:
            self._refuse_overwriting()
        self._began = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        train = share(train, train=True)
        validation = None if validation is None else share(validation, train=False)
        first = processes()[0] == 0
        for logger in self._loggers if first else ():
            logger.begin(self.rows)
        self._notify("on_fit_start")
        length = length_of(train)
        totals = [steps] if length is None or epochs is None else [steps, epochs * math.ceil(length / self._accumulate)]
        total = min((n for n in totals if n is not None), default=None)
        with progress_bar(self._progress if first else False, total, self.step) as self._bar:
            while not self._done(epochs, steps):
                self._epoch(train, validation, length, lambda: self._done(epochs, steps))
            if self._rows_seen:
                self._row(validation)
                self._save(train)
        if self._restore and "model" in self.best:
            self.model.load_state_dict(self.best["model"])
            if self.ema is not None:
                self.ema.load_state_dict(self.best["ema"])
        self._notify("on_fit_end")
        return self

    def _done(self, epochs: int | None, steps: int | None) -> bool:
        return self.stop or self.epoch >= (epochs or math.inf) or self.step >= (steps or math.inf)

    def _epoch(self, train: Any, validation: Any, length: int | None, done: Callable[[], bool]) -> None:
        """Runs the rest of the epoch, or until done. Batches of an unfinished epoch are drawn again and skipped."""
        now, self._saved_rng = self._saved_rng or rng_state(train), {}
        set_rng_state(self._epoch_rng if self._batch else now, train)
        self._epoch_rng = rng_state(train)
        sampler: Any = getattr(train, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        batches = iter(train)
        if self._batch:
            if sum(1 for _ in itertools.islice(batches, self._batch)) < self._batch:
                raise ValueError(f"train: expected more than {self._batch} batches, as in the checkpoint")
            set_rng_state(now, train)
        self._net.train()
        while group := list(itertools.islice(batches, self._accumulate)):
            lr = float(self.optimizer.param_groups[0]["lr"])
            loss = self._step(group)
            self.step, self._batch = self.step + 1, self._batch + len(group)
            self._bar.update(1)
            self._bar.set_postfix({"loss": f"{loss:.4g}", "lr": f"{lr:.3g}", **self._shown()}, refresh=False)
            self._notify("on_step_end", loss)
            ended = self._batch == length
            if ended:
                self.epoch, self._batch = self.epoch + 1, 0
            if self.step % self._every == 0 if self._every else ended:
                self._row(validation, lr)
                self._after(ended, train, True)
            else:
                self._after(ended, train, self._save_every is not None and self.step % self._save_every == 0)
            if ended or done():
                return
        if not self._batch:
            raise ValueError("train: no batch in this epoch; expected data that can be iterated more than once")
        self.epoch, self._batch = self.epoch + 1, 0
        if not self._every:
            self._row(validation)
        self._after(True, train, True)

    def _after(self, ended: bool, train: Any, save: bool) -> None:
        if ended and self._by == "epoch" and not isinstance(self.schedule, ReduceLROnPlateau | None):
            self.schedule.step()
        if save:
            self._save(train)

    def _step(self, group: list[Any]) -> float:
        """Forward and backward for each batch, then one optimizer step. Returns the loss."""
        sizes = [size_of(batch) for batch in group]
        total = 0.0
        self.optimizer.zero_grad()
        for i, (batch, size) in enumerate(zip(group, sizes, strict=True)):
            quiet = self._net is not self.model and i < len(group) - 1  # DDP averages gradients with the last batch
            with self._net.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                batch = self._moved(batch)
                with self._autocast():
                    loss = self.forward(self._net, batch)[0]
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(self._advice(value, batch))
                loss = self._scaler.scale(loss * (size / sum(sizes)) if len(group) > 1 else loss)
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            total += value * size
        if self._clip is not None:
            self._scaler.unscale_(self.optimizer)
            self._norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._clip))
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if getattr(self.optimizer, "last_grad_norm", None) is not None:
            self._norm = float(self.optimizer.last_grad_norm)  # type: ignore[attr-defined]
        if self._scaler.get_scale() >= scale:  # a lower scale means that the step was skipped
            if self._by == "step" and not isinstance(self.schedule, ReduceLROnPlateau | None):
                self.schedule.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        self._sum, self._rows_seen = self._sum + total, self._rows_seen + sum(sizes)
        return total / sum(sizes)

    def _advice(self, value: float, batch: Any) -> str:
        lr = float(self.optimizer.param_groups[0]["lr"])
        text = f"the loss is {value} at step {self.step} (lr {lr:g}); "
        if not all(t.isfinite().all() for t in tree_leaves(batch) if isinstance(t, torch.Tensor)):
            return text + "the batch contains NaN or infinity: check the data"
        half = ", precision='bfloat16'" if self._dtype == torch.float16 else ""
        return text + f"try a smaller lr, a warm-up (fusedopt.schedules.LinearWarmup), max_grad_norm=1.0{half}"

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    def _moved(self, batch: Any) -> Any:
        if self.device.type == "cpu":
            return batch
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device, non_blocking=True), batch)

    # --- rows ---

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """``loss`` and the metrics over all of the data, of the averaged weights if there are any."""
        net: nn.Module = self.model if self.ema is None else self.ema.module
        was_training, total, rows = net.training, 0.0, 0
        outputs: list[Any] = []
        net.eval()
        with self._averaged(), torch.no_grad():
            for batch in share(data, train=False):
                with self._autocast():
                    loss, output, target = self.forward(net, self._moved(batch))
                total, rows = total + float(loss) * size_of(batch), rows + size_of(batch)
                if self.metrics:
                    outputs.append((output.float().cpu(), target.cpu()))
        net.train(was_training)
        parts = gathered((total, rows, outputs))
        rows = sum(part[1] for part in parts)
        if not rows:
            raise ValueError("validation: no batch; expected data that can be iterated more than once")
        values = {"loss": sum(part[0] for part in parts) / rows}
        if self.metrics:
            pairs = [pair for part in parts for pair in part[2]]
            output, target = (torch.cat(each) for each in zip(*pairs, strict=True))
            values.update({name: float(metric(output, target)) for name, metric in self.metrics.items()})
        return values

    def _averaged(self) -> contextlib.AbstractContextManager[Any]:
        """A context with the averaged weights of the optimizer, if it keeps them, in the model."""
        if any(group.get("ema_decay") is not None for group in self.optimizer.param_groups):
            return self.optimizer.ema_parameters()  # type: ignore[attr-defined, no-any-return]
        return contextlib.nullcontext()

    def _row(self, validation: Iterable[Any] | None, lr: float | None = None) -> None:
        """Adds a row to the history; updates schedule, early stopping, loggers and callbacks."""
        parts = gathered((self._sum, self._rows_seen))
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": sum(part[0] for part in parts) / sum(part[1] for part in parts),
            "lr": float(self.optimizer.param_groups[0]["lr"]) if lr is None else lr,
        }
        self._sum = self._rows_seen = 0.0
        if not math.isnan(self._norm):
            row["grad_norm"] = self._norm
        if validation is not None:
            row.update({f"val_{name}": value for name, value in self.evaluate(validation).items()})
        row["seconds"] = time.perf_counter() - self._began
        self.rows.append(row)
        monitor = self._monitor or ("loss" if validation is None else "val_loss")
        if monitor not in row:
            raise ValueError(f"monitor: expected one of {', '.join(row)}, got {monitor!r}")
        if isinstance(self.schedule, ScheduledLR):
            self.schedule.observe(row[monitor])
        elif isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(row[monitor])
        if self._sign * row[monitor] < self._sign * self.best.get("value", self._sign * math.inf) - self._min_delta:
            self.best, self._bad = {"value": row[monitor], "step": self.step}, 0
            if self._restore:
                with self._averaged():
                    self.best["model"] = copy.deepcopy(self.model.state_dict())
                self.best["ema"] = None if self.ema is None else copy.deepcopy(self.ema.state_dict())
        else:
            self._bad += 1
            self.stop |= self._patience is not None and self._bad >= self._patience
        for logger in self._loggers if processes()[0] == 0 else ():
            logger.add(row)
        self._notify("on_log", row)

    def _shown(self) -> dict[str, str]:
        last = self.rows[-1] if self.rows else {}
        return {name: f"{value:.4g}" for name, value in last.items() if name.startswith("val_")}

    def _notify(self, event: str, *what: Any) -> None:
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                getattr(callback, event)(self, *what)
            elif event == "on_log":
                callback(self, *what)

    # --- checkpoints ---

    def _save(self, train: Any) -> None:
        if self._checkpoint is None:
            return
        own = gathered((rng_state(train), self._epoch_rng, self._sum, self._rows_seen))
        if processes()[0] == 0:
            parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "ema": self.ema}
            place = {name: getattr(self, name) for name in _PLACE}
            value = {name: None if part is None else part.state_dict() for name, part in parts.items()}
            value |= {"optimizer_class": type(self.optimizer).__name__}
            value |= {"format": "fusedopt.Trainer 1", "scaler": self._scaler.state_dict(), "place": place, "own": own}
            write_checkpoint(value, self._checkpoint)
        if processes()[1] > 1:
            distributed.barrier()

    def _refuse_overwriting(self) -> None:
        """Raises FileExistsError instead of overwriting the checkpoint of an earlier run."""
        if self._checkpoint is None or self.step:  # after the first step the file belongs to this run
            return
        path = Path(self._checkpoint)
        exists = gathered(path.exists() or previous(path).exists())[0]
        if exists:
            raise FileExistsError(
                f"checkpoint: {path} exists; resume=True resumes from it. To start over, delete it"
                f"{' and ' + previous(path).name if previous(path).exists() else ''}, or give another path"
            )

    def _resume(self) -> None:
        """Loads the checkpoint, if there is one; rank 0 reads the file for all processes."""
        if self._checkpoint is None:
            raise ValueError("resume: expected checkpoint= with the file to resume from")
        rank, world = processes()
        value: Any = None
        try:
            value = read_checkpoint(self._checkpoint) if rank == 0 else None
        except ValueError as e:
            value = e
        value = gathered(value)[0]
        if isinstance(value, Exception):
            raise value
        if value is None:
            return
        if len(value["own"]) != world:
            raise ValueError(f"checkpoint: written by {len(value['own'])} processes; this run has {world}")
        for name in ("schedule", "ema"):
            if (value[name] is None) != (getattr(self, name) is None):
                there = "no " if value[name] is None else "a "
                raise ValueError(f"checkpoint: it contains {there}{name}; expected a Trainer with the same options")
        ours, theirs = type(self.optimizer).__name__, value.get("optimizer_class")  # 0.1.0 did not write it
        if theirs not in (None, ours):
            raise ValueError(f"checkpoint: written with the optimizer {theirs}; this Trainer has {ours}")
        self.model.load_state_dict(value["model"])
        for name in ("optimizer", "schedule", "ema"):
            if value[name] is not None:
                getattr(self, name).load_state_dict(value[name])
        if value["scaler"]:
            self._scaler.load_state_dict(value["scaler"])
        for name, one in value["place"].items():
            setattr(self, name, one)
        self._saved_rng, self._epoch_rng, self._sum, self._rows_seen = value["own"][rank]


_PLACE = ("epoch", "step", "_batch", "_bad", "rows", "best", "stop", "_norm")


def fit(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    resume: bool = False,
    **options: Any,
) -> Trainer:
    """Creates a :class:`Trainer` with these options and calls its :meth:`~Trainer.fit`.

    Args:
        model: as in :class:`Trainer`; so are loss, optimizer and all further options.
        train: as in :meth:`Trainer.fit`; so are validation, epochs, steps, batch_size and resume.

    Returns:
        The trainer.

    Raises:
        The exceptions of both.
    """
    trainer = Trainer(model, loss, optimizer, **options)
    return trainer.fit(train, validation, epochs=epochs, steps=steps, batch_size=batch_size, resume=resume)
