"""Schedules: values against torch's schedulers and against their equations, composition, refusals; with NumPy and torch
optimizers."""

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedopt
from fusedopt import schedules
from fusedopt.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    ExponentialWarmup,
    InverseTime,
    Linear,
    LinearWarmup,
    MultiStep,
    OneCycle,
    Polynomial,
    ReduceOnPlateau,
    Schedule,
    Step,
    WarmupStableDecay,
    chain,
    join,
)

PURE: list[Schedule] = [
    Constant(0.1),
    Linear(0.0, 0.1, 10),
    LinearWarmup(0.1, 10),
    ExponentialWarmup(0.1, 10),
    Step(0.1, 7, 0.5),
    MultiStep(0.1, (3, 5, 20)),
    Exponential(0.1, 0.9),
    InverseTime(0.1, 0.5, 3),
    Polynomial(0.1, 30, 2.0, 0.01),
    Cosine(0.1, 30, 0.01),
    CosineRestarts(0.1, 4, 2, 0.01),
    OneCycle(0.1, 50),
    WarmupStableDecay(0.1, 50, 10, 20, 0.01),
    chain(LinearWarmup(1.0, 10), Cosine(0.1, 30), 2.0),
    join([LinearWarmup(0.1, 10), Cosine(0.1, 30), 0.001], [10, 40]),
]

every_schedule = pytest.mark.parametrize("schedule", PURE, ids=lambda s: type(s).__name__)


# ---- values


def of_torch(make: Callable[[Any, Any], Any], steps: int, lr: float = 0.1, **options: Any) -> list[dict[str, Any]]:
    """The groups of a torch optimizer, by step."""
    torch = pytest.importorskip("torch")
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's schedulers call others in a deprecated way
        scheduler = make(torch.optim.lr_scheduler, opt)
        groups = []
        for _ in range(steps):
            groups.append(dict(opt.param_groups[0]))
            opt.step()
            scheduler.step()
    return groups


SAME_AS_TORCH: dict[str, tuple[Schedule, Callable[[Any, Any], Any], int]] = {
    "ConstantLR": (Constant(0.1), lambda m, o: m.ConstantLR(o, factor=1.0), 20),
    "LinearLR": (Linear(0.03, 0.1, 12), lambda m, o: m.LinearLR(o, 0.3, 1.0, 12), 40),
    "StepLR": (Step(0.1, 7, 0.5), lambda m, o: m.StepLR(o, 7, 0.5), 100),
    "MultiStepLR": (MultiStep(0.1, (3, 5, 20)), lambda m, o: m.MultiStepLR(o, [3, 5, 20]), 40),
    "ExponentialLR": (Exponential(0.1, 0.93), lambda m, o: m.ExponentialLR(o, 0.93), 200),
    "PolynomialLR": (Polynomial(0.1, 50, 2.5), lambda m, o: m.PolynomialLR(o, 50, 2.5), 80),
    "CosineAnnealingLR": (Cosine(0.1, 60, 0.01), lambda m, o: m.CosineAnnealingLR(o, 60, 0.01), 61),
    "CosineAnnealingWarmRestarts": (
        CosineRestarts(0.1, 5, 2, 0.01),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 5, 2, 0.01),
        200,
    ),
    "CosineAnnealingWarmRestarts, equal": (
        CosineRestarts(0.1, 7),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 7),
        50,
    ),
    "OneCycleLR": (OneCycle(0.1, 97), lambda m, o: m.OneCycleLR(o, 0.1, 97), 97),
    "OneCycleLR, linear, three phases": (
        OneCycle(0.1, 90, 0.4, 10, 100, "linear", True),
        lambda m, o: m.OneCycleLR(
            o, 0.1, 90, pct_start=0.4, div_factor=10, final_div_factor=100, anneal_strategy="linear", three_phase=True
        ),
        90,
    ),
    "LambdaLR, inverse time": (InverseTime(0.1, 0.5, 3), lambda m, o: m.LambdaLR(o, lambda t: 1 / (1 + t / 6)), 50),
    "ChainedScheduler": (
        chain(Exponential(0.1, 0.9), Linear(0.25, 1.0, 8)),
        lambda m, o: m.ChainedScheduler([m.ExponentialLR(o, 0.9), m.LinearLR(o, 0.25, 1.0, 8)]),
        40,
    ),
    "SequentialLR": (
        join([Linear(0.01, 0.1, 10), Exponential(0.1, 0.9)], [10]),
        lambda m, o: m.SequentialLR(o, [m.LinearLR(o, 0.1, 1.0, 10), m.ExponentialLR(o, 0.9)], [10]),
        40,
    ),
}


