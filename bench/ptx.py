"""Builds the CUDA library for one architecture and checks its PTX: ``make cuda``. Needs nvcc, no GPU.

Exits 1 unless the library loads and has every rule in every form; no kernel spills registers; every update has 16-byte
accesses; every division and square root is rounded to nearest; nothing is flushed to zero or approximated; and the
compiler contracts nothing: with every ``fma1`` of the rules compiled as ``a * b + c``, the code has no fma.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from fusedopt import _core

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda"
FLOAT = r"\.(?:f32|f64|f16|bf16)\b"
EXACT = re.compile(rf"\b(?:div|sqrt|rcp)\.(?!rn{FLOAT}).*{FLOAT}|\.ftz\b|\.approx\b|\brsqrt\.|\bex2\.|\blg2\.")
WIDE = re.compile(r"\b(?:ld|st)\b[.\w]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b")  # 16 bytes at once
FUSED = re.compile(rf"\b(?:fma|mad)\.\w+{FLOAT}")


def build(architecture: str) -> None:
    define = {
        "FUSEDOPT_CUDA": "ON",
        "FUSEDOPT_WERROR": "ON",  # ptxas warns about register spills
        "CMAKE_CUDA_ARCHITECTURES": architecture,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "SKBUILD_PROJECT_VERSION_FULL": _core.__version__,
    }
    beside = Path(sys.executable).parent
    options = [f"-D{name}={value}" for name, value in define.items()]
    ninja = f"-DCMAKE_MAKE_PROGRAM={beside / 'ninja'}"
    subprocess.run([beside / "cmake", "-G", "Ninja", ninja, *options, "-S", ROOT, "-B", BUILD], check=True)
    subprocess.run([beside / "cmake", "--build", BUILD, "--target", "cuda"], check=True)


def commands() -> list[list[str]]:
    """The compile commands of the library's parts, without the output option."""
    out = []
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        if words[-3].endswith("grid.cu"):
            out.append(words[: words.index("-x")])
    return out


def ptx(command: list[str], *more: str) -> str:
    """The PTX that this command compiles to."""
    words = [w for w in command if not w.startswith(("--generate-code", "--compress"))]
    architecture = re.search(r"compute_(\d+)", " ".join(command))
    assert architecture
    words += [
        f"-arch=compute_{architecture[1]}",
        *more,
        "-x",
        "cu",
        f"-I{ROOT / 'cpp'}",
        "-ptx",
        str(ROOT / "cpp" / "device" / "grid.cu"),
        "-o",
        "-",
    ]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def kernels(text: str) -> dict[str, list[str]]:
    """Kernel name -> instructions."""
    parts = re.split(r"\.entry\s+(\w+)\(", text)[1:]
    return {
        name: [line.strip() for line in body.splitlines() if line.startswith("\t")]
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="90")
    build(parser.parse_args().architecture)
    wrong = []

    _core.set_device_library(str(next(BUILD.glob("_cuda.*"))))
    expected = _core.formats()
    if _core.device_formats() != expected:
        wrong.append("the library does not have every rule in every form")
    with ThreadPoolExecutor(2) as pool:
        whole = list(pool.map(ptx, commands()))
        plain = list(pool.map(lambda c: ptx(c, "-DFUSEDOPT_NO_FMA", "-DFUSEDOPT_FEW_FORMATS"), commands()))

    found = {name: body for text in whole for name, body in kernels(text).items()}
    updates = [name for name in found if "update" in name.partition("Update")[0]]
    if len(updates) != sum(map(len, expected.values())):
        wrong.append(f"{len(updates)} kernels for {sum(map(len, expected.values()))} combinations of rule and form")
    for name, body in found.items():
        wrong += [f"{name}: {line}" for line in body if EXACT.search(line)]
    wrong += [f"{name}: no accesses of 16 bytes" for name in updates if not any(map(WIDE.search, found[name]))]
    fused = sum(bool(FUSED.search(line)) for body in found.values() for line in body)
    divided = sum(line.startswith(("div.rn", "sqrt.rn")) for body in found.values() for line in body)
    if not fused or not divided:
        wrong.append("no fma, division or root was found: the code is not read right")
    for text in plain:
        for name, body in kernels(text).items():
            wrong += [f"{name}: fused by the compiler: {line}" for line in body if FUSED.search(line)]
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    print(
        f"{len(updates)} update kernels of {len(found)}: {divided} divisions and roots, {fused} fma; {len(wrong)} wrong"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
