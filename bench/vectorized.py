"""Which loops of cpp/sweep.h the compiler vectorises, by rule and formats: ``make vectorized``.

Compiles cpp/cpu.cpp for one instruction set with the flags of CMakeLists.txt and reads GCC's vectoriser dump. Exits 1
where a loop is missed. Needs g++ (``CXX``); clang has no such dump.
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


def dump(isa: str) -> str:
    """What the vectoriser has to say, function by function."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump"
        flags = shlex.split(f"{FLAGS} {ISAS[isa]} -DFUSEDOPT_ISA={isa} -fdump-tree-vect-optimized={path}")
        subprocess.run([*compiler, *flags, "-c", str(CPP / "cpu.cpp"), "-o", os.devnull], check=True)
        return path.read_text()


def loops(text: str) -> Iterator[tuple[str, int]]:
    """(rule and formats, bytes of a vector or 0) of every instance of the loops in sweep.h."""
    for part in text.split("\n;; Function ")[1:]:
        head, _, body = part.partition("\n")
        sizes = re.findall(r"sweep\.h:.*optimized: loop vectorized using (\d+) byte vectors", body)
        size = max(map(int, sizes), default=0)
        if m := re.search(r"Sweep<.*?::(\w+)<\w+>, .*?::(\w+), .*?::(\w+), .*?::(\w+)>::sweep ", head):
            yield f"{m[1]:24} {m[2]} {m[3]} {m[4]}", size
        elif m := re.search(r"square_sum<.*?::(\w+)>", head):
            yield f"square_sum {m[1]}", size


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=ISAS, default="avx512")
    isa: str = parser.parse_args().isa
    found = list(loops(dump(isa)))
    if not found:
        print("the dump names no loop: is the compiler GCC?", file=sys.stderr)
        return 2
    missed = [name for name, size in found if not size]
    widths = ", ".join(f"{n} with {size} bytes" for size, n in sorted(Counter(s for _, s in found if s).items()))
    print(f"{isa}: {len(found) - len(missed)} of {len(found)} loops of sweep.h vectorised ({widths or 'none'})")
    print("".join(f"missed: {name}\n" for name in missed), end="")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
