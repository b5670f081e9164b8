"""The documentation is true: its Python code runs, its tables are those of the committed results, and CONTRIBUTING
names existing folders, paths and symbols."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import integrations

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks("README.md")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n\n")[0].splitlines()[-1][:40])
def test_the_python_in_the_readme_runs(block: str) -> None:
    if "torch" in block:
        pytest.importorskip("torch")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("torch" in block for block in blocks(page)):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        for block in blocks(page):
            exec(compile(block, page, "exec"), names)


def test_the_readme_shows_numpy_and_torch() -> None:
    assert len(BLOCKS) >= 4
    assert any("fusedopt.torch" in block for block in BLOCKS)
    assert any("torch" not in block for block in BLOCKS)


def test_every_local_link_leads_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", *PAGES):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_the_table_of_combinations_is_that_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["matrix.py", "--check"])
    assert load("docs/matrix.py").main() == 0


# ---- the benchmark section

DATA = {
    "machine": {
        "processor": "a processor",
        "cores": 2,
        "torch_threads": 2,
        "system": "Linux x86_64",
        "python": "3.11.7",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"fusedopt": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0"},
    },
    "results": [
        {
            "suite": "rules",
            "case": "Adam",
            "contenders": {
                "ours": {"ratio_to_ours": 1.0},
                "fused": {"ratio_to_ours": 1.25},
                "default": {"ratio_to_ours": 12.3},
            },
            "gb_per_s": 21.04,
            "share_of_ceiling": 0.97,
            "bars": [],
        },
        {
            "suite": "bars",
            "case": "Adam, tiny",
            "contenders": {"ours": {"ratio_to_ours": 1.0}},
            "gb_per_s": None,
            "share_of_ceiling": None,
            "bars": [
                {"against": "fused", "least": 12, "measured": 13.5, "ok": True},
                {"against": "ceiling", "least": 0.9, "measured": 0.85, "ok": False},
            ],
        },
    ],
}


def test_the_benchmark_section_is_written_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    page, script = tmp_path / "README.md", load("bench/readme.py")
    page.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    (tmp_path / "readme.json").write_text(json.dumps(DATA))
    monkeypatch.setattr(script, "SECTIONS", ((page, "bench", script.section),))
    monkeypatch.setattr(script, "PICTURE", tmp_path / "speedup.png")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["readme.py", str(tmp_path), *arguments])
        code: int = script.main()
        return code

    assert run("--check") == 1
    assert not script.PICTURE.exists()
    assert run() == 0
    assert run("--check") == 0
    assert script.PICTURE.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n\na processor, 2 cores")
    assert text.endswith("\n<!-- bench:end -->\nafter\n")
    assert "| Adam | 1.25 | 12.3 | 21.0 | 97% |" in text
    assert "| Adam, tiny | torch fused | 12.0 | 13.5 |" in text
    assert "| Adam, tiny | share of `mul_` | 0.90 | 0.85 (missed) |" in text
    assert "old" not in text
    (tmp_path / "readme.json").write_text(json.dumps({**DATA, "results": DATA["results"][:1]}))  # type: ignore[index]
    assert run("--check") == 1
    assert f"{script.PICTURE}: out of date" in capsys.readouterr().out
    page.write_text("no marks")
    assert run() == 2


def test_a_gain_is_over_the_fastest_baseline_and_the_range_of_its_results() -> None:
    script = load("bench/readme.py")
    rows: list[dict[str, object]] = [
        {"contenders": {"ours": {"ratio_to_ours": 1.0}, "a": {"ratio_to_ours": 5.04}, "b": {"ratio_to_ours": 3.14}}},
        {"contenders": {"ours": {"ratio_to_ours": 1.0}, "a": {"ratio_to_ours": 1.256}}},
    ]
    assert script.speedup(rows[:1], ("a", "b")) == "3.1x"
    assert script.speedup(rows, ("a", "b")) == "1.26x to 3.1x"
    assert script.speedup(rows[1:], ("b",)) == ""


def test_a_gain_without_results_is_an_error(tmp_path: Path) -> None:
    for name in ("readme", "bytes"):
        (tmp_path / f"{name}.json").write_text(json.dumps(DATA))
    with pytest.raises(LookupError, match="no results for 'Many small tensors"):
        load("bench/readme.py").gains(tmp_path)


def test_the_committed_tables_and_picture_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("bench/readme.py")
    if not script.RESULTS.exists():
        pytest.skip("no results are committed")
    for page, mark, written in script.SECTIONS:
        section = script.between(mark).search(page.read_text())
        assert section is not None
        assert section[0] == written(script.RESULTS)
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    assert script.main() == 0


# ---- CONTRIBUTING

MAPPED = ("cpp", "python", "tests", "bench", "examples", "docs")


def test_contributing_names_every_folder_and_no_path_that_is_not_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\S+)/` \| .+ \| `(\S+)` \|$", text, re.MULTILINE)
    folders = [folder for folder, _ in rows]
    assert len(folders) == len(set(folders))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *MAPPED],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    there = {Path(name).parent.as_posix() for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert there - set(folders) == set(), "not in the table of folders"
    named = {*folders, *re.findall(rf"`((?:{'|'.join(MAPPED)})/[^`\s]*)`", text)}
    assert {name for name in named if not (ROOT / name).exists()} == set(), "named, but not there"


def test_the_places_that_contributing_names_are_in_their_files() -> None:
    """``path`` (``NAME``) in CONTRIBUTING: the file contains the name."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = re.findall(rf"`((?:{'|'.join(MAPPED)})/[^`\s]+)` \(`([^`]+)`\)", text)
    assert len(places) >= 4
    assert [(path, name) for path, name in places if name not in (ROOT / path).read_text()] == []


# ---- the table of integrations


def test_the_table_of_integrations_has_a_row_for_every_marked_test() -> None:
    """Outcomes are those of the run that wrote the table; its rows must be those that a run would write now."""
    written = [row[:2] for row in integrations.table_rows(integrations.TABLE.read_text())]
    assert written == list(dict.fromkeys(integrations.marked_rows())), "run `make integrations`"
    for row in integrations.table_rows(integrations.TABLE.read_text()):
        assert len(row) == 4
        assert row[2] == "works" or row[2].startswith("not run: "), row
