"""Tables by name and from files: IDX, CSV, .npz; what is refused."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")

from fusedopt.columns import categories, dates, numbers  # noqa: E402
from fusedopt.data import NAMES, load, read_idx  # noqa: E402


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
    assert table.of_kind("category") == ["town"]
    assert list(categories(table.x[["town"]])[:, 0]) == ["Ulm", "Köln, Süd", None]
    np.testing.assert_array_equal(numbers(table.x[["area", "age"]]), [[100, 5], [80, np.nan], [np.nan, 30]])
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
    assert tasks["kind"].of_kind("category") == ["letter"]
    assert tasks["letter"].of_kind("category") == []
    assert all(dtype.kind in "if" for dtype in tasks["letter"].x.dtypes)
    headless = tmp_path / "y.csv"
    headless.write_text("\n".join(rows))
    table = load(headless, header=False)
    assert table.names == ["column_0", "column_1", "column_2"]
    assert len(table.y) == 60


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "empty"),
        ("a,b\n1,2\n3\n", {}, "expected 2 columns, got 1 in row 2"),
        ("a\n1\n", {}, "two or more columns"),
        ("a;b\n1;2\n", {}, "separator"),
        ("a,b\n1,2\n1,2,3\n", {}, "Expected 2 fields in line 3, saw 3"),
        ("a,a ,b\n1,2,3\n", {}, "'a' twice"),
        ("a,d,b\n1,2024-01-31,3\n", {"target": "d"}, "dates in 'd'"),
        ("a,b\n1,2\n", {"drop": ["c"]}, "drop: expected some of a, b, got c"),
        ("a,b\n1,1\n1,2\n", {}, "no usable column besides the target"),
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


@pytest.mark.parametrize("names", ["a,b,2020", "2019,2020,2021"])
def test_names_of_columns_that_look_like_numbers_are_names(tmp_path: Path, names: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(names + "\n1.5,2,3\n4,5.5,6\n7,8,9.5\n")
    table = load(path)
    assert [*table.names, table.columns[-1].name] == names.split(",")
    assert table.of_kind("number") == table.names
    np.testing.assert_array_equal(table.y, [3, 6, 9.5])


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,a,y\n" + "x" * 200_000 + ",1,\nu,2,1\nu,3,2\n")
    with pytest.raises(ValueError, match="1 values of 'y' are missing"):  # the short rows were looked for, too
        load(path)
    path.write_text("text,a,y\n" + "x" * 200_000 + ",1,3\nu,2,1\nu,3,2\n")
    assert len(load(path).x["text"][0]) == 200_000


@pytest.mark.parametrize("name", ["x.tsv", "x.csv.gz", "x.tsv.bz2", "x.csv.xz", "x.parquet", "x.csv"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"area": [1.5, 2.5, None, 4.0], "town": ["Ulm", "Köln", "Ulm", None], "price": [1, 5, 3, 7]})
    path = tmp_path / name
    separator = "\t" if ".tsv" in name else ";" if name == "x.csv" else ","
    if name == "x.parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep=separator)
    table = load(path, separator=";") if separator == ";" else load(path)
    assert [(c.name, c.kind, c.missing) for c in table.columns] == [
        ("area", "number", 1), ("town", "category", 1), ("price", "target: number", 0),
    ]  # fmt: skip
    np.testing.assert_array_equal(numbers(table.x[["area"]])[:, 0], [1.5, 2.5, np.nan, 4])
    assert list(categories(table.x[["town"]])[:, 0]) == ["Ulm", "Köln", "Ulm", None]


def column(tmp_path: Path, cells: list[str]) -> Any:
    """What is understood about a column of a CSV file."""
    path = tmp_path / "x.csv"
    path.write_text("c,n,y\n" + "".join(f'"{cell}",{i * 0.5},{i * 1.5}\n' for i, cell in enumerate(cells)))
    table = load(path)
    return table, next(c for c in table.columns if c.name == "c")


@pytest.mark.parametrize(
    ("cells", "values", "note"),
    [
        (["1,000", "20", "NA", "-3,500,000.5"], [1000, 20, np.nan, -3500000.5], "1,000 is read as 1000"),
        (["5%", "7.5 %", "", "1%"], [5, 7.5, np.nan, 1], "5% is read as 5"),
        (["$3.50", "€ 1,200", "?", "4"], [3.5, 1200, np.nan, 4], "$3.50 is read as 3.5"),
        (["1,5", "2,25", "1.000,5", "3"], [1.5, 2.25, 1000.5, 3], "1,5 is read as 1.5"),
        (["1", "2", "none", "4e2"], [1, 2, np.nan, 400], ""),
    ],
)
def test_numbers_as_people_write_them_are_numbers(
    tmp_path: Path, cells: list[str], values: list[float], note: str
) -> None:
    table, found = column(tmp_path, cells)
    assert (found.kind, found.note, found.missing) == ("number", note, sum(v != v for v in values))
    np.testing.assert_array_equal(numbers(table.x[["c"]], ["c"] * (found.how == "comma"))[:, 0], values)


@pytest.mark.parametrize(
    ("cells", "how"),
    [
        (["2024-02-29", "2023-01-31"], "ISO8601"),
        (["2024-02-29T23:15:00+02:00", "2023-01-31 10:00"], "ISO8601"),
        (["29.02.2024", "31.01.2023"], "%d.%m.%Y"),
        (["02/29/2024", "01/31/2023"], "%m/%d/%Y"),
        (["29/02/2024", "31/01/2023"], "%d/%m/%Y"),
        (["02/03/2024", "01/02/2023"], "%m/%d/%Y"),
    ],
)
def test_dates_are_dates(tmp_path: Path, cells: list[str], how: str) -> None:
    table, found = column(tmp_path, [*cells, "", cells[0]])
    assert (found.kind, found.how, found.missing) == ("date", how, 1)
    assert ("also matches" in found.note) == (cells[0] == "02/03/2024")
    values = dates(table.x[["c"]], {"c": how})
    assert values.shape == (4, 4)
    assert np.isnan(values[2]).all()
    first = np.datetime64("2024-02-03" if "03" in cells[0] else "2024-02-29", "D").astype(int)
    assert np.floor(values[0, 0]) == first
    assert values[0, 1] == first - np.datetime64("2023-12-31", "D").astype(int)
    assert values[0, 3] == (21 if "T" in cells[0] else 0)


@pytest.mark.parametrize(
    ("convert", "cell", "message"),
    [(numbers, "many", "column 'c': expected numbers, got 'many'"), (numbers, "inf", "column 'c': expected finite"),
     (lambda frame: dates(frame, {}), "soon", "column 'c': expected dates such as 2024-12-31, got 'soon'")],
)  # fmt: skip
def test_what_a_column_cannot_hold_is_refused_by_name(convert: Any, cell: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(pd.DataFrame({"c": [cell]}))


def test_columns_that_say_nothing_are_not_used(tmp_path: Path) -> None:
    path, n = tmp_path / "x.csv", 30
    rows = [f"{i},{n - i},u{i},same,,{i % 7},{i * 0.5}" for i in range(n)]
    path.write_text("\n".join([",id,user,where,note,a,y", *rows]))
    table = load(path)
    kinds = {c.name: c.kind for c in table.columns}
    assert kinds == {
        "Unnamed: 0": "index", "id": "index", "user": "identifier", "where": "constant", "note": "empty",
        "a": "number", "y": "target: number",
    }  # fmt: skip
    assert table.names == list(table.x.columns) == ["a"]
    assert load(path, drop=["a", "note"], target="user").names == ["y"]


def test_classes_may_be_called_none_and_na(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,y\n1,None\n2,NA\n3,some\n4,None\n")
    np.testing.assert_array_equal(load(path).y, ["None", "NA", "some", "None"])
    path.write_text("a,y\n1,5\n2,NA\n3,6\n")
    with pytest.raises(ValueError, match="1 values of 'y' are missing"):
        load(path)


@pytest.mark.parametrize(
    ("cells", "task", "dtype"),
    [
        (["0", "1", "2", "1"], "classification", "i"),
        (["1", "2", "2", "1"], "classification", "i"),
        (["True", "False", "True", "True"], "classification", "b"),
        (["yes", "no", "no", "yes"], "classification", "U"),
        (["1", "2", "3", "5"], "regression", "f"),  # ratings
        (["100", "120", "100", "150"], "regression", "f"),  # prices
        (["1,000", "1,200", "1,000", "1,500"], "regression", "f"),
    ],
)
def test_few_whole_numbers_are_classes_only_if_they_are_numbered_like_classes(
    tmp_path: Path, cells: list[str], task: str, dtype: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,y\n" + "".join(f'{i * 0.5},"{cell}"\n' for i, cell in enumerate(cells)))
    table = load(path)
    assert (table.task, table.y.dtype.kind) == (task, dtype)
    assert bool(table.why) == (cells[0] in ("0", "1", "100", "1,000"))
    assert load(path, task="classification").y.dtype.kind in "ibU"


def test_target_and_task_of_a_shipped_table_may_be_chosen() -> None:
    table = load("iris", target="petal width (cm)")
    assert table.task == "regression"
    assert table.names[-1] == "target"
    assert table.of_kind("category") == ["target"]
    assert load("wine", target="proline", task="classification").y.dtype.kind == "i"
    with pytest.raises(ValueError, match="expected numbers for regression"):
        load("iris", task="regression")
    assert load("digits", task="regression").y.dtype == float
    assert load("digits", target="pixel_0_3", task="regression").x.shape == (1797, 61)
    with pytest.raises(ValueError, match="target: expected one of"):
        load("wine", target="nothing")


@pytest.mark.parametrize("option", [{"separator": ";"}, {"header": False}, {"drop": ["x"]}])
def test_options_of_text_files_are_refused_elsewhere(tmp_path: Path, option: dict[str, Any]) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((4, 2)), y=np.arange(4.0))
    with pytest.raises(ValueError, match="does not apply"):
        load(tmp_path / "x.npz", **option)


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
    (tmp_path / "x.xls").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.parquet or \.npz"):
        load(tmp_path / "x.xls")
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        load(tmp_path / "x.parquet")
