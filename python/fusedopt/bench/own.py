"""Every built-in rule written again with :mod:`fusedopt.rule`, operation by operation as in cpp/rules/rules.h, so that
the results have the same bits. The suite ``own`` and the tests compare the two."""

from __future__ import annotations

from typing import Any

from fusedopt.rule import OwnRule, exp, fma, lerp, maximum, option, rule, scalar, sign, sqrt, state, where
from fusedopt.zoo import adam_moments, adam_update

LOG_096 = -0.040821994520255166


def decayed(g: Any, p: Any, decay: Any) -> Any:
    return where(decay != 0, fma(decay, p, g), g)


@rule(lr=1e-3, weight_decay=0.0)
def PlainSGD(p: Any, g: Any, *, lr: Any, weight_decay: Any) -> Any:
    return fma(-lr, decayed(g, p, weight_decay), p)


@rule(lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)
def MomentumSGD(
    p: Any,
    g: Any,
    momentum_buffer: Any = state(),
    *,
    t: Any,
    lr: Any,
    momentum: Any,
    dampening: Any,
    weight_decay: Any,
    nesterov: Any,
) -> Any:
    g = decayed(g, p, weight_decay)
    b = where(t == 1, g, fma(1 - dampening, g, momentum * momentum_buffer))
    d = fma(momentum, b, g) if nesterov else b
    return fma(-lr, d, p), b


@rule(lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10)
def OwnAdagrad(
    p: Any,
    g: Any,
    sum: Any = state("initial_accumulator_value", non_negative=True),
    *,
    t: Any,
    lr: Any,
    lr_decay: Any,
    weight_decay: Any,
    initial_accumulator_value: Any,
    eps: Any,
) -> Any:
    g = decayed(g, p, weight_decay)
    sum = fma(g, g, sum)
    return p - (lr / (1 + (t - 1) * lr_decay) * g) / (sqrt(sum) + eps), sum


@rule(
    lr=1e-2,
    alpha=option(0.99, 0.0, 1.0, include_high=True),
    eps=1e-8,
    weight_decay=0.0,
    momentum=0.0,
    centered=False,
    buffered=False,
)
def OwnRMSprop(
    p: Any,
    g: Any,
    square_avg: Any = state(non_negative=True),
    momentum_buffer: Any = state(),
    grad_avg: Any = state(quantise=False),
    *,
    lr: Any,
    alpha: Any,
    eps: Any,
    weight_decay: Any,
    momentum: Any,
    centered: Any,
    buffered: Any,
) -> Any:
    g = decayed(g, p, weight_decay)
    v = square_avg = fma((1 - alpha) * g, g, alpha * square_avg)
    if centered:
        grad_avg = lerp(grad_avg, g, 1 - alpha)
        v = fma(-grad_avg, grad_avg, square_avg)
    d = sqrt(v) + eps
    if buffered:
        momentum_buffer = momentum * momentum_buffer + g / d
        p = fma(-lr, momentum_buffer, p)
    else:
        p = p - (lr * g) / d
    return p, square_avg, momentum_buffer, grad_avg


def moments(p: Any, g: Any, m: Any, v: Any, lr: Any, betas: Any, weight_decay: Any, decoupled: bool) -> Any:
    if decoupled:
        p = p * (1 - lr * weight_decay)
    else:
        g = decayed(g, p, weight_decay)
    return p, g, *adam_moments(m, v, g, betas)


@rule(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, decoupled_weight_decay=False)
def OwnAdam(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    max_exp_avg_sq: Any = state(quantise=False),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    amsgrad: Any,
    decoupled_weight_decay: Any,
) -> Any:
    p, g, exp_avg, exp_avg_sq = moments(p, g, exp_avg, exp_avg_sq, lr, betas, weight_decay, decoupled_weight_decay)
    v = exp_avg_sq
    if amsgrad:
        v = max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return p - adam_update(exp_avg, v, t, lr, betas, eps), exp_avg, exp_avg_sq, max_exp_avg_sq


@rule(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3, decoupled_weight_decay=False)
def OwnNAdam(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    mu_product: Any = scalar(1.0),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    momentum_decay: Any,
    decoupled_weight_decay: Any,
) -> Any:
    p, g, exp_avg, exp_avg_sq = moments(p, g, exp_avg, exp_avg_sq, lr, betas, weight_decay, decoupled_weight_decay)
    mu, ahead = (betas[0] * (1 - 0.5 * exp(LOG_096 * i * momentum_decay)) for i in (t, t + 1))
    mu_product = mu_product * mu
    lr_g = lr * (1 - mu) / (1 - mu_product)
    lr_m = lr * ahead / (1 - mu_product * ahead)
    p = p - (lr_g * g + lr_m * exp_avg) / fma(sqrt(exp_avg_sq), 1 / sqrt(1 - betas[1] ** t), eps)
    return p, exp_avg, exp_avg_sq, mu_product


