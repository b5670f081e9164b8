"""The package where it is likely to be used: a folder that cannot be written, Python's own options, a zip archive, a
subinterpreter. In fresh interpreters."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusedopt

USE = """
import numpy as np, fusedopt, fusedopt.schedules
from fusedopt.rule import rule
p = np.ones(100, np.float32)
opt = fusedopt.AdamW(p, lr=fusedopt.schedules.Cosine(0.1, 10), max_grad_norm=1.0)
opt.step(np.ones(100, np.float32))
assert_ = lambda ok: None if ok else exit("wrong")
assert_((p < 1).all())
try:
    fusedopt.adam_(p, p, p, p, step=1)
except ValueError as error:
    assert_("grad" in str(error) or "param" in str(error))
else:
    exit("not refused")

@rule(lr=0.1)
def Plain(p, g, *, t, lr):
    return p - lr * g

q = np.ones(3)
Plain.numpy([q]).step([np.ones(3)])
assert_((q == 0.9).all())
print("done")
"""
# As on a folder without write access, for root too: what is written there is refused.
READ_ONLY = """
import os, sys
from importlib.util import find_spec
folder = os.path.dirname(find_spec("fusedopt").origin) + os.sep
attempts = []
def refuse(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.truncate", "os.utime"):
        if isinstance(args[0], (str, bytes)) and os.fsdecode(args[0]).startswith(folder):
            attempts.append(args[0])
            raise PermissionError(13, "no write access", args[0])
sys.addaudithook(refuse)
sys.dont_write_bytecode = False
try:
    open(folder + "probe", "w")
except PermissionError:
    attempts.clear()
else:
    exit("the folder can be written")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-B"], ["-I"], ["-P"], ["-X", "dev"]], ids=" ".join)
def test_it_works_with_pythons_options(options: list[str]) -> None:
    """``-O`` strips assertions and ``-OO`` docstrings: neither may be needed."""
    if options == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("-P is of Python 3.11")
    done = python(*options, "-W", "error", "-c", USE)
    assert done.stdout == "done\n", done.stderr


def test_it_works_from_a_folder_without_write_access() -> None:
    done = python("-W", "error", "-c", f"{READ_ONLY}\n{USE}\nprint([a for a in attempts if '__pycache__' not in a])")
    assert done.stdout == "done\n[]\n", done.stdout + done.stderr


def test_a_zip_archive_is_refused_with_the_reason(tmp_path: Path) -> None:
    path, folder = tmp_path / "site.zip", Path(fusedopt.__file__).parent
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.py"):
            archive.write(file, Path("fusedopt") / file.relative_to(folder))
    done = python("-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(path)!r}); import fusedopt")
    assert done.returncode == 1
    assert "ImportError: fusedopt contains compiled code and cannot be imported from a zip archive" in done.stderr


def test_a_subinterpreter_is_refused_with_the_reason() -> None:
    """It must not hang, which an import of the core did where the GIL is shared."""
    code = """
import sys
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
else:
    import _xxsubinterpreters as interpreters
script = '''
try:
    import fusedopt._core
except ImportError as error:
    print(error)
'''
interpreters.run_string(interpreters.create(), script)
"""
    done = python("-c", code)
    assert "subinterpreter" in done.stdout, done.stdout + done.stderr
