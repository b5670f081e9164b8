"""Tables to train on, by name or from a file: scikit-learn's, CSV, NumPy's .npz, folders of MNIST's IDX files.

Files are read with the standard library and NumPy; nothing is downloaded. Nothing here is fitted to the data:
imputation, scaling and encoding are the pipeline's (``cli/train.py``), which learns them on the training part alone.
"""

from __future__ import annotations

import csv
import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]

NAMES = ("digits", "breast_cancer", "iris", "wine", "diabetes")
"""The tables that scikit-learn ships."""

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
_IDX_TYPES = {8: np.uint8, 9: np.int8, 11: np.int16, 12: np.int32, 13: np.float32, 14: np.float64}
_IDX_FILES = {
    "x": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "y": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "x_test": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "y_test": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


@dataclass
class Table:
    """Rows to learn from."""

    x: np.ndarray[Any, Any]
    """(n, d): numbers, NaN where one is missing; objects, None where one is missing, if some columns hold texts."""
    y: np.ndarray[Any, Any]
    """(n,): classes or numbers."""
    task: str
    """``classification`` or ``regression``."""
    names: list[str]
    """Of the columns of x."""
    texts: list[int]
    """The columns of x that hold texts."""
    pixels: bool = False
    """Whether all columns are of one kind and need no scaling: pixels in 0 to 1."""
    test: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
    """A part that the data themselves keep for testing."""


def load(source: PathLike, *, target: str | None = None, task: str | None = None) -> Table:
    """Loads a table.

    Args:
        source: a name of scikit-learn's (``digits``, ``breast_cancer``, ``iris``, ``wine``, ``diabetes``), a ``.csv``
            or ``.npz`` file, or a folder that holds MNIST's four IDX files, or the two for training, gzipped or not.
        target: the column of a CSV file to predict, the last one if None; of an ``.npz`` file the array, ``y`` if None
            (the rows are the array ``x`` or ``X``).
        task: ``"classification"`` or ``"regression"``; None guesses: classes are texts, truth values, or whole numbers
            of at most 20 kinds.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it does not hold a table; the message says what was expected.
    """
    path = Path(source)
    if str(source) in NAMES:
        return _shipped(str(source))
    if not path.exists():
        raise FileNotFoundError(f"data: expected {', '.join(NAMES)}, a file or a folder, got {str(source)!r}")
    if path.is_dir():
        return _mnist(path)
    if path.suffix == ".csv":
        x, y, names = _csv(path, target)
    elif path.suffix == ".npz":
        x, y, names = _npz(path, target or "y")
    else:
        raise ValueError(f"data: expected a .csv or .npz file or a folder of IDX files, got {str(source)!r}")
    texts = [i for i in range(x.shape[1]) if x.dtype == object and any(isinstance(v, str) for v in x[:, i])]
    if x.dtype == object and not texts:
        x = x.astype(float)
    task = task or _guess(y)
    if task == "regression":
        if y.dtype.kind not in "fiub":
            raise ValueError(f"target: expected numbers for regression, got {y[0]!r}")
        y = y.astype(float)
    return Table(x, y, task, names, texts)


def read_idx(path: PathLike) -> np.ndarray[Any, Any]:
    """Reads an array in the IDX format of MNIST's files, gzipped or not.

    A header of two zero bytes, a byte for the type and one for the number of axes, then the length of each as a
    big-endian 32-bit integer; then the elements, big-endian.

    Raises:
        ValueError: if the file is damaged, too short or too long, or of another format.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as e:
            raise ValueError(f"{path}: a damaged gzip file ({e})") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path}: expected an IDX file, got one that begins with {data[:4]!r}")
    dtype, axes = np.dtype(_IDX_TYPES[data[2]]).newbyteorder(">"), data[3]
    begin = 4 + 4 * axes
    if len(data) < begin:
        raise ValueError(f"{path}: the file ends in its header")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    expected = begin + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape}, got {len(data)}")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape).astype(dtype.newbyteorder("="))


def _shipped(name: str) -> Table:
    from sklearn import datasets  # type: ignore[import-untyped, unused-ignore]

    data = getattr(datasets, f"load_{name}")()
    names = [str(n) for n in data.feature_names]
    if name == "digits":
        return Table((data.data / 16).astype(np.float32), data.target, "classification", names, [], pixels=True)
    if name == "diabetes":
        return Table(data.data, data.target, "regression", names, [])
    return Table(data.data, np.asarray(data.target_names)[data.target], "classification", names, [])


def _mnist(folder: Path) -> Table:
    arrays = {}
    for part, files in _IDX_FILES.items():
        found = [folder / (name + end) for name in files for end in ("", ".gz") if (folder / (name + end)).exists()]
        if found:
            arrays[part] = read_idx(found[0])
        elif not part.endswith("test"):
            raise ValueError(f"{folder}: expected MNIST's files, at least {files[0]}[.gz], got none of that name")
    for x, y in (("x", "y"), ("x_test", "y_test")):
        if x in arrays and (y not in arrays or len(arrays[x]) != len(arrays[y])):
            raise ValueError(f"{folder}: expected as many labels as images")
    if "x_test" in arrays and arrays["x_test"].shape[1:] != arrays["x"].shape[1:]:
        raise ValueError(f"{folder}: expected test images of shape {arrays['x'].shape[1:]}, as those for training")
    pixels = {k: (v.reshape(len(v), -1) / np.float32(255)) for k, v in arrays.items() if k in ("x", "x_test")}
    test = (pixels["x_test"], arrays["y_test"]) if "x_test" in pixels else None
    names = [f"pixel_{i}" for i in range(pixels["x"].shape[1])]
    return Table(pixels["x"], arrays["y"], "classification", names, [], pixels=True, test=test)


def _csv(path: Path, target: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    headless = any(_number(cell) is not None for cell in rows[0])
    names = [f"column_{i}" for i in range(len(rows[0]))] if headless else rows.pop(0)
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(f"{path}: expected {len(names)} columns, got {len(row)} in row {i + 1}")
    if len(names) < 2 or not rows:
        raise ValueError(f"{path}: expected rows of two or more columns")
    if target is not None and target not in names:
        raise ValueError(f"target: expected one of {', '.join(names)}, got {target!r}")
    column = names.index(target) if target is not None else len(names) - 1
    cells = [_column([row[i] for row in rows]) for i in range(len(names))]
    y = cells.pop(column)
    missing = sum(v is None or v != v for v in y)
    if missing:
        raise ValueError(f"target: {missing} values of {names[column]!r} are missing")
    names.pop(column)
    x = np.empty((len(rows), len(cells)), object)
    for i, values in enumerate(cells):
        x[:, i] = values
    return x, np.array(y), names


def _column(cells: list[str]) -> list[Any]:
    """Numbers where every cell is one, else texts."""
    numbers = [_number(cell) for cell in cells]
    if all(n is not None or cell.lower() in _MISSING for n, cell in zip(numbers, cells, strict=True)):
        return [np.nan if n is None else n for n in numbers]
    return [None if cell.lower() in _MISSING else cell for cell in cells]


def _number(cell: str) -> float | None:
    try:
        return float(cell) if cell.lower() not in _MISSING else None
    except ValueError:
        return None


def _npz(path: Path, target: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    with np.load(path, allow_pickle=False) as arrays:
        rows = next((name for name in ("x", "X") if name in arrays), None)
        if rows is None or target not in arrays:
            raise ValueError(f"{path}: expected arrays x (or X) and {target}, got {', '.join(arrays)}")
        x, y = arrays[rows], arrays[target]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or x.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected numbers x of shape (n, ...) and y of shape (n,), got {x.dtype} {x.shape} and {y.shape}"
        )
    x = x.reshape(len(x), -1)
    return (x if x.dtype.kind == "f" else x.astype(np.float32)), y, [f"column_{i}" for i in range(x.shape[1])]


def _guess(y: np.ndarray[Any, Any]) -> str:
    if y.dtype.kind not in "fiu":
        return "classification"
    whole = bool((y == np.floor(y)).all())
    return "classification" if whole and len(np.unique(y)) <= 20 else "regression"
