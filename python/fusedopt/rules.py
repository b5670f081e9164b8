"""Every update rule: options with defaults and ranges, documentation, float64 reference.

The kernels are in cpp/rules/rules.h; the references here state the arithmetic a second time, on purpose, to check them.
The front ends (``fusedopt.numpy``, ``fusedopt.torch``), their stubs, tests and benchmarks are generated from ``RULES``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import _core

Array = NDArray[np.float64]
State = MutableMapping[str, Array]
Options = Mapping[str, Any]

RULES: dict[str, Rule] = {}
"""Optimizer class name -> rule, in the order of definition."""
SPARSE_RULES: dict[str, Rule] = {}
"""Likewise, of rules for sparse gradients alone; torch has them, as it has no other way to take such gradients."""


@dataclass(frozen=True)
class Kernel:
    """One entry of FUSEDOPT_RULES in cpp/rules/rules.h, and the options that supply its hyperparameters."""

    name: str
    index: int
    states: tuple[str, ...]
    operands: tuple[str, ...]
    """Operands in the kernel's order: param, grad, the states, the carried scalar if any."""

    sources: tuple[tuple[str | None, int, float], ...]
    """Per hyperparameter: the option or None; the index into a tuple option or -1; the value if there is no option."""

    values: Callable[[Options], list[float]]
    """Options -> the hyperparameters as numbers, in the kernel's order."""

    hyper: tuple[str, ...]
    """The names of the hyperparameters, which are not all options."""

    codes: tuple[str, ...]
    """dtype of each state's codes: int8 if signed, uint8 for a second moment, empty if it cannot be quantised."""

    def code(self, state: str) -> str:
        """The dtype of a state's codes; empty if it cannot be quantised."""
        return self.codes[self.states.index(state)]


def _kernel(name: str, rule: Rule) -> Kernel:
    index, hyper, states, _, codes = _core.kernels()[name]
    sources: list[tuple[str | None, int, float]] = []
    for h in hyper:
        if h in rule.constants:
            sources.append((None, -1, rule.constants[h]))
        elif h.removeprefix("beta").isdigit():
            sources.append(("betas", int(h.removeprefix("beta")) - 1, 0.0))
        else:
            sources.append((h, -1, 0.0))
    operands = ("param", "grad", *states, *rule.carried)
    return Kernel(name, index, states, operands, tuple(sources), values_of(sources), tuple(hyper), codes)


def values_of(sources: Iterable[tuple[str | None, int, float]]) -> Callable[[Options], list[float]]:
    """The function for :attr:`Kernel.values`. Generated source, since it runs in every step."""
    items = (repr(c) if key is None else f"o[{key!r}]" + f"[{i}]" * (i >= 0) for key, i, c in sources)
    found: Callable[[Options], list[float]] = eval(f"lambda o: [{', '.join(items)}]")
    return found


def check_max_grad_norm(value: Any) -> float | None:
    """The value of the option ``max_grad_norm`` as a float or None; raises ValueError for anything else."""
    if value is None:
        return None
    number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {value!r}")
    return float(value)