@pytest.mark.parametrize("name", SAME_AS_TORCH)
def test_values_agree_with_torch_over_a_whole_run(name: str) -> None:
    schedule, make, steps = SAME_AS_TORCH[name]
    lrs = [float(group["lr"]) for group in of_torch(make, steps)]
    np.testing.assert_allclose([schedule(t) for t in range(steps)], lrs, rtol=1e-11, atol=1e-17)


def test_the_momentum_of_one_cycle_agrees_with_torch() -> None:
    momenta = [group["momentum"] for group in of_torch(lambda m, o: m.OneCycleLR(o, 0.1, 97), 97)]
    schedule = OneCycle(0.85, 97, div_factor=0.85 / 0.95, final_div_factor=1)
    np.testing.assert_allclose([schedule(t) for t in range(97)], momenta, rtol=1e-12)


PLATEAUS: list[dict[str, Any]] = [
    {},
    {"factor": 0.5, "patience": 0},
    {"patience": 2, "cooldown": 3},
    {"mode": "max", "patience": 1},
    {"threshold": 0.05, "threshold_mode": "abs", "patience": 1},
    {"factor": 0.3, "patience": 0, "min_value": 0.004},
    {"factor": 0.3, "patience": 0, "eps": 0.002},
]


@pytest.mark.parametrize("options", PLATEAUS, ids=str)
def test_reduce_on_plateau_agrees_with_torch(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    metrics = [*(1 / np.arange(1, 40) + 0.05 * rng.standard_normal(39)), np.nan, 5.0, *np.full(30, 0.3)]
    opt = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = {("min_lr" if k == "min_value" else k): v for k, v in options.items()}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, **theirs)
    schedule = ReduceOnPlateau(0.1, **options)
    falls = 0
    for t, metric in enumerate(metrics):
        before = schedule(t)
        scheduler.step(metric)
        schedule.observe(metric)
        assert schedule(t) == opt.param_groups[0]["lr"]
        falls += schedule(t) < before
    assert falls > 0


