"""What the loop in ``loop.py`` calls: its arguments checked, random generators, files, shares of the data."""

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
    """Refuses arguments of Trainer that are out of their range."""
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
    """Refuses what is neither None nor a positive integer."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")


def length_of(data: Any) -> int | None:
    """How many batches it has, if it says so."""
    try:
        return len(data)
    except TypeError:  # of an iterable data set
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
"""What the target of a batch that is a dict may be called."""


def parts_of(batch: Any, targets: bool | None = True) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs, named inputs and the target of a batch; None decides by the number of parts whether there is a target."""
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
    """Whether it is all rows at once: a tuple of arrays or tensors of one length, and no sequence of batches."""
    if not isinstance(data, tuple) or len(data) < 2 or not all(isinstance(a, torch.Tensor | np.ndarray) for a in data):
        return False
    if len({len(a) for a in data}) > 1:
        raise ValueError(f"train: expected arrays of one length, got {', '.join(str(len(a)) for a in data)} rows")
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
    """The state of torch's, NumPy's and Python's global generators and of the loader's own; loads with weights_only."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002  # transforms of data may use the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_rng_state(state: dict[str, Any], loader: Iterable[Any]) -> None:
    """Puts back what :func:`rng_state` took."""
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
    """Writes a checkpoint whole or not at all; the one that stood there is kept beside it, as ``<name>.previous``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda file: torch.save(value, file))


def read_checkpoint(path: PathLike) -> dict[str, Any] | None:
    """The checkpoint at this path, or None where there is none. A damaged one is refused: the one before it is read.

    Raises:
        ValueError: if there is no whole one, or the file is something else.
    """
    target, damage = Path(path), ""
    for candidate in (target, previous(target)):
        if not candidate.exists():
            continue
        try:
            value = _read_whole(candidate)
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as e:
            damage = f"checkpoint: {candidate} is damaged ({e})"
            os.replace(candidate, candidate.with_name(candidate.name + ".damaged"))  # or it would become the previous
            continue
        if damage:
            warnings.warn(f"{damage}; going on from the one before it, {candidate.name}", stacklevel=2)
        return value
    if damage:
        raise ValueError(f"{damage}, and there is no other beside it")
    return None


def _read_whole(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch reads without looking at the checksums
        if (broken := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad checksum of {broken}")
    value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, dict) or value.get("format") != "fusedopt.Trainer 1":
        raise ValueError(f"checkpoint: {path} was not written by Trainer")
    return value


# --- several processes ---


def processes() -> tuple[int, int]:
    """The rank of this process and the number of all."""
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
    """This process's share of a loader; a loader that samples in its own way is taken to give it already.

    Shares of a training loader are equally long (a few rows come twice); those of another hold every row once.
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
    """The model as it trains: wrapped, where torchrun has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.is_available() and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    if processes()[1] == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return nn.parallel.DistributedDataParallel(model)


def size_of(batch: Any) -> int:
    """How many samples are in it."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return len(leaf)
    return 1
