"""Update rules beyond the built-in ones, each written with :mod:`fusedopt.rule` in a few lines.

    >>> import numpy as np
    >>> from fusedopt.zoo import Adan
    >>> w = np.ones(3, np.float32)
    >>> opt = Adan.numpy(w, lr=0.1)
    >>> opt.step(np.ones(3, np.float32))

``Adan.torch`` is the class for torch. Read the source for examples of rules.
"""

from __future__ import annotations

from typing import Any

from .rule import lerp, maximum, minimum, option, rule, sign, sqrt, state, where

__all__ = ["ASGD", "Adan", "Rprop"]


@rule(lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0)
def Adan(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_diff: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    previous_grad: Any = state(),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
) -> Any:
    r"""Adan: Nesterov momentum estimated from differences of gradients.

    .. math::
        d_t &= g_t - g_{t-1}, \qquad d_1 = 0 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        \theta_t &= \frac{1}{1 + \gamma \lambda} \left(\theta_{t-1} - \gamma
            \frac{\hat m_t + \beta_2 \hat v_t}{\sqrt{\hat n_t} + \epsilon}\right)

    Xie, Zhou, Li, Lin, Yan: Adan, arXiv 2208.06677. The betas are those of the authors' code, one minus the paper's,
    and as there the averages are corrected for their start at 0.
    """
    b1, b2, b3 = betas
    diff = where(t == 1, 0.0, g - previous_grad)
    looked_ahead = g + b2 * diff
    exp_avg = lerp(exp_avg, g, 1 - b1)
    exp_avg_diff = lerp(exp_avg_diff, diff, 1 - b2)
    exp_avg_sq = lerp(exp_avg_sq, looked_ahead * looked_ahead, 1 - b3)
    step = lr / (1 - b1**t) * exp_avg + lr * b2 / (1 - b2**t) * exp_avg_diff
    p = (p - step / (sqrt(exp_avg_sq) / sqrt(1 - b3**t) + eps)) * (1 / (1 + lr * weight_decay))
    return p, exp_avg, exp_avg_diff, exp_avg_sq, g


@rule(lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0)
def ASGD(
    p: Any,
    g: Any,
    ax: Any = state("param", quantise=False),
    *,
    t: Any,
    lr: Any,
    lambd: Any,
    alpha: Any,
    t0: Any,
    weight_decay: Any,
) -> Any:
    r"""Averaged stochastic gradient descent. The average of the parameters, from step t0 on, is the state ``ax``.

    .. math::
        \gamma_t &= \gamma / (1 + \lambda \gamma (t - 1))^\alpha, \qquad \mu_t = 1 / \max(1, t - 1 - t_0) \\
        \theta_t &= (1 - \lambda \gamma_t) \theta_{t-1} - \gamma_t g_t, \qquad
            a_t = a_{t-1} + \mu_t (\theta_t - a_{t-1})

    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30 (1992). The
    options are those of ``torch.optim.ASGD``; weight_decay is added to the gradient.
    """
    g = where(weight_decay != 0, g + weight_decay * p, g)
    rate = lr / (1 + lambd * lr * (t - 1)) ** alpha
    p = p * (1 - lambd * rate) - rate * g
    return p, lerp(ax, p, 1 / maximum(1.0, t - 1 - t0))


@rule(lr=1e-2, etas=(0.5, 1.2), step_sizes=option((1e-6, 50.0)))
def Rprop(
    p: Any,
    g: Any,
    prev: Any = state(),
    step_size: Any = state("lr", quantise=False),
    *,
    lr: Any,
    etas: Any,
    step_sizes: Any,
) -> Any:
    """Rprop: steps of a size that grows while the gradient's sign stays, and shrinks when it turns.

    Riedmiller, Braun: A direct adaptive method for faster backpropagation learning (ICNN 1993). The options are
    those of ``torch.optim.Rprop``; ``lr`` is the first size of a step. For gradients of the whole data set, not of
    mini-batches.
    """
    turned = g * prev
    factor = where(turned > 0, etas[1], where(turned < 0, etas[0], 1.0))
    step_size = minimum(maximum(step_size * factor, step_sizes[0]), step_sizes[1])
    g = where(turned < 0, 0.0, g)
    return p - sign(g) * step_size, g, step_size