class Rule:
    """One update rule: a subclass per optimizer, one instance of it in ``RULES``."""

    function: ClassVar[str]
    """Name of the in-place function; empty for a rule for sparse gradients alone."""
    defaults: ClassVar[dict[str, Any]]
    """Options and defaults, with torch's names in torch's order."""
    variants: ClassVar[dict[tuple[str, ...], str]]
    """Options that are true -> kernel in cpp/rules/rules.h; the first entry is the kernel without any."""
    scalars: ClassVar[tuple[str, ...]] = ("step",)
    """Scalar states of a parameter, as in torch: the step count, and the scalar that the kernel carries (NAdam)."""
    clock: ClassVar[str | None] = "step"
    """The in-place function's time argument: ``step``, counted from 1; ``first``, a bool; or none."""
    constants: ClassVar[dict[str, float]] = {}
    """Hyperparameters of the kernel that are not options of this optimizer, with their values."""
    decoupled: ClassVar[bool] = False
    """Whether weight decay scales the parameter, instead of being added to the gradient, whatever the options."""
    ranges: ClassVar[dict[str, tuple[float, float, bool]]] = {}
    """Options that are not in [0, inf): lower bound, upper bound, whether the upper bound is included. betas are in
    [0, 1)."""
    keras_names: ClassVar[dict[str, str]] = {}
    """Options that Keras calls by another name, beside eps (epsilon) and betas (beta_1, beta_2, ...)."""
    initial: ClassVar[dict[str, str | float]] = {}
    """Initial values of states that do not start at 0: a number, the name of an option, or "param" for a copy of the
    parameter."""
    wide: ClassVar[bool] = False
    """Whether the carried scalar is a float64 tensor beside torch parameters of any dtype, and not torch's."""
    own: ClassVar[bool] = False
    """Whether the rule is a user's, whose kernels are those of the CPU's interpreter."""
    reduces: ClassVar[bool] = False
    """Whether it needs sums over the whole tensor."""
    row_wise: ClassVar[str] = ""
    """The state of which a table may keep one number for each row, with the option ``row_wise``; empty if none."""

    def __init_subclass__(cls) -> None:
        if "function" in cls.__dict__:
            (RULES if cls.function else SPARSE_RULES)[cls.__name__] = cls()

    @property
    def name(self) -> str:
        """Name of the optimizer class."""
        return type(self).__name__

    @property
    def rows_function(self) -> str:
        """Name of the in-place function that updates rows."""
        return f"{self.function}rows_"

    @property
    def carried(self) -> tuple[str, ...]:
        """The scalar states other than the step count."""
        return tuple(s for s in self.scalars if s != "step")

    @property
    def once(self) -> tuple[str, ...]:
        """The options that only set the initial value of a state."""
        return tuple(v for v in self.initial.values() if isinstance(v, str))

    @cached_property
    def chooses(self) -> tuple[str, ...]:
        """The options whose truth selects the kernel."""
        return tuple(sorted({option for key in self.variants for option in key}))

    @cached_property
    def _by_truth(self) -> dict[tuple[bool, ...], Kernel]:
        return {tuple(o in key for o in self.chooses): _kernel(name, self) for key, name in self.variants.items()}

    def kernel(self, options: Options) -> Kernel:
        """The kernel for these options."""
        if options.get("row_wise"):
            return self._row_wise_kernel
        for option in self.chooses:
            if options.get(option):
                return self._by_truth[tuple([bool(options.get(o)) for o in self.chooses])]
        return self._plainest

    @cached_property
    def _plainest(self) -> Kernel:
        return self._by_truth[(False,) * len(self.chooses)]

    @cached_property
    def _row_wise_kernel(self) -> Kernel:
        """SGD's, with a learning rate for each row. cpp/step/rows.cpp computes it from all hyperparameters."""
        index, of_sgd, *_ = _core.kernels()["sgd"]
        hyper = (*of_sgd, "lr_decay", "eps")
        sources = tuple((name, -1, 0.0) for name in hyper)
        return Kernel("sgd", index, (), ("param", "grad"), sources, values_of(sources), hyper, ())

    @property
    def counts_by_row(self) -> bool:
        """Whether the rows of a table may count their own steps: the option ``row_steps``."""
        return self.clock is not None and not self.carried and not self.reduces

    def check_rows(self, options: Options) -> None:
        """Raises ValueError unless the rule has the options ``row_steps`` and ``row_wise`` as they are given."""
        if options["row_steps"] and not self.counts_by_row:
            carried = "a number from step to step that belongs to the whole table"
            why = (
                "sums over the whole tensor" if self.reduces else carried if self.carried else "no use for step counts"
            )
            raise ValueError(f"row_steps: {self.name} has {why}, expected False")
        if options["row_wise"] and not self.row_wise:
            raise ValueError(f"row_wise: {self.name} has no such form, expected False")
        if options["row_wise"] and options["weight_decay"]:
            raise ValueError(f"weight_decay: expected 0 with row_wise=True, got {options['weight_decay']!r}")
        if options["row_wise"] and options["state_dtype"]:
            raise ValueError(f"state_dtype: expected None with row_wise=True, got {options['state_dtype']!r}")

    @cached_property
    def all_operands(self) -> tuple[str, ...]:
        """The operands of all kernels; those of each are a subsequence of them."""
        return max((kernel.operands for kernel in self._by_truth.values()), key=len)

    def states(self, options: Options) -> tuple[str, ...]:
        """Names of a parameter's state arrays under these options, in torch's order."""
        return self.kernel(options).states

    def first(self, state: str, options: Options) -> float:
        """The initial value of a state that is not a copy of the parameter."""
        value: Any = self.initial.get(state, 0.0)
        if isinstance(value, str):
            value = options[value]
        return float(value(0) if callable(value) else value)

    def starts_as_param(self, state: str) -> bool:
        """Whether a state starts as a copy of the parameter."""
        return self.initial.get(state) == "param"

    @cached_property
    def _ranges(self) -> list[tuple[str, type, float, float, bool]]:
        ranges = {"betas": (0.0, 1.0, False), **self.ranges}
        return [(o, type(d), *ranges.get(o, (0.0, math.inf, False))) for o, d in self.defaults.items()]

    @cached_property
    def _clearly_right(self) -> Callable[[Options], bool]:
        """Fast path of :meth:`check`: True if every option is a float, bool or tuple of floats in its range.

        Generated source, since it runs in every step.
        """
        tests = []
        for option, kind, low, high, _ in self._ranges:
            inside = f"is float and {low!r} <= {{0}} < {high!r}"
            if kind is bool:
                tests.append(f"(o[{option!r}] is False or o[{option!r}] is True)")
            elif kind is tuple:
                n = len(self.defaults[option])
                tests.append(f"type(v := o[{option!r}]) is tuple and len(v) == {n}")
                tests += [f"type(v[{i}]) {inside.format(f'v[{i}]')}" for i in range(n)]
            else:
                tests.append(f"type(v := o[{option!r}]) {inside.format('v')}")
        found: Callable[[Options], bool] = eval("lambda o: " + " and ".join(tests), {"inf": math.inf})
        return found

    def check(self, options: Options) -> None:
        """Raises ValueError or TypeError, naming the option, unless every option is in its range."""
        if self._clearly_right(options):
            return
        for option, kind, low, high, closed in self._ranges:
            value = options[option]
            if kind is bool:
                if value is not True and value is not False and not isinstance(value, np.bool_):
                    raise TypeError(f"{option}: expected True or False, got {value!r}")
                continue
            if kind is tuple:
                if not isinstance(value, tuple | list | np.ndarray) or len(value) != len(self.defaults[option]):
                    raise TypeError(f"{option}: expected {len(self.defaults[option])} numbers, got {value!r}")
                items = value
            else:
                items = (value,)
            for item in items:
                if isinstance(item, str | bytes):
                    raise TypeError(f"{option}: expected a number, got {item!r}")
                try:
                    x = float(item)
                except (TypeError, ValueError):
                    raise TypeError(f"{option}: expected a number, got {item!r}") from None
                except OverflowError:
                    raise ValueError(f"{option}: expected a value below 1.8e308, got {item!r:.40}...") from None
                if not (low <= x < high or (closed and x == high)):
                    bracket = "]" if closed else ")"
                    raise ValueError(f"{option}: expected a value in [{low:g}, {high:g}{bracket}, got {item!r}")

    def reference(self, param: Array, grad: Array, state: State, step: int, **options: Any) -> None:
        """The update in float64 NumPy, in place, for tests; ``step`` counts from 1."""
        o = {**self.defaults, **options}
        self._reference(param, -grad if o["maximize"] else grad, state, step, o)

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        raise NotImplementedError


