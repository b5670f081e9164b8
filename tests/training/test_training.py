"""The torch training loop in one process: against a hand-written loop, resumed bit-identically, stopping, logs,
refusals. Killed and parallel processes: test_training_processes.py."""

import contextlib
import csv
import errno
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fusedopt.torch as optim  # noqa: E402
from fusedopt import _files  # noqa: E402
from fusedopt.schedules import Constant, Cosine, ReduceOnPlateau  # noqa: E402
from fusedopt.torch import Callback, Trainer, fit  # noqa: E402


class Noisy(torch.utils.data.Dataset[Any]):
    """A data set whose transform draws from NumPy's global generator, as is common."""

    def __init__(self, n: int = 70) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x[:, :3].sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + np.float32(np.random.standard_normal()) * 0.1, self.y[i]  # noqa: NPY002


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


def network(dropout: float = 0.0) -> Any:
    seed()
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(dropout),
        torch.nn.Linear(16, 2),
    )  # fmt: skip


def plain_data(n: int = 64, batch: int = 16) -> list[Any]:
    data = Noisy(n)
    return [(data.x[i : i + batch], data.y[i : i + batch]) for i in range(0, n, batch)]


CROSS_ENTROPY = torch.nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: networks this small gain nothing from more, and lose much on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_of(model: Any, **options: Any) -> Trainer:
    return Trainer(model, CROSS_ENTROPY, optim.AdamW(model.parameters(), lr=0.01), **options)


def assert_same_state(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif isinstance(value, list):
            assert_same_state(dict(enumerate(value)), dict(enumerate(other[name])))
        else:
            assert value == other[name], name


# ---- against a loop by hand


@pytest.mark.parametrize("ours", [True, False])
def test_it_does_what_a_loop_by_hand_does(ours: bool) -> None:
    data, schedule = plain_data(), Cosine(0.05, 12)
    make = (optim if ours else torch.optim).AdamW
    model = network()
    opt = make(model.parameters(), lr=1.0, weight_decay=0.1)
    trainer = Trainer(model, CROSS_ENTROPY, opt, schedule=schedule).fit(data, data[:2], epochs=3)
    by_hand = network()
    opt = make(by_hand.parameters(), lr=1.0, weight_decay=0.1)
    rows = []
    for epoch in range(3):
        losses = []
        for i, (x, y) in enumerate(data):
            opt.param_groups[0]["lr"] = schedule(4 * epoch + i)
            opt.zero_grad()
            loss = CROSS_ENTROPY(by_hand(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        by_hand.eval()
        with torch.no_grad():
            rows.append((np.mean(losses), np.mean([CROSS_ENTROPY(by_hand(x), y) for x, y in data[:2]])))
        by_hand.train()
    assert_same_state(model.state_dict(), by_hand.state_dict())
    np.testing.assert_allclose(np.transpose(rows), [trainer.history["loss"], trainer.history["val_loss"]], rtol=1e-6)
    assert trainer.history["lr"] == [schedule(3), schedule(7), schedule(11)]
    assert trainer.history["step"] == [4, 8, 12]
    assert (trainer.epoch, trainer.step) == (3, 12)


def test_accumulated_batches_are_one_large_batch_even_where_they_differ_in_size() -> None:
    x, y = Noisy(50).x, Noisy(50).y
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 10), (10, 30), (30, 33), (33, 50))]
    whole = [(x[:33], y[:33]), (x[33:], y[33:])]
    ends = []
    for data, accumulate in ((parts, 3), (whole, 1)):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 2)
        opt = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        trainer = fit(model, data, loss=CROSS_ENTROPY, optimizer=opt, epochs=4, accumulate=accumulate)
        assert trainer.step == 8
        ends.append((model.weight.detach(), torch.tensor(trainer.history["loss"])))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_clipping_is_inside_our_step_and_before_torchs() -> None:
    ends = []
    for make in (optim.SGD, torch.optim.SGD):
        model = network()
        opt = make(model.parameters(), lr=0.5)
        trainer = Trainer(model, CROSS_ENTROPY, opt, max_grad_norm=0.05).fit(plain_data(), epochs=2)
        assert getattr(opt, "max_grad_norm", 0.05) == 0.05
        ends.append((torch.nn.utils.parameters_to_vector(model.parameters()), trainer.history["grad_norm"]))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
    assert ends[0][1][0] > 0.05


