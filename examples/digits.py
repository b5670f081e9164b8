"""Trains a classifier of digits with torch.optim, with fusedopt, and with NumPy alone; then times every rule.

All runs have the same seed and the same batches in the same order, so their losses agree. The runs of a table take
turns, epoch by epoch, so that noise affects all alike. The NumPy network has a hand-written backward pass. The last
part is the `short` benchmark with its table and plots. Run: ``python examples/digits.py [--quick] [--output DIR]``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from torch import nn

import fusedopt
import fusedopt.torch
from fusedopt.bench import LARGE, numpy_best, render, run_suites, save
from fusedopt.plots import losses, save_all

Array = np.ndarray[Any, np.dtype[np.float32]]

WIDTHS = (64, 512, 256, 10)
BATCH, LR, SEED = 32, 1e-3, 0
EARLY = 100  # steps


@dataclass
class Run:
    """The results of one training run."""

    name: str
    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds in the optimizer, per step
    seconds: float = 0.0  # of all epochs
    accuracy: float = 0.0


def data() -> tuple[Array, np.ndarray[Any, Any], Array, np.ndarray[Any, Any]]:
    """Pixels in [0, 1]; 80% of the rows for training, 20% for testing."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.2, random_state=SEED, stratify=y
    )
    return x_train, y_train, x_test, y_test


def batches(rows: int, epoch: int) -> Iterator[np.ndarray[Any, Any]]:
    """The same shuffled batches for every run."""
    order = np.random.default_rng((SEED, epoch)).permutation(rows)
    return (order[i : i + BATCH] for i in range(0, rows, BATCH))


