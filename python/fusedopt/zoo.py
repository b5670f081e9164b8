"""Update rules written with :mod:`fusedopt.rule`, in addition to the built-in ones.

    >>> import numpy as np
    >>> from fusedopt.zoo import Adan
    >>> w = np.ones(3, np.float32)
    >>> opt = Adan.numpy(w, lr=0.1)
    >>> opt.step(np.ones(3, np.float32))

``Adan.torch`` is the class for torch. The source serves as an example of rules.
"""

from __future__ import annotations

from typing import Any

from .rule import (
    fma,
    lerp,
    maximum,
    minimum,
    option,
    rule,
    sign,
    sqrt,
    state,
    tensor_mean,
    tensor_norm,
    where,
)

__all__ = ["ASGD", "LAMB", "LARS", "MARS", "Adan", "CautiousAdamW", "CautiousLion", "Rprop", "StableAdamW"]


def adam_moments(exp_avg: Any, exp_avg_sq: Any, g: Any, betas: Any) -> Any:
    """Adam's moving averages of the gradient and of its square."""
    b1, b2 = betas
    return lerp(exp_avg, g, 1 - b1), fma((1 - b2) * g, g, b2 * exp_avg_sq)


def adam_update(exp_avg: Any, exp_avg_sq: Any, t: Any, lr: Any, betas: Any, eps: Any) -> Any:
    """Adam's update with bias correction, times the learning rate."""
    b1, b2 = betas
    return (lr / (1 - b1**t) * exp_avg) / fma(sqrt(exp_avg_sq), 1 / sqrt(1 - b2**t), eps)


