"""A state machine: after any sequence of a user's operations, fusedopt and torch's plain loop agree."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from torch_cases import IN_TORCH, generator, option_sets, ours, plain, values
from torch_compare import all_params, assert_close, snapshot

SHAPES = [(), (3,), (0,), (2, 5), (17,)]
DTYPE = torch.float64
QUICK = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Training(RuleBasedStateMachine):
    """Two optimizers over equal parameters, fusedopt's and torch's; every rule applies to both."""

    name = "SGD"

    def __init__(self) -> None:
        super().__init__()
        self.pair: list[Any] = []
        self.seed = 0

    def tensors(self, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(values(s, DTYPE, generator(i + 100 * self.seed))) for i, s in enumerate(shapes)]

    @initialize(
        options=st.integers(0, 10**6),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        split=st.booleans(),
    )
    def start(self, options: int, shapes: list[tuple[int, ...]], split: bool) -> None:
        sets = option_sets(self.name)
        self.options = copy.deepcopy(sets[options % len(sets)])
        for make in (ours, plain):
            params: Any = self.tensors(shapes)
            groups = [{"params": [p]} for p in params] if split else params
            self.pair.append(make(self.name, groups, **copy.deepcopy(self.options)))

    @rule(seed=st.integers(0, 1000), missing=st.integers(0, 3), size=st.sampled_from([1.0, 1e-4, 0.0]))
    def step(self, seed: int, missing: int, size: float) -> None:
        for opt in self.pair:
            for i, p in enumerate(all_params(opt)):
                gone = not p.requires_grad or (missing and (i + seed) % 4 < missing)
                p.grad = None if gone else values(p.shape, DTYPE, generator(seed + i)) * size
            opt.step()

    @rule()
    def step_again_with_the_same_gradients(self) -> None:
        for opt in self.pair:
            opt.step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for opt in self.pair:
            opt.zero_grad(set_to_none=set_to_none)

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.05]), as_tensor=st.booleans(), which=st.integers(0, 9))
    def change_lr(self, lr: float, as_tensor: bool, which: int) -> None:
        for opt in self.pair:
            group = opt.param_groups[which % len(opt.param_groups)]
            if as_tensor and isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = torch.tensor(lr, dtype=DTYPE) if as_tensor else lr

    @rule(which=st.integers(0, 9), maximize=st.booleans(), decay=st.sampled_from([0.0, 0.1]))
    def change_options(self, which: int, maximize: bool, decay: float) -> None:
        for opt in self.pair:
            group = opt.param_groups[which % len(opt.param_groups)]
            group["maximize"] = maximize
            if "weight_decay" in group:
                group["weight_decay"] = decay

    @rule(which=st.integers(0, 9))
    def freeze_or_thaw(self, which: int) -> None:
        for opt in self.pair:
            params = all_params(opt)
            p = params[which % len(params)]
            p.requires_grad_(not p.requires_grad)
            if not p.requires_grad:
                p.grad = None

    @precondition(lambda self: len(self.pair[0].param_groups) < 6)
    @rule(shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2), lr=st.sampled_from([None, 0.02]))
    def add_group(self, shapes: list[tuple[int, ...]], lr: float | None) -> None:
        self.seed += 1
        for opt in self.pair:
            opt.add_param_group({"params": self.tensors(shapes), **({} if lr is None else {"lr": lr})})

    @rule(which=st.integers(0, 9), state=st.booleans())
    def move_storage(self, which: int, state: bool) -> None:
        for opt in self.pair:
            params = all_params(opt)
            p = params[which % len(params)]
            if state:
                for key, value in opt.state.get(p, {}).items():
                    if value is not None:
                        opt.state[p][key] = value.clone()
            else:
                p.data = p.data.clone()

    @rule(which=st.integers(0, 9))
    def forget_state(self, which: int) -> None:
        if self.name != "Adagrad":  # whose state torch makes in the constructor alone
            for opt in self.pair:
                params = all_params(opt)
                opt.state.pop(params[which % len(params)], None)

    @rule(through_file=st.booleans())
    def save_and_load(self, through_file: bool) -> None:
        """Loads each into a new optimizer of its own kind, over the same parameters."""
        self.pair = [self.loaded(make, o, o, through_file) for make, o in zip((ours, plain), self.pair, strict=True)]

    @rule()
    def exchange(self) -> None:
        """Loads each into a new optimizer of the other kind."""
        mine, theirs = self.pair
        self.pair = [self.loaded(ours, mine, theirs, True), self.loaded(plain, theirs, mine, True)]

    @rule()
    def deepcopy(self) -> None:
        grads = [[p.grad for p in all_params(o)] for o in self.pair]
        self.pair = copy.deepcopy(self.pair)
        for opt, row in zip(self.pair, grads, strict=True):
            for p, g in zip(all_params(opt), row, strict=True):
                p.grad = None if g is None else g.clone()

    def loaded(self, make: Any, over: Any, source: Any, through_file: bool) -> Any:
        groups = [{"params": list(g["params"])} for g in over.param_groups]
        new = make(self.name, groups, **copy.deepcopy(self.options))
        state = copy.deepcopy(source.state_dict())
        if through_file:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        new.load_state_dict(state)
        return new

    @invariant()
    def together(self) -> None:
        if self.pair:
            mine, theirs = (snapshot(o) for o in self.pair)
            # a load in torch turns NAdam's mu_product into float64, so it is only as good as float32 then
            loose = self.name == "NAdam"
            assert_close(mine, theirs, rtol=1e-5 if loose else 1e-11, atol=1e-7 if loose else 1e-13, types=not loose)


@pytest.mark.parametrize("name", IN_TORCH)
def test_any_sequence_of_actions_ends_where_torch_ends(name: str) -> None:
    machine = type(f"Training{name}", (Training,), {"name": name})
    run_state_machine_as_test(machine, settings=QUICK)


def test_the_machine_notices_a_wrong_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that uses the learning rate of the constructor only."""

    class Stale(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            kept = [g["lr"] for g in self.param_groups]
            for g in self.param_groups:
                g["lr"] = self.defaults["lr"]
            super().step(closure)
            for g, lr in zip(self.param_groups, kept, strict=True):
                g["lr"] = lr

    monkeypatch.setitem(globals(), "ours", lambda name, params, **options: Stale(params, **options))
    machine = type("TrainingStale", (Training,), {"name": "Adam"})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine, settings=settings(QUICK, phases=[Phase.generate], report_multiple_bugs=False)
        )