def _decayed(g: Array, p: Array, o: Options) -> Array:
    """The gradient with the L2 penalty; 0 * inf must not make it NaN if there is no penalty."""
    return g + o["weight_decay"] * p if o["weight_decay"] else g


def _lerp(a: Array, b: Array, weight: float) -> Array:
    """a + weight (b - a), from the nearer end, as torch.lerp: it decides where infinities become NaN."""
    return a + weight * (b - a) if weight < 0.5 else b - (b - a) * (1 - weight)


def _moments(p: Array, g: Array, s: State, o: Options, decoupled: bool) -> Array:
    """Applies weight decay and updates both moments; returns the decayed gradient. Shared by the Adam family."""
    b1, b2 = o["betas"][:2]
    if decoupled:
        p *= 1 - o["lr"] * o["weight_decay"]
    else:
        g = _decayed(g, p, o)
    s["exp_avg"][...] = _lerp(s["exp_avg"], g, 1 - b1)
    s["exp_avg_sq"][...] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    return g


class SGD(Rule):
    r"""Stochastic gradient descent, with momentum, dampening and Nesterov momentum.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        b_1 &= g_1, \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \\
        d_t &= g_t + \mu b_t \text{ (Nesterov)}, \quad b_t \text{ (momentum)}, \quad g_t \text{ (plain)} \\
        \theta_t &= \theta_{t-1} - \gamma d_t

    Options:
        lr: :math:`\gamma \ge 0`, the learning rate.
        momentum: :math:`\mu \ge 0`; 0 is plain SGD, which has no state.
        dampening: :math:`\tau \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        nesterov: Nesterov momentum; requires momentum > 0 and dampening = 0.
        maximize: maximise instead of minimise.

    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning (ICML 2013).
    As in torch, the learning rate multiplies the velocity, and the first step copies the gradient without dampening.
    """

    function = "sgd_"
    defaults: ClassVar = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    }
    variants: ClassVar = {(): "sgd", ("momentum",): "momentum"}
    scalars = ()
    clock = "first"

    def check(self, options: Options) -> None:
        super().check(options)
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError("nesterov: requires momentum > 0 and dampening = 0")

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        g = _decayed(g, p, o)
        if o["momentum"]:
            b = s["momentum_buffer"]
            b[...] = g if t == 1 else o["momentum"] * b + (1 - o["dampening"]) * g
            g = g + o["momentum"] * b if o["nesterov"] else b
        p -= o["lr"] * g


