"""Generates functions with a real signature from a rule, by compiling source, as ``dataclasses`` does."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent
from typing import Any

from .rules import Rule


def compile_function(name: str, signature: str, body: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``name`` with this signature and one line as its body; ``names`` are its globals."""
    namespace = dict(names)
    exec(f"def {name}({signature}):\n    {body}", namespace)
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
