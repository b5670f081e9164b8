"""Puts measured ratios into README.md, between its two bench marks, from what ``fusedopt bench --json`` wrote.

``python bench/readme.py [bench/results/readme.json]`` rewrites the section; ``--check`` exits 1 where it would change.
Only ratios, GB/s and shares are shown, never a time alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedopt.bench.cases import BEST_NUMPY, CEILING, COMPILED
from fusedopt.bench.contenders import OURS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "readme.json"
SECTION = re.compile(r"(?<=<!-- bench:begin -->\n).*(?=<!-- bench:end -->)", re.DOTALL)
TITLES = {
    "rules": "Every rule, float32, one large tensor",
    "formats": "Adam in every format",
    "shapes": "Adam on the shapes of networks",
    "numpy": "NumPy functions against in-place NumPy",
    "training": "Whole iterations: forward, backward, step",
    "estimators": "Estimators and losses for NumPy",
    "denormals": "Denormal moments",
    "short": "Every rule, small",
    "bars": "The bars the project sets itself",
}
NAMES = {
    "default": "torch",
    "foreach": "torch foreach",
    "fused": "torch fused",
    COMPILED: "torch.compile",
    BEST_NUMPY: "best NumPy",
}
Row = dict[str, Any]


def grid(lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; first column to the left, the others to the right."""
    header, *rest = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rest))


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def promises(rows: Sequence[Row]) -> str:
    lines = [("case", "against", "at least", "measured")]
    for row in rows:
        for bar in row["bars"]:
            against = "share of `mul_`" if bar["against"] == CEILING else NAMES.get(bar["against"], bar["against"])
            measured = ratio(bar["measured"]) + ("" if bar["ok"] else " (missed)")
            lines.append((row["case"], against, ratio(bar["least"]), measured))
    return grid(lines)


def ratios(rows: Sequence[Row]) -> str:
    names = [n for n in dict.fromkeys(n for row in rows for n in row["contenders"]) if n not in (OURS, CEILING)]
    with_ceiling = any(row["share_of_ceiling"] is not None for row in rows)
    lines = [["case", *(f"{NAMES.get(n, n)} / ours" for n in names), *(["GB/s", "of `mul_`"] if with_ceiling else [])]]
    for row in rows:
        cells = [ratio(row["contenders"].get(n, {}).get("ratio_to_ours")) for n in names]
        if with_ceiling:
            share = row["share_of_ceiling"]
            cells += ["-", "-"] if share is None else [f"{row['gb_per_s']:.1f}", f"{share:.0%}"]
        lines.append([row["case"], *cells])
    return grid(lines)


def section(data: dict[str, Any]) -> str:
    """The text between the marks."""
    machine, results = data["machine"], data["results"]
    packages = [f"{k} {v}" for k, v in machine["versions"].items() if k in ("fusedopt", "torch", "numpy")]
    parts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} threads, {machine['system']}; "
        f"{', '.join(packages)}, Python {machine['python']}; {machine['date'][:10]}. "
        "Ratios of medians, measured turn by turn in one run; above 1 ours is faster."
    ]
    order = list(TITLES)
    for suite, rows in groupby(sorted(results, key=lambda r: order.index(r["suite"])), key=lambda r: r["suite"]):
        table = promises if suite == "bars" else ratios
        parts.append(f"**{TITLES[suite]}**\n\n{table(list(rows))}")
    return "\n" + "\n\n".join(parts) + "\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the section would change")
    args = parser.parse_args()
    old = README.read_text()
    text = section(json.loads(args.json.read_text()))
    new, found = SECTION.subn(lambda _: text, old)
    if found != 1:
        print("README.md: expected one pair of bench marks", file=sys.stderr)
        return 2
    if args.check:
        print("README.md: " + ("out of date" if new != old else "up to date"))
        return new != old
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