class Adagrad(Rule):
    r"""AdaGrad: divides each element's step by the root of its sum of squared gradients.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1}, \qquad \gamma_t = \gamma / (1 + (t - 1) \eta) \\
        s_t &= s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma_t g_t / (\sqrt{s_t} + \epsilon)

    Options:
        lr: :math:`\gamma \ge 0`.
        lr_decay: :math:`\eta \ge 0`, decay of the learning rate per step.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        initial_accumulator_value: :math:`s_0 \ge 0` (optimizer objects only).
        eps: :math:`\epsilon \ge 0`.
        maximize: maximise instead of minimise.

    Duchi, Hazan, Singer: Adaptive Subgradient Methods (JMLR 12, 2011).
    """

    function = "adagrad_"
    defaults: ClassVar = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "maximize": False,
    }
    variants: ClassVar = {(): "adagrad"}
    initial: ClassVar = {"sum": "initial_accumulator_value"}
    row_wise = "sum"

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        g = _decayed(g, p, o)
        s["sum"] += g * g
        p -= o["lr"] / (1 + (t - 1) * o["lr_decay"]) * g / (np.sqrt(s["sum"]) + o["eps"])


class RMSprop(Rule):
    r"""RMSprop: divides the gradient by its running root mean square; centered: by its standard deviation.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1}, \qquad v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        \bar g_t &= \alpha \bar g_{t-1} + (1 - \alpha) g_t, \quad \tilde v_t = v_t - \bar g_t^2
            \text{ (centered)}, \quad \tilde v_t = v_t \text{ (else)} \\
        b_t &= \mu b_{t-1} + g_t / (\sqrt{\tilde v_t} + \epsilon) \\
        \theta_t &= \theta_{t-1} - \gamma b_t

    Options:
        lr: :math:`\gamma \ge 0`.
        alpha: :math:`\alpha \in [0, 1]`, decay rate of the averages.
        eps: :math:`\epsilon \ge 0`, added after the square root, as in torch.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        momentum: :math:`\mu \ge 0`; with 0 there is no momentum buffer.
        centered: subtract the squared mean of the gradient.
        maximize: maximise instead of minimise.

    Tieleman, Hinton: Lecture 6.5 (2012); centered: Graves, Generating Sequences With Recurrent Neural Networks,
    arXiv 1308.0850.
    """

    function = "rmsprop_"
    defaults: ClassVar = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    }
    variants: ClassVar = {
        (): "rmsprop",
        ("momentum",): "rmsprop_momentum",
        ("centered",): "rmsprop_centered",
        ("centered", "momentum"): "rmsprop_centered_momentum",
    }
    ranges: ClassVar = {"alpha": (0.0, 1.0, True)}
    keras_names: ClassVar = {"alpha": "rho"}
    clock = None

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        a = o["alpha"]
        g = _decayed(g, p, o)
        v = s["square_avg"]
        v[...] = a * v + (1 - a) * g * g
        if o["centered"]:
            s["grad_avg"][...] = _lerp(s["grad_avg"], g, 1 - a)
            v = v - s["grad_avg"] ** 2
        d = g / (np.sqrt(v) + o["eps"])
        if o["momentum"]:
            s["momentum_buffer"][...] = o["momentum"] * s["momentum_buffer"] + d
            d = s["momentum_buffer"]
        p -= o["lr"] * d


