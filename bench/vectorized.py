"""Lists which loops of cpp/cpu/sweep.h, by rule and formats, and of cpp/cpu/interpret.cpp, by instruction, the compiler
vectorises: ``make vectorized``.

Compiles for one instruction set with the flags of CMakeLists.txt and reads GCC's vectoriser dump or clang's
optimization record. Exits 1 where a loop is missed. ``CXX`` names the compiler (g++); ``--target aarch64`` takes the
cross compiler aarch64-linux-gnu-g++ unless CXX is given.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CPP = Path(__file__).parents[1] / "cpp"
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math"
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}


Place = tuple[str, int]
"""File and line."""


class Function(NamedTuple):
    """A function, its vectorised loops (the size of a vector by file and line, in bytes for GCC and in elements for
    clang), and where clang has unrolled a short loop completely and made vectors of the straight code."""

    name: str
    sizes: dict[Place, int]
    straight: set[Place]


def compiler(target: str) -> list[str]:
    return shlex.split(os.environ.get("CXX") or (f"{target}-linux-gnu-g++" if target else "g++"))


def vectorised(isa: str, unit: str, command: list[str], clang: bool) -> list[Function]:
    """Every function of a unit in cpp/cpu that has a loop, and its vectorised loops. A function that is compiled as
    several clones is there as often."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record"
        flags = shlex.split(f"{FLAGS} {ISAS[isa]} -I{CPP} -DFUSEDOPT_ISA={isa} -DFUSEDOPT_VERSION=0")
        if clang:
            flags += ["-fsave-optimization-record", "-foptimization-record-passes=(loop|slp)-vectorize"]
            flags += [f"-foptimization-record-file={path}"]
        else:
            flags += [f"-fdump-tree-vect-optimized={path}"]
        subprocess.run([*command, *flags, "-c", str(CPP / "cpu" / unit), "-o", f"{folder}/object"], check=True)
        return (of_record if clang else of_dump)(path.read_text())


def of_dump(text: str) -> list[Function]:
    """GCC's dump; a loop's remainder has shorter vectors."""
    found = []
    for part in text.split("\n;; Function ")[1:]:
        head, _, body = part.partition("\n")
        function = Function(head.partition(" (")[0].replace("fusedopt::{anonymous}::", ""), {}, set())
        for file, line, size in re.findall(r"(\w+\.\w+):(\d+):.*optimized: loop vectorized using (\d+) byte vec", body):
            place = file, int(line)
            function.sizes[place] = max(int(size), function.sizes.get(place, 0))
        found.append(function)
    return found


def of_record(text: str) -> list[Function]:
    """clang's record: one entry for each loop that is vectorised or missed, with the mangled name of its function."""
    of: dict[str, Function] = {}
    for entry in text.split("--- !")[1:]:
        name = re.search(r"^Function: +'?([^\s']+)", entry, re.MULTILINE)
        at = re.search(r"File: '?([^',]+)'?, Line: (\d+)", entry)
        if not name:
            continue
        function = of.setdefault(name[1], Function(name[1], {}, set()))
        if entry.startswith("Passed") and at:
            place = Path(at[1]).name, int(at[2])
            if size := re.search(r"VectorizationFactor: '(\d+)'", entry):
                function.sizes[place] = int(size[1])
            elif re.search(r"Name: +(StoresVectorized|VectorizedHorizontalReduction)", entry):
                function.straight.add(place)
    demangled = subprocess.run(["c++filt"], input="\n".join(of), capture_output=True, text=True, check=True).stdout
    names = [name.replace("fusedopt::(anonymous namespace)::", "") for name in demangled.splitlines()]
    # What is left in front is the type that a function template returns; then come the arguments.
    return [
        function._replace(name=re.sub(r"^(void|double|float|bool) ", "", name.partition("(")[0]))
        for name, function in zip(names, of.values(), strict=True)
    ]


