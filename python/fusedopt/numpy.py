"""The NumPy front end: two in-place functions and an optimizer class for every rule, generated from ``RULES``.

cpp/bindings/numpy.cpp checks arrays (dtype, shape, memory); the rule checks options.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from . import _core, forms
from ._make import array_names, compile_function, option_dict, option_signature, rule_doc
from .config import get_num_threads
from .rules import RULES, Kernel, Rule, check_max_grad_norm

__all__: list[str] = ["Optimizer", "Rows"]


class Rows:
    """The gradient of a table of which few rows were used, such as an embedding: which rows, and a gradient for each.

    ``step`` of an optimizer takes it in place of an array. Rows that are named several times get the sum of their
    values, added up in their order. Rows that are not named keep their values and states: there is no weight decay and
    no momentum for them.

    Args:
        indices: array of int32 or int64, one dimension; the rows of the parameter, in any order.
        values: array of shape ``(len(indices), *param.shape[1:])``; read-only.

    Example:
        >>> import numpy as np, fusedopt
        >>> table = np.zeros((1000, 16), np.float32)
        >>> opt = fusedopt.Adam(table, lr=0.1)
        >>> opt.step(fusedopt.Rows(np.array([3, 8, 3]), np.ones((3, 16), np.float32)))
    """

    __slots__ = ("indices", "values")

    def __init__(self, indices: Any, values: Any) -> None:
        self.indices = indices
        self.values = values

    def __repr__(self) -> str:
        return f"Rows({self.indices!r:.200}, {self.values!r:.200})"


_OWN = ("master", "ema", "stream")  # state entries that torch does not have


def _paired(param: Any, indices: Any, values: Any) -> Any:
    """The gradient of an in-place function by rows, as the core takes it: a pair, or a list of pairs."""
    if not isinstance(param, list | tuple):
        return _core.Pair(indices, values)
    for name, several in (("indices", indices), ("values", values)):
        if not isinstance(several, list | tuple):
            raise TypeError(f"{name}: expected a sequence of arrays, as param is, got {type(several).__name__}")
        if len(several) != len(param):
            raise ValueError(f"{name}: expected {len(param)} arrays, one for each of param, got {len(several)}")
    return list(map(_core.Pair, indices, values))


def _update(rule: Rule, options: dict[str, Any], arrays: tuple[Any, ...], step: Any) -> None:
    """``arrays``: in the order of ``rule.all_operands``."""
    rule.check(options)
    kernel = rule.kernel(options)
    _core.update(
        kernel.index, kernel.values(options), bool(options["maximize"]), kernel.operands, rule.all_operands, arrays,
        step, get_num_threads(),
    )  # fmt: skip


def _update_rows(
    rule: Rule,
    options: dict[str, Any],
    arrays: tuple[Any, ...],
    step: Any,
    row_steps: Any = None,
    row_wise: Any = False,
) -> None:
    rule.check(options)
    given = {**forms.OPTIONS, **options, "row_steps": row_steps is not None, "row_wise": row_wise}
    forms.check(given)
    rule.check_rows(given)
    kernel = rule.kernel(given)
    names, all_names = kernel.operands, (*rule.all_operands, "row_steps")
    arrays = (*arrays, row_steps)
    if given["row_steps"]:
        names = (*names, "row_steps")
    if row_wise:
        at = all_names.index(rule.row_wise)
        arrays, all_names = ((*x[:at], *x[at + 1 :], x[at]) for x in (arrays, all_names))
        names = (*names, rule.row_wise)
    called, all_called = ((x[0], "", *x[2:]) for x in (names, all_names))  # a gradient is called indices and values
    _core.update(
        kernel.index, kernel.values(given), bool(options["maximize"]), called, all_called, arrays, step,
        get_num_threads(), given["row_steps"], bool(row_wise),
    )  # fmt: skip


_FUNCTION_DOC = """
    Args:
        param: array, updated in place, or a sequence of arrays; then all array arguments are sequences of this length.
        grad: gradient, same shape; read-only.
        {states}: state, same shape, updated in place.{extra}

    Supported dtypes: all arrays float64, float32, float16 or bfloat16 (ml_dtypes); float32 param with 16-bit grad;
    16-bit param and grad with float32 states. Any strides. CPU objects with ``__dlpack__`` are accepted.

    Returns:
        None.

    Raises:
        TypeError: wrong dtype, byte order, device or kind of object; masked arrays.
        ValueError: read-only, misaligned or overlapping arrays; wrong shape; an option out of its range.

        The message names the argument. Nothing has been written.

    Example:
        >>> import numpy as np, fusedopt
        >>> param, grad = np.ones(3, np.float32), np.ones(3, np.float32)
        >>> {zeros}fusedopt.{call}
    """


_ROWS_DOC = """
    As :func:`fusedopt.{dense}`, for the rows of ``param`` that ``indices`` names. Other rows and their states are
    neither read nor written: weight decay and momentum apply to rows when they are named.

    Args:
        param: array whose rows are contiguous, updated in place, or a sequence of arrays; then all array arguments are
            sequences of this length.
        indices: array of int32 or int64, one dimension: rows of param, in any order. The values of a row that is named
            several times are added up in their order.
        values: gradient of the named rows, of shape ``(len(indices), *param.shape[1:])``; read-only.
        {states}: state, of the shape of param, updated in place.{extra}

    Supported dtypes, with values as the gradient: as for :func:`fusedopt.{dense}`.

    Returns:
        None.

    Raises:
        IndexError: an index is negative, or no row of param; the message says which and where.
        TypeError, ValueError: as :func:`fusedopt.{dense}`.

        The message names the argument. Nothing has been written.

    Example:
        >>> import numpy as np, fusedopt
        >>> param = np.ones((100, 4), np.float32)
        >>> indices, values = np.array([7, 3, 7]), np.ones((3, 4), np.float32)
        >>> {zeros}fusedopt.{call}
    """


def make_function(rule: Rule, rows: bool = False) -> Callable[..., None]:
    """The in-place function of a rule; with ``rows`` the one for rows of tables."""
    always, sometimes = array_names(rule)
    grad = ["indices", "values"] if rows else ["grad"]
    # A rule without required states takes its optional state by position.
    positional = [*always, *(f"{s}=None" for s in sometimes if not always)]
    late = [f"{s}=None" for s in sometimes if always]
    clock = [*(["step"] if rule.clock == "step" else []), *rule.carried]
    first = ["first=False"] if rule.clock == "first" else []
    signature = ", ".join(["param", *grad, *positional, "*", *clock, option_signature(rule, rule.once), *late, *first])
    of_rows = {}
    if rows and rule.counts_by_row:
        of_rows["row_steps"] = "None"
    if rows and rule.row_wise:
        of_rows["row_wise"] = "False"
    signature = ", ".join([signature, *(f"{name}={default}" for name, default in of_rows.items())])
    names = rule.all_operands
    given = {s: s for s in names} | ({"grad": "_paired(param, indices, values)"} if rows else {})
    arrays = f"({', '.join(given.values())})"
    step = {"step": "step", "first": "1 if first else 2", None: "1"}[rule.clock]
    update = f"_update{'_rows' * rows}"
    beside = "".join(f", {name}={name}" for name in of_rows)
    body = f"{update}(_rule, {option_dict(rule, rule.once)}, {arrays}, {step}{beside})"
    name = rule.rows_function if rows else rule.function
    function = compile_function(
        rule,
        f"fusedopt.{name}",
        signature,
        body,
        {"_update": _update, "_update_rows": _update_rows, "_rule": rule, "_paired": _paired},
    )
    extra = ["step: the step count, from 1; a sequence has one for each array."] * (clock != [])
    extra += [
        f"{s}: float64 array of one element, updated in place; starts at {rule.first(s, rule.defaults):g}."
        for s in rule.carried
    ]
    extra += ["first: True in the first step, which initialises momentum_buffer with the gradient."] * len(first)
    if "row_steps" in of_rows:
        extra += [
            "row_steps: float32 array with a number for each row of param, updated in place: the steps in which the",
            "    row occurred. The rule then counts these in place of step. Starts at 0.",
        ]
    if "row_wise" in of_rows:
        extra += [
            f"row_wise: {rule.row_wise} has one number for each row, the sum of the mean squares of its gradients;",
            "    shape (len(param), 1, ...), float32, or float64 beside a float64 param.",
        ]
    scalars = ["step=1"] * (clock != [])
    scalars += [f"{s}=np.array({rule.first(s, rule.defaults)!r})" for s in rule.carried]
    function.__doc__ = _fill(
        rule_doc(rule, _ROWS_DOC if rows else _FUNCTION_DOC),
        {
            "{dense}": rule.function,
            "{states}": ", ".join((*always, *sometimes)) or "(no state)",
            "{extra}": "".join(f"\n    {line}" for line in extra),
            "{zeros}": "".join(f"{s} = np.zeros_like(param); " for s in always),
            "{call}": f"{name}({', '.join(['param', *grad, *always, *scalars, 'lr=0.1'])})",
        },
    )
    function.__module__ = "fusedopt"
    return function


def _fill(text: str, values: dict[str, str]) -> str:
    """str.format for texts with TeX braces."""
    for key, value in values.items():
        text = text.replace(key, value)
    return text


LearningRate = float | Callable[[int], float]


def _is_timed(value: Any) -> bool:
    """Whether an option is a function of the step, or a tuple that contains one."""
    return callable(value) or (type(value) is tuple and any(map(callable, value)))


def _row_dtype(param: Any) -> Any:
    """The dtype of a state with one number for each row."""
    return np.float64 if param.dtype == np.float64 else np.float32


def _row_means(param: Any, state: Any) -> Any:
    """A state of the shape of its parameter as one number for each row, the mean; one that is so already as it is."""
    if state.shape != param.shape or param.shape == forms.row_shape(param.shape):
        return state
    return state.astype(_row_dtype(param)).mean(axis=tuple(range(1, param.ndim)), keepdims=True)


class Optimizer:
    """Base class of the NumPy optimizers, such as :class:`fusedopt.Adam`.

    Attributes:
        param_groups: list of dicts, as in torch: ``params`` (a list of arrays) and the options, which may be changed
            between steps.
        state: list of dicts, one per parameter in the order of all groups: ``step`` and the rule's arrays.
        last_grad_norm: global gradient norm of the last step; None without ``max_grad_norm``.
    """

    _rule: ClassVar[Rule]
    _timed: ClassVar[tuple[str, ...]]
    """The options that may be functions of the step."""

    def _setup(self, params: Any, options: dict[str, Any], max_grad_norm: float | None, kept: dict[str, Any]) -> None:
        self.defaults = {**options, **kept}
        self.max_grad_norm = max_grad_norm
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[dict[str, Any]] = []
        self.last_grad_norm: float | None = None
        self._keys: list[Any] | None = None
        self._revive()
        check_max_grad_norm(max_grad_norm)
        if isinstance(params, Mapping):
            self._keys = list(params)
            params = [params[k] for k in self._keys]
        elif not isinstance(params, list | tuple):
            params = [params]
        if params and all(isinstance(p, Mapping) for p in params):
            for group in params:
                self.add_param_group(group)
        else:
            self.add_param_group({"params": list(params)})

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Adds a parameter group: ``{"params": arrays, "lr": 0.1, ...}``. Missing options take their defaults.

        Raises:
            TypeError, ValueError: an option is unknown or out of its range, or a parameter cannot be updated.
        """
        unknown = set(group) - {"params", *self.defaults}
        if "params" not in group or unknown:
            raise TypeError(
                f"param_groups: expected 'params' and options of {type(self).__name__}, got {sorted(group)}"
            )
        params = group["params"]
        new = {"params": list(params) if isinstance(params, list | tuple) else [params]}
        new.update({k: group.get(k, v) for k, v in self.defaults.items()})
        options = self._check(new, 0)
        for i, p in enumerate(new["params"]):
            if not isinstance(p, np.ndarray):
                raise TypeError(f"params[{self._label(len(self.state) + i)}]: expected a NumPy array, got {p!r:.80}")
        states = [self._initial(p, len(self.state) + i, options) for i, p in enumerate(new["params"])]
        self.param_groups.append(new)
        self.state.extend(states)
        try:  # the checks of a step, over all groups, with parameters in place of gradients
            self._batch.clear()
            self._add_all([p for g in self.param_groups for p in g["params"]], [])
            self._batch.check(grads=False)
        except (TypeError, ValueError):
            self.param_groups.pop()
            del self.state[len(self.state) - len(states) :]
            raise
        finally:
            self._batch.clear()

    def _check(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        options = {**forms.OPTIONS, **{k: group[k] for k in self.defaults}}  # a pickle of an earlier version lacks some
        for name in self._timed:
            if _is_timed(value := options[name]):
                options[name] = value(step) if callable(value) else [v(step) if callable(v) else v for v in value]
        self._rule.check(options)
        forms.check(options)
        if options["row_steps"] or options["row_wise"]:
            self._rule.check_rows(options)
        return options

    def _initial(self, param: Any, index: int, options: dict[str, Any]) -> dict[str, Any]:
        """The initial state of a parameter; ``index``: its position among all parameters."""
        rule, kernel = self._rule, self._rule.kernel(options)
        state: dict[str, Any] = {"step": 0}
        for name in rule.carried:
            state[name] = np.array(rule.first(name, options))
        form = self._form(param, options)
        if param.dtype.name in forms.FLOATS:  # the core refuses other dtypes
            reason = forms.refusal(kernel, param.dtype.name, form)
            if reason:
                raise ValueError(reason)
        for name in kernel.states:
            if rule.starts_as_param(name):
                state.update(self._copied(name, param, kernel, form))
                continue
            first = rule.first(name, options)
            if form.quantised:
                codes = np.zeros(param.shape, kernel.code(name))  # blocks follow C order
                scale = np.full(forms.blocks(param.size), first, np.float32)
                codes.fill(np.iinfo(codes.dtype).max if first else 0)
                state[f"{name}_codes"], state[f"{name}_scale"] = codes, scale
            else:
                state[name] = np.full(param.shape, first, forms.numpy_dtype(form.state))
        if form.master:
            dtype = forms.MASTERS[form.master][1]
            state["master"] = param.astype(dtype) if dtype == "float32" else np.zeros(param.shape, dtype)
        if options["ema_decay"] is not None:
            state["ema"] = param.astype(np.float32 if param.dtype.itemsize < 8 else param.dtype)
        if form.random:
            state["stream"] = index
        if options["row_wise"]:
            first = rule.first(rule.row_wise, options)
            state[rule.row_wise] = np.full(forms.row_shape(param.shape), first, _row_dtype(param))
        return state

    @staticmethod
    def _copied(name: str, param: Any, kernel: Kernel, form: forms.Form) -> dict[str, Any]:
        """A state that starts as a copy of the parameter."""
        if not form.quantised:
            return {name: param.astype(forms.numpy_dtype(form.state))}
        made = forms.encoded({name: param.ravel()}, kernel)
        return {n: x.reshape(param.shape) if n.endswith("_codes") else x for n, x in made.items()}

    def _form(self, param: Any, options: dict[str, Any]) -> forms.Form:
        name = param.dtype.name
        return forms.form_of(name, options, "float32" if param.dtype.itemsize == 2 else name)

    def _label(self, index: int) -> Any:
        return index if self._keys is None or index >= len(self._keys) else repr(self._keys[index])

    def step(self, grads: Any) -> None:
        """Updates every parameter in place.

        Args:
            grads: gradients in the structure of ``params``: an array, a sequence, or a dict with the same keys; with
                several groups one sequence per group, or one flat sequence. A parameter whose gradient is None is
                skipped. The gradient of a parameter may be :class:`fusedopt.Rows`.

        Raises:
            TypeError, ValueError, IndexError: as the in-place functions, before anything is written.
            RuntimeError: another thread is running this optimizer's step.
        """
        states = self._open(grads)
        try:
            self.last_grad_norm = self._batch.run(check_max_grad_norm(self.max_grad_norm) or 0.0, get_num_threads())
            for state in states:
                state["step"] += 1
        finally:
            self._close()

    def _open(self, grads: Any) -> list[dict[str, Any]]:
        """Fills the batch, for one step or several, until :meth:`_close`. Returns the states that the steps update."""
        if not self._free.acquire(blocking=False):
            raise RuntimeError("step() of this optimizer is already running in another thread")
        states: list[dict[str, Any]] = []
        try:
            self._batch.clear()
            self._add_all(self._flat(grads), states)
        except BaseException:
            self._close()
            raise
        return states

    def _close(self) -> None:
        self._batch.clear()
        self._free.release()

    def _has_timed_options(self) -> bool:
        """Whether an option other than the learning rate is a function of the step."""
        return any(_is_timed(group[name]) for group in self.param_groups for name in self._timed if name != "lr")

    def _add_all(self, grads: list[Any], advanced: list[dict[str, Any]]) -> None:
        start = 0
        for group in self.param_groups:
            n = len(group["params"])
            self._add(group, grads[start : start + n], start, advanced)
            start += n

    def _add(self, group: dict[str, Any], grads: list[Any], start: int, advanced: list[Any]) -> None:
        options = self._check(group, max((s["step"] for s in self.state), default=0))
        chosen = [i for i, g in enumerate(grads) if g is not None]
        # A group may have parameters of several dtypes, and gradients by rows beside others.
        kinds: dict[tuple[forms.Form, bool], list[int]] = {}
        alike: dict[tuple[Any, bool], list[int]] = {}  # the same lists by dtype, since dtype.name takes microseconds
        for i in chosen:
            counts = bool(options["row_steps"]) and type(grads[i]) is _core.Pair
            kind = group["params"][i].dtype, counts
            if kind not in alike:
                alike[kind] = kinds.setdefault((self._form(group["params"][i], options), counts), [])
            alike[kind].append(i)
        for (form, counts), those in kinds.items():
            self._add_alike(group["params"], grads, start, options, form, counts, those, advanced)

    def _add_alike(
        self,
        params: list[Any],
        grads: list[Any],
        start: int,
        options: dict[str, Any],
        form: forms.Form,
        row_steps: bool,
        chosen: list[int],
        advanced: list[Any],
    ) -> None:
        rule = self._rule
        kernel = rule.kernel(options)
        ema = options["ema_decay"] is not None
        row_wise = bool(options["row_wise"])
        of_rows = ("row_steps",) * row_steps + (rule.row_wise,) * row_wise
        names = forms.array_names(kernel.states, form, ema) + rule.carried + of_rows
        wanted = {*names, "stream"} if form.random else set(names)
        states = [self.state[start + i] for i in chosen]
        for i, state in zip(chosen, states, strict=True):
            if not state.keys() >= wanted:
                state.update({**self._initial(params[i], start + i, options), **state})
                if row_steps:
                    state.setdefault("row_steps", np.full(len(params[i]), state["step"], np.float32))
                if row_wise:
                    state[rule.row_wise] = _row_means(params[i], state[rule.row_wise])
        extras = _core.Extras(
            master=form.master_number,
            noisy=form.noisy,
            noisy_state=form.noisy_state,
            quantised=form.quantised and kernel.states != (),
            ema=ema,
            l1=options["l1"],
            ema_weight=1 - (options["ema_decay"] or 0),
            seed=options["seed"],
            streams=[s["stream"] for s in states] if form.random else [],
            row_steps=row_steps,
            row_sum=row_wise,
        )
        self._batch.add(
            kernel.index,
            kernel.values(options),
            bool(options["maximize"]),
            ("params", "grads", *names),
            [self._label(start + i) for i in chosen],
            [
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                *([s[n] for s in states] for n in names),
            ],
            [s["step"] + 1 for s in states],
            extras,
        )
        advanced += states

    def _flat(self, grads: Any) -> list[Any]:
        expected = len(self.state)
        if self._keys is not None:
            if not isinstance(grads, Mapping):
                raise TypeError(f"grads: expected a dict with the keys of params, got {type(grads).__name__}")
            if set(grads) - set(self._keys):
                raise ValueError(f"grads: unknown keys {sorted(set(map(str, grads)) - set(map(str, self._keys)))}")
            missing = [k for k in self._keys if k not in grads]
            if missing:
                raise ValueError(f"grads: missing keys {missing}")
            flat = [grads[k] for k in self._keys]
        elif not isinstance(grads, list | tuple):
            flat = [grads]
        elif len(self.param_groups) > 1 and all(isinstance(g, list | tuple) for g in grads):
            for group, part in zip(self.param_groups, grads, strict=False):
                if len(part) != len(group["params"]):
                    raise ValueError(f"grads: expected {len(group['params'])} for a group, got {len(part)}")
            flat = [g for part in grads for g in part]
        else:
            flat = list(grads)
        flat = [np.asarray(g) if isinstance(g, np.generic) else g for g in flat]  # the gradient of a 0-d array
        flat = [_core.Pair(g.indices, g.values) if isinstance(g, Rows) else g for g in flat]
        if len(flat) != expected:
            raise ValueError(f"grads: expected {expected}, one for each of params, got {len(flat)}")
        return flat

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """Context manager: swaps the moving averages of ``ema_decay`` into the parameters, and back on exit."""
        params = [p for group in self.param_groups for p in group["params"]]
        pairs = [(p, p.copy(), state["ema"]) for p, state in zip(params, self.state, strict=True) if "ema" in state]
        for p, _, ema in pairs:
            p[...] = ema.astype(p.dtype)
        try:
            yield
        finally:
            for p, saved, _ in pairs:
                p[...] = saved

    def _entries(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        for i, state in enumerate(self.state):
            for name in state:
                yield f"state.{i}.{name}", state, name
        for i, group in enumerate(self.param_groups):
            for name in self.defaults:
                yield f"group.{i}.{name}", group, name

    def state_dict(self) -> dict[str, Any]:
        """The state as a flat dict of copies, for ``np.savez(path, **opt.state_dict())``.

        Keys: ``state.<i>.<name>`` for every parameter, ``group.<i>.<option>`` for every group, and ``keys`` if the
        parameters were given as a dict. Options that are functions of the step are omitted; the program that loads the
        dict has to pass them again.
        """
        keys = {} if self._keys is None else {"keys": np.array([str(key) for key in self._keys])}
        return keys | {
            key: holder[name].copy() if isinstance(holder[name], np.ndarray) else holder[name]
            for key, holder, name in self._entries()
            if not _is_timed(holder[name]) and holder[name] is not None
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a dict from :meth:`state_dict`, or a file of it from ``np.load``. Changes nothing if it raises.

        Raises:
            KeyError: a key is missing.
            ValueError: the number of parameters or groups differs, an array has another shape than its state, or the
                parameters were given as dicts whose keys differ in name or order.
        """
        if self._keys is not None and "keys" in state_dict:
            ours, theirs = [str(key) for key in self._keys], np.asarray(state_dict["keys"]).tolist()
            if ours != theirs:
                raise ValueError(f"state_dict: expected parameters {', '.join(ours)}, got {', '.join(theirs)}")
        params = [p for group in self.param_groups for p in group["params"]]
        for kind, n in (("state", len(params)), ("group", len(self.param_groups))):
            found = {k.split(".")[1] for k in state_dict if k.startswith(kind + ".")}
            if found - {str(i) for i in range(n)}:
                raise ValueError(f"state_dict: expected {n} entries {kind}.<i>, got {len(found)}")
        state: list[dict[str, Any]] = []
        for i, (param, old) in enumerate(zip(params, self.state, strict=True)):
            prefix = f"state.{i}."
            names = [k[len(prefix) :] for k in state_dict if k.startswith(prefix)]
            plain = {n.removesuffix("_codes") for n in names}  # a scale alone is no state
            missing = [
                prefix + n for n in map(forms.plain_name, old) if n not in plain and n not in (*_OWN, "row_steps")
            ]
            if missing:
                raise KeyError(f"state_dict: missing {', '.join(missing)}")
            state.append({n: self._loaded(state_dict[prefix + n], n, param, prefix + n) for n in names})
        options = []
        for i, group in enumerate(self.param_groups):
            new = dict(group)
            for name, default in self.defaults.items():
                key = f"group.{i}.{name}"
                if key in state_dict:
                    value = np.asarray(state_dict[key]).tolist()
                    new[name] = tuple(value) if isinstance(default, tuple) else value
                elif not _is_timed(group[name]) and name not in forms.OPTIONS:
                    raise KeyError(f"state_dict: missing {key}")
            for name in forms.OURS:  # the optimizer selects the form, not the checkpoint
                new[name] = group[name]
            options.append(new)
        i = 0
        for new in options:
            checked = self._check(new, 0)
            for param in new["params"]:
                state[i] = self._recoded(state[i], param, i, checked)
                i += 1
        self.state[:] = state
        for group, new in zip(self.param_groups, options, strict=True):
            group.update(new)

    def _recoded(self, entry: dict[str, Any], param: Any, index: int, options: dict[str, Any]) -> dict[str, Any]:
        """A loaded entry, converted to the form that the options select."""
        form, states = self._form(param, options), self._rule.states(options)
        wanted = forms.array_names(states, form, options["ema_decay"] is not None)
        fresh = self._initial(param, index, options)
        if entry["step"] == 0 and any(name not in entry for name in wanted):
            return fresh
        numbers = forms.decoded({k: v.ravel() for k, v in entry.items() if isinstance(v, np.ndarray)}, states)
        out = {k: v for k, v in entry.items() if forms.plain_name(k) not in (*states, *_OWN)}
        if options["row_wise"]:
            out[self._rule.row_wise] = _row_means(param, out[self._rule.row_wise])
        for name, x in (forms.encoded(numbers, self._rule.kernel(options)) if form.quantised else numbers).items():
            same = name in entry and entry[name].dtype == fresh[name].dtype
            out[name] = entry[name] if same else x.astype(fresh[name].dtype).reshape(fresh[name].shape)
        for name in ("master", "ema", "stream"):
            if name in fresh:
                kept = entry.get(name)
                same = kept is not None and (name == "stream" or kept.dtype == fresh[name].dtype)
                out[name] = kept if same else fresh[name]
        if form.master and "master" in entry and entry["master"].dtype != fresh["master"].dtype:
            weight = param.view(np.uint16).ravel()
            x = forms.join(weight, entry["master"].ravel())
            out["master"] = forms.split(x, form.master, weight).reshape(param.shape)
        return out

    def _loaded(self, value: Any, name: str, param: Any, key: str) -> Any:
        array = np.array(value)
        if name in ("step", "stream"):
            return int(array)
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # np.savez stores bfloat16 as raw bytes
            import ml_dtypes

            array = array.view(ml_dtypes.bfloat16)
        if name.endswith("_scale"):
            if array.shape != (forms.blocks(param.size),):
                raise ValueError(f"state_dict: {key}: expected one element for each block of {forms.BLOCK}")
        elif name == "row_steps":
            if array.shape != param.shape[:1]:
                raise ValueError(f"state_dict: {key}: expected shape {param.shape[:1]}, got {array.shape}")
        elif name == self._rule.row_wise and array.shape == forms.row_shape(param.shape):
            pass
        elif name not in self._rule.carried and array.shape != param.shape:
            raise ValueError(f"state_dict: {key}: expected shape {param.shape}, got {array.shape}")
        return array

    def _revive(self) -> None:
        self._batch: Any = _core.Batch()
        self._free = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_batch", "_free")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._revive()

    def __repr__(self) -> str:
        n = sum(p.size for group in self.param_groups for p in group["params"])
        options = ", ".join(f"{k}={self.param_groups[0][k]!r}" for k in self.defaults)
        return f"{type(self).__name__}({n} parameters in {len(self.state)} arrays, {options})"


_CLASS_DOC = """
    Args:
        params: a float array, a sequence or dict of arrays, or a sequence of groups (dicts with ``params`` and
            options). Updated in place; 16-bit parameters have float32 states by default.
        lr: a number, or a function of the step, counted from 0 (see :mod:`fusedopt.schedules`). weight_decay, momentum
            and each of betas may be functions, too.
        max_grad_norm: clips the gradients to this global norm over all groups within the step; None: no clipping.
        state_dtype: dtype of the states: "float64", "float32", "bfloat16", "float16", or "int8" (blocks of 64).
        master: residual of 16-bit parameters: "split16", "split8", or "float32" for a master copy.
        stochastic_rounding: rounds 16-bit parameters and their states stochastically.
        seed: seed of stochastic rounding, in [0, 2**32).
        ema_decay: decay of a moving average of the parameters, in (0, 1); see :meth:`ema_parameters`.
        l1: soft-thresholds parameters by lr * l1 after the update; >= 0.
        row_steps: with gradients by rows, counts the steps of each row for the bias correction, in place of the
            table's; not for rules without step counts, and not for NAdam.{row_wise}

    Call ``step(grads)`` with gradients in the same structure; see :class:`fusedopt.Optimizer`.

    Example:
        >>> import numpy as np, fusedopt
        >>> w = np.ones(3, np.float32)
        >>> opt = fusedopt.{name}(w, lr=0.1)
        >>> opt.step(np.ones(3, np.float32))
    """


def make_class(rule: Rule) -> type[Optimizer]:
    """The optimizer class of a rule."""
    options = option_signature(rule).split(", ", 1)
    taken = {k: v for k, v in forms.OPTIONS.items() if k not in forms.unused_by(rule)}
    kept = ", ".join(f"{k}={v!r}" for k, v in taken.items())
    signature = f"self, params, {options[0]}, *, {options[1]}, max_grad_norm=None, {kept}"
    given = "{" + ", ".join(f"{k!r}: {k}" for k in taken) + "}"
    body = f"self._setup(params, {option_dict(rule)}, max_grad_norm, {given})"
    init = compile_function(rule, f"fusedopt.{rule.name}.__init__", signature, body, {})
    row_wise = (
        f"\n    row_wise: keeps one number in {rule.row_wise!r} for each row of a parameter, the sum of the mean"
        "\n        squares of the row's gradients, as FBGEMM and TorchRec do; without weight_decay and state_dtype."
    )
    doc = _fill(rule_doc(rule, _CLASS_DOC), {"{name}": rule.name, "{row_wise}": row_wise * bool(rule.row_wise)})
    timed: tuple[str, ...] = tuple(k for k in ("lr", "betas", "momentum", "weight_decay") if k in rule.defaults)
    if rule.own:
        timed = tuple(k for k, v in rule.defaults.items() if not isinstance(v, bool))
    names = {"__init__": init, "__doc__": doc, "__module__": "fusedopt", "_rule": rule, "_timed": timed}
    return type(rule.name, (Optimizer,), names)


for _rule in RULES.values():
    globals()[_rule.function] = make_function(_rule)
    globals()[_rule.rows_function] = make_function(_rule, rows=True)
    globals()[_rule.name] = make_class(_rule)
    __all__ += [_rule.function, _rule.rows_function, _rule.name]
