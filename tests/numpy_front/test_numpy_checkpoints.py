"""Saving and loading NumPy optimizers: state_dict through files, pickle, deepcopy; training resumes bit-identically."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import (
    F16,
    F32,
    F64,
    assert_all_same,
    label,
    optimizer,
    some,
    two_option_sets,
)

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=label)


def through_npz(state: Any, path: Path) -> Any:
    np.savez(path / "state.npz", **state)
    return np.load(path / "state.npz")


def through_pickle(state: Any, path: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


@every_rule
@pytest.mark.parametrize("through", [through_npz, through_pickle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_a_checkpoint_continues_with_the_same_bits(rule: Any, through: Any, dtype: Any, tmp_path: Path) -> None:
    for options in two_option_sets(rule):
        params = some(0, dtype)
        opt = optimizer(rule)(params, **options)
        for step in range(3):
            opt.step(some(step, dtype))
        saved = opt.state_dict()
        assert all(isinstance(key, str) for key in saved)
        loaded_params = [p.copy() for p in params]
        other = optimizer(rule)(loaded_params, **options)
        loaded = through(saved, tmp_path)
        other.load_state_dict(loaded)
        if hasattr(loaded, "close"):
            loaded.close()
        for step in range(3, 6):
            opt.step(some(step, dtype))
            other.step(some(step, dtype))
            assert_all_same(loaded_params, params)


@every_rule
def test_a_state_dict_is_a_copy_and_is_loaded_as_one(rule: Any) -> None:
    """The copy is independent of later steps of the saved and of the loading optimizer."""
    options = two_option_sets(rule)[1]
    a = some(0)
    first = optimizer(rule)(a, **options)
    first.step(some(1))
    b = [p.copy() for p in a]
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second = optimizer(rule)(b, **options)
    second.load_state_dict(saved)
    for step in (2, 3):
        first.step(some(step))
        second.step(some(step))
    assert_all_same(b, a)
    for key, value in kept.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


def test_the_options_come_with_the_checkpoint() -> None:
    source = fusedopt.Adam(np.ones(2), lr=0.125, betas=(0.5, 0.75))
    source.step(np.ones(2))
    target = fusedopt.Adam(np.ones(2))
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["lr"] == 0.125
    assert tuple(target.param_groups[0]["betas"]) == (0.5, 0.75)


def test_a_checkpoint_before_the_first_step() -> None:
    for rule in RULES.values():
        a, b = some(0), some(0)
        first, second = optimizer(rule)(a), optimizer(rule)(b)
        second.load_state_dict(first.state_dict())
        first.step(some(1))
        second.step(some(1))
        assert_all_same(b, a)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("Adam", [3]), ("Adam", [3, 5]), ("Adam", [3, 4, 1]), ("RMSprop", [3, 4]), ("SGD", [3, 4])],
    ids=str,
)
def test_checkpoints_of_other_shapes_or_rules_are_refused_and_change_nothing(name: str, shapes: list[int]) -> None:
    adam = fusedopt.Adam([np.ones(3), np.ones(4)], lr=0.5)
    adam.step([np.ones(3), np.ones(4)])
    other = getattr(fusedopt, name)([np.ones(n) for n in shapes])
    before = copy.deepcopy((other.state, other.param_groups))
    with pytest.raises((ValueError, KeyError, TypeError)):
        other.load_state_dict(adam.state_dict())
    np.testing.assert_equal((other.state, other.param_groups), before)


@every_rule
def test_pickling_and_deepcopy_continue_with_the_same_bits(rule: Any) -> None:
    for options in two_option_sets(rule):
        params = dict(zip("abcd", some(0), strict=True))
        opt = optimizer(rule)(params, **options, max_grad_norm=2.0)
        opt.step(dict(zip("abcd", some(1), strict=True)))
        twins = [pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)]
        for twin in twins:
            own = [p for group in twin.param_groups for p in group["params"]]
            assert not any(np.shares_memory(a, b) for a, b in zip(own, params.values(), strict=True) if a.size)
            assert twin.last_grad_norm == opt.last_grad_norm
        for step in range(2, 5):
            for o in (opt, *twins):
                o.step(dict(zip("abcd", some(step), strict=True)))
        for twin in twins:
            own = [p for group in twin.param_groups for p in group["params"]]
            assert_all_same(own, list(params.values()))


def test_a_parameter_and_its_optimizer_pickle_together() -> None:
    """Pickling both together keeps them connected: the loaded optimizer updates the loaded parameter."""
    param = np.ones(3)
    opt = fusedopt.SGD(param, lr=0.5)
    loaded_param, loaded = pickle.load(io.BytesIO(pickle.dumps((param, opt))))
    loaded.step(np.ones(3))
    np.testing.assert_array_equal(loaded_param, 0.5)


@pytest.mark.parametrize("through", [through_npz, through_pickle], ids=lambda f: f.__name__)
def test_a_state_of_other_keys_or_another_order_is_refused(through: Any, tmp_path: Path) -> None:
    def made(*keys: str) -> Any:
        return fusedopt.Adam({key: np.ones(3, F32) for key in keys})

    first = made("enc", "dec")
    first.step({"enc": np.ones(3, F32), "dec": np.zeros(3, F32)})
    saved = through(first.state_dict(), tmp_path)
    for keys in (("dec", "enc"), ("enc", "other")):
        other = made(*keys)
        with pytest.raises(ValueError, match=f"expected parameters {', '.join(keys)}, got enc, dec"):
            other.load_state_dict(saved)
        assert other.state[0]["step"] == 0
    same = made("enc", "dec")
    same.load_state_dict(saved)
    np.testing.assert_array_equal(same.state[0]["exp_avg"], first.state[0]["exp_avg"])
    without = {key: value for key, value in dict(saved).items() if key != "keys"}  # as 0.1.0 wrote it
    made("dec", "enc").load_state_dict(without)
    as_list = fusedopt.Adam([np.ones(3, F32), np.ones(3, F32)])
    as_list.load_state_dict(dict(saved))
    if hasattr(saved, "close"):
        saved.close()
