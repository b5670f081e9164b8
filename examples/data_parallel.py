"""Trains one network in two processes, each on half of the data, with gradients averaged over gloo.

The script launches itself with torchrun; the training code is the same as for one process. Run:
``python examples/data_parallel.py [--quick]`` or ``torchrun --nproc_per_node=2 examples/data_parallel.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import accuracy_score  # type: ignore[import-untyped, unused-ignore]
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fusedopt import plots
from fusedopt.schedules import Cosine
from fusedopt.torch import AdamW, fit

SEED, BATCH = 0, 16


def train(epochs: int, output: Path) -> None:
    """Runs in each process; only rank 0 prints."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    torch.manual_seed(SEED)
    training, test = random_split(data, [0.8, 0.2])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = fit(
        model,
        DataLoader(training, BATCH, shuffle=True),
        DataLoader(test, 100),
        loss=nn.CrossEntropyLoss(),
        optimizer=AdamW(model.parameters()),
        schedule=Cosine(5e-3, epochs * len(training) // (2 * BATCH)),
        metrics={"accuracy": lambda scores, truth: accuracy_score(truth, scores.argmax(1))},
        epochs=epochs,
    )
    if os.environ["RANK"] == "0":
        history = trainer.history
        print(
            f"{os.environ['WORLD_SIZE']} processes, {trainer.step} steps of 2 x {BATCH} rows: "
            f"loss {history['loss'][-1]:.4f}, {history['val_accuracy'][-1]:.2%} of the test digits correct"
        )
        plots.history(history, output / "data-parallel.png", title="Two processes, one network")
    # Both processes must hold the same weights.
    total = torch.tensor(float(np.sum([p.detach().double().sum() for p in model.parameters()])))
    totals = [torch.zeros(()) for _ in range(2)]
    torch.distributed.all_gather(totals, total)
    assert totals[0] == totals[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        train(3 if args.quick else 20, args.output)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *sys.argv]
    subprocess.run(launch, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


if __name__ == "__main__":
    main()