class Adam(Rule):
    r"""Adam: bias-corrected first and second moments of the gradient.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= m_t / (1 - \beta_1^t), \qquad \hat v_t = v_t / (1 - \beta_2^t) \\
        \theta_t &= \theta_{t-1} - \gamma \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        amsgrad: divide by the largest :math:`v_t` so far.
        maximize: maximise instead of minimise.

    Kingma, Ba: Adam, arXiv 1412.6980. AMSGrad: Reddi, Kale, Kumar, arXiv 1904.09237; as in torch, the maximum is taken
    before the correction.
    """

    function = "adam_"
    defaults: ClassVar = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    }
    variants: ClassVar = {(): "adam", ("amsgrad",): "amsgrad"}
    constants: ClassVar = {"early_eps": 0.0}

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2 = o["betas"]
        _moments(p, g, s, o, self.decoupled or o.get("decoupled_weight_decay", False))
        v = s["exp_avg_sq"]
        if o["amsgrad"]:
            v = s["max_exp_avg_sq"]
            np.maximum(v, s["exp_avg_sq"], out=v)
        p -= o["lr"] * s["exp_avg"] / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + o["eps"])


class AdamW(Adam):
    r"""AdamW: Adam with decoupled weight decay.

    .. math::
        \theta_{t-1} &\leftarrow (1 - \gamma \lambda) \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= m_t / (1 - \beta_1^t), \qquad \hat v_t = v_t / (1 - \beta_2^t) \\
        \theta_t &= \theta_{t-1} - \gamma \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        amsgrad: divide by the largest :math:`v_t` so far.
        maximize: maximise instead of minimise.

    Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101. As in torch, the learning
    rate scales the decay.
    """

    function = "adamw_"
    defaults: ClassVar = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "amsgrad": False,
        "maximize": False,
    }
    constants: ClassVar = {**Adam.constants, "decoupled_weight_decay": 1.0}
    decoupled = True


class SparseAdam(Adam):
    r"""Adam over the rows that a sparse gradient names; other rows and their moments stay as they are.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} + \epsilon}

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`, added to the uncorrected root, as in torch.
        maximize: maximise instead of minimise.

    Kingma, Ba: Adam, arXiv 1412.6980.
    """

    function = ""
    defaults: ClassVar = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False}
    variants: ClassVar = {(): "adam"}
    constants: ClassVar = {"weight_decay": 0.0, "decoupled_weight_decay": 0.0, "early_eps": 1.0}

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2 = o["betas"]
        _moments(p, g, s, {**o, "weight_decay": 0.0}, False)
        p -= o["lr"] * np.sqrt(1 - b2**t) / (1 - b1**t) * s["exp_avg"] / (np.sqrt(s["exp_avg_sq"]) + o["eps"])


