"""The GPU benchmark suite without a GPU: its cases, its clock on a simulated device, a case with the CPU in place of a
GPU, the table, and the command line."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fusedopt.bench import LARGE, SUITES, Case, Result, contenders, gpu, render, run_case, run_suites, save
from fusedopt.bench.cases import CEILING
from fusedopt.bench.contenders import OURS
from fusedopt.bench.timing import Contender, Times, race
from fusedopt.cli import main
from fusedopt.cli.arguments import SUITES as DESCRIBED
from fusedopt.rules import RULES


class Device:
    """A simulated GPU that runs queued kernels, one after the other, on synchronisation; times in milliseconds."""

    def __init__(self) -> None:
        self.now, self.queue = 0.0, []  # type: float, list[Any]

    def launch(self, milliseconds: float) -> None:
        self.queue.append(milliseconds)

    def synchronize(self) -> None:
        for entry in self.queue:
            if isinstance(entry, float):
                self.now += entry
            else:
                entry.at = self.now
        self.queue.clear()

    def Event(self, enable_timing: bool) -> Any:  # torch.cuda's name
        assert enable_timing
        device = self

        class Event:
            at: float | None = None

            def record(self) -> None:
                device.queue.append(self)

            def synchronize(self) -> None:
                device.synchronize()

            def elapsed_time(self, end: Any) -> float:
                assert self.at is not None
                assert end.at is not None, "read before it was reached"
                return float(end.at - self.at)

        return Event()


def test_a_span_is_that_of_the_devices_events_and_not_of_the_calls() -> None:
    device = Device()
    clock = gpu.events(device)
    device.launch(7.0)  # of an earlier use
    clock.settle()
    start = clock.mark()
    device.launch(2.0)
    device.launch(1.5)
    assert clock.seconds(start, clock.mark()) == pytest.approx(3.5e-3)


def test_contenders_are_raced_by_the_devices_clock() -> None:
    device = Device()
    slow, fast = Contender(lambda: device.launch(3.0)), Contender(lambda: device.launch(0.1))
    fresh = Contender(lambda: device.launch(0.5), setup=lambda: device.launch(50.0))
    times = race({"slow": slow, "fast": fast, "fresh": fresh}, rounds=6, sample_seconds=1e-3, clock=gpu.events(device))
    assert {name: t.calls for name, t in times.items()} == {"slow": 10, "fast": 10, "fresh": 10}
    assert {name: t.median for name, t in times.items()} == pytest.approx({"slow": 3e-3, "fast": 1e-4, "fresh": 5e-4})


def test_the_cases_can_be_listed_without_a_gpu() -> None:
    assert set(DESCRIBED) == set(SUITES)
    cases = SUITES["gpu"](LARGE)
    assert len({case.label for case in cases}) == len(cases)
    assert {case.rule for case in cases} == set(RULES)
    assert all(case.kind == "gpu" and case.bytes for case in cases)
    assert all(bar in case.against for case in cases for bar in case.bars)
    sizes = [case.elements for case in cases]
    assert 1 << 28 in sizes
    assert 64_000 in sizes
    assert 640_000 in sizes
    assert 1_235_814_400 in sizes


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.bench.timing import HOST

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "clock", lambda: HOST)


LABELS = (
    "Adam f32, 2K", "RMSprop f32", "SGD f32", "Lion f32", "split8", "Adam bf16, 512", "EMA",
    "gradients replaced, 1,000", "misaligned gradients, 512", "graph replay, 1,000",
)  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_a_case_runs_with_the_cpu_in_a_gpus_place(
    on_the_cpu: None, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in SUITES["gpu"](64) if c.label.startswith(label) or f" {label}" in c.label)
    steps: list[Callable[[], object]] = []
    if case.graph:  # there are none on the CPU, and no capturable steps

        def captured(step: Callable[[], object]) -> Callable[[], object]:
            steps.append(step)
            return step

        monkeypatch.setattr(gpu, "captured", captured)
        case = dataclasses.replace(case, options={})
    result = run_case(case, "gpu", rounds=2)
    ran = {OURS} | ({CEILING} & set(case.against)) | {n for n in gpu.TORCH if n in case.against}
    ran -= set(gpu.TORCH) if case.rule == "Lion" else {"fused"} if case.rule == "RMSprop" else set()
    assert ran <= set(result.times)
    assert len(steps) == (len(ran) if case.graph else 0)
    text = render([result])
    assert case.label in text
    assert "copy_" in text or CEILING not in case.against
    save([result], tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["results"][0]["case"] == case.label


def test_misaligned_gradients_are_those_of_the_aligned_case() -> None:
    import torch

    grads = [torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0]), torch.arange(4.0)]
    found = contenders._bucket(grads)
    for a, b in zip(found, grads, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() % 16 != 0
    assert len({a.untyped_storage().data_ptr() for a in found}) == 1


def test_a_case_is_found_by_its_whole_name() -> None:
    names = [case.label for case in SUITES["short"](64)]
    assert "Adam" in names
    assert "NAdam" in names
    for name in ("Adam", "adam"):
        found = [r.case.label for r in run_suites(["short"], 64, only=name, rounds=1, progress=False)]
        assert found == (["Adam"] if name == "Adam" else [n for n in names if "adam" in n.lower()])


def test_each_case_has_a_process_and_is_written_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that fails, or does not end, is named and does not end the run."""
    to = tmp_path / "results" / "gpu.json"
    seen: list[int] = []

    def run(command: list[str], *, check: bool, timeout: float) -> None:
        label = command[command.index("--case") + 1]
        seen.append(len(json.loads(to.read_text())["results"]) if to.exists() else -1)
        assert command[-2:] == ["--seconds", "1"]
        assert timeout > 60
        if label == "broken":
            raise subprocess.CalledProcessError(1, command)
        if label == "endless":
            raise subprocess.TimeoutExpired(command, timeout)
        written = {"machine": {"gpu": "a GPU"}, "results": [{"case": label}]}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(written))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setattr(gpu, "labels", lambda: ["first", "broken", "endless", "last", "other"])
    assert gpu.main(["--json", str(to), "--case", "s", "--seconds", "1"]) == 1
    assert seen == [-1, 1, 1]
    data = json.loads(to.read_text())
    assert [r["case"] for r in data["results"]] == ["first", "last"]
    assert data["machine"] == {"gpu": "a GPU"}
    assert set(data["failed"]) == {"endless"}
    assert gpu.main(["--json", str(to), "--case", "broken", "--seconds", "1"]) == 1
    assert gpu.main(["--json", str(to), "--case", "last", "--seconds", "1"]) == 0
    assert gpu.main(["--json", str(to), "--case", "nothing has this name", "--seconds", "1"]) == 1
    assert list(to.parent.iterdir()) == [to]