def cautious(update: Any, direction: Any, g: Any) -> Any:
    """The update where ``direction`` has the gradient's sign, else 0; and the share of such elements, at least 1e-3."""
    agrees = direction * g > 0
    return where(agrees, update, 0.0), maximum(tensor_mean(agrees), 1e-3)


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

    Xie, Zhou, Li, Lin, Yan: Adan, arXiv 2208.06677. The betas are those of the authors' code: one minus the paper's.
    As in that code, bias correction is applied to the averages.
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
    r"""Averaged stochastic gradient descent. The state ``ax`` is the average of the parameters from step t0 on.

    .. math::
        \gamma_t &= \gamma / (1 + \lambda \gamma (t - 1))^\alpha, \qquad \mu_t = 1 / \max(1, t - 1 - t_0) \\
        \theta_t &= (1 - \lambda \gamma_t) \theta_{t-1} - \gamma_t g_t, \qquad
            a_t = a_{t-1} + \mu_t (\theta_t - a_{t-1})

    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30 (1992). The
    options are those of ``torch.optim.ASGD``. weight_decay is an L2 penalty: it is added to the gradient.
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
    """Rprop: the step size of an element grows while its gradient keeps its sign, and shrinks when the sign changes.

    Riedmiller, Braun: A direct adaptive method for faster backpropagation learning (ICNN 1993). The options are
    those of ``torch.optim.Rprop``; ``lr`` is the initial step size. Use it with gradients of the whole data set, not of
    mini-batches.
    """
    turned = g * prev
    factor = where(turned > 0, etas[1], where(turned < 0, etas[0], 1.0))
    step_size = minimum(maximum(step_size * factor, step_sizes[0]), step_sizes[1])
    g = where(turned < 0, 0.0, g)
    return p - sign(g) * step_size, g, step_size


@rule(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
def CautiousAdamW(
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
) -> Any:
    r"""AdamW that updates only the elements whose update has the sign of the gradient.

    .. math::
        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon), \qquad c_t = [u_t g_t > 0] \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma u_t c_t / \max(\overline{c_t}, 10^{-3})

    The mean is over the tensor. Liang, Chen, Liu, Liu: Cautious Optimizers, arXiv 2411.16085.
    """
    exp_avg, exp_avg_sq = adam_moments(exp_avg, exp_avg_sq, g, betas)
    kept, share = cautious(adam_update(exp_avg, exp_avg_sq, t, lr, betas, eps), exp_avg, g)
    return p * (1 - lr * weight_decay) - kept * (1 / share), exp_avg, exp_avg_sq


@rule(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
def CautiousLion(p: Any, g: Any, exp_avg: Any = state(), *, lr: Any, betas: Any, weight_decay: Any) -> Any:
    r"""Lion that updates only the elements whose update has the sign of the gradient; see :data:`CautiousAdamW`.

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad c_t = [u_t g_t > 0] \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma u_t c_t / \max(\overline{c_t}, 10^{-3}) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Liang, Chen, Liu, Liu: Cautious Optimizers, arXiv 2411.16085.
    """
    update = sign(lerp(exp_avg, g, 1 - betas[0]))
    kept, share = cautious(update, update, g)
    return p * (1 - lr * weight_decay) - lr / share * kept, lerp(exp_avg, g, 1 - betas[1])


@rule(lr=3e-3, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.0, gamma=0.025, max_norm=1.0)
def MARS(
    p: Any,
    g: Any,
    exp_avg: Any = state(),
    exp_avg_sq: Any = state(non_negative=True),
    previous_grad: Any = state(),
    *,
    t: Any,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    gamma: Any,
    max_norm: Any,
) -> Any:
    r"""MARS-AdamW: AdamW with variance reduction by the difference from the previous gradient.

    .. math::
        c_t &= g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}), \qquad
            \tilde c_t = c_t / \max(1, \|c_t\| / c_{\max}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \tilde c_t, \qquad
            v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde c_t^2 \\
        \theta_t &= (1 - \eta \lambda) \theta_{t-1} - \eta \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    The norm is that of the tensor. Yuan, Liu, Wu, Zhou, Gu: MARS, arXiv 2411.10438, in the approximate form, which
    uses the gradient of the previous step as computed then.
    """
    b1 = betas[0]
    c = where(t == 1, g, g + gamma * b1 / (1 - b1) * (g - previous_grad))
    c = c * (1 / maximum(1.0, tensor_norm(c) / max_norm))
    exp_avg, exp_avg_sq = adam_moments(exp_avg, exp_avg_sq, c, betas)
    update = adam_update(exp_avg, exp_avg_sq, t, lr, betas, eps)
    return p * (1 - lr * weight_decay) - update, exp_avg, exp_avg_sq, g


@rule(lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
def LAMB(
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
) -> Any:
    r"""LAMB: Adam with an update whose norm is that of the parameter tensor, times the learning rate.

    .. math::
        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda \theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \gamma \frac{\|\theta_{t-1}\|}{\|u_t\|} u_t

    The ratio is 1 if one of the norms is 0. You et al.: Large Batch Optimization for Deep Learning, arXiv
    1904.00962.
    """
    exp_avg, exp_avg_sq = adam_moments(exp_avg, exp_avg_sq, g, betas)
    u = adam_update(exp_avg, exp_avg_sq, t, 1, betas, eps) + weight_decay * p
    weight, update = tensor_norm(p), tensor_norm(u)
    ratio = where((weight > 0) & (update > 0), weight / update, 1.0)
    return p - lr * ratio * u, exp_avg, exp_avg_sq


@rule(lr=0.1, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=1e-8)
def LARS(
    p: Any,
    g: Any,
    momentum_buffer: Any = state(),
    *,
    lr: Any,
    momentum: Any,
    weight_decay: Any,
    trust_coefficient: Any,
    eps: Any,
) -> Any:
    r"""LARS: momentum with a learning rate per tensor, proportional to the ratio of its norm to that of its gradient.

    .. math::
        r_t &= \eta \frac{\|\theta_{t-1}\|}{\|g_t\| + \lambda \|\theta_{t-1}\| + \epsilon} \\
        b_t &= \mu b_{t-1} + \gamma r_t (g_t + \lambda \theta_{t-1}), \qquad \theta_t = \theta_{t-1} - b_t

    r is 1 if one of the norms is 0. You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks, arXiv
    1708.03888.
    """
    weight, grad = tensor_norm(p), tensor_norm(g)
    trusted = trust_coefficient * weight / (grad + weight_decay * weight + eps)
    ratio = where((weight > 0) & (grad > 0), trusted, 1.0)
    momentum_buffer = momentum * momentum_buffer + lr * ratio * (g + weight_decay * p)
    return p - momentum_buffer, momentum_buffer


@rule(lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2)
def StableAdamW(
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
) -> Any:
    r"""StableAdamW: AdamW with AdaFactor's update clipping, which limits the RMS of a tensor's update.

    .. math::
        \beta_{i,t} &= \beta_i (1 - \beta_i^{t-1}) / (1 - \beta_i^t) \\
        m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \\
        v_t &= \beta_{2,t} v_{t-1} + (1 - \beta_{2,t}) g_t^2 \\
        \mathrm{RMS}_t &= \sqrt{\overline{g_t^2 / \max(v_t, \epsilon^2)}}, \qquad
            \gamma_t = \gamma / \max(1, \mathrm{RMS}_t) \\
        \theta_t &= (1 - \gamma_t \lambda) \theta_{t-1} - \gamma_t m_t / (\sqrt{v_t} + \epsilon)

    The mean is over the tensor. Wortsman et al.: Stable and low-precision training for large-scale vision-language
    models, arXiv 2304.13013.
    """
    corrected = [b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas]
    exp_avg, exp_avg_sq = adam_moments(exp_avg, exp_avg_sq, g, corrected)
    rms = sqrt(tensor_mean(g * g / maximum(exp_avg_sq, eps**2)))
    rate = lr / maximum(1.0, rms)
    return p * (1 - rate * weight_decay) - (rate * exp_avg) / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq
