"""User-defined update rules: a Python function becomes a fused step for NumPy and torch, without a compiler.

    >>> from fusedopt.rule import lerp, rule, sqrt, state
    >>> @rule(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    ... def MyAdam(p, g, exp_avg=state(), exp_avg_sq=state(non_negative=True), *, t, lr, betas, eps):
    ...     b1, b2 = betas
    ...     exp_avg = lerp(exp_avg, g, 1 - b1)
    ...     exp_avg_sq = lerp(exp_avg_sq, g * g, 1 - b2)
    ...     p = p - lr / (1 - b1**t) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - b2**t) + eps)
    ...     return p, exp_avg, exp_avg_sq

``MyAdam.numpy`` and ``MyAdam.torch`` are optimizer classes with all options of the built-in ones. ``MyAdam.update_`` is
the in-place function, and ``MyAdam.reference`` evaluates the function on float64 arrays. ``repr(MyAdam)`` shows the
program.

The decorator traces the function: it calls it with symbols, once for every combination of the boolean options. Steps do
not call it. Its arguments are the parameter ``p``, the gradient ``g`` (unscaled, clipped and signed), the states and
scalars, and by keyword the step number ``t``, counted from 1, and the options. It returns the new parameter, states and
scalars in the order of its arguments. Expressions of options, ``t`` and scalars only are evaluated once per step, in
float64. All others are evaluated for each element, in float32, or in float64 for float64 parameters. The order of
operations is that of the function.

Operators: ``+ - * /``, ``**``, comparisons, ``& | ~`` of conditions, ``abs``. The functions are listed below.
"""

from ._define import OwnRule, option, rule, scalar, state
from ._symbols import (
    RuleError,
    exp,
    fma,
    lerp,
    log,
    maximum,
    minimum,
    sign,
    sqrt,
    tensor_mean,
    tensor_norm,
    tensor_sum,
    where,
)

__all__ = [
    "OwnRule",
    "RuleError",
    "exp",
    "fma",
    "lerp",
    "log",
    "maximum",
    "minimum",
    "option",
    "rule",
    "scalar",
    "sign",
    "sqrt",
    "state",
    "tensor_mean",
    "tensor_norm",
    "tensor_sum",
    "where",
]
