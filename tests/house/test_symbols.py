"""Objects compiled for different instruction sets must share no symbols, or the linker may use AVX-512 code on an old
machine. Debug builds inline nothing, so they show it. Needs a C++ compiler, nm and objdump; skipped otherwise."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp"
SOURCES = (
    CPP / "cpu" / "cpu.cpp",
    CPP / "cpu" / "forms.cpp",
    CPP / "cpu" / "interpret.cpp",
    CPP / "network" / "kernels.cpp",
)
COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
# As in CMakeLists.txt.
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}

pytestmark = [
    pytest.mark.skipif(COMPILER is None or not shutil.which("nm"), reason="no C++ compiler or no nm"),
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="one instruction set only"),
    pytest.mark.skipif(platform.system() != "Linux", reason="other tools"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("objects")

    def build(isa: str) -> Path:
        out = folder / f"{isa}.o"
        parts = [folder / f"{isa}-{source.stem}.o" for source in SOURCES]
        command = [
            str(COMPILER),
            "-std=c++17",
            "-O0",
            *FLAGS[isa],
            f"-DFUSEDOPT_ISA={isa}",
            "-DFUSEDOPT_X86",
            '-DFUSEDOPT_VERSION="symbols"',
            f"-I{CPP}",
        ]
        for source, part in zip(SOURCES, parts, strict=True):
            subprocess.run([*command, "-c", str(source), "-o", str(part)], check=True, timeout=300)
        subprocess.run(["ld", "-r", *map(str, parts), "-o", str(out)], check=True, timeout=60)
        return out

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FLAGS, pool.map(build, FLAGS), strict=True))


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter, demangled name) of all symbols that an object defines or uses."""
    listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    rows = [re.match(r"[0-9a-f ]*\s([A-Za-z])\s(.*)", line) for line in listed.splitlines()]
    return [(row[1], row[2]) for row in rows if row]


@pytest.mark.parametrize("isa", FLAGS)
def test_an_object_exports_its_tables_and_nothing_else(objects: dict[str, Path], isa: str) -> None:
    defined = [(kind, name) for kind, name in symbols(objects[isa]) if kind.isupper() and kind not in "UWV"]
    names = (f"forms_{isa}()", f"interpreter_{isa}()", f"kernels_{isa}_0(int)", f"library_{isa}()", f"network_{isa}()")
    assert sorted(defined) == [("T", f"fusedopt::{name}") for name in names]


@pytest.mark.parametrize("isa", FLAGS)
def test_an_object_has_no_weak_symbols(objects: dict[str, Path], isa: str) -> None:
    """Inline functions, templates and static members with external linkage are weak symbols: the linker keeps any copy.
    (The pointer to the C++ runtime's exception handler is weak, too, but the same everywhere.)"""
    weak = {name for kind, name in symbols(objects[isa]) if kind in "wWvVu"}
    assert weak <= {"DW.ref.__gxx_personality_v0"}


@pytest.mark.parametrize("isa", FLAGS)
def test_an_object_wants_only_the_c_library(objects: dict[str, Path], isa: str) -> None:
    wanted = {name for kind, name in symbols(objects[isa]) if kind == "U"}
    assert not {name for name in wanted if "std::" in name or "operator" in name or "fusedopt" in name}


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_the_baseline_has_no_avx_and_avx2_no_avx512(objects: dict[str, Path]) -> None:
    def code(isa: str) -> str:
        command = ["objdump", "-d", "--no-show-raw-insn", str(objects[isa])]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    baseline, avx2, avx512 = code("baseline"), code("avx2"), code("avx512")
    for register in ("%ymm", "%zmm", "%k1"):
        assert register not in baseline
    vex = r"\tv[a-z]+[ps][sd]\b"
    assert not re.search(vex, baseline)
    assert "%zmm" not in avx2
    assert not re.search(r"%[xy]mm(1[6-9]|2\d|3[01])\b", avx2)
    assert re.search(vex, avx2)  # the check can see what it looks for
    assert re.search(vex, avx512)