def test_warm_ups_and_the_stable_stretch_follow_their_equations() -> None:
    assert [LinearWarmup(0.4, 4)(t) for t in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    exponential = ExponentialWarmup(0.4, 5)
    assert exponential(0) == pytest.approx(0.4 * (1 - math.exp(-0.2)))
    assert exponential(4) == pytest.approx(0.4 * (1 - math.exp(-1)))
    wsd = WarmupStableDecay(0.4, 20, 4, 10, end=0.1)
    assert [wsd(t) for t in (0, 3, 4, 9, 10)] == pytest.approx([0.1, 0.4, 0.4, 0.4, 0.4])
    assert [wsd(t) for t in (15, 19, 20, 1000)] == pytest.approx([0.25, 0.13, 0.1, 0.1])
    assert WarmupStableDecay(0.4, 20, 0, 10, shape="sqrt")(15) == pytest.approx(0.4 * (1 - math.sqrt(0.5)))
    assert WarmupStableDecay(0.4, 20, 0, 10, shape="cosine")(15) == pytest.approx(0.2)
    assert WarmupStableDecay(0.4, 20, 0, 0)(50) == 0.4


@every_schedule
def test_a_schedule_gives_a_plain_float_at_any_step(schedule: Schedule) -> None:
    for t in (0, 1, 49, 50, 1000, 10**7, np.int64(3)):
        value = schedule(t)  # type: ignore[arg-type]
        assert type(value) is float
        assert 0 <= value < math.inf


@every_schedule
def test_a_schedule_stays_after_its_last_step(schedule: Schedule) -> None:
    if not isinstance(schedule, CosineRestarts | Exponential | InverseTime | ExponentialWarmup | Step):
        assert schedule(1000) == schedule(2000)


@every_schedule
def test_a_schedule_can_be_pickled_copied_and_compared(schedule: Schedule) -> None:
    for copied in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert copied == schedule
        assert repr(copied) == repr(schedule)
        assert [copied(t) for t in range(60)] == [schedule(t) for t in range(60)]
    assert hash(schedule) == hash(copy.deepcopy(schedule))
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert schedule.state_dict() == {}
    before = [schedule(t) for t in range(60)]
    schedule.observe(1.0)
    assert [schedule(t) for t in range(60)] == before


def test_importing_schedules_loads_nothing_heavy() -> None:
    code = "import fusedopt.schedules, sys; print([m for m in ('torch', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_every_schedule_is_tested() -> None:
    classes = {s for s in vars(schedules).values() if isinstance(s, type) and issubclass(s, Schedule)}
    assert classes - {Schedule, ReduceOnPlateau} == {type(s) for s in PURE}
    for name in schedules.__all__:
        assert (getattr(schedules, name).__doc__ or "").strip(), name


def test_schedules_of_schedules_nest_and_pass_on_what_they_hear() -> None:
    plateau = ReduceOnPlateau(1.0, factor=0.5, patience=0)
    schedule = join([LinearWarmup(0.1, 5), chain(Constant(0.1), plateau)], [5])
    for metric in (1.0, 2.0):
        schedule.observe(metric)
    assert [schedule(4), schedule(5)] == [0.1, 0.05]
    other = join([LinearWarmup(0.1, 5), chain(Constant(0.1), ReduceOnPlateau(1.0, factor=0.5, patience=0))], [5])
    assert other != schedule
    other.load_state_dict(schedule.state_dict())
    assert other == schedule
    assert other(5) == 0.05
    with pytest.raises(KeyError):
        other.load_state_dict({"1": {"1": {"current": 1.0}}})
    assert other == schedule


# ---- refusals


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(-1), "value"),
        (lambda: Constant(math.nan), "value"),
        (lambda: Constant(math.inf), "value"),
        (lambda: Constant("fast"), "value"),  # type: ignore[arg-type]
        (lambda: Linear(-0.1, 1, 5), "start"),
        (lambda: Linear(0, -0.1, 5), "end"),
        (lambda: Linear(0, 1, 0), "steps"),
        (lambda: Linear(0, 1, 2.5), "steps"),  # type: ignore[arg-type]
        (lambda: LinearWarmup(1, True), "steps"),
        (lambda: Step(1, 0), "step_size"),
        (lambda: Step(1, 5, 0.0), "gamma"),
        (lambda: MultiStep(1, (5, 3)), "milestones"),
        (lambda: MultiStep(1, (0, 3)), "milestones"),
        (lambda: MultiStep(1, (1.5,)), "milestones"),  # type: ignore[arg-type]
        (lambda: MultiStep(1, 5), "milestones"),  # type: ignore[arg-type]
        (lambda: Exponential(1, -0.5), "gamma"),
        (lambda: InverseTime(1, -1), "decay_rate"),
        (lambda: InverseTime(1, 1, 0), "decay_steps"),
        (lambda: Polynomial(1, 5, 0), "power"),
        (lambda: CosineRestarts(1, 5, 0), "mult"),
        (lambda: OneCycle(1, 5, 1.5), "pct_start"),
        (lambda: OneCycle(1, 5, div_factor=0), "div_factor"),
        (lambda: OneCycle(1, 5, anneal="up"), "anneal"),
        (lambda: WarmupStableDecay(1, 10, 6, 6), "steps"),
        (lambda: WarmupStableDecay(1, 10, 1, 1, shape="round"), "shape"),
        (lambda: ReduceOnPlateau(1, factor=1.0), "factor"),
        (lambda: ReduceOnPlateau(1, factor=0.0), "factor"),
        (lambda: ReduceOnPlateau(1, patience=-1), "patience"),
        (lambda: ReduceOnPlateau(1, mode="down"), "mode"),
        (lambda: ReduceOnPlateau(1, threshold_mode="both"), "threshold_mode"),
        (chain, "schedules"),
        (lambda: chain(lambda t: 1.0), "schedules"),  # type: ignore[arg-type]
        (lambda: join([1.0, 2.0], []), "milestones"),
        (lambda: join([1.0, 2.0], [3, 4]), "milestones"),
        (lambda: join([1.0, 2.0], [0]), "milestones"),
        (lambda: Constant(1)(-1), "step"),
        (lambda: Constant(1)(0.5), "float"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make: Callable[[], Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        make()


# ---- NumPy


def test_learning_rate_momentum_and_weight_decay_of_numpy_follow_schedules() -> None:
    rates, momenta, decays = Cosine(0.1, 8), Linear(0.5, 0.9, 8), Step(0.01, 3)
    for make, fixed in (
        (
            lambda p: fusedopt.SGD(p, lr=rates, momentum=momenta, weight_decay=decays),
            lambda p, t: fusedopt.SGD(p, lr=rates(t), momentum=momenta(t), weight_decay=decays(t)),
        ),
        (
            lambda p: fusedopt.AdamW(p, lr=rates, betas=(momenta, 0.999), weight_decay=decays),
            lambda p, t: fusedopt.AdamW(p, lr=rates(t), betas=(momenta(t), 0.999), weight_decay=decays(t)),
        ),
    ):
        one, other = np.ones(50, np.float32), np.ones(50, np.float32)
        opt, state = make(one), None
        for t in range(10):
            grad = np.random.default_rng(t).standard_normal(50).astype(np.float32)
            opt.step(grad)
            by_hand = fixed(other, t)  # a new optimizer with the values of this step and the current state
            if state:
                by_hand.state[:] = state
            by_hand.step(grad)
            state = by_hand.state
            np.testing.assert_array_equal(one, other)


def test_a_momentum_that_rises_from_zero_begins_with_the_gradient() -> None:
    w = np.zeros(3)
    opt = fusedopt.SGD(w, lr=1.0, momentum=Linear(0.0, 0.5, 1))
    opt.step(np.ones(3))
    np.testing.assert_array_equal(w, -np.ones(3))
    opt.step(np.ones(3))
    np.testing.assert_array_equal(w, -2 * np.ones(3))
    opt.step(np.ones(3))
    np.testing.assert_array_equal(w, -3.5 * np.ones(3))


def test_numpy_options_out_of_a_scheduled_range_are_refused_before_anything_is_written() -> None:
    w = np.ones(3)
    opt = fusedopt.Adam(w, betas=(lambda t: 0.9 if t < 1 else 1.5, 0.999), weight_decay=lambda t: 0.0)
    opt.step(np.ones(3))
    before = w.copy()
    with pytest.raises(ValueError, match="betas"):
        opt.step(np.ones(3))
    np.testing.assert_array_equal(w, before)
    with pytest.raises(ValueError, match="weight_decay"):
        fusedopt.Adam(w, weight_decay=lambda t: -1.0)


def test_a_numpy_checkpoint_leaves_scheduled_options_to_the_program() -> None:
    def make() -> tuple[Any, Any]:
        w = np.ones(3)
        return w, fusedopt.AdamW(w, lr=Cosine(0.1, 9), betas=(Linear(0.5, 0.9, 9), 0.99), weight_decay=Constant(0.1))

    w, opt = make()
    for _ in range(4):
        opt.step(np.ones(3))
    file = io.BytesIO()
    np.savez(file, **opt.state_dict())
    file.seek(0)
    other, again = make()
    other[:] = w
    again.load_state_dict(np.load(file))
    for one in (opt, again, pickle.loads(pickle.dumps(again))):
        assert one.param_groups[0]["betas"] == (Linear(0.5, 0.9, 9), 0.99)
    opt.step(np.ones(3))
    again.step(np.ones(3))
    np.testing.assert_array_equal(w, other)
    with pytest.raises(KeyError, match=r"group\.0\.lr"):
        fusedopt.AdamW(np.ones(3)).load_state_dict(opt.state_dict())


# ---- torch


def test_a_torch_optimizer_follows_the_same_schedules() -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    rates, momenta, decays = OneCycle(0.1, 12), Linear(0.5, 0.9, 8), Step(0.01, 3)
    for cls in (optim.SGD, optim.AdamW, torch.optim.SGD, torch.optim.AdamW, optim.Lion):
        p = torch.nn.Parameter(torch.ones(50))
        opt = cls([p], lr=1.0)
        scheduler = optim.ScheduledLR(opt, lr=rates, momentum=momenta, weight_decay=decays)
        for t in range(12):
            group = opt.param_groups[0]
            assert group["lr"] == rates(t) == scheduler.get_last_lr()[0]
            assert (group["momentum"] if "momentum" in group else group["betas"][0]) == momenta(t)
            assert group["weight_decay"] == decays(t)
            p.grad = torch.ones(50)
            opt.step()
            scheduler.step()


def test_numpy_and_torch_train_to_the_same_bits_by_one_schedule() -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    schedule = WarmupStableDecay(0.1, 20, 5, 10)
    w, p = np.ones(64, np.float32), torch.nn.Parameter(torch.ones(64))
    ours = fusedopt.AdamW(w, lr=schedule, betas=(Linear(0.8, 0.9, 9), 0.999), weight_decay=0.01)
    theirs = optim.AdamW([p], lr=1.0, weight_decay=0.01)
    scheduler = optim.ScheduledLR(theirs, lr=schedule, momentum=Linear(0.8, 0.9, 9))
    for t in range(25):
        grad = np.random.default_rng(t).standard_normal(64).astype(np.float32)
        ours.step(grad)
        p.grad = torch.from_numpy(grad)
        theirs.step()
        scheduler.step()
    np.testing.assert_array_equal(w, p.detach().numpy())


def test_torch_groups_may_have_schedules_of_their_own_and_tensors_are_written_in_place() -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in "ab")
    rate = torch.tensor(1.0, dtype=torch.float64)
    opt = optim.Adam([{"params": [a], "lr": rate}, {"params": [b]}])
    scheduler = optim.ScheduledLR(opt, lr=[Exponential(0.1, 0.5), Constant(0.3)])
    for _ in range(3):
        opt.step()
        scheduler.step()
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == 0.0125
    assert opt.param_groups[1]["lr"] == 0.3


def test_a_torch_scheduler_checkpoints_with_what_its_schedules_heard(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    def make() -> tuple[Any, Any]:
        opt = optim.SGD([torch.nn.Parameter(torch.ones(3)) for _ in "ab"], lr=1.0)
        return opt, optim.ScheduledLR(opt, lr=chain(Cosine(0.1, 50), ReduceOnPlateau(1.0, 0.5, patience=0)))

    def go_on(opt: Any, scheduler: Any, steps: range) -> list[float]:
        rates = []
        for t in steps:
            opt.step()
            scheduler.observe(abs(10 - t))
            scheduler.step()
            rates.append(opt.param_groups[0]["lr"])
        return rates

    opt, scheduler = make()
    go_on(opt, scheduler, range(15))
    torch.save({"opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    other, again = make()
    other.load_state_dict(saved["opt"])
    again.load_state_dict(saved["scheduler"])
    assert go_on(other, again, range(15, 20)) == go_on(opt, scheduler, range(15, 20))
    fixed = optim.ScheduledLR(opt, lr=lambda t: 1.0)
    with pytest.raises(ValueError, match="schedules"):
        fixed.load_state_dict(saved["scheduler"])


def test_a_torch_scheduler_refuses_what_does_not_fit() -> None:
    torch = pytest.importorskip("torch")
    import fusedopt.torch as optim

    opt = optim.Adagrad([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    for wrong, name in (({"lr": 0.1}, "lr"), ({"lr": Constant(1), "weight_decay": 0.1}, "weight_decay")):
        with pytest.raises(TypeError, match=name):
            optim.ScheduledLR(opt, **wrong)
    with pytest.raises(ValueError, match="momentum"):
        optim.ScheduledLR(opt, lr=Constant(1), momentum=Constant(0.9))
    with pytest.raises(ValueError, match="groups"):
        optim.ScheduledLR(opt, lr=[Constant(1), Constant(2)])
    assert opt.param_groups[0]["lr"] == 0.5
    assert "ScheduledLR" in dir(optim)


# ---- pictures


def test_schedules_are_drawn_as_they_are(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from fusedopt import plots

    figure = plots.schedule({type(s).__name__: s for s in PURE}, 60, tmp_path / "schedules.png")
    lines = figure.axes[0].get_lines()
    assert len(lines) == len(PURE)
    for line, schedule in zip(lines, PURE, strict=True):
        assert list(itertools.islice(line.get_ydata(), 60)) == [schedule(t) for t in range(60)]
    assert (tmp_path / "schedules.png").stat().st_size > 10_000
    one = plots.schedule(Cosine(0.1, 30), 30)
    assert not one.legends
    assert figure.legends