def test_the_moving_average_is_kept_and_validated() -> None:
    data, model = plain_data(), network()
    shadow = {k: v.clone() for k, v in model.state_dict().items()}
    first = True

    class Follow(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            nonlocal first
            for k, v in trainer.model.state_dict().items():
                if v.is_floating_point():
                    shadow[k] = v.clone() if first else 0.9 * shadow[k] + 0.1 * v
            first = False

    trainer = trainer_of(model, ema_decay=0.9, callbacks=[Follow()]).fit(data, data, epochs=3)
    assert trainer.ema is not None
    for k, v in trainer.ema.module.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(v, shadow[k])
    trainer.ema.module.eval()
    with torch.no_grad():
        expected = np.mean([float(CROSS_ENTROPY(trainer.ema.module(x), y)) for x, y in data])
    assert trainer.history["val_loss"][-1] == pytest.approx(expected)


def test_an_average_inside_the_step_is_validated_and_restored() -> None:
    model, data = network(), plain_data()
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, ema_decay=0.9)
    trainer = Trainer(model, CROSS_ENTROPY, opt).fit(data, data, epochs=4)
    with opt.ema_parameters(), torch.no_grad():
        model.eval()
        expected = np.mean([float(CROSS_ENTROPY(model(x), y)) for x, y in data])
        averages = {k: v.clone() for k, v in model.state_dict().items()}
    assert trainer.history["val_loss"][-1] == pytest.approx(expected)
    assert not torch.equal(model[0].weight, averages["0.weight"])
    other = network()
    opt = optim.SGD(other.parameters(), lr=0.1, momentum=0.9, ema_decay=0.9)
    score = iter([1.0, 2.0, 3.0, 4.0])
    metrics = {"m": lambda output, target: next(score)}
    options: dict[str, Any] = {"metrics": metrics, "monitor": "val_m", "mode": "max", "restore_best": True}
    Trainer(other, CROSS_ENTROPY, opt, **options).fit(data, data, epochs=4)
    assert_same_state(other.state_dict(), averages)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_and_learns(precision: str) -> None:
    seen = set()
    model = network()
    model.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    for opt in (optim.AdamW(model.parameters(), lr=0.02), optim.AdamW(model.parameters(), lr=0.02, fused=True)):
        trainer = Trainer(model, CROSS_ENTROPY, opt, precision=precision, max_grad_norm=10.0)
        history = trainer.fit(plain_data(), plain_data(), epochs=10).history
        assert history["val_loss"][-1] < history["val_loss"][0]
    assert seen == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_step_that_the_scaler_skips_moves_neither_schedule_nor_average() -> None:
    model, schedule = network(), Cosine(0.01, 100)
    trainer = trainer_of(model, precision="float16", schedule=schedule, ema_decay=0.5)
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer.fit(plain_data(), epochs=4)
    assert trainer.step == 16
    assert trainer.schedule.last_epoch == int(trainer.ema.n_averaged)  # type: ignore[union-attr]
    assert 0 < trainer.schedule.last_epoch < 16


# ---- metrics, schedules, stopping


def test_metrics_are_of_the_whole_validation_data() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    data, model = plain_data(), network()
    several = {
        "accuracy": lambda output, target: metrics.accuracy_score(target, output.argmax(1)),
        "f1": lambda output, target: metrics.f1_score(target, output.argmax(1)),
        "auc": lambda output, target: metrics.roc_auc_score(target, output[:, 1]),
    }
    uneven = [(x, y) for x, y in (data[0], (data[1][0][:3], data[1][1][:3]))]
    trainer = trainer_of(model, metrics=several).fit(data, uneven, epochs=2)
    model.eval()
    with torch.no_grad():
        output = model(torch.cat([x for x, _ in uneven]))
    target = torch.cat([y for _, y in uneven])
    for name, metric in several.items():
        assert trainer.history[f"val_{name}"][-1] == metric(output, target)
    assert trainer.history["val_loss"][-1] == pytest.approx(float(CROSS_ENTROPY(output, target)), rel=1e-5)
    assert trainer.evaluate(uneven)["f1"] == several["f1"](output, target)
    assert model.training is False


