"""Folders are layers: no import of ``python/fusedopt`` and no include of ``cpp/`` leads from a lower layer to a higher
one, or round in a circle. They are read from the source: imports within functions and by name count, too."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Arrows = Mapping[str, set[str]]
"""A module or file -> what it imports or includes."""

Layers = tuple[tuple[str, ...], ...]

PYTHON: Layers = (
    ("_core", "rules", "forms", "config", "_make", "_files"),
    ("numpy", "", "losses", "columns", "data", "schedules"),
    ("torch",),
    ("training", "estimators", "keras", "rule"),
    ("bench", "plots", "zoo"),
    ("cli", "__main__"),
    ("torch_forms", "torch_schedule", "training_log"),
)
"""The layers of the package, the lowest first; "" is the package itself, which hands on numpy and config."""

FACADES = {("fusedopt.torch", "fusedopt.training")}
"""A facade -> what it hands on from a higher layer, imported when it is asked for."""

CPP: Layers = (
    ("rules",),
    ("library.h",),
    ("cpu", "device"),
    ("step",),
    ("network",),
    ("bindings",),
)
"""The layers of the core, the lowest first: folders of cpp/, and files outside of them."""


def top_of(name: str) -> str:
    """The folder or file at the top of a module's name or a file's path."""
    return re.split(r"/|\.(?!h$)", name)[0]


def layer_of(name: str, layers: Layers) -> int:
    top = top_of(name)
    found = [i for i, names in enumerate(layers) if top in names]
    assert len(found) == 1, f"{name} has no layer: say in this test which"
    return found[0]


def upward(arrows: Arrows, layers: Layers) -> set[tuple[str, str]]:
    """The arrows from a lower layer to a higher one."""
    return {(a, b) for a, targets in arrows.items() for b in targets if layer_of(a, layers) < layer_of(b, layers)}


def circle(arrows: Arrows) -> list[str]:
    """Names that lead round in a circle, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            found = visit(target, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def between_folders(arrows: Arrows, pending: Iterable[tuple[str, str]] = ()) -> dict[str, set[str]]:
    """The arrows from one folder or top-level file to another."""
    found: dict[str, set[str]] = {}
    for a, b in {(a, b) for a, targets in arrows.items() for b in targets}.difference(pending):
        start, end = top_of(a), top_of(b)
        if start != end:
            found.setdefault(start, set()).add(end)
    return found


# ---- Python


def python_modules(package: Path) -> dict[str, Path]:
    """Full name -> file, of every module; the compiled core by its stub."""
    found = {}
    for path in [*package.rglob("*.py"), package / "_core.pyi"]:
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def absolute(name: str, package: str) -> str:
    """The full name of a module that is named, perhaps with leading dots, within a package."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    parent = package.split(".")[: len(package.split(".")) - dots + 1]
    return ".".join([*parent, name[dots:]] if name[dots:] else parent)


def imports(tree: ast.Module, name: str, is_package: bool, known: Iterable[str]) -> Iterator[str]:
    """The modules among ``known`` that the source of module ``name`` imports anywhere in it, also under TYPE_CHECKING.

    Where a module is imported by a computed name, every string in the source that can be part of it counts.
    """
    known = set(known)
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), package)
            if base not in known:
                continue
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0]
            starts = strings(argument) if isinstance(argument, ast.JoinedStr | ast.BinOp) else set()
            names = strings(argument if isinstance(argument, ast.Constant) else tree)
            candidates = {absolute(start + text, package) for start in {"", *starts} for text in names if text}
            found = candidates & known
            outside = isinstance(argument, ast.Constant) and candidates.isdisjoint(known)
            assert found or (outside and not re.match(r"\.|fusedopt\b", argument.value)), (
                f"{name}, line {node.lineno}: an import by a name that this test cannot read"
            )
            yield from found


def python_arrows(package: Path) -> dict[str, set[str]]:
    """Names without the package's own, so that the first part is the layer's."""
    modules = python_modules(package)
    arrows = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        found = set(imports(tree, name, path.name == "__init__.py", modules)) - {name}
        arrows[name] = {target for target in found if (name, target) not in FACADES}
    return arrows


def short(arrows: Arrows) -> dict[str, set[str]]:
    """The same without ``fusedopt.`` in front."""
    return {a.partition(".")[2]: {b.partition(".")[2] for b in targets} for a, targets in arrows.items()}


def test_no_import_leads_to_a_higher_layer() -> None:
    assert upward(short(python_arrows(ROOT / "python" / "fusedopt")), PYTHON) == set()


def test_no_imports_lead_round_in_a_circle() -> None:
    arrows = short(python_arrows(ROOT / "python" / "fusedopt"))
    assert circle(arrows) == []
    assert circle(between_folders(arrows)) == []


def test_every_exempt_import_is_there() -> None:
    modules = python_modules(ROOT / "python" / "fusedopt")
    for name, target in FACADES:
        path = modules[name]
        assert target in set(imports(ast.parse(path.read_text()), name, path.name == "__init__.py", modules))


@pytest.mark.parametrize(
    "source",
    [
        "import fusedopt.bench",
        "from fusedopt import bench",
        "from . import bench",
        "from .bench import cases",
        "def f():\n    from .bench.cases import Case",
        "if TYPE_CHECKING:\n    from .bench import cases",
        "importlib.import_module('.bench', __package__)",
        "__import__('fusedopt.bench')",
        "TABLE = {'Case': 'bench'}\nimportlib.import_module(f'.{TABLE[name]}', __package__)",
        "TABLE = {'Case': '.bench.cases'}\nimport_module(TABLE[name], __name__)",
        "where = 'bench'\nimport_module('fusedopt.' + where)",
        "for where in ('fusedopt.bench', 'fusedopt.plots'):\n    import_module(where)",
    ],
)
def test_an_import_is_found_however_it_is_written(source: str) -> None:
    known = {"fusedopt", "fusedopt.numpy", "fusedopt.bench", "fusedopt.bench.cases"}
    found = set(imports(ast.parse(source), "fusedopt.numpy", False, known))
    arrows = short({"fusedopt.numpy": found})
    assert {b for _, b in upward(arrows, PYTHON)} & {"bench", "bench.cases"}


def test_an_import_by_an_unreadable_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot read"):
        list(imports(ast.parse("import_module(sys.argv[1])"), "fusedopt.cli", True, {"fusedopt", "fusedopt.cli"}))


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle(between_folders({"a.x": {"b.x"}, "b.y": {"a.y"}, "a.y": {"a.x"}})) == ["a", "b", "a"]


# ---- C++


def cpp_arrows(root: Path) -> dict[str, set[str]]:
    """The includes of files below ``root``, by paths from there; those in angle brackets are not ours."""
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.suffix in (".h", ".cpp", ".cu")}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        arrows[name] = set()
        for line, target in re.findall(r'^(\s*#\s*include\s*"([^"]+)")', path.read_text(), re.MULTILINE):
            near = (Path(name).parent / target).as_posix()
            found = near if near in files else target
            assert found in files, f"{name}: {line}"
            arrows[name].add(found)
    return arrows


def test_no_include_leads_to_a_higher_layer() -> None:
    assert upward(cpp_arrows(ROOT / "cpp"), CPP) == set()


def test_no_includes_lead_round_in_a_circle() -> None:
    arrows = cpp_arrows(ROOT / "cpp")
    assert circle(arrows) == []
    assert circle(between_folders(arrows)) == []


def test_an_include_of_a_higher_layer_is_found(tmp_path: Path) -> None:
    for name, text in {"rules/a.h": '#include "step/b.h"\n', "step/b.h": '#include "c.h"\n', "step/c.h": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(cpp_arrows(tmp_path), CPP) == {("rules/a.h", "step/b.h")}
    assert circle(cpp_arrows(tmp_path)) == []
