"""Tables by name and from files: IDX, CSV, .npz; what is refused."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fusedopt.data import NAMES, load, read_idx


def write_idx(path: Path, array: np.ndarray[Any, Any], code: int, compressed: bool = False) -> None:
    """The format as documented, written independently of the reader."""
    data = struct.pack(">HBB", 0, code, array.ndim) + b"".join(struct.pack(">I", n) for n in array.shape)
    data += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if compressed else data)


def mnist(folder: Path, compressed: bool = False, test: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (60, 28, 28)).astype(np.uint8),
        "train-labels-idx1-ubyte": (np.arange(60) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28)).astype(np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
    }
    for name, array in arrays.items():
        if test or name.startswith("train"):
            write_idx(folder / (name + ".gz" * compressed), array, 8, compressed)
    return arrays


# ---- IDX


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")])
def test_idx_files_of_every_type_are_read(tmp_path: Path, code: int, dtype: str, compressed: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_idx(tmp_path / "x", array, code, compressed)
    read = read_idx(tmp_path / "x")
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)
    read[0] = 0  # the array is writable


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:-1], "expected 40 bytes"),
        (lambda d: d + b"x", "expected 40 bytes"),
        (lambda d: b"", "expected an IDX file"),
        (lambda d: b"\x01" + d[1:], "expected an IDX file"),
        (lambda d: d[:2] + b"\x07" + d[3:], "expected an IDX file"),
        (lambda d: d[:6], "ends in its header"),
        (lambda d: d[:4] + b"\xff" * 12 + d[16:], "bytes for shape"),
        (lambda d: gzip.compress(d)[:-5], "damaged gzip"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "x"
    write_idx(path, np.zeros((2, 3, 4), np.uint8), 8)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_folder_of_mnists_files_is_a_table_with_a_test_part(tmp_path: Path, compressed: bool) -> None:
    arrays = mnist(tmp_path, compressed)
    table = load(tmp_path)
    assert (table.task, table.pixels, table.x.shape, table.x.dtype) == ("classification", True, (60, 784), np.float32)
    np.testing.assert_allclose(table.x, arrays["train-images-idx3-ubyte"].reshape(60, 784) / 255, rtol=1e-6)
    np.testing.assert_array_equal(table.y, arrays["train-labels-idx1-ubyte"])
    assert table.test is not None
    assert table.test[0].shape == (20, 784)
    np.testing.assert_array_equal(table.test[1], arrays["t10k-labels-idx1-ubyte"])


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load(tmp_path)
    mnist(tmp_path, test=False)
    assert load(tmp_path).test is None
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(59, np.uint8), 8)
    with pytest.raises(ValueError, match="as many labels as images"):
        load(tmp_path)


# ---- names


@pytest.mark.parametrize("name", NAMES)
def test_scikit_learns_tables_are_loaded_by_name(name: str) -> None:
    table = load(name)
    assert table.task == ("regression" if name == "diabetes" else "classification")
    assert table.x.shape == (len(table.y), len(table.names))
    assert table.pixels == (name == "digits")
    if name == "breast_cancer":
        assert set(table.y) == {"benign", "malignant"}


# ---- CSV


def test_a_csv_file_of_numbers_and_texts_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('area,town,age,price\n100, Ulm ,5,300.5\n80,"Köln, Süd",,250\nNA,?,30,199\n', encoding="utf-8")
    table = load(path, task="regression")
    assert table.names == ["area", "town", "age"]
    assert table.texts == [1]
    assert list(table.x[:, 1]) == ["Ulm", "Köln, Süd", None]
    np.testing.assert_array_equal(table.x[:, [0, 2]].astype(float), [[100, 5], [80, np.nan], [np.nan, 30]])
    np.testing.assert_array_equal(table.y, [300.5, 250, 199])
    by_name = load(path, target="price", task="regression")
    np.testing.assert_array_equal(by_name.y, table.y)


def test_the_target_may_be_any_column_and_the_task_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [f"{i},{i * 0.5},{'ab'[i % 2]},{i % 3}" for i in range(60)]
    path.write_text("\n".join(["i,half,letter,kind", *rows]) + "\n")
    tasks = {name: load(path, target=name) for name in ("i", "half", "letter", "kind")}
    assert {name: table.task for name, table in tasks.items()} == {
        "i": "regression", "half": "regression", "letter": "classification", "kind": "classification",
    }  # fmt: skip
    assert tasks["kind"].texts == [2]
    assert tasks["letter"].texts == []
    assert tasks["letter"].x.dtype == float
    headless = tmp_path / "y.csv"
    headless.write_text("\n".join(rows))
    assert load(headless).names == ["column_0", "column_1", "column_2"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "empty"),
        ("a,b\n1,2\n3\n", {}, "expected 2 columns, got 1 in row 2"),
        ("a\n1\n", {}, "two or more columns"),
        ("a,b\n", {}, "two or more columns"),
        ("a,b\n1,2\n3,\n", {}, "1 values of 'b' are missing"),
        ("a,b\n1,2\n", {"target": "c"}, "target: expected one of a, b"),
        ("a,b\n1,x\n2,y\n", {"task": "regression"}, "target: expected numbers"),
    ],
)
def test_tables_that_make_no_sense_are_refused(
    tmp_path: Path, text: str, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path, **options)


# ---- .npz


def test_an_npz_file_of_rows_and_targets(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    x, y = np.arange(24, dtype=np.int16).reshape(6, 2, 2), np.array(list("ababab"))
    np.savez(path, X=x, y=y, z=np.linspace(0, 1, 6))
    table = load(path)
    assert (table.task, table.x.dtype, table.x.shape) == ("classification", np.float32, (6, 4))
    np.testing.assert_array_equal(table.y, y)
    assert load(path, target="z").task == "regression"
    with pytest.raises(ValueError, match="x \\(or X\\) and w"):
        load(path, target="w")
    np.savez(path, x=x, y=np.zeros(5))
    with pytest.raises(ValueError, match="shape"):
        load(path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="digits"):
        load(tmp_path / "nothing.csv")
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.csv or \.npz"):
        load(tmp_path / "x.parquet")
