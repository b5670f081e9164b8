"""The torch training loop in separate processes: killed at any moment, and parallel under torchrun."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes under /proc")

SCRIPT = """
import os, sys, random
import numpy as np, torch
import fusedopt.torch as optim
from fusedopt.schedules import Cosine

torch.set_num_threads(1)
out, resume, epochs = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
torch.manual_seed(0); np.random.seed(0); random.seed(0)
generator = torch.Generator().manual_seed(1)
x = torch.randn(203, 6, generator=generator)
y = (x[:, :3].sum(1) > 0).long()
dropout = float(os.environ.get("DROPOUT", "0"))
model = torch.nn.Sequential(
    torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(32, 2))
opt = optim.AdamW(model.parameters())
data = torch.utils.data.TensorDataset(x, y)
make = torch.utils.data.DataLoader
batch = int(os.environ.get("BATCH", "8"))
shuffle = bool(int(os.environ.get("SHUFFLE", "1")))
trainer = optim.fit(
    model, make(data, batch, shuffle=shuffle), make(data, 50), loss=torch.nn.functional.cross_entropy, optimizer=opt,
    schedule=Cosine(0.01, 500), epochs=epochs, resume=resume, checkpoint=out + ".pt", checkpoint_every=1,
    metrics={"rows": lambda output, target: len(target),
             "accuracy": lambda output, target: (output.argmax(1) == target).double().mean()},
    log=out + ".jsonl", every=int(os.environ["EVERY"]) if "EVERY" in os.environ else None)
rank = os.environ.get("RANK", "0")
history = {name: values for name, values in trainer.history.items() if name != "seconds"}
torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "history": history}, out + ".end" + rank)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, out: Path, how: str, epochs: int, processes: int = 1, **more: str) -> subprocess.Popen[str]:
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launch, str(script), str(out), how, str(epochs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def end(out: Path, rank: int = 0) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(f"{out}.end{rank}", weights_only=True)
    return result


def assert_same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["history"] == other["history"]
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for i, state in one["opt"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["opt"]["state"][i][name]), (i, name)


def written(file: Path) -> int:
    """Modification time of the checkpoint; 0 if there is none, or during its replacement."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_again_and_again(script: Path, out: Path, epochs: int, processes: int, rng: random.Random, **more: str) -> int:
    """Kills the training shortly after each sign of progress, writing of checkpoints included; returns the number of
    kills."""
    file, kills, how = Path(f"{out}.pt"), 0, "resume"
    while kills < 4:
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = start(script, out, how, epochs, processes, **more)
        while process.poll() is None and not (written(file) > before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:  # torchrun starts its workers in new sessions
                os.kill(pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    return kills


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes_to_the_same_bits(script: Path, tmp_path: Path) -> None:
    more = {"DROPOUT": "0.5", "EVERY": "17"}
    whole, part = tmp_path / "whole", tmp_path / "part"
    finish(start(script, whole, "anew", 12, **more))
    assert kill_again_and_again(script, part, 12, 1, random.Random(0), **more) >= 2
    finish(start(script, part, "resume", 12, **more))
    assert_same_end(end(part), end(whole))
    assert Path(f"{part}.jsonl").read_text().count("\n") == len(end(whole)["history"]["step"])


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_batches_of_both(script: Path, tmp_path: Path) -> None:
    """Without shuffling, rank r gets rows r, r + 2, ...: batches of 4 each equal one of 8, but for the last odd row."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(script, one, "anew", 1, SHUFFLE="0", BATCH="8", EVERY="10"))
    finish(start(script, two, "anew", 1, 2, SHUFFLE="0", BATCH="4", EVERY="10"))
    first, second = end(two, 0), end(two, 1)
    assert_same_end(first, second)
    alone = end(one)["history"]
    assert first["history"]["step"] == alone["step"]
    assert first["history"]["val_rows"] == [203] * len(alone["step"])
    for name in ("loss", "val_loss"):
        torch.testing.assert_close(
            torch.tensor(first["history"][name][:-1]), torch.tensor(alone[name][:-1]), rtol=1e-4, atol=1e-6
        )
    assert first["history"]["val_accuracy"][:-1] == alone["val_accuracy"][:-1]
    assert Path(f"{two}.jsonl").read_text().count("\n") == len(alone["step"])


@pytest.mark.slow
def test_two_processes_that_are_killed_resume_to_the_same_bits(script: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    finish(start(script, whole, "anew", 4, 2, DROPOUT="0.5"))
    assert kill_again_and_again(script, part, 4, 2, random.Random(1), DROPOUT="0.5") >= 1
    finish(start(script, part, "resume", 4, 2, DROPOUT="0.5"))
    for rank in (0, 1):
        assert_same_end(end(part, rank), end(whole, rank))
    alone = start(script, part, "resume", 6, DROPOUT="0.5")
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 1
    assert "written by 2 processes" in output