def required() -> dict[str, set[Place]]:
    """The loops over a block in sweep.h and update.h, by the function they are in."""
    lines: dict[str, set[Place]] = {}
    for path in (CPP / "cpu" / "sweep.h", CPP / "rules" / "update.h"):
        function = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if m := re.match(r"  (?:static )?FUSEDOPT_\w+ (?:static )?(?:void|bool) (\w+)\(", line):
                function = m[1]
            if re.search(r"for \(int i = 0; (quantised && )?i < kBlock", line) or (
                "for (int i = 0; i < numbers;" in line and function == "draw"
            ):
                lines.setdefault(function, set()).add((path.name, number))
    return lines


def needed(formats: str, lines: dict[str, set[Place]]) -> set[Place]:
    """The loops that this combination has, without copies of float32, which GCC compiles to calls."""
    decode, gradient, rule, encode, shift = sorted(lines["block"])
    (codes_in, in_), (codes_out, out) = sorted(lines["load"]), sorted(lines["store"])
    some = {gradient, rule} | (set() if formats.startswith("Plain<F32>") else {decode, encode})
    if formats.endswith("Int8"):
        return some | {codes_in, codes_out, shift} | lines["measure"] | lines["draw"]
    some |= set() if formats.endswith(" F32") else {in_, out}
    return some | (lines["draw"] if "Noisy" in formats else set())


def loops(functions: Iterable[Function]) -> Iterator[tuple[str, int]]:
    """(rule and formats, size of a vector or 0) of every instance of the loops in sweep.h."""
    lines = required()
    found: dict[str, int] = {}
    for head, everywhere, straight in functions:
        sizes = {place: size for place, size in everywhere.items() if place[0] in ("sweep.h", "update.h")}
        size = max(sizes.values(), default=0)
        if m := re.match(r"(Sweep|Blocks)<(\w+)<\w+>, (.*)>::(sweep|flat)(\.|$)", head):
            name = f"{m[2]:24} {m[3]}"
            if m[1] == "Blocks":
                missed = needed(m[3], lines) - sizes.keys()
                missed = {(file, n) for file, n in missed if not any((file, n + k) in straight for k in range(4))}
                found[name] = 0 if missed else size
            elif m[4] == "flat" or size:
                found[name] = max(size, found.get(name, 0))
            else:
                found.setdefault(name, 0)  # its loop may be in a function of its own, flat or Blocks
        elif m := re.match(r"square_sum<(\w+)>", head):
            found[f"square_sum {m[1]}"] = size
    yield from found.items()


def instructions(functions: Iterable[Function]) -> Iterator[tuple[str, int]]:
    """(instruction, size of a vector or 0) of every loop of the interpreter; one that has two is missed unless both
    are vectorised."""
    for head, everywhere, _ in functions:
        if m := re.match(r"(\w+)Loop<(\d+), (\w+)>::run", head):
            sizes = {line: size for (file, line), size in everywhere.items() if file == "interpret.cpp"}
            wanted = 2 if (m[1], m[2]) == ("Lerp", "1") else 1
            yield f"{m[1]} {m[2]} {m[3]}", max(sizes.values()) if len(sizes) >= wanted else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=ISAS, default="avx512")
    parser.add_argument("--target", choices=["aarch64"], help="cross-compile the baseline loop")
    args = parser.parse_args()
    isa, name = ("baseline", f"{args.target} (NEON)") if args.target else (args.isa, args.isa)
    command = compiler(args.target)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    clang = "clang" in version
    units = {
        "sweep.h": list(loops(vectorised(isa, "cpu.cpp", command, clang))),
        "interpret.cpp": list(instructions(vectorised(isa, "interpret.cpp", command, clang))),
    }
    unit_of_size = "elements" if clang else "bytes"
    for unit, found in units.items():
        if not found:
            print(f"the compiler's record names no loop of {unit}: is it GCC or clang?", file=sys.stderr)
            return 2
        missed = [loop for loop, size in found if not size]
        widths = ", ".join(
            f"{n} with {size} {unit_of_size}" for size, n in sorted(Counter(s for _, s in found if s).items())
        )
        print(f"{name}: {len(found) - len(missed)} of {len(found)} loops of {unit} vectorised ({widths or 'none'})")
        print("".join(f"missed: {loop}\n" for loop in missed), end="")
    return not all(size for found in units.values() for _, size in found)


if __name__ == "__main__":
    sys.exit(main())
