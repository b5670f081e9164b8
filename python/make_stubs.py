"""Generates the type stubs fusedopt/__init__.pyi, numpy.pyi and torch/__init__.pyi from the rules. Not installed.

``python python/make_stubs.py`` writes them; ``--check`` writes nothing, and exits 1 with a diff if one is out of date.
fusedopt/_core.pyi is written by hand. The torch classes are typed as those of the installed torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fusedopt
from fusedopt.rules import RULES, SPARSE_RULES, Rule

PACKAGE = Path(__file__).parent / "fusedopt"
HEAD = "# Made by python/make_stubs.py from the rules: do not edit, run `make stubs`.\n"
LINE = 120

NUMPY = '''
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, SupportsIndex, TypeAlias

from numpy.typing import NDArray

{all}

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Array: TypeAlias = NDArray[Any] | _SupportsDLPack
_Arrays: TypeAlias = _Array | Sequence[_Array]
_Steps: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
_Timed: TypeAlias = float | Callable[[int], float]
_Params: TypeAlias = NDArray[Any] | Sequence[NDArray[Any]] | Mapping[Any, NDArray[Any]] | Sequence[Mapping[str, Any]]

class Rows:
    """The gradient of a table of which few rows were used: which rows, and a gradient for each."""

    indices: Any
    values: Any
    def __init__(self, indices: _Array, values: _Array) -> None: ...

_Grad: TypeAlias = _Array | Rows
_Grads: TypeAlias = _Grad | Sequence[_Grad | Sequence[_Grad | None] | None] | Mapping[Any, _Grad | None]

class Optimizer:
    """Base class of the NumPy optimizers."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: list[dict[str, Any]]
    max_grad_norm: float | None
    last_grad_norm: float | None
    def add_param_group(self, group: Mapping[str, Any]) -> None: ...
    def step(self, grads: _Grads) -> None: ...
    def ema_parameters(self) -> AbstractContextManager[None]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...