@pytest.mark.parametrize("restore", [True, False])
def test_early_stopping_and_the_best_weights(restore: bool) -> None:
    scores = iter([0.5, 0.7, 0.6, 0.69, 0.71, 0.1, 0.2, 0.705, 0.3])
    model, seen = network(), []
    trainer = trainer_of(
        model, metrics={"score": lambda output, target: next(scores)}, monitor="val_score", mode="max", patience=3,
        restore_best=restore, callbacks=[lambda trainer, row: seen.append(trainer.model[0].weight.clone())],
    )  # fmt: skip
    trainer.fit(plain_data(), plain_data(), epochs=100)
    assert trainer.history["val_score"] == [0.5, 0.7, 0.6, 0.69, 0.71, 0.1, 0.2, 0.705]
    assert (trainer.best["value"], trainer.best["step"], trainer.epoch) == (0.71, 20, 8)
    assert torch.equal(model[0].weight, seen[4] if restore else seen[-1])


def test_a_minimal_improvement_may_be_asked_for() -> None:
    scores = iter([1.0, 0.95, 0.91, 0.85, 0.8])
    trainer = trainer_of(
        network(), metrics={"m": lambda o, t: next(scores)}, monitor="val_m", patience=2, min_delta=0.1
    )
    trainer.fit(plain_data(), plain_data(), epochs=5)
    assert trainer.history["val_m"] == [1.0, 0.95, 0.91]


def test_schedules_of_torch_and_of_ours_count_steps_or_epochs_or_listen() -> None:
    lr = torch.optim.lr_scheduler

    def rates(make: Callable[[Any], Any], **options: Any) -> list[float]:
        model = network()
        opt = optim.SGD(model.parameters(), lr=0.1)
        metric = iter([1.0, 2.0, 3.0, 4.0])
        trainer = Trainer(
            model, CROSS_ENTROPY, opt, schedule=make(opt), metrics={"m": lambda o, t: next(metric)}, monitor="val_m",
            **options,
        )  # fmt: skip
        return trainer.fit(plain_data(), plain_data(), epochs=4).history["lr"]

    assert rates(lambda opt: lambda t: 0.1 / (t + 1)) == [0.1 / 4, 0.1 / 8, 0.1 / 12, 0.1 / 16]
    assert rates(lambda opt: lambda t: 0.1 / (t + 1), schedule_by="epoch") == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4]
    assert rates(lambda opt: lr.StepLR(opt, 2, 0.5), schedule_by="epoch") == [0.1, 0.1, 0.05, 0.05]
    assert rates(lambda opt: lr.ReduceLROnPlateau(opt, factor=0.5, patience=0)) == [0.1, 0.1, 0.05, 0.025]
    assert rates(lambda opt: ReduceOnPlateau(0.1, 0.5, patience=0)) == [0.1, 0.1, 0.05, 0.025]
    assert rates(lambda opt: ReduceOnPlateau(0.1, 0.5, patience=0), schedule_by="epoch") == [0.1, 0.1, 0.05, 0.025]
    assert rates(lambda opt: optim.ScheduledLR(opt, lr=Constant(0.3))) == [0.3] * 4
    assert rates(lambda opt: None) == [0.1] * 4


def test_rows_may_be_by_steps_and_training_may_end_inside_an_epoch() -> None:
    model = network()
    trainer = trainer_of(model, every=3).fit(plain_data(), plain_data(), steps=10)
    assert trainer.history["step"] == [3, 6, 9, 10]
    assert trainer.history["epoch"] == [0, 1, 2, 2]
    trainer.fit(plain_data(), plain_data(), epochs=3, steps=100)
    assert (trainer.step, trainer.epoch) == (12, 3)
    other = network()
    at_once = trainer_of(other, every=3).fit(plain_data(), plain_data(), epochs=3)
    assert_same_state(model.state_dict(), other.state_dict())
    assert at_once.history["step"] == [3, 6, 9, 12]


def test_a_data_set_without_a_length_is_trained_on() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(Noisy(64).x, Noisy(64).y, strict=True))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=16)
    model, other = network(), network()
    trainer = trainer_of(model).fit(loader, epochs=3)
    trainer_of(other).fit(plain_data(), epochs=3)
    assert_same_state(model.state_dict(), other.state_dict())
    assert trainer.history["step"] == [4, 8, 12]


