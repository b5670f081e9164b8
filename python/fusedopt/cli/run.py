"""``fusedopt run``: runs a training script unchanged, with fusedopt's optimizers in place of torch.optim's.

The script's arguments, ``__main__``, ``sys.path`` and exit status are those of a run without fusedopt. A report at the
end lists what each optimizer did. Child processes started through ``multiprocessing`` also use fusedopt's optimizers,
and write reports of their own.
"""

from __future__ import annotations

import builtins
import io
import json
import multiprocessing.spawn
import multiprocessing.util
import os
import runpy
import statistics
import sys
import threading
import time
import types
import warnings
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from ..torch import FallbackWarning
from ..torch._engine import engine_of
from ..torch._install import REPLACED, install
from ..torch._optimizer import Fused

__all__ = ["Record", "Recorder", "run"]


class Record:
    """What one optimizer did: steps, their durations, and which tensors were updated by kernels or by torch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.name, self.module = type(optimizer).__name__, type(optimizer).__module__
        self.seconds = array("d")  # per step, without its closure
        self.fused = 0  # largest number of tensors that the kernels updated in a step
        self.reasons: dict[str, int] = {}  # reason for the fallback -> largest number of tensors in a step
        self._plans_built = 0

    def count_tensors(self, optimizer: Any) -> None:
        """Counts fused and fallback tensors; called after a step."""
        if not isinstance(optimizer, Fused):
            self.reasons[_why_not(optimizer)] = sum(len(group["params"]) for group in optimizer.param_groups)
            return
        engine = engine_of(optimizer)
        if engine.plans_built == self._plans_built and not engine.fallback.places:
            return
        self._plans_built = engine.plans_built
        tensors = engine.updated_by(optimizer)
        self.fused = max(self.fused, tensors.pop(None))
        for reason, n in tensors.items():
            if n:
                self.reasons[str(reason)] = max(n, self.reasons.get(str(reason), 0))

    def as_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.name,
            "class": f"{self.module}.{self.name}",
            "steps": len(self.seconds),
            "seconds": sum(self.seconds),
            "median_seconds_per_step": statistics.median(self.seconds),
            "fused_tensors": self.fused,
            "torchs_own_step": self.reasons,
        }

    def __str__(self) -> str:
        n = len(self.seconds)
        text = f"{self.name}: {n:,} step{'s' * (n != 1)}, {_human(statistics.median(self.seconds))} each"
        text += f" (median; {_human(sum(self.seconds))} in all), " + (
            f"fused: {_tensors(self.fused)}" if self.fused else "not fused"
        )
        for reason, tensors in self.reasons.items():
            text += f"\n    torch's own step for {_tensors(tensors)}: {reason}"
        return text


def _human(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _tensors(n: int) -> str:
    return f"{n:,} tensor{'s' * (n != 1)}"


def _why_not(optimizer: Optimizer) -> str:
    cls = type(optimizer)
    if cls in REPLACED:
        return "made before the classes were replaced"
    base = next((c for c in cls.__mro__ if c in REPLACED), None)
    if base is not None:
        return f"a custom class derived from torch.optim.{base.__name__}"
    return f"fusedopt has no {cls.__name__}"


class Recorder:
    """Context that records the steps of all optimizers of the process through torch's global step hooks."""

    def __init__(self, file: Path | None = None, quiet: bool = False) -> None:
        self.file, self.quiet = file, quiet
        self.records: list[Record] = []
        self._by_optimizer: weakref.WeakKeyDictionary[Optimizer, Record] = weakref.WeakKeyDictionary()
        self._running: dict[int, list[float]] = {}  # id of a stepping optimizer -> start, seconds in its closure
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._handles = [
            _torch_optimizer.register_optimizer_step_pre_hook(self._before),
            _torch_optimizer.register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._running[id(optimizer)] = running = [0.0, 0.0]
        closure = kwargs.get("closure") if "closure" in kwargs else next((a for a in args[1:] if callable(a)), None)
        if closure is None:
            running[0] = time.perf_counter()
            return None

        def timed(*a: Any, **k: Any) -> Any:
            start = time.perf_counter()
            try:
                return closure(*a, **k)
            finally:
                running[1] += time.perf_counter() - start

        if "closure" in kwargs:
            kwargs = {**kwargs, "closure": timed}
        else:
            args = tuple(timed if a is closure else a for a in args)
        running[0] = time.perf_counter()
        return args, kwargs

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        now = time.perf_counter()
        start, elsewhere = self._running.pop(id(optimizer), (now, 0.0))
        record = self._by_optimizer.get(optimizer)
        if record is None:
            record = self._by_optimizer[optimizer] = Record(optimizer)
            self.records.append(record)
        record.seconds.append(now - start - elsewhere)
        record.count_tensors(optimizer)

    def restart(self) -> None:
        """In a child process: discards the parent's records, and reports when the child exits."""
        self.records, self._running = [], {}
        self._by_optimizer = weakref.WeakKeyDictionary()
        if self.file is not None:
            self.file = self.file.with_suffix(f".{os.getpid()}{self.file.suffix}")
        multiprocessing.util.Finalize(None, self.report_child, exitpriority=0)

    def report_child(self) -> None:
        if self.records:
            self.report(f"process {os.getpid()}")

    def report(self, what: str) -> None:
        """Writes the report to stderr, and as JSON to the file."""
        if self.file is not None:
            text = {"ran": what, "torch": str(torch.__version__), "optimizers": [r.as_dict() for r in self.records]}
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text(json.dumps(text, indent=2) + "\n")
            except OSError as e:  # must not change the exit status of the script
                print(f"fusedopt run: the report cannot be written: {e}", file=sys.stderr)
        if not self.quiet:
            lines = [f"  {record}" for record in self.records] or ["  no optimizer took a step"]
            print("\n".join([f"fusedopt run: {what}", *lines]), file=sys.stderr, flush=True)


class _Child:
    """Sent to a process that ``multiprocessing`` spawns; unpickling it there starts the recording."""

    def __init__(self, file: Path | None, quiet: bool) -> None:
        self.settings = (file, quiet)

    def __reduce__(self) -> Any:
        return _begin_in_child, self.settings


def _begin_in_child(file: Path | None, quiet: bool) -> None:
    begin(Recorder(file, quiet)).restart()


def begin(recorder: Recorder) -> Recorder:
    """Replaces the classes and starts recording, in this process and in its future child processes."""
    install()
    warnings.filterwarnings("ignore", category=FallbackWarning)  # the report contains the reasons
    recorder.__enter__()
    multiprocessing.util.register_after_fork(recorder, Recorder.restart)
    prepare = multiprocessing.spawn.get_preparation_data

    def preparation_data(name: str) -> dict[str, Any]:
        return {**prepare(name), "fusedopt": _Child(recorder.file, recorder.quiet)}

    multiprocessing.spawn.get_preparation_data = preparation_data
    return recorder


def _run_script(path: Path) -> None:
    """Like ``python script.py``: absolute ``__file__``, and ``sys.argv[0]`` as given, which runpy would change."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=str(path), __builtins__=builtins, __cached__=None)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        with io.open_code(str(path)) as file:
            code = compile(file.read(), str(path), "exec")
        exec(code, main.__dict__)
    finally:
        sys.modules["__main__"] = before


def _wait_for_threads() -> None:
    """Joins non-daemon threads, as Python does at exit: the report must include their steps."""
    while left := [t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon]:
        for thread in left:
            thread.join()


def run(
    target: str, args: Sequence[str] = (), *, module: bool = False, report: Path | None = None, quiet: bool = False
) -> None:
    """Runs a script, or a module like ``python -m``, and reports. Exceptions and SystemExit of the script propagate.

    Args:
        target: path of the script or name of the module.
        args: ``sys.argv[1:]`` of the script.
        module: whether the target is a module.
        report: JSON file to write. Under ``torchrun`` ranks above 0 append their rank to the file name, and child
            processes their process id.
        quiet: write no report to stderr.
    """
    rank = os.environ.get("RANK", "0")
    if report is not None and rank != "0":
        report = report.with_suffix(f".rank{rank}{report.suffix}")
    sys.argv = [target, *args]
    if module:
        sys.path.insert(0, os.getcwd())
    elif not Path(target).is_dir() and not target.endswith((".zip", ".pyz")):  # runpy handles those
        sys.path.insert(0, str(Path(target).resolve().parent))
    recorder = begin(Recorder(report.absolute() if report is not None else None, quiet))
    try:
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        elif Path(target).suffix == ".py" and Path(target).is_file():
            _run_script(Path(target).absolute())
        else:
            runpy.run_path(target, run_name="__main__")
    finally:
        _wait_for_threads()
        recorder.report(f"{target}, rank {rank}" if "RANK" in os.environ else target)
