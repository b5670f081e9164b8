"""The package as a whole: what an import costs and loads, settings and environment, the command line, forks, Python
threads, flush-to-zero mode. Mostly in fresh interpreters."""

import importlib
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt.rules import RULES
from helpers import assert_same_bits


def python(code: str, env: Mapping[str, str] | None = None, timeout: float = 300, ok: bool = True) -> str:
    """The output of a fresh interpreter with warnings as errors."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**clean, **(env or {})},
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


# ---- import


def test_import_loads_neither_torch_nor_matplotlib_nor_sklearn() -> None:
    heavy = "torch matplotlib sklearn scipy pandas ml_dtypes fusedopt.torch fusedopt.plots fusedopt.bench tqdm"
    loaded = python(f"import fusedopt, sys; print([m for m in {heavy.split()!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_a_numpy_step_loads_no_more() -> None:
    code = "import fusedopt, numpy as np, sys; a = np.ones(3); fusedopt.Adam(a).step(np.ones(3)); "
    assert python(code + "print('torch' in sys.modules, 'matplotlib' in sys.modules)").split() == ["False", "False"]


def test_importing_it_imports_numpy_alone() -> None:
    """Nothing else of what is installed, which would also make the import slow."""
    code = (
        "import sys, numpy; names = lambda: {m.partition('.')[0] for m in sys.modules}; before = names(); "
        "import fusedopt; print(*names() - before - set(sys.stdlib_module_names))"
    )
    assert python(code).split() == ["fusedopt"]


def test_every_public_name_is_there_and_documented() -> None:
    for name in fusedopt.__all__:
        value = getattr(fusedopt, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name
    for rule in RULES.values():
        assert {rule.name, rule.function} <= set(fusedopt.__all__)
        assert getattr(fusedopt, rule.name).__name__ == rule.name
        assert getattr(fusedopt, rule.function).__name__ == rule.function


def test_importing_torch_before_or_after_gives_the_same_bits() -> None:
    pytest.importorskip("torch")
    body = (
        "p = np.linspace(-1, 1, 1_000_003).astype('f4'); s = [np.zeros_like(p) for _ in 'ab']; "
        "fusedopt.set_num_threads(3); fusedopt.adam_(p, p[::-1].copy(), *s, step=1); print(hash(p.tobytes()))"
    )
    env = {"PYTHONHASHSEED": "0"}
    imports = (
        "import numpy as np, fusedopt",
        "import torch, numpy as np, fusedopt",
        "import numpy as np, fusedopt, torch",
    )
    assert len({python(f"{line}\n{body}", env) for line in imports}) == 1


# ---- settings


def test_config_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    config = fusedopt.config()
    assert {"version", "isa", "isas", "threads", "runtime", "cuda", "numpy", "torch"} <= set(config)
    assert config["version"] == fusedopt.__version__
    assert config["isa"] == fusedopt.get_isa() == fusedopt.isas()[-1]
    assert config["threads"] == fusedopt.get_num_threads() >= 1
    fusedopt.show_config()
    shown = capsys.readouterr().out
    for value in (fusedopt.__version__, fusedopt.get_isa(), np.__version__):
        assert value in shown


@pytest.mark.parametrize("command", [["-m", "fusedopt", "info"]])
def test_info_on_the_command_line(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True)
    assert fusedopt.__version__ in done.stdout
    assert fusedopt.isas()[-1] in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "fusedopt", "nonsense"], capture_output=True, timeout=120, check=False
    )
    assert wrong.returncode == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="Linux on x86-64")
def test_the_instruction_sets_are_those_of_the_processor() -> None:
    """Whatever compiled the core: Zig's runtime library answers no to every __builtin_cpu_supports."""
    (flags, *_) = re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    avx2 = {"avx2", "fma"} <= set(flags.split())
    avx512 = avx2 and {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(flags.split())
    assert list(fusedopt.isas()) == ["baseline", *["avx2"] * avx2, *["avx512"] * avx512]


def test_isas_are_known_names_with_the_baseline_first() -> None:
    isas = fusedopt.isas()
    assert isas[0] == "baseline"
    assert list(isas) == [name for name in ("baseline", "avx2", "avx512") if name in isas]
    for name in isas:
        fusedopt.set_isa(name)
        assert fusedopt.get_isa() == name
    fusedopt.set_isa(None)
    assert fusedopt.get_isa() == isas[-1]


@pytest.mark.parametrize("name", ["", "sse9", "AVX2 ", "neon"])
def test_an_unknown_isa_is_refused_and_changes_nothing(name: str) -> None:
    before = fusedopt.get_isa()
    with pytest.raises(ValueError, match="baseline"):
        fusedopt.set_isa(name)
    assert fusedopt.get_isa() == before
    with pytest.raises(TypeError):
        fusedopt.set_isa(512)  # type: ignore[arg-type]


def test_thread_counts() -> None:
    default = fusedopt.get_num_threads()
    fusedopt.set_num_threads(3)
    assert fusedopt.get_num_threads() == 3
    for bad in (0, -1, 2.5, "four", True):
        with pytest.raises((TypeError, ValueError)):
            fusedopt.set_num_threads(bad)  # type: ignore[arg-type]
        assert fusedopt.get_num_threads() == 3
    fusedopt.set_num_threads(None)
    assert fusedopt.get_num_threads() == default


def test_the_environment_forces_isa_and_threads() -> None:
    code = "import fusedopt; print(fusedopt.get_isa(), fusedopt.get_num_threads())"
    for isa in fusedopt.isas():
        assert python(code, {"FUSEDOPT_ISA": isa, "FUSEDOPT_NUM_THREADS": "5"}).split() == [isa, "5"]
    assert python(code, {"OMP_NUM_THREADS": "3"}).split()[1] == "3"
    assert python(code, {"OMP_NUM_THREADS": "3", "FUSEDOPT_NUM_THREADS": "6"}).split()[1] == "6"
    assert (
        python(
            "import fusedopt; fusedopt.set_num_threads(2); print(fusedopt.get_num_threads())",
            {"FUSEDOPT_NUM_THREADS": "5"},
        )
        == "2\n"
    )


@pytest.mark.parametrize(
    "env", [{"FUSEDOPT_ISA": "sse9"}, {"FUSEDOPT_NUM_THREADS": "many"}, {"FUSEDOPT_NUM_THREADS": "0"}], ids=str
)
def test_a_wrong_environment_variable_is_named(env: dict[str, str]) -> None:
    assert next(iter(env)) in python("import fusedopt", env, ok=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_the_thread_count_follows_the_cpu_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "import fusedopt; print(fusedopt.get_num_threads())"
    env = {k: "" for k in ("OMP_NUM_THREADS", "FUSEDOPT_NUM_THREADS") if k in os.environ}
    assert python(code, env).strip() == "1"


def test_the_thread_count_follows_torch() -> None:
    pytest.importorskip("torch")
    code = "import torch, fusedopt; torch.set_num_threads(3); print(fusedopt.get_num_threads())"
    assert python(code).strip() == "3"
    assert python(code, {"FUSEDOPT_NUM_THREADS": "2"}).strip() == "2"


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True, [1.0], 1j, np.complex64(1)], ids=str)
def test_max_grad_norm_has_the_same_range_everywhere(value: object) -> None:
    torch = pytest.importorskip("torch")
    optim = importlib.import_module("fusedopt.torch")
    model = torch.nn.Linear(2, 1)
    opt, here = optim.SGD(model.parameters(), lr=0.1), fusedopt.SGD(np.ones(3), lr=0.1)
    refused: list[Callable[[], object]] = [
        lambda: fusedopt.SGD(np.ones(3), lr=0.1, max_grad_norm=value),
        lambda: (setattr(here, "max_grad_norm", value), here.step(np.ones(3))),
        lambda: optim.SGD(model.parameters(), lr=0.1, max_grad_norm=value),
        lambda: setattr(opt, "max_grad_norm", value),
        lambda: optim.convert(torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=value),
        lambda: optim.Trainer(model, torch.nn.MSELoss(), opt, max_grad_norm=value),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"max_grad_norm: expected a positive number or None, got"):
            call()
    assert opt.max_grad_norm is None


