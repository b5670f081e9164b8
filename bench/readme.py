"""Writes measured ratios into README.md, bench/README.md and docs/own-rule.md, README's table of tested versions, and
draws docs/speedup.png, from the committed results.

``python bench/readme.py [bench/results]`` reads readme.json, bytes.json and own.json, which ``fusedopt bench --json``
wrote, and versions.json of ``make matrix``, rewrites the text between two marks of a page, and draws the
picture. ``--check`` writes nothing and exits 1 if a page or the picture is out of date. Only ratios, GB/s and shares
are shown, never a time alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedopt.bench import Result
from fusedopt.bench.cases import BEST_NUMPY, BUILT_IN, CEILING, COMPILED, FUSED_F32, NUMPY, REFERENCE, Case
from fusedopt.bench.contenders import OURS
from fusedopt.bench.timing import Times

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "speedup.png"
TITLES = {
    "rules": "Every rule, float32, one large tensor",
    "formats": "Adam in every format",
    "shapes": "Adam on the shapes of networks",
    "numpy": "NumPy functions against in-place NumPy",
    "training": "Whole iterations: forward, backward, step",
    "estimators": "Estimators and losses for NumPy",
    "sparse": "Sparse gradients",
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


def _one(suite: str, case: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["suite"] == suite and row["case"] == case)


# A row of README's table: the words, and which results it summarises.
GAINS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("One large tensor: Adam, 32M parameters", _one("rules", "Adam")),
    ("Many small tensors: Adam, 1,000 tensors of 64", _one("bars", "Adam, 1,000 of 64, gradients replaced")),
    (
        "Gradient clipping: Adam, GPT-2 small; torch: `clip_grad_norm_`, then the step",
        _one("bars", "Adam + clipping, GPT-2 small, gradients replaced"),
    ),
    ("16-bit: Adam, everything in bfloat16, 32M", _one("bars", "Adam bf16, 32M")),
    (
        '8-bit: AdamW, bfloat16 weights, `master="split8"`, int8 states, 32M; torch: float32',
        _one("bytes", "AdamW bf16 + split8 + int8 states, 32M"),
    ),
    (
        "Rules that torch does not fuse: RMSprop, NAdam, RAdam, Adamax, Adadelta, 32M",
        lambda row: row["suite"] == "rules" and "default" in row["contenders"] and "fused" not in row["contenders"],
    ),
    (
        "Whole training iterations: two MLPs, a convnet, a transformer",
        lambda row: bool(row["suite"] == "training"),
    ),
    ("NumPy: `fusedopt.adam_`, 32M", _one("bars", "NumPy Adam f32, 32M")),
)
# Its columns: the heading, and the contenders that count; the fastest of them is the baseline.
BASELINES = {
    "`torch.optim`": ("default",),
    "`torch.optim`, `fused=True`": ("fused", FUSED_F32),
    "in-place NumPy": NUMPY,
}


def grid(lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
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


def _load(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return data


def _provenance(machine: dict[str, Any]) -> str:
    packages = [f"{k} {v}" for k, v in machine["versions"].items() if k in ("fusedopt", "torch", "numpy")]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} threads, {machine['system']}; "
        f"{', '.join(packages)}, Python {machine['python']}; {machine['date'][:10]}."
    )


def speedup(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The speedup over the fastest of ``names``, or the range of speedups of several results."""
    ratios = [[row["contenders"][n]["ratio_to_ours"] for n in names if n in row["contenders"]] for row in rows]
    best = sorted(min(of_row) for of_row in ratios if of_row)
    written = [f"{x:.2f}x" if x < 1.95 else f"{x:.1f}x" for x in best]
    return " to ".join(dict.fromkeys([written[0], written[-1]])) if written else ""


def gains(folder: Path) -> str:
    """README's table: how many times faster than each baseline, by kind of work."""
    readme, bytes_ = _load(folder, "readme"), _load(folder, "bytes")
    lines = [("Speedup over", *BASELINES)]
    for words, chosen in GAINS:
        rows = [row for row in (*readme["results"], *bytes_["results"]) if chosen(row)]
        if not rows:
            raise LookupError(f"no results for {words!r}")
        lines.append((words, *(speedup(rows, names) for names in BASELINES.values())))
    notes = (
        "Ratios of medians, measured turn by turn in one run; float32 unless stated. "
        "An empty cell was not measured, or torch has no such step."
    )
    return f"\n{grid(lines)}\n\n{notes} {_provenance(readme['machine'])}\n\n"


