"""fuzz_torch.py: a short run of it, and the defects that it has to find."""

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz_torch
import torch_programs
from torch_programs import Difference, Run, generate

Tensor = torch.Tensor
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="the fuzzer forks")


@needs_fork
def test_a_short_run_finds_no_difference() -> None:
    command = [sys.executable, fuzz_torch.__file__, "--cases", "150", "--jobs", "1", "--failures", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@needs_fork
def test_a_case_that_crashes_is_a_finding_and_the_next_one_runs() -> None:
    worker, program = fuzz_torch.Worker(None), generate(0)
    try:
        why = fuzz_torch.fails(worker, {**program, "events": [("crash", 0, 0)]})
        assert "SIGSEGV" in (why or "")
        assert fuzz_torch.fails(worker, {**program, "events": []}) is None
    finally:
        worker.close()


@needs_fork
def test_a_case_that_hangs_is_a_finding_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_torch, "PATIENCE", 5.0)
    worker, program = fuzz_torch.Worker(None), generate(0)
    try:
        why = fuzz_torch.fails(worker, {**program, "events": [("hang", 0, 0)]}) or ""
        assert "no answer for 5 s" in why
        assert "in hang" in why
    finally:
        worker.close()


class Guarded(torch.optim.Adam):
    """torch's own, with what ours promises: a step beside another one is an error. Those below do one thing wrong."""

    lock = threading.Lock()
    silently = False

    def step(self, closure: Any = None) -> Any:
        if not Guarded.lock.acquire(blocking=False):
            if self.silently:
                return None
            raise RuntimeError("step() of this optimizer is already running in another thread")
        try:
            return self.guarded_step(closure)
        finally:
            Guarded.lock.release()

    def guarded_step(self, closure: Any) -> Any:
        return super().step(closure)

    def params(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]


class RemembersMemory(Guarded):
    """Writes to where its state was at first: what moves a state tensor loses updates."""

    def guarded_step(self, closure: Any) -> Any:
        first = self.__dict__.setdefault("first", {})
        now = {p: dict(s) for p, s in self.state.items()}
        for p, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = first.setdefault((id(p), key, id(value)), value.detach())
        try:
            return super().guarded_step(closure)
        finally:
            for p, state in now.items():
                self.state[p].update(state)


class KeepsDtypes(Guarded):
    """Loads a checkpoint without casting it."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i, {}) for g in state_dict["param_groups"] for i in g["params"]]
        for p, entry in zip(self.params(), saved, strict=True):
            self.state[p].update(entry)


class ForgetsTheVersion(Guarded):
    """Writes past autograd."""

    def guarded_step(self, closure: Any) -> Any:
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.params())):
            return super().guarded_step(closure)


class WritesTheGradient(Guarded):
    def guarded_step(self, closure: Any) -> Any:
        loss = super().guarded_step(closure)
        for p in self.params():
            if p.grad is not None and p.grad.layout == torch.strided:
                p.grad = p.grad * 0.5
        return loss


class ComputesOverlappingState(Guarded):
    """Takes a state whose elements share memory for a plain one."""

    def guarded_step(self, closure: Any) -> Any:
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and torch_programs.overlapping(value):
                    state[key] = value.clone(memory_format=torch.contiguous_format)
        return super().guarded_step(closure)


class LosesSteps(Guarded):
    """Does nothing in a second thread, and does not say so."""

    silently = True


def differs(optimizer: Any, monkeypatch: pytest.MonkeyPatch, cases: int) -> str:
    """What the programs find, with this class in place of ours."""

    def ours(name: str, params: Any, **options: Any) -> Any:
        return optimizer(params, **{k: v for k, v in options.items() if k not in ("fused", "foreach")}, foreach=False)

    monkeypatch.setattr(torch_programs, "ours", ours)
    for seed in range(cases):
        try:
            Run({**generate(seed, ["Adam"]), "ours": {}}).go()
        except Difference as error:
            return f"{seed}: {error}"
    return ""


MUTANTS = [
    (RemembersMemory, "differ|wrote"),
    (KeepsDtypes, "torch has torch|expected dtype"),
    (ForgetsTheVersion, "version"),
    (WritesTheGradient, "was written to"),
    (ComputesOverlappingState, "ours None, torch RuntimeError"),
    (LosesSteps, "in four threads"),
]


@pytest.mark.parametrize(("mutant", "why"), MUTANTS)
def test_the_programs_find_a_wrong_optimizer(mutant: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = differs(mutant, monkeypatch, 1000)
    assert re.search(why, found), found
    print(found)


def test_the_programs_find_nothing_wrong_with_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not differs(Guarded, monkeypatch, 100)


def test_a_program_is_the_same_in_every_process() -> None:
    command = [sys.executable, "-c", "from torch_programs import generate; print([generate(s) for s in range(5)])"]
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=support)
    assert done.stdout.strip() == repr([generate(s) for s in range(5)])