# ---- the processor's mode


def test_denormal_arithmetic_is_as_before_after_every_call() -> None:
    tiny = np.full(67, 5e-324)
    for rule in RULES.values():
        for dtype in ("f4", "f8"):
            getattr(fusedopt, rule.name)(np.ones(40_000, dtype), max_grad_norm=1.0).step(np.ones(40_000, dtype))
            assert (tiny * 1.0 == tiny).all()
            assert (tiny + 0.0 > 0).all()


def test_flush_to_zero_is_as_before_after_every_call_and_does_not_reach_the_step() -> None:
    """torch enables flush-to-zero; it stays enabled, but a step keeps denormals in every thread."""
    pytest.importorskip("torch")
    code = """
import numpy as np, torch, fusedopt
if not torch.set_flush_denormal(True):
    print("kept")
    raise SystemExit  # this processor has no such mode
one, tiny = np.ones(9), np.full(9, 1e-310)
flushes = lambda: (tiny * one == 0.0).all() and (one * 2e-308 * 0.25 == 0.0).all()
assert flushes()
for n in (1, 1_000_003):
    for threads in (1, 4):
        fusedopt.set_num_threads(threads)
        p, g, b = np.full(n, 8e-323), np.full(n, 3e-323), np.zeros(n)
        fusedopt.sgd_(p, g, b, lr=1.0, momentum=0.5, first=True)
        assert flushes()
        bits = p.view(np.uint64)
        assert (bits == 10).all(), bits[:3]
        assert (b.view(np.uint64) == 6).all()
        opt = fusedopt.AdamW(p, max_grad_norm=1.0)
        opt.step(g)
        assert flushes()
        try:
            fusedopt.sgd_(p, p)
        except ValueError:
            pass
        assert flushes()
torch.set_flush_denormal(False)
assert not (tiny * one == 0.0).any()
fusedopt.sgd_(p, g)
assert not (tiny * one == 0.0).any()
print("kept")
"""
    assert python(code) == "kept\n"


