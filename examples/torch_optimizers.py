"""A two-layer torch network, trained with SGD and Adam. Moving from torch.optim to fusedopt changed one import.

Run: ``python examples/torch_optimizers.py [--quick]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import make_moons  # type: ignore[import-untyped, unused-ignore]
from torch import nn

import fusedopt.torch as optim  # was: import torch.optim as optim
from fusedopt import plots

SEED = 0


def train(make: Callable[[Any], torch.optim.Optimizer], epochs: int) -> tuple[list[float], float]:
    """The loss by epoch, and the test accuracy."""
    points, moons = make_moons(1200, noise=0.2, random_state=SEED)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(moons)
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer, loss_of, losses = make(model.parameters()), nn.CrossEntropyLoss(), []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(1000).view(-1, 50):
            optimizer.zero_grad()
            loss = loss_of(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / 1000)
    with torch.no_grad():
        return losses, (model(x[1000:]).argmax(1) == y[1000:]).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = 5 if args.quick else 60

    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD, lr 0.1": lambda params: optim.SGD(params, lr=0.1),
        "SGD with momentum, lr 0.1": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
        "Adam, lr 0.01": lambda params: optim.Adam(params, lr=0.01),
    }
    histories = {}
    for name, make in makers.items():
        losses, accuracy = train(make, epochs)
        histories[name] = {"loss": losses}
        print(f"{name:>26}: loss {losses[-1]:.4f} after {epochs} epochs, {accuracy:.1%} of the test points correct")
    plots.compare(histories, "loss", args.output / "torch-optimizers.png", title="Two moons, a network of two layers")


if __name__ == "__main__":
    main()