def test_batches_of_another_kind_need_another_forward() -> None:
    class OfDicts(Trainer):
        def forward(self, net: Any, batch: Any) -> Any:
            output = net(batch["x"])
            return self.loss(output, batch["y"]), output, batch["y"]

    data, model, other = plain_data(), network(), network()
    opt = optim.AdamW(model.parameters(), lr=0.01)
    named = [{"x": x, "y": y} for x, y in data]
    OfDicts(model, CROSS_ENTROPY, opt, accumulate=2).fit(named, named, epochs=2)
    trainer_of(other, accumulate=2).fit(data, epochs=2)
    assert_same_state(model.state_dict(), other.state_dict())


# ---- resumed to the same bits


class Stopped(Exception):
    pass


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.step:
            raise Stopped


def loaders(workers: int, own_generator: bool) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    make = torch.utils.data.DataLoader
    return make(Noisy(), batch_size=8, shuffle=True, num_workers=workers, generator=generator), make(Noisy(), 32)


def run(
    path: Path, stop: int | None, resume: bool, workers: int = 0, own_generator: bool = False, **options: Any
) -> Trainer:
    """A training run with every source of randomness and state, to the end or to a step."""
    model = network(dropout=0.5)
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        model, CROSS_ENTROPY, opt, schedule=ReduceOnPlateau(0.05, 0.5, patience=0), ema_decay=0.9, patience=3,
        checkpoint=path, callbacks=[StopAt(stop)] if stop is not None else [], log=path.with_suffix(".csv"), **options,
    )  # fmt: skip
    if resume and path.exists():
        torch.rand(17)  # the generators have other states in a new process
    if stop is None:
        return trainer.fit(*loaders(workers, own_generator), epochs=5, resume=resume)
    with pytest.raises(Stopped):
        trainer.fit(*loaders(workers, own_generator), epochs=5, resume=resume)
    return trainer


