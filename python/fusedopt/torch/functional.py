"""``torch.optim.functional`` with the fused step: in-place updates of lists of tensors, as torch 2.15 names them.

The functions have the names and signatures of torch's, and work with every torch from 2.6 on, whose classes have
called the same functions. The other names of ``torch.optim.functional`` are torch's. Tensors that the kernels do not
take are updated by torch's own step, as with the classes. Each call plans its step anew: for training the classes are
faster.

Example:
    >>> import torch
    >>> from fusedopt.torch.functional import adamw
    >>> p, g, m, v = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    >>> adamw([p], [g], [m], [v], [], [torch.tensor(0.0)], amsgrad=False, beta1=0.9, beta2=0.999, lr=0.1,
    ...       weight_decay=0.01, eps=1e-8, maximize=False)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch.optim import Optimizer

from ._engine import engine_of
from ._optimizer import CLASSES

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd"]

# The lists of torch's functions, as the entries of an optimizer's state.
_STATES = {
    "acc_deltas": "acc_delta",
    "exp_avg_sqs": "exp_avg_sq",
    "exp_avgs": "exp_avg",
    "exp_infs": "exp_inf",
    "grad_avgs": "grad_avg",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "momentum_buffer_list": "momentum_buffer",
    "mu_products": "mu_product",
    "square_avgs": "square_avg",
    "state_steps": "step",
    "state_sums": "sum",
}
_LISTS = {state: name for name, state in _STATES.items()}
_BESIDE = ("found_inf", "grad_scale", "has_complex", "has_sparse_grad")  # no options of a group


@cache
def _template(name: str) -> Optimizer:
    """An optimizer of this class with its defaults, which its twins share; so a warning is given once."""
    cls: Any = CLASSES[name]
    made: Optimizer = cls([torch.zeros(0)])
    return made


def _function(name: str) -> Callable[..., None]:
    """The function of the class with this name."""
    theirs: Callable[..., None] = getattr(sys.modules[f"torch.optim.{name.lower()}"], name.lower())
    signature = inspect.signature(theirs)

    @wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if torch.compiler.is_compiling() or given.get("differentiable"):
            return theirs(*args, **kwargs)
        params, grads, *_ = given.values()
        lists = {_STATES[key]: value for key, value in given.items() if key in _STATES and value}
        for key, value in (("grads", grads), *lists.items()):
            if len(value) != len(params):
                raise ValueError(f"{key}: expected a list of {len(params)} tensors, as params is, got {len(value)}")
        if not params:
            return None
        options = {key: value for key, value in list(given.items())[2:] if key not in (*_STATES, *_BESIDE)}
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        template: Any = _template(name)
        rule = template._rule
        for key in (*rule.scalars, *rule.states({**template.defaults, **options})):
            if key not in lists:
                raise ValueError(f"{_LISTS[key]}: expected a list of {len(params)} tensors, as params is, got none")
        # Other tensors on the same memory, which may be given gradients without the caller's seeing it.
        aliases = [p.detach() for p in params]
        optimizer, engine = engine_of(template).twin(template, [{**template.defaults, **options, "params": aliases}])
        for i, (alias, grad) in enumerate(zip(aliases, grads, strict=True)):
            if grad.dtype != alias.dtype and hasattr(alias, "grad_dtype"):
                alias.grad_dtype = None
            alias.grad = grad
            state = {key: value[i] for key, value in lists.items() if value[i] is not None}
            if state:
                optimizer.state[alias] = state
        for key in ("found_inf", "grad_scale"):
            if given.get(key) is not None:
                setattr(optimizer, key, given[key])
        with torch.no_grad():
            engine.run(optimizer)
        for i, alias in enumerate(aliases):
            for key, value in lists.items():
                if value[i] is None:  # the first step of SGD makes the buffer
                    value[i] = optimizer.state[alias].get(key)
        return None

    function.__module__ = __name__
    function.__doc__ = f"""torch's function ``{name.lower()}`` with the fused step of :class:`fusedopt.torch.{name}`.

    Arguments and their defaults are torch's. ``params``, the lists of states and ``state_steps`` are updated in place,
    ``grads`` is read-only. ``fused=False`` selects torch's own step.
    """
    return function


adadelta = _function("Adadelta")
adagrad = _function("Adagrad")
adam = _function("Adam")
adamax = _function("Adamax")
adamw = _function("AdamW")
nadam = _function("NAdam")
radam = _function("RAdam")
rmsprop = _function("RMSprop")
sgd = _function("SGD")


def __getattr__(name: str) -> Any:
    theirs = getattr(torch.optim, "functional", None)
    if theirs is None or name not in theirs.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(theirs, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *getattr(getattr(torch.optim, "functional", None), "__all__", ())})