'''

TORCH = """
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from ..training import Callback as Callback
from ..training import Trainer as Trainer
from ..training import fit as fit
from . import functional as functional
from ._backward import InBackward as InBackward
from ._backward import step_in_backward as step_in_backward
from ._fallback import FallbackWarning as FallbackWarning
from ._install import convert as convert
from ._install import install as install
from ._install import installed as installed
from ._install import uninstall as uninstall
from ._offload import Offload as Offload
from ._schedule import ScheduledLR as ScheduledLR
from ._state import memory_report as memory_report

{all}

class _Fused(Optimizer):
    @property
    def last_grad_norm(self) -> torch.Tensor | None: ...
    @property
    def last_step_skipped(self) -> bool: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None: ...
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def ema_parameters(self) -> AbstractContextManager[None]: ...
"""

# Types of the options of both front ends.
KINDS = {
    "max_grad_norm": "float | None",
    "state_dtype": "str | None",
    "master": "str | None",
    "ema_decay": "float | None",
}


def _listed(head: str, items: Iterable[str], tail: str, indent: str = "") -> str:
    """``head`` items ``tail`` on one line, or one item per line if that is too long."""
    items = list(items)
    one = f"{indent}{head}{', '.join(items)}{tail}"
    if len(one) <= LINE:
        return one
    return "\n".join([indent + head, *(f"{indent}    {item}," for item in items), indent + tail])


def _kind(name: str) -> int:
    """CONSTANTS, Classes, functions: the order that ruff expects."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2


def _all(names: Iterable[str]) -> str:
    return _listed("__all__ = [", (f'"{name}"' for name in sorted(names, key=lambda name: (_kind(name), name))), "]")


def _imports(module: str, names: Iterable[str]) -> str:
    text = _listed(f"from .{module} import (", sorted(names, key=lambda name: (_kind(name), name.lower())), ")")
    return text if "\n" in text else text.replace("(", "").replace(")", "")


def _docstring(rule: Rule) -> str:
    """The rule's summary, and where the rest of it is; indented."""
    summary = inspect.cleandoc(type(rule).__doc__ or "").splitlines()[0]
    return f'    """{summary}\n\n    The rule is class {type(rule).__name__} in fusedopt/rules.py.\n    """\n'


def _parameters(function: Any, kinds: dict[str, str]) -> list[str]:
    """The parameters as source; ``kinds`` overrides their types."""
    out: list[str] = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in out:
            out.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        out.append(p.name if p.name == "self" else f"{p.name}: {kinds.get(p.name) or _type(p)}{default}")
    return out


def _type(p: inspect.Parameter) -> str:
    if isinstance(p.annotation, str):
        return p.annotation
    if p.annotation is not p.empty:
        return inspect.formatannotation(p.annotation).replace("typing.", "").replace("collections.abc.", "")
    if p.default is p.empty or p.default is None:  # only arrays have no default or None
        return "_Arrays" if p.default is p.empty else "_Arrays | None"
    if isinstance(p.default, tuple):
        return f"tuple[{', '.join(type(x).__name__ for x in p.default)}]"
    return type(p.default).__name__


def _class(rule: Rule, bases: str, init: Any, kinds: dict[str, str]) -> str:
    return f"class {rule.name}({bases}):\n{_docstring(rule)}\n" + _listed(
        "def __init__(", _parameters(init, kinds), ") -> None: ...\n", "    "
    )


def numpy_stub() -> str:
    """fusedopt/numpy.pyi."""
    kinds = KINDS | {"params": "_Params"}
    kinds |= dict.fromkeys(("lr", "momentum", "weight_decay"), "_Timed")
    parts = [NUMPY.replace("{all}", _all(importlib.import_module("fusedopt.numpy").__all__))]
    for rule in RULES.values():
        for name in (rule.function, rule.rows_function):
            head = _listed(f"def {name}(", _parameters(getattr(fusedopt, name), {"step": "_Steps"}), ") -> None:")
            parts.append(f"{head}\n{_docstring(rule)}")
        timed = {"betas": f"tuple[{', '.join('_Timed' for _ in rule.defaults.get('betas', ()))}]"}
        parts.append(_class(rule, "Optimizer", getattr(fusedopt, rule.name).__init__, kinds | timed))
    return HEAD + "\n".join(parts)


def torch_stub() -> str:
    """fusedopt/torch/__init__.pyi; needs torch."""
    import torch

    module = importlib.import_module("fusedopt.torch")
    kinds = KINDS | {"params": "ParamsT", "state_dtype": "torch.dtype | str | None"}
    parts = [TORCH.replace("{all}", _all(module.__all__))]
    for rule in (*RULES.values(), *SPARSE_RULES.values()):
        theirs = hasattr(torch.optim, rule.name)
        bases = f"_Fused, torch.optim.{rule.name}" if theirs else "_Fused"
        more = {} if theirs else {"lr": "float | torch.Tensor"}
        parts.append(_class(rule, bases, getattr(module, rule.name).__init__, kinds | more))
    parts.append("def __getattr__(name: str) -> Any: ...  # torch.optim's\n")
    return HEAD + "\n".join(parts)


def init_stub() -> str:
    """fusedopt/__init__.pyi: all names, for type checkers that cannot evaluate ``__all__``."""
    made = importlib.import_module("fusedopt.numpy").__all__
    config = [name for name in fusedopt.__all__ if name not in (*made, "__version__", "losses")]
    parts = [
        "from . import losses as losses",
        _imports("config", config),
        _imports("numpy", made),
        "",
        _all(fusedopt.__all__),
        "",
        "__version__: str\n",
    ]
    return HEAD + "\n" + "\n".join(parts)


STUBS = {"__init__.pyi": init_stub, "numpy.pyi": numpy_stub, "torch/__init__.pyi": torch_stub}


def differences(names: Iterable[str] | None = None) -> list[str]:
    """The diff from the committed stubs to the generated ones, as lines; empty if they agree."""
    out: list[str] = []
    for name in STUBS if names is None else names:
        path = PACKAGE / name
        old = path.read_text() if path.exists() else ""
        new = STUBS[name]()
        out += difflib.unified_diff(old.splitlines(), new.splitlines(), str(name), "from the rules", lineterm="")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with a diff where a stub is old")
    if parser.parse_args().check:
        lines = differences()
        print("\n".join(lines) if lines else "stubs: up to date")
        return bool(lines)
    for name, make in STUBS.items():
        (PACKAGE / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
