"""Atomic writing of files: a checkpoint is complete or absent, even if the process is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def previous(path: Path) -> Path:
    """Where :func:`write_whole` keeps the previous version of ``path``."""
    return path.with_name(path.name + ".previous")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes to a temporary file, then renames it to ``path``. The old file is kept as :func:`previous`."""
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    if os.name == "posix":  # the rename is durable only once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