def test_floating_point_warnings_of_numpy_are_as_before() -> None:
    """The step neither raises nor clears floating-point flags that NumPy would report."""
    with np.errstate(all="raise"):
        p = np.array([np.inf, np.nan, 1e300, 5e-324])
        fusedopt.adam_(p, np.full(4, np.inf), np.zeros(4), np.zeros(4), step=1)
        fusedopt.sgd_(p, np.full(4, 1e300), lr=1e300)
        np.add(1.0, 2.0)
        with pytest.raises(FloatingPointError):
            np.divide(1.0, np.zeros(2))


# ---- fork and threads

FORK = """
import os, signal, sys
{imports}
import numpy as np, fusedopt
def step():
    p = np.linspace(-1, 1, 1_000_003).astype('f4')
    opt = fusedopt.Adam(p, lr=0.1, max_grad_norm=1.0)
    for _ in range(3):
        opt.step(p[::-1].copy())
    return p.tobytes()
fusedopt.set_num_threads(4)
want = step()
{before}
for generation in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(40)  # a hang ends as a signal
        same = step() == want
        grandchild = os.fork()
        if grandchild == 0:
            signal.alarm(40)
            os._exit(0 if step() == want else 3)
        same = same and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
        os._exit(0 if same else 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, code
    assert step() == want  # and the parent goes on
print("done")
"""


