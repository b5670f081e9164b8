"""Files that are written whole or not at all, whatever kills the process; what checkpoints are written by."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def previous(path: Path) -> Path:
    """Where the file that stood at ``path`` before is kept."""
    return path.with_name(path.name + ".previous")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the file, then takes its place; the file before it is kept as :func:`previous`."""
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    if os.name == "posix":  # the name is safe only once its folder is on disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
