"""Progress reporting: the progress bar, and logs as CSV, JSON lines or for TensorBoard.

A logger receives all rows so far when training starts or resumes, then each new row.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PathLike = str | os.PathLike[str]
Row = Mapping[str, float]


class Logger(Protocol):
    """Receives rows of the history: numbers by name."""

    def begin(self, rows: Sequence[Row]) -> None:
        """Called when training starts or resumes, with the rows so far."""

    def add(self, row: Row) -> None:
        """Called with each new row."""


class JSONLines:
    """Writes one JSON object per line; a number that is not finite is written as null."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def begin(self, rows: Sequence[Row]) -> None:
        """Rewrites the file, so that it contains no row twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(map(self._line, rows)))

    def add(self, row: Row) -> None:
        """Appends a line."""
        with open(self.path, "a") as file:
            file.write(self._line(row))

    def _line(self, row: Row) -> str:
        return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


class CSV:
    """Writes a table with one column per name."""

    def __init__(self, path: PathLike) -> None:
        self.path, self._rows = Path(path), list[Row]()

    def begin(self, rows: Sequence[Row]) -> None:
        """Rewrites the file, so that it contains no row twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = list(rows)
        with open(self.path, "w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, self._columns(rows))
                writer.writeheader()
                writer.writerows(rows)

    def add(self, row: Row) -> None:
        """Appends a line, or rewrites the table if the row has a new column."""
        self._rows.append(row)
        columns = self._columns(self._rows[:-1])
        if not set(row) <= set(columns):
            self.begin(self._rows)
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _columns(self, rows: Sequence[Row]) -> list[str]:
        return list(dict.fromkeys(name for row in rows for name in row))


class TensorBoard:
    """Writes to a TensorBoard folder; needs the package ``tensorboard``."""

    def __init__(self, folder: PathLike) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(f"log: {folder} is a folder for TensorBoard: pip install tensorboard") from e
        self._make: Any = lambda step: SummaryWriter(str(folder), purge_step=step)
        self._writer: Any = None

    def begin(self, rows: Sequence[Row]) -> None:
        """Opens the folder. TensorBoard discards what was written after the last of these rows."""
        self._writer = self._make(int(rows[-1]["step"]) + 1 if rows else 0)

    def add(self, row: Row) -> None:
        """Adds a point to each curve."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()


def loggers(log: PathLike | Logger | Sequence[PathLike | Logger] | None) -> list[Logger]:
    """The loggers for ``log``: ``.csv`` or ``.jsonl`` files, TensorBoard folders, objects with begin and add."""
    several: list[Any] = [] if log is None else list(log) if isinstance(log, list | tuple) else [log]
    return [one if hasattr(one, "add") else _logger(one) for one in several]


def _logger(path: PathLike) -> Logger:
    suffix = Path(path).suffix
    if suffix and suffix not in (".csv", ".jsonl"):
        raise ValueError(f"log: expected a name that ends in .csv or .jsonl, or a folder for TensorBoard, got {path!r}")
    if not suffix:
        return TensorBoard(path)
    return CSV(path) if suffix == ".csv" else JSONLines(path)


class _NoBar(contextlib.nullcontext[Any]):
    """Has the methods of a progress bar, and does nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def update(self, n: int) -> None: ...

    def set_postfix(self, values: dict[str, str], refresh: bool) -> None: ...


def progress_bar(progress: bool | None, total: int | None, done: int) -> Any:
    """A progress bar over the steps, or a stand-in without output."""
    if progress is False:
        return _NoBar()
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        return _NoBar()
    return tqdm(total=total, initial=done, unit="step", disable=None if progress is None else False)
