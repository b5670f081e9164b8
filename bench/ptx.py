"""Builds the CUDA library for one architecture and checks its PTX: ``make cuda``. Needs nvcc, no GPU.

Exits 1 unless the library loads and has every rule in every form; no kernel spills registers; every update has 16-byte
accesses and only global stores; every division and square root is rounded to nearest; nothing is flushed to zero or
approximated; and the compiler contracts nothing: with every ``fma1`` of the rules compiled as ``a * b + c``, the code
has no fma. Prints registers, instructions and memory accesses of some kernels, and exits 1 if one has more registers
than its limit.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from fusedopt import _core

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda"
FLOAT = r"\.(?:f32|f64|f16|bf16)\b"
EXACT = re.compile(rf"\b(?:div|sqrt|rcp)\.(?!rn{FLOAT}).*{FLOAT}|\.ftz\b|\.approx\b|\brsqrt\.|\bex2\.|\blg2\.")
WIDE = re.compile(r"\b(?:ld|st)\b[.\w]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b")  # 16 bytes at once
ACCESS = [re.compile(rf"(?:@\S+\s+)?{kind}\.(?!shared|param|const|local)") for kind in ("ld", "st")]
GENERIC_LOAD, GENERIC_STORE = (
    re.compile(rf"(?:@\S+\s+)?{kind}\.(?!global|shared|param|const|local)") for kind in ("ld", "st")
)
# Rule and form -> the most registers of its kernel for aligned tensors, on sm_90; None: shown only.
REPORTED: dict[str, int | None] = {
    "Adam<float>, Plain<F32>, F32, F32": 48,
    "Adam<float>, Plain<BF16>, BF16, BF16": 64,
    "Adam<float>, Plain<F16>, F16, F16": 64,
    "Adam<float>, Plain<Noisy<BF16>>, BF16, Noisy<BF16>": 72,
    "Adam<float>, Split8, BF16, Int8": 80,
    "Adam<float>, Plain<F32>, F32, Int8": 80,
    "Adam<double>, Plain<F64>, F64, F64": None,
}
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


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled name -> kernel, rule and form, as ``update<Adam<float>, Plain<F32>, F32, F32>``."""
    listed = list(names)
    text = subprocess.run(["c++filt"], input="\n".join(listed), check=True, capture_output=True, text=True).stdout
    text = re.sub(r"fusedopt::|\(anonymous namespace\)::|^void ", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(DeviceTables.*\)$", "", text, flags=re.MULTILINE)
    text = text.replace("> >", ">>").replace("> >", ">>")
    short = (re.sub(r"<Update<(.*)>>$", r"<\1>", line) for line in text.splitlines())
    return dict(zip(listed, short, strict=True))


def machine_code(command: list[str], text: str) -> dict[str, tuple[int, int]]:
    """Assembles PTX; mangled name -> registers, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
        source.write_text(text)
        architecture = re.search(r"compute_(\d+)", " ".join(command))
        assert architecture
        options = [w for w in command[1:] if w.startswith(("-fmad", "-Xptxas"))]
        words = [command[0], *options, f"-arch=sm_{architecture[1]}", "-Xptxas=-v", "-cubin", str(source)]
        log = subprocess.run([*words, "-o", str(binary)], check=True, capture_output=True, text=True).stderr
        sizes = sections(binary.read_bytes())
    registers = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    return {name: (int(n), sizes[f".text.{name}"] // 16) for name, n in registers}


def sections(elf: bytes) -> dict[str, int]:
    """Sizes of an ELF file's sections, in bytes."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * k) for k in range(count)]
    start = headers[names][4]
    return {elf[start + h[0] : elf.index(b"\0", start + h[0])].decode(): h[5] for h in headers}


def report(whole: Sequence[str]) -> list[str]:
    """Prints a table of the reported kernels; returns what is missing or above its limit."""
    wrong, missing = [], set(REPORTED)
    print(f"{'':72}{'registers':>10}{'limit':>7}{'length':>8}{'loads':>7}{'stores':>8}{'generic loads':>15}")
    for command, text in zip(commands(), whole, strict=True):
        bodies = kernels(text)
        names = {name: short for name, short in demangled(bodies).items() if any(f"<{r}>" in short for r in REPORTED)}
        code = machine_code(command, text) if any(short.startswith("update") for short in names.values()) else {}
        for name, short in sorted(names.items(), key=lambda item: item[1]):
            if not short.startswith("update"):
                continue
            registers, length = code[name]
            limit = REPORTED[short.partition("<")[2][:-1]] if short.startswith("update_plain<") else None
            loads, stores, generic = (sum(1 for line in bodies[name] if p.match(line)) for p in (*ACCESS, GENERIC_LOAD))
            print(f"{short:72}{registers:10}{limit or '':>7}{length:8}{loads:7}{stores:8}{generic:15}")
            if short.startswith("update_plain<"):
                missing.remove(short.partition("<")[2][:-1])
            if limit is not None and registers > limit:
                wrong.append(f"{short}: {registers} registers, limit {limit}")
    return wrong + [f"no kernel of {name} was found" for name in sorted(missing)]


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
    if len(updates) != 2 * sum(map(len, expected.values())):
        wrong.append(f"{len(updates)} kernels for {sum(map(len, expected.values()))} combinations of rule and form")
    for name, body in found.items():
        wrong += [f"{name}: {line}" for line in body if EXACT.search(line)]
    wrong += [f"{name}: no accesses of 16 bytes" for name in updates if not any(map(WIDE.search, found[name]))]
    wrong += [f"{name}: generic store: {line}" for name in updates for line in found[name] if GENERIC_STORE.match(line)]
    wrong += report(whole)
    fused = sum(bool(FUSED.search(line)) for body in found.values() for line in body)
    divided = sum(line.startswith(("div.rn", "sqrt.rn")) for body in found.values() for line in body)
    if not fused or not divided:
        wrong.append("no fma, division or root was found: the code was not parsed correctly")
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
