"""Makes functions and constructors from a rule: one line of source with a real signature, compiled by ``exec``.

Why ``exec``: options and defaults stand once, in the rule, and Python itself binds and checks the arguments. A function
of ``*args, **kwargs`` with a ``__signature__`` would have to bind them in Python code at every call, which costs more
than the update of a small array, and would state Python's error messages a second time. ``dataclasses`` and
``namedtuple`` do the same for the same reasons. The source is kept for ``inspect.getsource``, debuggers and tracebacks,
and says where the rule is; type checkers and editors read the stubs, which say so, too.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from textwrap import dedent
from typing import Any

from .rules import Rule


def compile_function(rule: Rule, where: str, signature: str, body: str, names: dict[str, Any]) -> Callable[..., Any]:
    """A function with this signature, whose body is one line that sees ``names``.

    Args:
        where: its full name, such as ``fusedopt.Adam.__init__``.
    """
    name, file = where.rpartition(".")[2], f"<{where}>"
    origin = f"# By fusedopt/_make.py from class {type(rule).__name__} in fusedopt/rules.py"
    source = f"def {name}({signature}):\n    {origin}\n    {body}\n"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function


def option_signature(rule: Rule, without: tuple[str, ...] = ()) -> str:
    """``lr=0.001, betas=(0.9, 0.999), ...``"""
    return ", ".join(f"{k}={v!r}" for k, v in rule.defaults.items() if k not in without)


def option_dict(rule: Rule, without: tuple[str, ...] = ()) -> str:
    """``{'lr': lr, 'betas': betas, ...}``; options in ``without`` have their default."""
    return "{" + ", ".join(f"{k!r}: {v!r}" if k in without else f"{k!r}: {k}" for k, v in rule.defaults.items()) + "}"


def array_names(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The states that every variant of the rule has, and those that only some have; torch's names and order."""
    variants = [rule.states(dict.fromkeys(true, True)) for true in rule.variants]
    always = tuple(s for s in variants[0] if all(s in v for v in variants))
    sometimes = tuple(dict.fromkeys(s for v in variants for s in v if s not in always))
    return always, sometimes


def rule_doc(rule: Rule, tail: str) -> str:
    """The rule's docstring, followed by the front end's."""
    return dedent("    " + (type(rule).__doc__ or "")).strip() + "\n\n" + dedent(tail).strip() + "\n"