def forking(imports: str, before: str = "") -> str:
    # Python >= 3.12 warns about a fork in a process with threads, which is tested here.
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
    return python(code + FORK.format(imports=imports, before=before))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_steps_after_its_parent_has() -> None:
    assert forking("") == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_steps_after_its_parent_has_used_torchs_threads() -> None:
    pytest.importorskip("torch")
    assert forking("import torch", "torch.set_num_threads(4); torch.ones(2_000_000).exp().sum()") == "done\n"


def test_optimizers_in_several_threads_do_not_meet() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(200_003).astype(np.float32)
    grads = [rng.standard_normal(200_003).astype(np.float32) for _ in range(3)]
    names = [*RULES, *RULES]

    def run(name: str) -> np.ndarray:
        p = start.copy()
        opt = getattr(fusedopt, name)(p, max_grad_norm=1.0)
        for g in grads * 2:
            opt.step(g)
        return p

    fusedopt.set_num_threads(1)
    want = {name: run(name) for name in RULES}
    fusedopt.set_num_threads(3)
    got: list[np.ndarray | None] = [None] * len(names)

    def work(i: int) -> None:
        got[i] = run(names[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
        assert not t.is_alive()
    for name, p in zip(names, got, strict=True):
        assert p is not None
        assert_same_bits(p, want[name], name)


def test_one_optimizer_in_several_threads_does_not_crash() -> None:
    """The calls may take turns or raise RuntimeError; the process survives, and every completed step is counted."""
    code = """
import threading, numpy as np, fusedopt
params = [np.zeros((2000, 1000), 'f4').T, *(np.zeros(100, 'f4') for _ in range(100))]
grads = [np.ones((1000, 2000), 'f4'), *(np.ones(100, 'f4') for _ in range(100))]
opt = fusedopt.Adam(params)
done, refused = [], []
def work():
    for _ in range(40):
        try:
            opt.step(grads)
            done.append(1)
        except RuntimeError:
            refused.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert opt.state[0]['step'] == len(done), (opt.state[0]['step'], len(done))
print(len(done) + len(refused))
"""
    assert python(code) == "160\n"


def test_the_gil_is_released_during_a_large_call() -> None:
    """Another thread makes progress during one call."""
    n = 6_000_000
    arrays = [np.zeros(n) for _ in range(4)]
    fusedopt.set_isa("baseline")  # the slowest
    fusedopt.set_num_threads(1)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        during = 0
        for step in range(1, 6):
            begin = time.perf_counter()
            fusedopt.adam_(*arrays, step=step)
            end = time.perf_counter()
            tenth = (end - begin) / 10
            during += sum(begin + tenth < t < end - tenth for t in ticks)
            if during > 5:
                break
    finally:
        stop.set()
        ticker.join()
    assert during > 5


def test_an_exception_in_one_thread_does_not_hold_up_another() -> None:
    """Errors are raised outside the parallel region, so the engine is usable afterwards."""
    p = np.ones(300_000)
    for _ in range(20):
        with pytest.raises(ValueError, match="grad"):
            fusedopt.sgd_(p, np.ones(299_999))
        fusedopt.sgd_(p, np.zeros(300_000))
    assert (p == 1).all()


def test_objects_are_freed() -> None:
    """In-place functions keep no reference to an argument, and an optimizer's arrays are freed with it."""
    param, grad, state = np.ones(1000), np.ones(1000), np.zeros(1000)
    fusedopt.sgd_(param, grad, state, momentum=0.9, first=True)
    counts = [sys.getrefcount(a) for a in (param, grad, state)]
    for _ in range(100):
        fusedopt.sgd_([param], [grad], [state], momentum=0.9)
        with pytest.raises(ValueError, match="grad"):
            fusedopt.sgd_([param], [grad[1:]], [state], momentum=0.9)
    assert [sys.getrefcount(a) for a in (param, grad, state)] == counts
    opt = fusedopt.SGD(param, momentum=0.9)
    opt.step(grad)
    opt.step(grad.copy())
    del opt
    assert [sys.getrefcount(a) for a in (param, grad, state)] == counts