def section(folder: Path) -> str:
    """The tables of bench/README.md: every suite in readme.json."""
    data = _load(folder, "readme")
    parts = [
        f"{_provenance(data['machine'])} "
        "Ratios of medians, measured turn by turn in one run; above 1, fusedopt is faster."
    ]
    order = list(TITLES)
    for suite, rows in groupby(
        sorted(data["results"], key=lambda r: order.index(r["suite"])), key=lambda r: r["suite"]
    ):
        table = promises if suite == "bars" else ratios
        parts.append(f"**{TITLES[suite]}**\n\n{table(list(rows))}")
    return "\n" + "\n\n".join(parts) + "\n\n"


def own(folder: Path) -> str:
    """The tables of docs/own-rule.md: rules written in Python against the same rules compiled, by form; the zoo."""
    data = _load(folder, "own")
    of_rule: dict[str, dict[str, str]] = {}
    zoo = [("`fusedopt.zoo`, float32", "share of `mul_`", "other implementation / ours")]
    for row in data["results"]:
        contenders = row["contenders"]
        if row["case"].startswith("zoo "):
            other = contenders.get(REFERENCE, {}).get("ratio_to_ours")
            zoo.append((row["rule"], ratio(row["share_of_ceiling"]), ratio(other)))
        elif named := re.fullmatch(r"own (.+?) ((?:f32|bf16)\b.*), \S+", row["case"]):
            of_rule.setdefault(named[1], {})[named[2]] = ratio(contenders[BUILT_IN]["ratio_to_ours"])
    forms = list(dict.fromkeys(form for cells in of_rule.values() for form in cells))
    built_in = [("built-in / ours", *forms)]
    built_in += [(name, *(cells.get(form, "-") for form in forms)) for name, cells in of_rule.items()]
    return f"\n{grid(built_in)}\n\n{grid(zoo)}\n\n{_provenance(data['machine'])}\n\n"


def tested(folder: Path) -> str:
    """README's table of the environments in which the tests have run."""
    packages = ("python", "numpy", "torch", "scikit-learn")
    lines = [("tests", "on", *("Python", "NumPy", "torch", "scikit-learn"), "passed", "failed", "skipped", "date")]
    rows = json.loads((folder / "versions.json").read_text())
    for row in rows:
        shown = (row.get(package, "").partition("+")[0] for package in packages)
        counts = (f"{row[kind]:,}" for kind in ("passed", "failed", "skipped"))
        lines.append((row["tests"], row["system"], *shown, *counts, row["date"]))
    notes = "".join(f"Python {row['python']}: {row['note']}\n\n" for row in rows if "note" in row)
    return f"\n{grid(lines)}\n\n{notes}"


# The text between two marks of a page, and what writes it.
SECTIONS: tuple[tuple[Path, str, Callable[[Path], str]], ...] = (
    (ROOT / "README.md", "bench", gains),
    (ROOT / "README.md", "versions", tested),
    (ROOT / "bench" / "README.md", "bench", section),
    (ROOT / "docs" / "own-rule.md", "own", own),
)


def between(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {mark}:begin -->\n).*(?=<!-- {mark}:end -->)", re.DOTALL)


def _digest(folder: Path) -> str:
    return "SHA-256 of readme.json: " + hashlib.sha256((folder / "readme.json").read_bytes()).hexdigest()


def draw(folder: Path) -> None:
    """Draws the speedup of every rule over torch's default and fused steps; the file names the results it shows."""
    from fusedopt.plots import speedups

    results = []
    for row in _load(folder, "readme")["results"]:
        if row["suite"] == "rules":
            shown = {n: c for n, c in row["contenders"].items() if n in (OURS, "default", "fused")}
            times = {n: Times(1, [c["ratio_to_ours"]]) for n, c in shown.items()}
            results.append(Result("rules", Case(row["case"], ()), times))
    figure = speedups(results, title="One step on 32M float32 parameters, against PyTorch")
    figure.savefig(PICTURE, dpi=110, facecolor="white", metadata={"Description": _digest(folder)})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="where the results are")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a page or the picture would change"
    )
    args = parser.parse_args()
    changed = []
    for page, mark, write in SECTIONS:
        old, text = page.read_text(), write(args.folder)
        new, found = between(mark).subn(lambda _, text=text: text, old)  # type: ignore[misc]
        if found != 1:
            print(f"{page}: expected one pair of {mark} marks", file=sys.stderr)
            return 2
        if new != old:
            changed.append(page)
            if not args.check:
                page.write_text(new)
    if not PICTURE.exists() or _digest(args.folder).encode() not in PICTURE.read_bytes():
        changed.append(PICTURE)
        if not args.check:
            draw(args.folder)
    if args.check:
        print("\n".join(f"{path}: out of date" for path in changed) or "up to date")
        return bool(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