@rule(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False)
def OwnRAdam(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    decoupled_weight_decay: Any,
) -> Any:
    p, g, exp_avg, exp_avg_sq = moments(p, g, exp_avg, exp_avg_sq, lr, betas, weight_decay, decoupled_weight_decay)
    b2, longest = betas[1] ** t, 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * b2 / (1 - b2)
    rectified = length > 5
    r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rate = lr / (1 - betas[0] ** t) * where(rectified, sqrt(r * (1 - b2)), 1.0)
    p = p - where(rectified, (rate * exp_avg) / (sqrt(exp_avg_sq) + eps), rate * exp_avg)
    return p, exp_avg, exp_avg_sq


@rule(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
def OwnAdamax(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_inf: Any = state(quantise=False),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
) -> Any:
    g = decayed(g, p, weight_decay)
    exp_avg = lerp(exp_avg, g, 1 - betas[0])
    exp_inf = maximum(betas[1] * exp_inf, abs(g) + eps)
    return p - (lr / (1 - betas[0] ** t) * exp_avg) / exp_inf, exp_avg, exp_inf


@rule(lr=1.0, rho=option(0.9, 0.0, 1.0, include_high=True), eps=1e-6, weight_decay=0.0)
def OwnAdadelta(
    p: Any,
    g: Any,
    square_avg: Any = state(non_negative=True),
    acc_delta: Any = state(quantise=False),
    *,
    lr: Any,
    rho: Any,
    eps: Any,
    weight_decay: Any,
) -> Any:
    g = decayed(g, p, weight_decay)
    square_avg = fma((1 - rho) * g, g, rho * square_avg)
    d = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
    acc_delta = fma((1 - rho) * d, d, rho * acc_delta)
    return fma(-lr, d, p), square_avg, acc_delta


@rule(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
def OwnLion(p: Any, g: Any, exp_avg: Any = state(), *, lr: Any, betas: Any, weight_decay: Any) -> Any:
    p = fma(-lr, sign(lerp(exp_avg, g, 1 - betas[0])), p * (1 - lr * weight_decay))
    return p, lerp(exp_avg, g, 1 - betas[1])


@rule(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, weight_decay=0.0)
def OwnAdEMAMix(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    exp_avg_slow: Any = state(),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    alpha: Any,
    eps: Any,
    weight_decay: Any,
) -> Any:
    b1, b2, b3 = betas
    exp_avg = lerp(exp_avg, g, 1 - b1)
    exp_avg_sq = fma((1 - b2) * g, g, b2 * exp_avg_sq)
    exp_avg_slow = lerp(exp_avg_slow, g, 1 - b3)
    step = fma(lr * alpha, exp_avg_slow, lr / (1 - b1**t) * exp_avg)
    d = fma(sqrt(exp_avg_sq), 1 / sqrt(1 - b2**t), eps)
    return p * (1 - lr * weight_decay) - step / d, exp_avg, exp_avg_sq, exp_avg_slow


_OWN: dict[str, tuple[OwnRule, dict[str, Any]]] = {
    "sgd": (PlainSGD, {}),
    "momentum": (MomentumSGD, {}),
    "adagrad": (OwnAdagrad, {}),
    "rmsprop": (OwnRMSprop, {}),
    "rmsprop_momentum": (OwnRMSprop, {"buffered": True}),
    "rmsprop_centered": (OwnRMSprop, {"centered": True}),
    "rmsprop_centered_momentum": (OwnRMSprop, {"centered": True, "buffered": True}),
    "adam": (OwnAdam, {}),
    "amsgrad": (OwnAdam, {"amsgrad": True}),
    "nadam": (OwnNAdam, {}),
    "radam": (OwnRAdam, {}),
    "adamax": (OwnAdamax, {}),
    "adadelta": (OwnAdadelta, {}),
    "lion": (OwnLion, {}),
    "ademamix": (OwnAdEMAMix, {}),
}
"""Kernel of a built-in rule -> the same rule in Python, and the options that choose the variant."""


def own_rule(built_in: Any, options: dict[str, Any]) -> tuple[OwnRule, dict[str, Any]]:
    """The rule in Python that does what a built-in one does with these options, and its options."""
    filled = {**built_in.defaults, **options}
    own, chosen = _OWN[built_in.kernel(filled).name]
    constants = {k: bool(v) for k, v in built_in.constants.items()}
    values = {**filled, **constants, **chosen}
    known = {**own.defaults, "maximize": False}
    kept = {k: v for k, v in options.items() if k not in built_in.defaults}
    return own, {**{k: v for k, v in values.items() if k in known}, **kept}
