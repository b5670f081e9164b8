"""Turns a rule into callables with a real signature, as dataclasses does: a line of source, compiled."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent
from typing import Any

from .rules import Rule


def compile_function(name: str, signature: str, body: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``name`` with this signature, whose body is one line that sees ``names``."""
    namespace = dict(names)
    exec(f"def {name}({signature}):\n    {body}", namespace)
    function: Callable[..., Any] = namespace[name]
    return function


def option_signature(rule: Rule, without: tuple[str, ...] = ()) -> str:
    """``lr=0.001, betas=(0.9, 0.999), ...``"""
    return ", ".join(f"{k}={v!r}" for k, v in rule.defaults.items() if k not in without)


def option_dict(rule: Rule, without: tuple[str, ...] = ()) -> str:
    """``{'lr': lr, 'betas': betas, ...}``; options that are not in the signature have their default."""
    return "{" + ", ".join(f"{k!r}: {v!r}" if k in without else f"{k!r}: {k}" for k, v in rule.defaults.items()) + "}"


def array_names(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arrays that every variant of the rule keeps, and those that only some do; torch's names and order."""
    variants = [rule.states(dict.fromkeys(true, True)) for true in rule.variants]
    always = tuple(s for s in variants[0] if all(s in v for v in variants))
    sometimes = tuple(dict.fromkeys(s for v in variants for s in v if s not in always))
    return always, sometimes


def rule_doc(rule: Rule, tail: str) -> str:
    """The rule's documentation, followed by what the front end has to say."""
    return dedent("    " + (type(rule).__doc__ or "")).strip() + "\n\n" + dedent(tail).strip() + "\n"