class NAdam(Rule):
    r"""NAdam: Adam with Nesterov momentum, which warms up.

    .. math::
        \mu_t &= \beta_1 (1 - 0.96^{t \psi} / 2), \qquad \Pi_t = \prod_{i \le t} \mu_i \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \mu_{t+1} m_t / (1 - \Pi_{t+1}) + (1 - \mu_t) g_t / (1 - \Pi_t), \qquad
            \hat v_t = v_t / (1 - \beta_2^t) \\
        \theta_t &= \theta_{t-1} - \gamma \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        momentum_decay: :math:`\psi \ge 0`, rate of the momentum's warm-up.
        decoupled_weight_decay: decouple weight decay, as AdamW does.
        maximize: maximise instead of minimise.

    Dozat: Incorporating Nesterov Momentum into Adam (ICLR workshop 2016).
    """

    function = "nadam_"
    defaults: ClassVar = {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum_decay": 4e-3,
        "decoupled_weight_decay": False,
        "maximize": False,
    }
    variants: ClassVar = {(): "nadam"}
    scalars = ("step", "mu_product")
    initial: ClassVar = {"mu_product": 1.0}

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2 = o["betas"]
        g = _moments(p, g, s, o, o["decoupled_weight_decay"])
        mu, ahead = (b1 * (1 - 0.5 * 0.96 ** (i * o["momentum_decay"])) for i in (t, t + 1))
        s["mu_product"][...] *= mu
        product = float(s["mu_product"])
        m = (1 - mu) / (1 - product) * g + ahead / (1 - product * ahead) * s["exp_avg"]
        p -= o["lr"] * m / (np.sqrt(s["exp_avg_sq"] / (1 - b2**t)) + o["eps"])


class RAdam(Rule):
    r"""RAdam: Adam with a rectified adaptive learning rate, used once its variance is bounded.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= 2 / (1 - \beta_2) - 1, \qquad
            \rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t), \qquad \hat m_t = m_t / (1 - \beta_1^t) \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        \theta_t &= \theta_{t-1} - \gamma \hat m_t r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon)
            \text{ if } \rho_t > 5, \qquad \theta_{t-1} - \gamma \hat m_t \text{ else}

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`, added to the uncorrected root, as in torch.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        decoupled_weight_decay: decouple weight decay, as AdamW does.
        maximize: maximise instead of minimise.

    Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, arXiv 1908.03265.
    """

    function = "radam_"
    defaults: ClassVar = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "maximize": False,
    }
    variants: ClassVar = {(): "radam"}

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2 = o["betas"]
        _moments(p, g, s, o, o["decoupled_weight_decay"])
        m = s["exp_avg"] / (1 - b1**t)
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * b2**t / (1 - b2**t)
        if length > 5:
            r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            m = m * math.sqrt(r) * math.sqrt(1 - b2**t) / (np.sqrt(s["exp_avg_sq"]) + o["eps"])
        p -= o["lr"] * m


class Adamax(Rule):
    r"""Adamax: Adam with the infinity norm in place of the second moment.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1}, \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \gamma m_t / ((1 - \beta_1^t) u_t)

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        maximize: maximise instead of minimise.

    Kingma, Ba: Adam, arXiv 1412.6980, section 7.1.
    """

    function = "adamax_"
    defaults: ClassVar = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    variants: ClassVar = {(): "adamax"}

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2 = o["betas"]
        g = _decayed(g, p, o)
        s["exp_avg"][...] = _lerp(s["exp_avg"], g, 1 - b1)
        s["exp_inf"][...] = np.maximum(b2 * s["exp_inf"], np.abs(g) + o["eps"])
        p -= o["lr"] / (1 - b1**t) * s["exp_avg"] / s["exp_inf"]


