"""The committed type stubs match the rules, `_core.pyi` matches the compiled core, and every public name is documented.
`make lint` runs the type checker."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt import _core
from fusedopt.rules import RULES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_stubs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_stubs", ROOT / "python" / "make_stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pinned_torch() -> None:
    """The torch classes are typed as in the development version of torch; others may differ."""
    pytest.importorskip("torch")
    pin = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pin is not None
    if importlib.metadata.version("torch").split("+")[0] != pin[1]:
        pytest.skip(f"the stubs are made with torch {pin[1]}")


@pytest.mark.parametrize("name", ["__init__.pyi", "numpy.pyi", "torch/__init__.pyi"])
def test_the_committed_stubs_are_those_of_the_rules(make_stubs: ModuleType, name: str) -> None:
    if name == "torch/__init__.pyi":
        pinned_torch()
    assert make_stubs.differences([name]) == []


def test_an_old_or_missing_stub_is_found(
    make_stubs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_stubs, "PACKAGE", tmp_path)
    monkeypatch.setattr(make_stubs, "STUBS", {k: v for k, v in make_stubs.STUBS.items() if k != "torch/__init__.pyi"})
    monkeypatch.setattr(sys, "argv", ["make_stubs.py", "--check"])
    assert make_stubs.main() == 1
    monkeypatch.setattr(sys, "argv", ["make_stubs.py"])
    assert make_stubs.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_stubs.py", "--check"])
    assert make_stubs.main() == 0
    stub = tmp_path / "numpy.pyi"
    stub.write_text(stub.read_text().replace("eps: float = 1e-08", "eps: float = 1e-07", 1))
    capsys.readouterr()
    assert make_stubs.main() == 1
    shown = capsys.readouterr().out
    assert "-    eps: float = 1e-07," in shown
    assert "+    eps: float = 1e-08," in shown


# ---- what is typed by hand


def classes(stub: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((ROOT / "python" / "fusedopt" / stub).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def functions(body: list[ast.stmt]) -> dict[str, list[str]]:
    """Name -> parameters of the functions in a part of a stub."""
    return {
        node.name: [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def compiled(owner: Any) -> dict[str, list[str]]:
    """The same for a pybind11 module or class, from the signatures in its docstrings."""
    found = {}
    for name, value in vars(owner).items():
        if isinstance(value, property):
            found[name] = ["self"]
        elif callable(value) and not isinstance(value, type) and (name == "__init__" or not name.startswith("_")):
            signature = (value.__doc__ or "").splitlines()[0]
            found[name] = re.findall(r"(\w+): (?!:)", signature[signature.index("(") :])
    return found


def test_the_compiled_core_has_what_its_stub_says() -> None:
    tree = ast.parse((ROOT / "python" / "fusedopt" / "_core.pyi").read_text())
    said = functions(tree.body)
    assert said == compiled(_core)
    stubbed = classes("_core.pyi")
    assert set(stubbed) == {name for name, value in vars(_core).items() if isinstance(value, type)}
    for name, node in stubbed.items():
        assert functions(node.body) == compiled(getattr(_core, name)), name


def test_the_optimizer_of_numpy_has_what_its_stub_says() -> None:
    node = classes("numpy.pyi")["Optimizer"]
    real = {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(fusedopt.Optimizer).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert functions(node.body) == real
    attributes = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert attributes == {name for name in vars(fusedopt.SGD(np.ones(3))) if not name.startswith("_")}


def test_the_optimizers_of_torch_have_what_their_stub_says() -> None:
    torch = pytest.importorskip("torch")
    module = importlib.import_module("fusedopt.torch")
    node = classes("torch/__init__.pyi")["_Fused"]
    opt = module.SGD([torch.ones(3, requires_grad=True)], lr=0.1)
    said = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    said |= set(functions(node.body))
    assert {name for name in said if not hasattr(opt, name)} == set()
    added = {name for name in dir(opt) if not name.startswith("_")} - set(dir(torch.optim.SGD([torch.ones(3)], lr=0.1)))
    assert added <= said


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_what_is_made_from_a_rule_leads_to_it(rule: Any) -> None:
    for function in (getattr(fusedopt, rule.function), getattr(fusedopt, rule.name).__init__):
        source = inspect.getsource(function)
        assert f"class {type(rule).__name__} in fusedopt/rules.py" in source
        assert ast.parse(source).body[0].name == function.__name__  # type: ignore[attr-defined]
    assert f"class {type(rule).__name__} in fusedopt/rules.py" in ast.get_docstring(classes("numpy.pyi")[rule.name])


# ---- documentation


def assert_documented(value: Any, name: str) -> None:
    assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"
    if inspect.isclass(value) and value.__module__.startswith("fusedopt"):
        for key, member in vars(value).items():
            if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert_documented(getattr(value, key), f"{name}.{key}")


def test_every_public_name_has_a_docstring() -> None:
    for name in fusedopt.__all__:
        if not isinstance(getattr(fusedopt, name), str):
            assert_documented(getattr(fusedopt, name), name)
    for rule in RULES.values():
        assert_documented(type(rule), f"rules.{rule.name}")


def test_every_public_name_of_the_torch_front_end_has_a_docstring() -> None:
    pytest.importorskip("torch")
    module = importlib.import_module("fusedopt.torch")
    for name in module.__all__:
        assert_documented(getattr(module, name), f"torch.{name}")


@pytest.mark.parametrize("module", ["losses", "estimators"])
def test_every_public_name_of_a_module_has_a_docstring_whose_examples_run(module: str) -> None:
    if module == "estimators":
        pytest.importorskip("sklearn")
    found = importlib.import_module(f"fusedopt.{module}")
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    examples = 0
    for name in found.__all__:
        value = getattr(found, name)
        assert_documented(value, f"{module}.{name}")
        for test in finder.find(value, name):
            examples += len(test.examples)
            assert runner.run(test).failed == 0, name
    assert examples > 5


@pytest.mark.parametrize(
    "name",
    [
        "numpy",
        "torch",
        "config",
        "rules",
        "losses",
        "estimators",
        "plots",
        "bench",
        "training",
        "schedules",
        "rule",
        "zoo",
        "cli",
        "__main__",
    ],
)
def test_every_module_says_what_is_in_it(name: str) -> None:
    if name in (needs := {"torch": "torch", "training": "torch", "plots": "matplotlib", "estimators": "sklearn"}):
        pytest.importorskip(needs[name])
    assert_documented(importlib.import_module(f"fusedopt.{name}"), name)
