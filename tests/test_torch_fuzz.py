"""fuzz_torch.py: a short run of it, and the defects that it has to find."""

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
        why = fuzz_torch.fails(worker, {**program, "events": [*program["events"], ("crash", 0, 0)]})
        assert "SIGSEGV" in (why or "")
        assert fuzz_torch.fails(worker, {**program, "events": []}) is None
    finally:
        worker.close()


class RemembersMemory(torch.optim.Adam):
    """Writes to where its state was at first: what replaces, swaps or moves a state tensor loses updates."""

    def step(self, closure: Any = None) -> Any:
        self.__dict__.setdefault("first", {})
        now = {p: dict(s) for p, s in self.state.items()}
        for p, state in self.state.items():
            for key, value in state.items():
                state[key] = self.first.setdefault((id(p), key, id(value)), value.detach())
        try:
            return super().step(closure)
        finally:
            for p, state in now.items():
                self.state[p].update(state)


class KeepsDtypes(torch.optim.Adam):
    """Loads a checkpoint without casting it."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i) for g in state_dict["param_groups"] for i in g["params"]]
        for p, entry in zip((p for g in self.param_groups for p in g["params"]), saved, strict=True):
            for key, value in (entry or {}).items():
                self.state[p][key] = value.clone() if isinstance(value, Tensor) else value


class ForgetsTheVersion(torch.optim.Adam):
    """Writes past autograd."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        params = [p for g in self.param_groups for p in g["params"]]
        before = [(p, p.data.clone()) for p in params]
        with torch.autograd._unsafe_preserve_version_counter(tuple(params)):
            super().step()
        del before
        return loss


class WritesTheGradient(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is not None and p.grad.layout == torch.strided and p.numel():
                    p.grad = p.grad * 0.5
        return loss


class ComputesOverlappingState(torch.optim.Adam):
    """Takes a state whose elements share memory for a plain one."""

    def step(self, closure: Any = None) -> Any:
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and torch_programs.overlapping(value):
                    state[key] = value.clone(memory_format=torch.contiguous_format)
        return super().step(closure)


class StepsInTurns(torch.optim.Adam):
    """Counts a step in whatever thread, and does it only where no other is at work."""

    lock = threading.Lock()

    def step(self, closure: Any = None) -> Any:
        if not StepsInTurns.lock.acquire(blocking=False):
            return None  # silently nothing
        try:
            return super().step(closure)
        finally:
            StepsInTurns.lock.release()


MUTANTS = [RemembersMemory, KeepsDtypes, ForgetsTheVersion, WritesTheGradient, ComputesOverlappingState, StepsInTurns]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_programs_find_a_wrong_optimizer(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(name: str, params: Any, **options: Any) -> Any:
        options.pop("fused", None)
        made = mutant(params, **{**options, "foreach": False})
        made._foreign = {}
        return made

    monkeypatch.setattr(torch_programs, "ours", ours)
    with pytest.raises(Difference):
        for seed in range(3000):
            program = generate(seed)
            if program["name"] == "Adam":
                Run(program).go()
    print(mutant.__name__, seed)


def test_a_program_is_the_same_in_every_process() -> None:
    command = [sys.executable, "-c", "from torch_programs import generate; print([generate(s) for s in range(5)])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == repr([generate(s) for s in range(5)])