def assert_same_run(one: Trainer, other: Trainer) -> None:
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    assert_same_state(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert_same_state(one.ema.state_dict(), other.ema.state_dict())  # type: ignore[union-attr]
    first, second = one.history, other.history
    assert set(first) == set(second)
    for name in set(first) - {"seconds"}:
        assert first[name] == second[name], name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint_every": 1},
        {"checkpoint_every": 2, "accumulate": 2},
        {"checkpoint_every": 1, "every": 4, "own_generator": True},
        {"checkpoint_every": 1, "precision": "float16"},
        {"checkpoint_every": 5, "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_a_training_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole.pt", None, False, **options)
    for stop in (1, 7, 13):
        for file in tmp_path.glob("part*"):
            file.unlink()
        run(tmp_path / "part.pt", stop, False, **options)
        run(tmp_path / "part.pt", stop + 5, True, **options)
        assert_same_run(run(tmp_path / "part.pt", None, True, **options), whole)
    with open(tmp_path / "part.csv") as part, open(tmp_path / "whole.csv") as file:
        strip = [[{**row, "seconds": ""} for row in csv.DictReader(lines)] for lines in (part, file)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR", "LambdaLR"])
def test_torchs_schedulers_are_resumed_with_the_training(tmp_path: Path, name: str) -> None:
    lr = torch.optim.lr_scheduler
    makers: dict[str, Callable[[Any], Any]] = {
        "StepLR": lambda opt: lr.StepLR(opt, 3, 0.5),
        "OneCycleLR": lambda opt: lr.OneCycleLR(opt, 0.1, total_steps=21),
        "ReduceLROnPlateau": lambda opt: lr.ReduceLROnPlateau(opt, factor=0.5, patience=0),
        "SequentialLR": lambda opt: lr.SequentialLR(opt, [lr.ConstantLR(opt, 1.0), lr.ExponentialLR(opt, 0.9)], [5]),
        "LambdaLR": lambda opt: lr.LambdaLR(opt, lambda step: 1 / (step + 1)),
    }

    def train(path: Path, stop: int | None, resume: bool) -> Trainer:
        model = network()
        opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        callbacks = [] if stop is None else [StopAt(stop)]
        trainer = Trainer(
            model, CROSS_ENTROPY, opt, schedule=makers[name](opt), checkpoint=path, checkpoint_every=1,
            callbacks=callbacks,
        )  # fmt: skip
        with pytest.raises(Stopped) if stop is not None else contextlib.nullcontext():
            trainer.fit(plain_data(), plain_data(), epochs=5, resume=resume)
        return trainer

    whole = train(tmp_path / "whole.pt", None, False)
    train(tmp_path / "part.pt", 7, False)
    part = train(tmp_path / "part.pt", None, True)
    assert part.history["lr"] == whole.history["lr"]
    assert_same_state(part.model.state_dict(), whole.model.state_dict())


def test_a_training_with_workers_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.pt", None, False, workers=2)
    run(tmp_path / "part.pt", 12, False, workers=2, checkpoint_every=1)
    assert_same_run(run(tmp_path / "part.pt", None, True, workers=2), whole)


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "x.pt", None, False)
    written = (tmp_path / "x.pt").stat().st_mtime_ns
    again = run(tmp_path / "x.pt", None, True)
    assert_same_run(again, whole)
    assert written == (tmp_path / "x.pt").stat().st_mtime_ns


def test_a_longer_training_goes_on_where_a_shorter_one_ended() -> None:
    ends = []
    for lengths in ((1, 2, 5), (5,)):
        model = network(0.3)
        trainer = trainer_of(model)
        for epochs in lengths:
            trainer.fit(plain_data(), epochs=epochs)
        assert trainer.history["step"] == [4, 8, 12, 16, 20]
        ends.append(model.state_dict())
    assert_same_state(*ends)


# ---- damaged checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "x.pt"
    whole = run(tmp_path / "whole.pt", None, False)
    run(path, 20, False, checkpoint_every=3)
    damage(path)
    with pytest.warns(UserWarning, match=r"damaged.*x\.pt\.previous"):
        again = run(path, None, True)
    assert_same_run(again, whole)
    for each in (path, path.with_name("x.pt.previous")):
        damage(each)
    with pytest.raises(ValueError, match="damaged"):
        run(path, None, True)


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not written by Trainer"):
        run(path, None, True)
    path.unlink()
    run(path, 12, False)
    trainer = trainer_of(network(), checkpoint=path)
    with pytest.raises(ValueError, match="schedule"):
        trainer.fit(plain_data(), epochs=5, resume=True)
    with pytest.raises(ValueError, match="checkpoint"):
        trainer_of(network()).fit(plain_data(), epochs=5, resume=True)
    fewer = torch.utils.data.DataLoader(Noisy(20), batch_size=8)
    run(path, 16, True, checkpoint_every=1)
    model = network(0.5)
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    shorter = Trainer(model, CROSS_ENTROPY, opt, ema_decay=0.9, schedule=ReduceOnPlateau(0.05), checkpoint=path)
    with pytest.raises(ValueError, match="batches"):
        shorter.fit(fewer, epochs=5, resume=True)


def test_a_checkpoint_is_not_overwritten_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    first = run(path, None, False)
    kept = path.read_bytes(), path.with_name("x.pt.previous").read_bytes()
    with pytest.raises(FileExistsError, match=r"x\.pt exists; resume=True resumes from it.*delete it and x\.pt\.prev"):
        run(path, None, False)
    assert (path.read_bytes(), path.with_name("x.pt.previous").read_bytes()) == kept
    first.fit(*loaders(0, False), epochs=first.epoch + 1)  # its own file
    path.unlink()
    with pytest.raises(FileExistsError):  # the one before it would be lost
        run(path, None, False)


@pytest.mark.parametrize("other", [optim.SGD, torch.optim.Adam], ids=lambda c: c.__module__)
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, other: Any) -> None:
    def trainer(make: Any) -> Trainer:
        model = network()
        return Trainer(model, CROSS_ENTROPY, make(model.parameters(), lr=0.1), checkpoint=tmp_path / "x.pt")

    trainer(optim.AdamW).fit(plain_data(), epochs=1)
    with pytest.raises(ValueError, match=f"written with the optimizer AdamW; this Trainer has {other.__name__}"):
        trainer(other).fit(plain_data(), epochs=2, resume=True)
    again = trainer(torch.optim.AdamW).fit(plain_data(), epochs=2, resume=True)  # torch's takes over ours
    assert again.history["epoch"] == [1, 2]


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    run(path, 12, False, checkpoint_every=4)
    kept = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_files, "open", Full, raising=False)
        with pytest.raises(OSError, match=r"x\.pt cannot be written: No space left on device; [\d,]+ bytes are free"):
            run(path, None, True)
    assert path.read_bytes() == kept
    assert list(tmp_path.glob("*.writing")) == []


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path: Path) -> None:
    trainer = run(tmp_path / "x.pt", None, False)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert saved["place"]["step"] == trainer.step
    assert not list(tmp_path.glob("*.writing"))


