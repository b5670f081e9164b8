"""Lists which loops of cpp/cpu/sweep.h, by rule and formats, and of cpp/cpu/interpret.cpp, by instruction, the compiler
vectorises: ``make vectorized``.

Compiles for one instruction set with the flags of CMakeLists.txt and reads GCC's vectoriser dump. Exits 1 where a loop
is missed. Needs g++ (``CXX``), or the cross compiler aarch64-linux-gnu-g++ for ``--target aarch64``; clang has no such
dump.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CPP = Path(__file__).parents[1] / "cpp"
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math"
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}


def dump(isa: str, unit: str, target: str) -> str:
    """GCC's vectoriser dump of a unit in cpp/cpu."""
    compiler = [f"{target}-linux-gnu-g++"] if target else shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump"
        flags = shlex.split(
            f"{FLAGS} {ISAS[isa]} -I{CPP} -DFUSEDOPT_ISA={isa} -DFUSEDOPT_VERSION=0 -fdump-tree-vect-optimized={path}"
        )
        subprocess.run([*compiler, *flags, "-c", str(CPP / "cpu" / unit), "-o", os.devnull], check=True)
        return path.read_text()


def required() -> dict[str, set[int]]:
    """Lines of the loops over a block in sweep.h, by the function they are in."""
    lines: dict[str, set[int]] = {}
    function = ""
    for number, line in enumerate((CPP / "cpu" / "sweep.h").read_text().splitlines(), 1):
        if m := re.match(r"  (?:static )?FUSEDOPT_\w+ (?:static )?(?:void|bool) (\w+)\(", line):
            function = m[1]
        if re.search(r"for \(int i = 0; (quantised && )?i < kBlock", line) or (
            "for (int i = 0; i < U::numbers;" in line and function == "draw"
        ):
            lines.setdefault(function, set()).add(number)
    return lines


def needed(formats: str, lines: dict[str, set[int]]) -> set[int]:
    """The loops that this combination has, without copies of float32, which GCC compiles to calls."""
    decode, gradient, rule, encode, shift = sorted(lines["block"])
    (codes_in, in_), (codes_out, out) = sorted(lines["load"]), sorted(lines["store"])
    some = {gradient, rule} | (set() if formats.startswith("Plain<F32>") else {decode, encode})
    if formats.endswith("Int8"):
        return some | {codes_in, codes_out, shift} | lines["measure"] | lines["draw"]
    some |= set() if formats.endswith(" F32") else {in_, out}
    return some | (lines["draw"] if "Noisy" in formats else set())


def loops(text: str) -> Iterator[tuple[str, int]]:
    """(rule and formats, bytes of a vector or 0) of every instance of the loops in sweep.h."""
    lines = required()
    found: dict[str, int] = {}
    for part in text.split("\n;; Function ")[1:]:
        head, _, body = part.partition("\n")
        head = head.partition(" (")[0].replace("fusedopt::{anonymous}::", "")
        sizes: dict[int, int] = {}  # by line; a loop's remainder has shorter vectors
        for line, bytes_ in re.findall(r"sweep\.h:(\d+):.*optimized: loop vectorized using (\d+) byte vectors", body):
            sizes[int(line)] = max(int(bytes_), sizes.get(int(line), 0))
        size = max(sizes.values(), default=0)
        if m := re.match(r"(Sweep|Blocks)<(\w+)<\w+>, (.*)>::(sweep|flat)(\.|$)", head):
            name = f"{m[2]:24} {m[3]}"
            if m[1] == "Blocks":
                found[name] = size if needed(m[3], lines) <= sizes.keys() else 0
            elif m[4] == "flat" or size:
                found[name] = max(size, found.get(name, 0))
            else:
                found.setdefault(name, 0)  # its loop may be in a function of its own, flat or Blocks
        elif m := re.match(r"square_sum<(\w+)>", head):
            found[f"square_sum {m[1]}"] = size
    yield from found.items()


def instructions(text: str) -> Iterator[tuple[str, int]]:
    """(instruction, bytes of a vector or 0) of every loop of the interpreter; one that has two is missed unless both
    are vectorised."""
    for part in text.split("\n;; Function ")[1:]:
        head, _, body = part.partition("\n")
        if m := re.match(r"fusedopt::\{anonymous\}::(\w+)Loop<(\d+), (\w+)>::run", head):
            sizes = re.findall(r"interpret\.cpp:(\d+):.*optimized: loop vectorized using (\d+) byte vectors", body)
            wanted = 2 if (m[1], m[2]) == ("Lerp", "1") else 1
            complete = len({line for line, _ in sizes}) >= wanted
            yield f"{m[1]} {m[2]} {m[3]}", max(int(size) for _, size in sizes) if complete else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=ISAS, default="avx512")
    parser.add_argument("--target", choices=["aarch64"], help="cross-compile the baseline loop")
    args = parser.parse_args()
    isa, name = ("baseline", f"{args.target} (NEON)") if args.target else (args.isa, args.isa)
    units = {
        "sweep.h": list(loops(dump(isa, "cpu.cpp", args.target))),
        "interpret.cpp": list(instructions(dump(isa, "interpret.cpp", args.target))),
    }
    for unit, found in units.items():
        if not found:
            print(f"the dump names no loop of {unit}: is the compiler GCC?", file=sys.stderr)
            return 2
        missed = [loop for loop, size in found if not size]
        widths = ", ".join(f"{n} with {size} bytes" for size, n in sorted(Counter(s for _, s in found if s).items()))
        print(f"{name}: {len(found) - len(missed)} of {len(found)} loops of {unit} vectorised ({widths or 'none'})")
        print("".join(f"missed: {loop}\n" for loop in missed), end="")
    return not all(size for found in units.values() for _, size in found)


if __name__ == "__main__":
    sys.exit(main())
