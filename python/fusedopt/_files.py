"""Atomic writing of files: a checkpoint is complete or absent, even if the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def previous(path: Path) -> Path:
    """Where :func:`write_whole` keeps the previous version of ``path``."""
    return path.with_name(path.name + ".previous")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes to a temporary file, then renames it to ``path``. The old file is kept as :func:`previous`.

    If the write fails, the temporary file is removed.

    Raises:
        OSError: the message names the file, and the free space if that was the reason.
    """
    temporary = path.with_name(path.name + ".writing")
    try:
        with open(temporary, "wb") as file:
            recorded = _Recorded(file)
            try:
                write(recorded)  # type: ignore[arg-type]
            except Exception:
                if recorded.error is None:
                    raise
            if recorded.error is not None:  # whatever the writer made of it
                raise recorded.error
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        free = _free_space(path)
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            space = f"; {free:,} bytes are free there" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise OSError(e.errno, f"{path} cannot be written: {e.strerror}{space}") from e
        raise
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    if os.name == "posix":  # the rename is durable only once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Recorded:
    """A file that keeps the error of a write: torch.save raises another one in its place, without the reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self._file.flush()


def _free_space(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 0