# ---- logs, callbacks, progress


def test_rows_are_logged_as_csv_and_json_lines(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "log.csv", tmp_path / "b" / "log.jsonl"]
    trainer = trainer_of(network(), log=files, metrics={"nan": lambda o, t: math.nan})
    trainer.fit(plain_data(), epochs=2)
    trainer.fit(plain_data(), plain_data(), epochs=3)  # with new columns
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["loss"] for row in rows] == trainer.history["loss"]
    assert rows[2]["val_nan"] is None
    with open(files[0]) as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == trainer.history["loss"]
    assert [row["val_loss"] == "" for row in table] == [True, True, False]
    assert math.isnan(trainer.history["val_loss"][0])


def test_tensorboard_gets_the_rows_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        trainer = trainer_of(network(), log=tmp_path / "runs").fit(plain_data(), plain_data(), epochs=3)
        events = EventAccumulator(str(tmp_path / "runs")).Reload()
    points = events.Scalars("val_loss")
    assert [point.step for point in points] == [4, 8, 12]
    np.testing.assert_allclose([point.value for point in points], trainer.history["val_loss"], rtol=1e-6)


def test_a_folder_for_tensorboard_without_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        trainer_of(network(), log=tmp_path / "runs")


def test_callbacks_are_told_in_order_and_may_stop() -> None:
    told: list[str] = []

    class Tell(Callback):
        def on_fit_start(self, trainer: Trainer) -> None:
            told.append("start")

        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            told.append(f"{trainer.step}")
            trainer.stop = trainer.step == 6

        def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
            told.append(f"row {row['step']}")

        def on_fit_end(self, trainer: Trainer) -> None:
            told.append("end")

    trainer_of(network(), callbacks=[Tell(), lambda trainer, row: told.append("function")]).fit(plain_data(), epochs=9)
    assert told == ["start", "1", "2", "3", "4", "row 4", "function", "5", "6", "row 6", "function", "end"]


