"""Helpers of the training loop: argument checks, batches, random generators, checkpoint files, processes."""

from __future__ import annotations

import atexit
import os
import random
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from .._files import previous, write_whole
from ..rules import check_max_grad_norm
from ..torch._schedule import ScheduledLR

PathLike = str | os.PathLike[str]

PRECISIONS = {None: None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- arguments ---


def check_options(given: dict[str, Any]) -> None:
    """Checks the arguments of Trainer. Raises ValueError, naming the argument that is out of its range."""
    known = {"precision": tuple(PRECISIONS), "schedule_by": ("step", "epoch"), "mode": ("min", "max")}
    for name, values in known.items():
        if given[name] not in values:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}, got {given[name]!r}")
    check_counts({name: given[name] for name in ("accumulate", "every", "checkpoint_every", "patience")})
    check_max_grad_norm(given["max_grad_norm"])
    decay = given["ema_decay"]
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"ema_decay: expected a number in [0, 1) or None, got {decay!r}")


def check_counts(given: dict[str, Any]) -> None:
    """Raises ValueError for a value that is neither None nor a positive integer."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")


def length_of(data: Any) -> int | None:
    """The number of batches, or None if the data have no length."""
    try:
        return len(data)
    except TypeError:  # an iterable data set
        return None


def scheduler_of(schedule: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule as a torch scheduler."""
    if schedule is None or isinstance(schedule, LRScheduler):
        return schedule
    if not callable(schedule):
        raise TypeError(f"schedule: expected a function of the step or a torch scheduler, got {schedule!r}")
    return ScheduledLR(optimizer, lr=schedule)


# --- batches ---

TARGETS = ("target", "targets", "label", "labels", "y")
"""Possible keys of the target in a batch that is a dict."""


def parts_of(batch: Any, targets: bool | None = True) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs, named inputs and target of a batch. ``targets=None``: the last of several parts is the target."""
    if isinstance(batch, Mapping):
        names = [name for name in TARGETS if name in batch]
        if targets and len(names) != 1:
            raise ValueError(
                f"batch: expected one of {', '.join(TARGETS)} in the dict, got {', '.join(map(str, batch))}"
            )
        return (), {k: v for k, v in batch.items() if k not in names}, batch[names[0]] if names else None
    if isinstance(batch, torch.Tensor) or not isinstance(batch, Sequence):
        if targets:
            raise ValueError(f"batch: expected (input, ..., target) or a dict, got a {type(batch).__name__}")
        return (batch,), {}, None
    if targets is None:
        targets = len(batch) > 1
    return (tuple(batch[:-1]), {}, batch[-1]) if targets else (tuple(batch), {}, None)


def are_arrays(data: Any) -> bool:
    """Whether the data are a tuple of arrays or tensors of equal length with all rows, not a sequence of batches."""
    if not isinstance(data, tuple) or len(data) < 2 or not all(isinstance(a, torch.Tensor | np.ndarray) for a in data):
        return False
    if len({len(a) for a in data}) > 1:
        raise ValueError(f"train: expected arrays of equal length, got {', '.join(str(len(a)) for a in data)} rows")
    return True


def as_loader(arrays: Iterable[Any], batch_size: int, model: nn.Module, shuffle: bool) -> DataLoader[Any]:
    """Batches of arrays or tensors; NumPy's floats become the dtype of the model's parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = [
        torch.from_numpy(np.ascontiguousarray(a)).to(dtype if a.dtype.kind == "f" else None)
        if isinstance(a, np.ndarray)
        else a
        for a in arrays
    ]
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=shuffle)


# --- random generators ---


def rng_state(loader: Iterable[Any]) -> dict[str, Any]:
    """The state of the global generators of torch, NumPy and Python, and of the loader's; loads with weights_only."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002  # data transforms may use it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_rng_state(state: dict[str, Any], loader: Iterable[Any]) -> None:
    """Restores the state from :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    for generator, one in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(one)


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    holders = (loader, getattr(loader, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


# --- files ---


def write_checkpoint(value: dict[str, Any], path: PathLike) -> None:
    """Writes a checkpoint atomically; the previous one is kept as ``<name>.previous``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda file: torch.save(value, file))


def read_checkpoint(path: PathLike) -> dict[str, Any] | None:
    """The checkpoint at this path, or None if there is none. If it is damaged, warns and reads the previous one.

    Raises:
        ValueError: no undamaged checkpoint is left, or Trainer did not write the file.
    """
    target, damage = Path(path), ""
    for candidate in (target, previous(target)):
        if not candidate.exists():
            continue
        try:
            value = _read_whole(candidate)
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as e:
            damage = f"checkpoint: {candidate} is damaged ({e})"
            os.replace(candidate, candidate.with_name(candidate.name + ".damaged"))  # else it becomes the previous
            continue
        if damage:
            warnings.warn(f"{damage}; resuming from the previous one, {candidate.name}", stacklevel=2)
        return value
    if damage:
        raise ValueError(f"{damage}, and there is no other one")
    return None


def _read_whole(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
        if (broken := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad checksum of {broken}")
    value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, dict) or value.get("format") != "fusedopt.Trainer 1":
        raise ValueError(f"checkpoint: {path} was not written by Trainer")
    return value


# --- several processes ---


def processes() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    world = processes()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    distributed.all_gather_object(values, value)
    return values


def share(loader: Iterable[Any], train: bool) -> Iterable[Any]:
    """This process's shard of a loader. A loader with a custom sampler is assumed to be sharded already.

    Shards for training have equal length, so a few rows occur twice. Other shards contain every row once.
    """
    rank, world = processes()
    if world == 1 or not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return loader
    sampler: Any = loader.sampler
    if type(sampler) is RandomSampler and (sampler.replacement or sampler.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        return loader
    if type(sampler) not in (RandomSampler, SequentialSampler):
        return loader
    if train:
        sampler = DistributedSampler(loader.dataset, world, rank, shuffle=type(sampler) is RandomSampler)
    else:
        sampler = range(rank, len(loader.dataset), world)  # type: ignore[arg-type]
    same = (
        "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    options = {name: getattr(loader, name) for name in same}
    return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, **options)


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped by DistributedDataParallel if torchrun has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.is_available() and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    if processes()[1] == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return nn.parallel.DistributedDataParallel(model)


def size_of(batch: Any) -> int:
    """The number of samples in a batch."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return len(leaf)
    return 1
