"""Runs the tests on the ends of what pyproject.toml promises: ``make matrix``.

One environment for each pair of Python and torch, in build/matrix, with the package installed as a user installs it.
Prints one line a pair, and records it in bench/results/versions.json, from which bench/readme.py writes README's table.
``--pair 3.10`` chooses; ``--again`` runs only what failed the last time; other arguments are pytest's, and the outcomes
of tests that they leave out are kept. A pair whose Python is not installed is said and left alone. torch comes from the
index, for most versions with gigabytes of CUDA libraries: ``--delete`` removes an environment once its tests have run.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "matrix"
RESULTS = ROOT / "bench" / "results" / "versions.json"
TOOLS = ("pip>=23.1", "scikit-build-core", "pybind11", "cmake", "ninja")
SHOWN = ("numpy", "torch", "scikit-learn")
# Pins of constraints.txt that do not hold for every torch, NumPy and scikit-learn.
LOOSE = re.compile(r"(ml_dtypes|numpy|torch|scikit-learn|sympy|setuptools)==")


class Pair(NamedTuple):
    """A Python and the requirements that are installed with it; nothing pinned is the newest that the index has."""

    python: str
    pins: tuple[str, ...]


PAIRS = {
    "3.10": Pair("3.10", ("numpy==1.26.*", "torch==2.6.*", "scikit-learn==1.6.*")),  # the least that is promised
    "3.12": Pair("3.12", ("torch",)),
    "3.13": Pair("3.13", ("torch==2.13.0",)),
}


def interpreter(version: str) -> str | None:
    """The Python of this version on PATH or among pyenv's; None if none runs."""
    of_pyenv = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in (f"python{version}", *sorted(of_pyenv)):
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, check=False)
        except FileNotFoundError:
            continue
        if done.stdout.decode().strip() == version:
            return path
    return None


def install(name: str, python: str) -> Path:
    """The interpreter of the pair's environment, with the package and what its tests import."""
    folder, pair = BUILD / name, PAIRS[name]
    env = folder / "venv"
    if not env.exists():
        subprocess.run([python, "-m", "venv", env], check=True)
    constraints = folder / "constraints.txt"
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not LOOSE.match(line)]
    constraints.write_text("\n".join([*pins, *(pin for pin in pair.pins if "=" in pin)]) + "\n")
    pip: list[str | Path] = [
        env / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "-c",
        constraints,
    ]
    subprocess.run([*pip, *TOOLS], check=True)
    # As deep as build/dev: ccache, where it is used, then finds the same commands.
    settings = ["-C", f"build-dir={BUILD.parent / f'matrix-{name}'}"]
    for option in ("FUSEDOPT_WERROR", "FUSEDOPT_SIMULATED"):
        settings += ["-C", f"cmake.define.{option}=ON"]
    subprocess.run([*pip, *pair.pins, f"{ROOT}[test]", "--no-build-isolation", *settings], check=True)
    return env / "bin" / "python"


def test(python: Path, folder: Path, again: bool, arguments: list[str], env: dict[str, str] | None) -> dict[str, str]:
    """Outcome by test; a run of some of the tests keeps those of the others."""
    report, kept = folder / "report.xml", folder / "outcomes.json"
    report.unlink(missing_ok=True)
    command: list[str | Path] = [
        python,
        "-m",
        "pytest",
        "-q",
        "-o",
        f"cache_dir={folder / 'cache'}",
        f"--junitxml={report}",
    ]
    command += ["--tb=short", "--no-showlocals", *(["--lf"] if again else []), *arguments]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
    if done.returncode > 1 or not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}: {folder / 'log.txt'}")
    some = again or any(argument.startswith("tests/") for argument in arguments)
    outcomes: dict[str, str] = json.loads(kept.read_text()) if some and kept.exists() else {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    kept.write_text(json.dumps(outcomes, indent=0))
    return outcomes


def installed(python: Path) -> dict[str, str]:
    """The versions of Python and of what is shown; a package that is absent is left out."""
    code = (
        "import importlib.metadata as m, json, platform, sys; found = {d.name: d.version for d in m.distributions()}; "
        "found['python'] = platform.python_version(); "
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    found: dict[str, str] = json.loads(
        subprocess.run([python, "-c", code, "python", *SHOWN], capture_output=True, check=True).stdout
    )
    return found


def run(
    name: str,
    python: Path,
    folder: Path,
    arguments: list[str],
    again: bool = False,
    env: dict[str, str] | None = None,
) -> bool:
    """Whether the tests pass; prints a line, and puts it into versions.json in place of the one of the same name."""
    counts = Counter(test(python, folder, again, arguments, env).values())
    found = installed(python)
    row = {
        "name": name,
        **found,
        "system": f"{platform.system()} {platform.machine()}",
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
    }
    rows = {row["name"]: row for row in (json.loads(RESULTS.read_text()) if RESULTS.exists() else [])}
    some = any(argument.startswith("tests/") for argument in arguments)
    row["tests"] = rows[name]["tests"] if again and name in rows else "some" if some else "all"
    rows[name] = row
    RESULTS.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")
    what = ", ".join(f"{package} {version}" for package, version in found.items())
    print(f"{name}: {what}: {', '.join(f'{counts[k]} {k}' for k in ('passed', 'failed', 'skipped'))}", flush=True)
    return not counts["failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", action="append", choices=PAIRS, help="default: all")
    parser.add_argument("--again", action="store_true", help="only what failed the last time")
    parser.add_argument("--delete", action="store_true", help="remove each environment after its tests")
    args, arguments = parser.parse_known_args()
    failed = False
    for name in args.pair or PAIRS:
        python = interpreter(PAIRS[name].python)
        if python is None:
            print(f"{name}: Python {PAIRS[name].python} is not installed", flush=True)
            continue
        (BUILD / name).mkdir(parents=True, exist_ok=True)
        failed |= not run(name, install(name, python), BUILD / name, arguments, args.again)
        if args.delete:
            shutil.rmtree(BUILD / name / "venv")
    return failed


if __name__ == "__main__":
    sys.exit(main())