def test_the_progress_bar_shows_loss_rate_and_metric(capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of(network(), progress=True, metrics={"m": lambda o, t: 0.125}).fit(plain_data(), plain_data(), epochs=3)
    shown = capsys.readouterr().err
    for text in ("12/12", "loss=", "lr=0.01", "val_m=0.125"):
        assert text in shown
    trainer_of(network()).fit(plain_data(), epochs=1)  # no terminal, no bar
    assert capsys.readouterr().err == ""


# ---- refusals


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    model = torch.nn.Linear(6, 1)
    opt = optim.SGD(model.parameters(), lr=1e20)
    data = [(x, y.float()[:, None]) for x, y in plain_data()]
    path = tmp_path / "x.pt"
    trainer = Trainer(model, torch.nn.functional.mse_loss, opt, checkpoint=path, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d.*lr 1e\+20.*smaller lr.*warm-up.*max_grad_norm"):
        trainer.fit(data, epochs=5)
    assert path.exists()
    bad = [(torch.full((4, 6), math.nan), torch.zeros(4, 1))]
    model = torch.nn.Linear(6, 1)
    before = model.weight.clone()
    with pytest.raises(FloatingPointError, match="batch contains NaN"):
        fit(model, bad, loss=torch.nn.functional.mse_loss, optimizer=optim.SGD(model.parameters()), epochs=1)
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"precision": "int8"}, "precision"),
        ({"schedule_by": "day"}, "schedule_by"),
        ({"mode": "best"}, "mode"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 1.5}, "accumulate"),
        ({"every": 0}, "every"),
        ({"checkpoint_every": True}, "checkpoint_every"),
        ({"patience": 0}, "patience"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"schedule": 0.1}, "schedule"),
        ({"log": "x.txt"}, "log"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        trainer_of(network(), **options)


def test_data_and_lengths_that_make_no_sense_are_refused() -> None:
    trainer = trainer_of(network())
    with pytest.raises(ValueError, match="epochs"):
        trainer.fit(plain_data())
    with pytest.raises(ValueError, match="epochs"):
        trainer.fit(plain_data(), epochs=0)
    with pytest.raises(ValueError, match="steps"):
        trainer.fit(plain_data(), steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train"):
        trainer.fit([], epochs=1)
    with pytest.raises(ValueError, match="more than once"):
        trainer.fit(iter(plain_data()), epochs=2)
    with pytest.raises(ValueError, match="validation"):
        trainer.fit(plain_data(), [], epochs=5)
    with pytest.raises(ValueError, match=r"monitor.*val_loss"):
        trainer_of(network(), monitor="accuracy").fit(plain_data(), plain_data(), epochs=1)


def test_it_is_reached_from_the_torch_front_end() -> None:
    assert {"Trainer", "fit", "Callback", "ScheduledLR"} <= set(dir(optim))
    for one in (Trainer, fit, Callback, Trainer.fit, Trainer.evaluate, Trainer.forward):
        assert (one.__doc__ or "").strip()


# ---- batches and data of other kinds, predictions


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, first: Any, second: Any) -> Any:
        return self.net(torch.cat([first, second], 1))


@pytest.mark.parametrize("key", ["target", "labels", "y"])
def test_batches_may_be_dicts(key: str) -> None:
    pairs = plain_data()
    dicts = [{"first": x[:, :2], "second": x[:, 2:], key: y} for x, y in pairs]
    plain, named = trainer_of(network()), trainer_of(Named())
    named.model.net.load_state_dict(plain.model.state_dict())  # type: ignore[union-attr, operator]
    plain.fit(pairs, pairs, epochs=2)
    named.fit(dicts, dicts, epochs=2)
    for name in ("loss", "val_loss"):
        assert named.history[name] == plain.history[name]
    assert torch.equal(named.predict(dicts), plain.predict(pairs))
    assert torch.equal(named.predict([{k: v for k, v in d.items() if k != key} for d in dicts]), plain.predict(pairs))
    with pytest.raises(ValueError, match="expected one of target, targets, label, labels, y in the dict, got a, b"):
        trainer_of(Named()).fit([{"a": 1, "b": 2}], epochs=1)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_arrays_of_all_rows_are_trained_on_in_shuffled_batches(kind: Any) -> None:
    data = Noisy(70)
    arrays: tuple[Any, ...] = (data.x, data.y)
    if kind is np.ndarray:
        arrays = (data.x.double().numpy(), data.y.numpy())
    by_loader, by_array = trainer_of(network()), trainer_of(network())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=16, shuffle=True)
    seed()
    by_loader.fit(loader, torch.utils.data.DataLoader(loader.dataset, batch_size=16), epochs=3)
    seed()
    by_array.fit(arrays, arrays, epochs=3, batch_size=16)
    assert by_array.history["loss"] == by_loader.history["loss"]
    np.testing.assert_allclose(by_array.history["val_loss"], by_loader.history["val_loss"], rtol=1e-6)
    torch.testing.assert_close(by_array.predict(arrays[0], batch_size=9), by_loader.predict([data.x]))
    with pytest.raises(ValueError, match="arrays of equal length, got 70, 69 rows"):
        by_array.fit((arrays[0], arrays[1][:-1]), epochs=4)


def test_predictions_are_those_of_the_model_in_evaluation() -> None:
    data = plain_data()
    x = torch.cat([x for x, _ in data])
    trainer = trainer_of(network(dropout=0.5))
    trainer.fit(data, epochs=2)
    trainer.model.train()
    found = trainer.predict(data)
    assert trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(x)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert torch.equal(trainer.predict([(x,)]), trainer.predict([x]))
    assert torch.equal(trainer.predict([(x, None)]), trainer.predict([x]))
    with pytest.raises(ValueError, match="no batch"):
        trainer.predict([])
    averaged = trainer_of(network(), ema_decay=0.5)
    averaged.fit(data, epochs=2)
    assert averaged.ema is not None
    averaged.ema.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(averaged.predict([x]), averaged.ema.module(x))


def test_a_metric_cannot_take_the_place_of_the_loss() -> None:
    with pytest.raises(ValueError, match="metrics: 'loss' is reserved for the loss"):
        trainer_of(network(), metrics={"loss": lambda output, target: 0.0})
