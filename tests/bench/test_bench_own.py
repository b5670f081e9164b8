"""The suite of rules written in Python: its bars, and the other implementations of the zoo's rules."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

import fusedopt
from fusedopt import zoo
from fusedopt.bench.cases import BUILT_IN, CEILING, EXTRA, REFERENCE, Case, rows
from fusedopt.bench.peers import ZOO
from fusedopt.bench.results import Result, run_case
from fusedopt.bench.suites import own
from fusedopt.bench.table import render
from fusedopt.bench.timing import Times


def test_small_tensors_may_take_a_number_of_nanoseconds_longer() -> None:
    (case,) = (case for case in own(1 << 10) if EXTRA in case.bars)
    assert case.against == (BUILT_IN,)
    assert (case.bars[EXTRA], len(case.shapes)) == (150, 1000)
    for ours, extra, ok in ((500e-6, 100, True), (549e-6, 149, True), (551e-6, 151, False), (300e-6, -100, True)):
        result = Result("own", case, {"ours": Times(1, [ours]), BUILT_IN: Times(1, [400e-6])})
        (bar,) = result.bars
        assert (bar.measured, bar.ok) == (pytest.approx(extra), ok)
        assert "at most 150" in render([result])
    (bar,) = Result("own", case, {"ours": Times(1, [1e-3])}).bars
    assert not bar.ok


def test_every_built_in_rule_is_timed_in_float32_bfloat16_and_with_int8_states() -> None:
    cases = {case.label: case for case in own(1 << 10) if case.kind == "own"}
    for label, rule, options in rows():
        assert cases[f"own {label} f32, 1K"].bars[BUILT_IN] == 0.75
        assert cases[f"own {label} bf16, 1K"].bars == {BUILT_IN: 0.6}
        try:
            made = getattr(fusedopt, rule)(np.zeros(64, np.float32), **options, state_dtype="int8")
            has_codes = any(name.endswith("_codes") for name in made.state[0])
        except ValueError:  # a state that cannot be quantised
            has_codes = False
        assert (f"own {label} f32 + int8 states, 1K" in cases) == has_codes
    result = run_case(dataclasses.replace(cases["own Lion f32 + int8 states, 1K"], shapes=((64,),)), rounds=2)
    assert set(result.times) == {"ours", BUILT_IN}


def test_every_rule_of_the_zoo_is_compared_with_another_implementation() -> None:
    assert set(ZOO) == set(zoo.__all__)
    cases = {case.rule: case for case in own(1 << 10) if case.kind == "zoo"}
    assert set(cases) == set(ZOO)
    assert {name for name, case in cases.items() if case.bars[CEILING] == 0.6} == {"Adan", "ASGD", "Rprop"}
    # Read: gradient; read and written: parameter and states, in float32.
    assert cases["Adan"].bytes == 1024 * 4 * (1 + 2 + 2 * 4)
    result = run_case(Case("ASGD", (REFERENCE,), "ASGD", shapes=((64,),), kind="zoo"), rounds=2)
    assert set(result.times) == {"ours", REFERENCE}