def test_the_cases_are_listed_by_a_process_of_its_own() -> None:
    assert gpu.labels(1024) == [case.label for case in SUITES["gpu"](1024)]


def test_a_peer_that_is_missing_is_not_measured_rather_than_missed() -> None:
    case = Case("AdamW", ("FlashOptim",), rule="AdamW", shapes=((8,),), kind="gpu", bars={"FlashOptim": 1.3})
    text = render([Result("gpu", case, {OURS: Times(1, [1e-3] * 5)})])
    assert "not measured" in text
    assert "missed" not in text


def test_ours_may_not_be_torchs_own_step(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.torch import FallbackWarning, _engine

    monkeypatch.setattr(_engine, "group_reason", lambda group: "it is not there")
    with pytest.raises(FallbackWarning, match="it is not there"):
        run_case(Case("Adam", ("default",), shapes=((8,),), kind="gpu"), rounds=1)


def test_the_table_has_times_and_bars_and_the_copy_as_ceiling() -> None:
    def result(bars: dict[str, float], label: str) -> Result:
        case = Case(label, ("fused", CEILING), shapes=((1 << 20,),), kind="gpu", bars=bars)
        seconds = {OURS: 28e-6, "fused": 42e-6, CEILING: 7e-6}  # 28 bytes a parameter against 8
        return Result("gpu", case, {name: Times(1, [s] * 5) for name, s in seconds.items()})

    rows = [result({"fused": 1.0, CEILING: 0.92}, "promised"), result({}, "shown")]
    assert rows[0].share == pytest.approx(0.875)
    assert [bar.ok for bar in rows[0].bars] == [True, False]
    text = render(rows)
    assert "of copy_" in text
    assert "1.50x" in text
    assert "share of copy_" in text
    assert "missed" in text
    assert "mul_" not in text


def test_a_run_in_which_every_test_is_skipped_fails() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--gpu",
        "-q",
        str(Path(__file__).parents[1] / "gpu" / "test_gpu.py"),
        "-k",
        "cupys",
    ]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300, check=False
    )
    assert "no test has run: all were skipped" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1


def test_a_machine_without_a_gpu_is_told_why_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "torch finds no GPU")
    assert main(["bench", "--suite", "gpu", "--quiet"]) == 2
    assert "skipped gpu: torch finds no GPU" in capsys.readouterr().err