class Adadelta(Rule):
    r"""Adadelta: scales the gradient by the ratio of the running RMS of updates to that of gradients.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1}, \qquad v_t = \rho v_{t-1} + (1 - \rho) g_t^2 \\
        d_t &= \sqrt{a_{t-1} + \epsilon} / \sqrt{v_t + \epsilon} \; g_t \\
        a_t &= \rho a_{t-1} + (1 - \rho) d_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma d_t

    Options:
        lr: :math:`\gamma \ge 0`; 1 is the paper's rule.
        rho: :math:`\rho \in [0, 1]`, decay rate of the averages.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, L2 penalty.
        maximize: maximise instead of minimise.

    Zeiler: ADADELTA, arXiv 1212.5701.
    """

    function = "adadelta_"
    ranges: ClassVar = {"rho": (0.0, 1.0, True)}
    defaults: ClassVar = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
    variants: ClassVar = {(): "adadelta"}
    clock = None

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        rho, eps = o["rho"], o["eps"]
        g = _decayed(g, p, o)
        v, a = s["square_avg"], s["acc_delta"]
        v[...] = rho * v + (1 - rho) * g * g
        d = np.sqrt(a + eps) / np.sqrt(v + eps) * g
        a[...] = rho * a + (1 - rho) * d * d
        p -= o["lr"] * d


class Lion(Rule):
    r"""Lion: steps by the sign of interpolated momentum; one state, decoupled weight decay.

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma u_t \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Options:
        lr: :math:`\gamma \ge 0`; the paper recommends a third to a tenth of AdamW's.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: maximise instead of minimise.

    Chen et al.: Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    function = "lion_"
    defaults: ClassVar = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}
    variants: ClassVar = {(): "lion"}
    decoupled = True
    scalars = ()
    clock = None

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        (b1, b2), m = o["betas"], s["exp_avg"]
        p *= 1 - o["lr"] * o["weight_decay"]
        p -= o["lr"] * np.sign(_lerp(m, g, 1 - b1))
        m[...] = _lerp(m, g, 1 - b2)


class AdEMAMix(Rule):
    r"""AdEMAMix: AdamW with a second, slower average of the gradient.

    .. math::
        \theta_{t-1} &\leftarrow (1 - \gamma \lambda) \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
            s_t = \beta_3 s_{t-1} + (1 - \beta_3) g_t \\
        \hat m_t &= m_t / (1 - \beta_1^t), \qquad \hat v_t = v_t / (1 - \beta_2^t) \\
        \theta_t &= \theta_{t-1} - \gamma (\hat m_t + \alpha s_t) / (\sqrt{\hat v_t} + \epsilon)

    Options:
        lr: :math:`\gamma \ge 0`.
        betas: :math:`\beta_1, \beta_2, \beta_3 \in [0, 1)`; the last is that of the slow average.
        alpha: :math:`\alpha \ge 0`, weight of the slow average.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: maximise instead of minimise.

    Pagliardini, Ablin, Grangier: The AdEMAMix Optimizer, arXiv 2409.03137. The paper's schedules of :math:`\alpha` and
    :math:`\beta_3` are left to the caller: both are options of the group.
    """

    function = "ademamix_"
    defaults: ClassVar = {
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 5.0,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }
    variants: ClassVar = {(): "ademamix"}
    decoupled = True

    def _reference(self, p: Array, g: Array, s: State, t: int, o: Options) -> None:
        b1, b2, b3 = o["betas"]
        _moments(p, g, s, o, decoupled=True)
        s["exp_avg_slow"][...] = _lerp(s["exp_avg_slow"], g, 1 - b3)
        m = s["exp_avg"] / (1 - b1**t) + o["alpha"] * s["exp_avg_slow"]
        p -= o["lr"] * m / (np.sqrt(s["exp_avg_sq"] / (1 - b2**t)) + o["eps"])
