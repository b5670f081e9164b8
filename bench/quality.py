"""Training loss with the forms that take fewer bytes: ``python bench/quality.py`` (about 5 minutes on two cores).

Two tasks on real data: digits with an MLP, and a character-level transformer on the sources of Python's standard
library. Data order and initial weights are the same for every form; several seeds. The loss is that of the final
weights in float32, on the training set of digits or on fixed batches of held-out text. Plain bfloat16, rounded to
nearest, is included to show that it stalls. Writes bench/results/quality.json and quality.md; ``--check`` compares the
two.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import fusedopt
import fusedopt.torch as optim

RESULTS = Path(__file__).parent / "results" / "quality.json"

# name -> dtype of the model, additional options of AdamW; the first is the baseline
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32 + int8 states": (torch.float32, {"state_dtype": "int8"}),
    "bf16 + float32 master": (torch.bfloat16, {"master": "float32", "state_dtype": "float32"}),
    "bf16 + split16 + bf16 states": (torch.bfloat16, {"master": "split16", "state_dtype": "bfloat16"}),
    "bf16 + split8 + int8 states": (torch.bfloat16, {"master": "split8", "state_dtype": "int8"}),
    "bf16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "bf16 plain": (torch.bfloat16, {}),
}


def digits(seed: int, dtype: torch.dtype, make: Callable[[Any, int], Any], steps: int) -> float:
    """An MLP 64-128-128-10 on all 1,797 digits, batches of 64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(128, 10))
    model = model.to(dtype)
    opt, schedule = make(model.parameters(), steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=order)
        opt.zero_grad()
        loss: Any = F.cross_entropy(model(x[chosen].to(dtype)).float(), y[chosen], label_smoothing=0.1)
        loss.backward()
        opt.step()
        schedule.step()
    model.float()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y, label_smoothing=0.1))


class Transformer(torch.nn.Module):
    """Next-character prediction: 3 causal layers of width 128, 64 characters of context."""

    def __init__(self, symbols: int, width: int = 128, layers: int = 3, context: int = 64) -> None:
        super().__init__()
        self.symbol = torch.nn.Embedding(symbols, width)
        self.place = torch.nn.Parameter(0.02 * torch.randn(context, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, symbols)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(self.symbol(x) + self.place, mask=self.mask.to(self.place.dtype), is_causal=True)
        logits: torch.Tensor = self.head(h)
        return logits


def text() -> tuple[torch.Tensor, int]:
    """Sources of the standard library as symbols; all non-ASCII characters are one symbol."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = "\n".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))[:80])
    codes = np.frombuffer(source.encode("ascii", "replace"), np.uint8)
    known, symbols = np.unique(codes, return_inverse=True)
    return torch.from_numpy(symbols.astype(np.int64)), len(known)


def language(seed: int, dtype: torch.dtype, make: Callable[[Any, int], Any], steps: int) -> float:
    """The transformer on batches of 16 x 64 characters; the last tenth of the text is held out."""
    symbols, n = text()
    train, test = symbols[: len(symbols) * 9 // 10], symbols[len(symbols) * 9 // 10 :]
    torch.manual_seed(seed)
    model = Transformer(n).to(dtype)
    opt, schedule = make(model.parameters(), steps)
    order = torch.Generator().manual_seed(seed)

    def batch(source: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(source) - 65, (count,), generator=order)
        rows = source[starts[:, None] + torch.arange(65)]
        return rows[:, :-1], rows[:, 1:]

    def loss(x: torch.Tensor, y: torch.Tensor) -> Any:
        return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())

    for _ in range(steps):
        opt.zero_grad()
        loss(*batch(train, 16)).backward()
        opt.step()
        schedule.step()
    model.float()
    order.manual_seed(12345)
    with torch.no_grad():
        return float(np.mean([float(loss(*batch(test, 64))) for _ in range(16)]))


TASKS: dict[str, tuple[Callable[..., float], int, float]] = {
    "digits": (digits, 2000, 1e-3),
    "characters": (language, 400, 2e-3),
}


def run(tasks: list[str], seeds: int, share: float) -> dict[str, Any]:
    """The loss of every task, form and seed."""
    results: dict[str, Any] = {}
    for task in tasks:
        train, steps, lr = TASKS[task]
        steps = max(2, int(steps * share))
        for name, (dtype, options) in FORMS.items():

            def make(params: Any, n: int, options: dict[str, Any] = options, lr: float = lr) -> Any:
                opt = optim.AdamW(params, lr=lr, weight_decay=0.01, **options)
                return opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, n)

            start = time.perf_counter()
            losses = [train(seed, dtype, make, steps) for seed in range(seeds)]
            results.setdefault(task, {"steps": steps, "loss": {}})["loss"][name] = losses
            print(f"{task}: {name}: {losses} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    versions = {"fusedopt": fusedopt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"seeds": seeds, "versions": versions, "tasks": results}


def table(data: dict[str, Any]) -> str:
    """Markdown table: mean loss over the seeds, and its difference from float32, also per seed."""
    lines = [f"AdamW, cosine schedule, {data['seeds']} seeds; the last loss, in float32 arithmetic.", ""]
    for task, result in data["tasks"].items():
        lines += [f"**{task}**, {result['steps']} steps", "", "| form | loss | against float32, mean | each seed |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        base = np.array(result["loss"]["float32"])
        for name, losses in result["loss"].items():
            change = 100 * (np.array(losses) / base - 1)
            each = ", ".join(f"{c:+.2f}%" for c in change)
            mean = 100 * (np.mean(losses) / base.mean() - 1)
            lines.append(f"| {name} | {np.mean(losses):.4f} | {mean:+.2f}% | {each} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the steps, for a short run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="exit 1 if the table differs from the results")
    args = parser.parse_args()
    page = args.output.with_suffix(".md")
    if args.check:
        same = page.read_text() == table(json.loads(args.output.read_text()))
        print("up to date" if same else f"{page} is not the table of {args.output}", file=sys.stderr)
        return not same
    data = run(args.task, args.seeds, args.share)
    args.output.write_text(json.dumps(data, indent=1) + "\n")
    page.write_text(table(data))
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
