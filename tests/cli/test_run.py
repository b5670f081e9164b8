"""`fusedopt run` on unmodified scripts and modules, run as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

SCRIPT = '''
"""Trains; written for torch alone."""
import sys
import torch
import torch.optim as optim
from torch.optim import Adam


def train(steps=4):
    torch.manual_seed(0)
    words, model = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 1)
    adam, sgd = Adam(model.parameters(), lr=0.1), optim.SGD(words.parameters(), lr=0.1, momentum=0.9)
    schedule = optim.lr_scheduler.StepLR(adam, 2)
    for _ in range(steps):
        for opt in (adam, sgd):
            opt.zero_grad()
        model(words(torch.tensor([1, 2, 4]))).square().mean().backward()
        for opt in (adam, sgd):
            opt.step()
        schedule.step()
    lbfgs = optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        lbfgs.zero_grad()
        loss = model(words(torch.tensor([1]))).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    return adam, model


class Mine(torch.optim.SGD):
    pass


if __name__ == "__main__":
    adam, model = train()
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Mine([p], lr=0.1).step()
    print(sys.argv, __name__, __file__)
    print(type(adam).__module__, [round(x, 5) for x in model.weight.flatten().tolist()])
    sys.exit(7)
'''

SPAWNS = """
import torch
import torch.multiprocessing as mp


def child(rank, method):
    model = torch.nn.Linear(3, 1)
    opt = torch.optim.AdamW(model.parameters())
    for _ in range(rank + 2):
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
    assert type(opt).__module__ == "fusedopt.torch", method


if __name__ == "__main__":
    for method in ("spawn", "fork"):
        mp.start_processes(child, (method,), 2, start_method=method)
"""


def fusedopt(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "fusedopt", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def by_name(report: dict[str, Any]) -> dict[str, Any]:
    return {entry["optimizer"]: entry for entry in report["optimizers"]}


@pytest.mark.integration("`fusedopt run script.py`", "arguments, exit status, report; the values of torch's own run")
def test_a_script_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    got = fusedopt(tmp_path, "run", "--report", "out/report.json", "train.py", "--report", "x", "-m", "y")
    assert got.returncode == 7, got.stderr
    first, second = got.stdout.splitlines()
    assert first == "['train.py', '--report', 'x', '-m', 'y'] __main__ " + str(tmp_path / "train.py")
    assert second.startswith("fusedopt.torch ")
    alone = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    mine, theirs = (json.loads(text.split(" ", 1)[1]) for text in (second, alone.stdout.splitlines()[1]))
    assert mine == pytest.approx(theirs, abs=1e-4)
    report = by_name(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert {k: (v["class"], v["steps"], v["fused_tensors"]) for k, v in report.items()} == {
        "Adam": ("fusedopt.torch.Adam", 4, 2),
        "SGD": ("fusedopt.torch.SGD", 4, 0),
        "LBFGS": ("torch.optim.lbfgs.LBFGS", 1, 0),
        "Mine": ("__main__.Mine", 1, 0),
    }
    assert report["Adam"]["torchs_own_step"] == {}
    assert report["SGD"]["torchs_own_step"] == {"a gradient is sparse": 1}
    assert "no LBFGS" in next(iter(report["LBFGS"]["torchs_own_step"]))
    assert "derived from torch.optim.SGD" in next(iter(report["Mine"]["torchs_own_step"]))
    assert all(0 < v["median_seconds_per_step"] <= v["seconds"] for v in report.values())
    said = got.stderr
    assert "Adam: 4 steps, " in said
    assert "fused: 2 tensors" in said
    assert "torch's own step for 1 tensor: a gradient is sparse" in said
    assert "Warning" not in said


@pytest.mark.integration("`fusedopt run -m module`", "as `python -m`")
def test_a_module_runs_as_python_dash_m_would(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(SCRIPT)
    got = fusedopt(tmp_path, "run", "--quiet", "-m", "pkg.part", "--lr", "3")
    assert got.returncode == 7, got.stderr
    assert got.stdout.startswith(f"['{package / 'part.py'}', '--lr', '3'] __main__ {package / 'part.py'}")
    assert got.stderr == ""


@pytest.mark.integration("`fusedopt run`", "processes that the script spawns or forks")
def test_child_processes_are_served_and_report(tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    got = fusedopt(tmp_path, "run", "--report", "r.json", "spawns.py")
    assert got.returncode == 0, got.stderr
    steps = sorted(
        by_name(json.loads(path.read_text()))["AdamW"]["steps"] for path in tmp_path.glob("r.*.json")
    )  # fmt: skip
    assert steps == [2, 2, 3, 3]
    assert json.loads((tmp_path / "r.json").read_text())["optimizers"] == []
    assert "spawns.py\n  no optimizer took a step" in got.stderr


def test_an_error_in_the_script_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import torch\nraise KeyError('here')\n")
    got = fusedopt(tmp_path, "run", "broken.py")
    assert got.returncode == 1
    assert "KeyError: 'here'" in got.stderr
    assert "broken.py" in got.stderr


def test_ranks_of_torchrun_write_reports_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    got = fusedopt(tmp_path, "run", "--report", "r.json", "train.py", RANK="1")
    assert got.returncode == 7
    assert "train.py, rank 1" in got.stderr
    assert [path.name for path in tmp_path.glob("*.json")] == ["r.rank1.json"]


@pytest.mark.parametrize("arguments", [["run"], ["run", "no-such-file.py"], ["run", "--nonsense", "x.py"]])
def test_wrong_calls_say_so(tmp_path: Path, arguments: list[str]) -> None:
    got = fusedopt(tmp_path, *arguments)
    assert got.returncode == 2
    assert "Traceback" not in got.stderr
    assert "run" in got.stderr


def test_help_names_the_options(tmp_path: Path) -> None:
    got = fusedopt(tmp_path, "run", "--help")
    assert got.returncode == 0
    assert "--report FILE" in got.stdout


def run_script(folder: Path, text: str, *options: str, **environment: str) -> Any:
    (folder / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "fusedopt", "run", *options, "script.py", "--one"], cwd=folder, capture_output=True,
        text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_script_knows_where_it_stands_as_under_python(tmp_path: Path) -> None:
    text = "import __main__, sys\nprint([__file__, sys.argv, __name__, __main__.__file__, __doc__, sys.path[0]])"
    ours = run_script(tmp_path, text)
    command = [sys.executable, "script.py", "--one"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ours.stdout == plain.stdout
    assert str(tmp_path / "script.py") in ours.stdout


TRAINS = """
import threading, time, torch
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
opt = torch.optim.Adam([p])
"""


def test_a_report_that_cannot_be_written_changes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_script(tmp_path, TRAINS + "opt.step()\nraise SystemExit(5)", "--report", "file/report.json")
    assert done.returncode == 5
    assert "fusedopt run: the report cannot be written" in done.stderr
    assert "Adam: 1 step," in done.stderr
    assert "Traceback" not in done.stderr


def test_steps_of_threads_that_outlive_the_script_are_counted(tmp_path: Path) -> None:
    more = """
def train():
    time.sleep(0.5)
    for _ in range(7):
        opt.step()
    threading.Thread(target=opt.step).start()
threading.Thread(target=train).start()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
"""
    done = run_script(tmp_path, TRAINS + more, "--report", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["optimizers"][0]["steps"] == 8
