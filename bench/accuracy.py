"""Test accuracy of the networks of ``fusedopt bench --suite estimators``: the same network, rows and epochs with
fusedopt's MLPClassifier, scikit-learn's, and a torch loop with fused Adam, over several seeds.

``python bench/accuracy.py`` prints a table and writes it to bench/results/accuracy.md; takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from fusedopt.bench.estimators import CHUNK, OURS, ROWS, SKLEARN, TORCH, network

RESULTS = Path(__file__).parent / "results" / "accuracy.md"


def accuracy(batch: int, name: str, seed: int, epochs: int) -> float:
    """Test accuracy in percent."""
    contender = network(batch, name, seed)
    for _ in range(epochs * ROWS // CHUNK):
        contender.step()
    assert contender.note
    return float(contender.note().split()[-1].rstrip("%"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    lines = [
        f"MLPClassifier 784-128-10, Adam, {ROWS:,} rows, {args.epochs} epochs: test accuracy in percent, mean of "
        f"{args.seeds} seeds and the standard error of the mean. Written by bench/accuracy.py.",
        "",
        "| batch | " + " | ".join((OURS, SKLEARN, TORCH)) + " |",
        "|---:|---:|---:|---:|",
    ]
    for batch in (32, 128):
        cells = []
        for name in (OURS, SKLEARN, TORCH):
            found = [accuracy(batch, name, seed, args.epochs) for seed in range(args.seeds)]
            error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
            cells.append(f"{statistics.mean(found):.2f} ± {error:.2f}")
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
