"""Loads tables to train on: scikit-learn's data sets, CSV, Parquet, NumPy's .npz, folders of MNIST's IDX files.

pandas reads tables with named columns; nothing is downloaded. Nothing here is fitted to the data: the pipeline
(``cli/models.py``) fits imputation, scaling and encoding to the training rows only. ``columns.py`` determines the kind
of each column.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import importlib.util
import lzma
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from .columns import Column

PathLike = str | os.PathLike[str]

NAMES = ("digits", "breast_cancer", "iris", "wine", "diabetes")
"""The data sets that scikit-learn ships."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SOURCES = f"{', '.join(NAMES)}, a .csv, .tsv (compressed or not), .parquet or .npz file, or a folder of IDX files"
_IDX_TYPES = {8: np.uint8, 9: np.int8, 11: np.int16, 12: np.int32, 13: np.float32, 14: np.float64}
_IDX_FILES = {
    "x": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "y": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "x_test": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "y_test": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


@dataclass
class Table:
    """Features, targets, and how the columns are interpreted."""

    x: Any
    """(n, d): a pandas DataFrame of the used columns, unconverted; or an array of numbers."""
    y: np.ndarray[Any, Any]
    """(n,): classes or numbers."""
    task: str
    """``classification`` or ``regression``."""
    names: list[str]
    """The names of the columns of x."""
    columns: list[Column] = field(default_factory=list)
    """How each column of a DataFrame is interpreted, including unused columns and the target."""
    why: str = ""
    """The reason for the task, if it was inferred from the target."""
    pixels: bool = False
    """Whether the features are pixels in [0, 1], which need no scaling."""
    test: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
    """Test features and targets, if the data provide them."""

    def of_kind(self, kind: str) -> list[str]:
        """The names of the columns of this kind: ``number``, ``date`` or ``category``."""
        return [column.name for column in self.columns if column.kind == kind]


def load(
    source: PathLike,
    *,
    target: str | None = None,
    task: str | None = None,
    separator: str | None = None,
    header: bool = True,
    drop: Sequence[str] = (),
    progress: bool = False,
) -> Table:
    """Loads a table.

    Args:
        source: the name of a scikit-learn data set (``digits``, ``breast_cancer``, ``iris``, ``wine``, ``diabetes``); a
            ``.csv``, ``.tsv``, ``.txt`` (compressed or not), ``.parquet`` or ``.npz`` file; or a folder with MNIST's
            four IDX files, or only the two for training, gzipped or not.
        target: the column to predict, by default the last one. For an ``.npz`` file, the array of targets, by default
            ``y``; its features are the array ``x`` or ``X``.
        task: ``"classification"`` or ``"regression"``. None infers it: classification if the target has texts,
            booleans, two different integers, or the integers 0, 1, 2, ... up to 20 classes; else regression.
        separator: separator of the cells of a text file; by default a comma in ``.csv`` files, else a tab.
        header: whether the first row of a text file contains the column names.
        drop: columns to leave out.
        progress: show a progress bar if reading a text file takes longer than two seconds.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the source is not a table; the message says what was expected.
        ImportError: a table with named columns needs pandas, which is not installed.
    """
    kind = _kind(source)
    named = kind in ("shipped", "text", "parquet") and not _as_pixels(source, target, drop)
    given = {"separator": separator is not None, "header=False": not header, "drop": bool(drop)}
    applies = (("drop",) if named else ()) + (("separator", "header=False") if kind == "text" else ())
    if wrong := [option for option, is_given in given.items() if is_given and option not in applies]:
        raise ValueError(f"{', '.join(wrong)}: does not apply to {str(source)!r}")
    if named:
        frame = read(source, separator=separator, header=header, progress=progress)
        return _from_frame(frame, str(source), target, task, drop)
    if kind == "folder" and target is not None:
        raise ValueError(f"target: does not apply to a folder of MNIST's files, got {target!r}")
    if kind == "folder":
        table = _mnist(Path(source))
    elif kind == "npz":
        table = _npz(Path(source), target or "y")
    else:
        table = _digits()
    table.y, table.task, table.why = as_task(table.y, task)
    if table.test is not None:
        table.test = table.test[0], as_task(table.test[1], table.task)[0]
    return table


def read(
    source: PathLike,
    *,
    separator: str | None = None,
    header: bool = True,
    as_text: Sequence[str] = (),
    progress: bool = False,
) -> pd.DataFrame:
    """Reads a table with named columns, or a scikit-learn data set, with the types that pandas infers.

    Args:
        source, separator, header, progress: as in :func:`load`.
        as_text: columns that are not converted to numbers or booleans.

    Raises:
        FileNotFoundError, ValueError, ImportError: as in :func:`load`.
    """
    kind, path = _kind(source), Path(source)
    if kind not in ("shipped", "text", "parquet"):
        raise ValueError(f"data: expected a table with named columns, got {str(source)!r}")
    try:
        import pandas as pd
    except ImportError as e:
        raise ImportError(f"data: {str(source)!r} needs pandas: pip install pandas") from e
    if kind == "shipped":
        return _shipped(str(source))
    if kind == "parquet":
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: expected a Parquet file ({e})") from None
    frame = _text(path, SEPARATORS[_suffix(path)] if separator is None else separator, header, as_text, progress)
    if not header:
        frame.columns = pd.Index([f"column_{i}" for i in range(frame.shape[1])])
    return frame


def arrays(source: PathLike) -> np.ndarray[Any, Any]:
    """The features of a source without named columns. For a folder of MNIST's files: the test images, if present.

    Raises:
        FileNotFoundError, ValueError: as in :func:`load`.
    """
    kind = _kind(source)
    if kind == "folder":
        table = _mnist(Path(source))
        return np.asarray(table.x if table.test is None else table.test[0])
    if kind == "npz":
        return np.asarray(_npz(Path(source), None).x)
    if str(source) == "digits":
        return np.asarray(_digits().x)
    raise ValueError(f"data: expected an array, as in the training data, got {str(source)!r}")


def _kind(source: PathLike) -> str:
    path = Path(source)
    if str(source) in NAMES:
        return "shipped"
    if not path.exists():
        raise FileNotFoundError(f"data: expected {_SOURCES}; got {str(source)!r}, which does not exist")
    if path.is_dir():
        return "folder"
    kinds = dict.fromkeys(SEPARATORS, "text") | {".npz": "npz", ".parquet": "parquet"}
    if _suffix(path) not in kinds:
        raise ValueError(f"data: expected {_SOURCES}; got {str(source)!r}")
    return kinds[_suffix(path)]


def _suffix(path: Path) -> str:
    """The suffix in lower case, ignoring that of a compressed file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _as_pixels(source: PathLike, target: str | None, drop: Sequence[str]) -> bool:
    return str(source) == "digits" and target in (None, "target") and not drop


def as_task(y: Any, task: str | None) -> tuple[np.ndarray[Any, Any], str, str]:
    """The targets in the form the task needs, the task, and the reason for it if it was inferred.

    Raises:
        ValueError: the task is regression, but the targets are classes.
    """
    y = np.asarray(y)
    why = ""
    if task is None:
        task, why = _guess(y)
    if task == "regression":
        if y.dtype.kind not in "fiub":
            raise ValueError(f"target: expected numbers for regression, got {y[0]!r}")
        return y.astype(float), task, why
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.floor(y)).all():
        y = y.astype(np.int64)
    return y, task, why


def _guess(y: np.ndarray[Any, Any]) -> tuple[str, str]:
    """The inferred task, and the reason for it."""
    if y.dtype.kind not in "fiu":
        return "classification", ""
    kinds = np.unique(y)
    if len(kinds) == 2 and (kinds == np.floor(kinds)).all():
        return "classification", "two different integers are treated as classes"
    if len(kinds) <= 20 and np.array_equal(kinds, np.arange(len(kinds))):
        return "classification", f"integers from 0 to {len(kinds) - 1} are treated as classes"
    return "regression", f"{len(kinds):,} different numbers are treated as quantities" if len(kinds) <= 20 else ""


def _from_frame(frame: pd.DataFrame, source: str, target: str | None, task: str | None, drop: Sequence[str]) -> Table:
    from . import columns

    frame.columns = frame.columns.map(str).str.strip()
    names = list(frame.columns)
    if unknown := [name for name in drop if name not in names]:
        raise ValueError(f"drop: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    frame = frame.drop(columns=list(drop))
    names = list(frame.columns)
    if len(names) < 2 or frame.empty:
        raise ValueError(
            f"{source}: expected rows of two or more columns, got {len(frame)} of {', '.join(names) or 'none'}; "
            "if the cells have another separator, pass separator"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{source}: expected unique column names, got {twice!r} twice")
    if target is not None and target not in names:
        raise ValueError(f"target: expected one of {', '.join(names)}, got {target!r}")
    chosen = names[-1] if target is None else target
    y, task, why, about = _target(frame[chosen], chosen, task)
    described = columns.understand(frame.drop(columns=[chosen]))
    used = [column.name for column in described if column.kind in columns.USED]
    if not used:
        raise ValueError(f"{source}: no usable column besides the target {chosen!r}")
    return Table(frame[used], y, task, used, [*described, about], why)


def _target(values: pd.Series, name: str, task: str | None) -> tuple[np.ndarray[Any, Any], str, str, Column]:
    """The targets, the task, its reason, and the column's description. In texts only empty cells are missing values."""
    from . import columns

    note, refusal = "", f"target: expected classes or numbers, got dates in {name!r}"
    y: Any = values.to_numpy()
    if columns.is_date(values):
        raise ValueError(refusal)
    if columns.is_number(values):
        _refuse_missing(values, name)
    elif values.dtype != bool:
        known = columns.texts(values, frozenset({""}))
        distinct = columns.texts(values.drop_duplicates()).dropna().drop_duplicates()
        style = columns.number_style(distinct) if len(distinct) and task != "classification" else ""
        if style:
            known = columns.texts(values)
        elif len(distinct) and task is None and columns.date_formats(distinct):
            raise ValueError(refusal)
        _refuse_missing(known, name)
        y = columns.parse_numbers(known, style).to_numpy() if style else np.array(known.tolist())
        note = f"{known.iloc[0]} is read as {y[0]:g}" if style not in ("", "plain") else ""
    y, task, why = as_task(y, task)
    kind = f"{len(np.unique(y)):,} classes" if task == "classification" else "number"
    return y, task, why, columns.Column(name, f"target: {kind}", 0, str(values.iloc[0]), note)


def _refuse_missing(values: pd.Series, name: str) -> None:
    if missing := int(values.isna().sum()):
        raise ValueError(f"target: {missing} values of {name!r} are missing")


def read_idx(path: PathLike) -> np.ndarray[Any, Any]:
    """Reads an array in the IDX format of MNIST's files, gzipped or not.

    The format: two zero bytes, one byte for the type, one for the number of axes, the length of each axis as a
    big-endian 32-bit integer, then the elements, big-endian.

    Raises:
        ValueError: the file is damaged, too short, too long, or has another format.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as e:
            raise ValueError(f"{path}: damaged gzip file ({e})") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path}: expected an IDX file, got one that starts with {data[:4]!r}")
    dtype, axes = np.dtype(_IDX_TYPES[data[2]]).newbyteorder(">"), data[3]
    begin = 4 + 4 * axes
    if len(data) < begin:
        raise ValueError(f"{path}: the file ends in its header")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    expected = begin + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape}, got {len(data)}")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape).astype(dtype.newbyteorder("="))


def _shipped(name: str) -> pd.DataFrame:
    from sklearn import datasets  # type: ignore[import-untyped, unused-ignore]

    data = getattr(datasets, f"load_{name}")(as_frame=True)
    frame = data.frame
    if name in ("breast_cancer", "iris", "wine"):
        frame["target"] = np.asarray(data.target_names)[data.target]
    return frame


def _digits() -> Table:
    from sklearn import datasets  # type: ignore[import-untyped, unused-ignore]

    data = datasets.load_digits()
    x = (data.data / 16).astype(np.float32)
    return Table(x, data.target, "classification", [str(name) for name in data.feature_names], pixels=True)


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
    return Table(pixels["x"], arrays["y"], "classification", names, pixels=True, test=test)


def _text(path: Path, separator: str, header: bool, as_text: Sequence[str], progress: bool) -> pd.DataFrame:
    import pandas as pd

    if len(separator) != 1:
        raise ValueError(f"separator: expected one character, got {separator!r}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    options: dict[str, Any] = {"sep": separator, "header": 0 if header else None, "index_col": False}
    options |= {"encoding": "utf-8-sig", "skipinitialspace": separator != " "}
    options |= {"keep_default_na": False, "na_values": [""], "low_memory": False, "dtype": dict.fromkeys(as_text, str)}
    options["compression"] = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix.lower())
    try:
        with _opened(path, progress) as file:
            frame = pd.read_csv(file, **options)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected text in UTF-8 ({e})") from None
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"{path}: {str(e).strip()}") from None
    if len(frame) and frame.iloc[:, -1].isna().any():  # an empty last cell, or a row that is too short
        with _COMPRESSED.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8", newline="") as lines:
            _refuse_short_rows(path, lines, separator, frame.shape[1], header)
    return frame


def _refuse_short_rows(path: Path, lines: Any, separator: str, expected: int, header: bool) -> None:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = (row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row)
        for i, row in enumerate(rows, 0 if header else 1):
            if len(row) < expected:
                raise ValueError(f"{path}: expected {expected} columns, got {len(row)} in row {i}")
    finally:
        csv.field_size_limit(limit)


@contextlib.contextmanager
def _opened(path: Path, progress: bool) -> Iterator[Any]:
    """The file, with a progress bar over its bytes if reading takes more than two seconds and tqdm is installed."""
    with open(path, "rb") as file:
        if not progress or importlib.util.find_spec("tqdm") is None:
            yield file
            return
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        with tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=f"reading {path.name}", delay=2) as watched:
            yield watched


def _npz(path: Path, target: str | None) -> Table:
    """The arrays of the file; the targets are zeros if ``target`` is None."""
    with np.load(path, allow_pickle=False) as found:
        rows = next((name for name in ("x", "X") if name in found), None)
        if rows is None or (target is not None and target not in found):
            wanted = "x (or X)" + (f" and {target}" if target else "")
            raise ValueError(f"{path}: expected arrays {wanted}, got {', '.join(found)}")
        x = found[rows]
        y = np.zeros(len(x)) if target is None else found[target]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or x.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected numbers x of shape (n, ...) and y of shape (n,), got {x.dtype} {x.shape} and {y.shape}"
        )
    x = x.reshape(len(x), -1)
    names = [f"column_{i}" for i in range(x.shape[1])]
    return Table(x if x.dtype.kind == "f" else x.astype(np.float32), y, "", names)