def network() -> nn.Sequential:
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_torch(makers: dict[str, Callable[[Any], torch.optim.Optimizer]], epochs: int) -> list[Run]:
    """Trains one network per optimizer, one epoch each in turn."""
    x_train, y_train, x_test, y_test = map(torch.from_numpy, data())
    models = [network() for _ in makers]
    optimizers = [make(model.parameters()) for make, model in zip(makers.values(), models, strict=True)]
    runs = [Run(name) for name in makers]
    loss_of = nn.CrossEntropyLoss()

    def one_epoch(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        start = time.perf_counter()
        for rows in batches(len(x_train), epoch):
            optimizer.zero_grad()
            loss = loss_of(model(x_train[rows]), y_train[rows])
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            run.steps.append(time.perf_counter() - before)
            run.losses.append(loss.item())
        run.seconds += time.perf_counter() - start

    for epoch in range(epochs):
        turns = list(zip(runs, models, optimizers, strict=True))
        for run, model, optimizer in turns if epoch % 2 else reversed(turns):
            one_epoch(run, model, optimizer, epoch)
    for run, model in zip(runs, models, strict=True):
        with torch.no_grad():
            run.accuracy = (model(x_test).argmax(1) == y_test).double().mean().item()
    return runs


Step = Callable[[], None]


def train_numpy(makers: dict[str, Callable[[list[Array], list[Array]], Step]], epochs: int) -> list[Run]:
    """Trains the same network with hand-written passes; a maker returns the step for (params, grads)."""
    x_train, y_train, x_test, y_test = data()
    last = len(WIDTHS) - 2

    def forward(params: list[Array], x: Array) -> list[Array]:
        outputs = [x]
        for k in range(last + 1):
            x = x @ params[2 * k].T + params[2 * k + 1]
            outputs.append(x if k == last else np.maximum(x, 0))
            x = outputs[-1]
        return outputs

    def one_epoch(run: Run, params: list[Array], grads: list[Array], step: Step, epoch: int) -> None:
        start = time.perf_counter()
        for rows in batches(len(x_train), epoch):
            outputs, y = forward(params, x_train[rows]), y_train[rows]
            logits = outputs[-1] - outputs[-1].max(1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            run.losses.append(float(-log_p[np.arange(len(y)), y].mean()))
            delta = np.exp(log_p)
            delta[np.arange(len(y)), y] -= 1
            delta /= np.float32(len(y))
            for k in range(last, -1, -1):
                np.matmul(delta.T, outputs[k], out=grads[2 * k])
                delta.sum(0, out=grads[2 * k + 1])
                if k:
                    delta = (delta @ params[2 * k]) * (outputs[k] > 0)
            before = time.perf_counter()
            step()
            run.steps.append(time.perf_counter() - before)
        run.seconds += time.perf_counter() - start

    turns = []
    for name, make in makers.items():
        params = [p.detach().numpy().copy() for p in network().parameters()]  # the same initial weights as above
        grads = [np.empty_like(p) for p in params]
        turns.append((Run(name), params, grads, make(params, grads)))
    for epoch in range(epochs):
        for run, params, grads, step in turns if epoch % 2 else reversed(turns):
            one_epoch(run, params, grads, step, epoch)
    for run, params, *_ in turns:
        run.accuracy = float((forward(params, x_test)[-1].argmax(1) == y_test).mean())
    return [run for run, *_ in turns]


def fused_step(params: list[Array], grads: list[Array]) -> Step:
    optimizer = fusedopt.Adam(params, lr=LR)
    return lambda: optimizer.step(grads)


def plain_step(params: list[Array], grads: list[Array]) -> Step:
    return numpy_best.Best("Adam", params, grads, None).step


def compare(runs: list[Run], epochs: int) -> None:
    """Prints losses by epoch, accuracy and times of all runs; the last run is fusedopt's."""
    *others, ours = runs
    per_epoch = len(ours.losses) // epochs
    print(f"{'epoch':>5}  " + "  ".join(f"{run.name:>30}" for run in runs))
    for epoch in sorted({0, 1, 2, *range(4, epochs, 5), epochs - 1} & set(range(epochs))):
        means = [statistics.fmean(run.losses[epoch * per_epoch : (epoch + 1) * per_epoch]) for run in runs]
        print(f"{epoch + 1:5}  " + "  ".join(f"{mean:30.7f}" for mean in means))
    rows: dict[str, Callable[[Run], str]] = {
        "test": lambda run: f"{run.accuracy:.2%} correct",
        "step": lambda run: f"{statistics.median(run.steps) * 1e6:.0f} us",
        "run": lambda run: f"{run.seconds:.2f} s",
    }
    for label, show in rows.items():
        print(f"{label:>5}  " + "  ".join(f"{show(run):>30}" for run in runs))
    for run in others:
        gaps = [abs(a - b) for a, b in zip(run.losses, ours.losses, strict=True)]
        step = statistics.median(run.steps) / statistics.median(ours.steps)
        print(
            f"{ours.name} against {run.name}:\n"
            f"    losses differ by at most {max(gaps[:EARLY]):.1e} in the first {EARLY} steps, {max(gaps):.1e} in all\n"
            f"    time: step {step:.2f}x, whole run {run.seconds / ours.seconds:.2f}x (above 1: fusedopt is faster)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the table and plots")
    args = parser.parse_args()
    epochs = 4 if args.quick else 20
    args.output.mkdir(parents=True, exist_ok=True)
    fusedopt.show_config()

    widths = "-".join(map(str, WIDTHS))
    print(f"\nDigits in PyTorch: {widths}, batches of {BATCH}, {epochs} epochs, the same seed for all\n")
    train_torch({"warm-up": torch.optim.Adam}, 1)
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torch.optim.Adam": lambda params: torch.optim.Adam(params, lr=LR),
        "torch.optim.Adam(fused=True)": lambda params: torch.optim.Adam(params, lr=LR, fused=True),
        "fusedopt.torch.Adam": lambda params: fusedopt.torch.Adam(params, lr=LR),
    }
    runs = train_torch(makers, epochs)
    compare(runs, epochs)

    print("\nThe same network in NumPy alone\n")
    in_numpy = train_numpy({"Adam in plain NumPy, in place": plain_step, "fusedopt.Adam": fused_step}, epochs)
    compare(in_numpy, epochs)
    losses({run.name: run.losses for run in [runs[-1], runs[0], in_numpy[-1]]}, args.output / "losses.png")

    print("\nEvery rule against PyTorch's own\n")
    results = run_suites(["short"], LARGE // 4 if args.quick else LARGE, seconds=0.2 if args.quick else None)
    text = render(results)
    print(text)
    (args.output / "bench.txt").write_text(text + "\n")
    save(results, args.output / "bench.json")
    save_all(results, args.output)
    print(f"\nIn {args.output}: " + ", ".join(sorted(path.name for path in args.output.iterdir())))


if __name__ == "__main__":
    main()
