"""A differential fuzzer: random programs over our optimizers and torch's plain loop, which have to stay together.

    python tests/torch_front/fuzz_torch.py --cases 100000

Cases run in processes of their own, so that one that crashes is a finding like any other. What fails is made smaller
and printed with the command that runs it again; a table says how often each event met each dtype, layout and size. What
the programs do and how the two sides are compared stands in torch_programs.py. --core takes another build of the
compiled module: make sanitize runs some cases with one that has the address sanitizer in it.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Program = dict[str, Any]
CHUNK = 50  # cases handed out at once
PATIENCE, START = 120.0, 1200.0  # seconds without an answer that count as a hang: of a case; of the first imports


def use_core(path: str) -> None:
    """Takes the compiled module from this file in place of the installed one."""
    spec = importlib.util.spec_from_file_location("fusedopt._core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fusedopt._core"] = module


# -- the processes that run the cases ---------------------------------------------------------------------------------


def serve() -> None:
    """Answers requests on stdin, a line each: a first and a last number, or a program. Each is done by a child, forked
    before torch has started threads, so that a crash costs no new import of torch."""
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing else may write there
    import torch_programs  # noqa: F401

    gc.freeze()  # a collection in a child need not look at every module
    faulthandler.enable()  # where a case hangs
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                with os.fdopen(answers, "w", buffering=1) as out:
                    answer(json.loads(line), out)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        how = "" if not status else f"exit status {status}" if status > 0 else signal.Signals(-status).name
        os.write(answers, json.dumps({"end": how}).encode() + b"\n")


def answer(request: Any, out: Any) -> None:
    import torch

    from torch_programs import Difference, Run, generate

    torch.set_num_threads(2)
    runs = []

    def counted() -> None:
        seen: collections.Counter[tuple[str, str]] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for run in runs:
            seen.update(run.seen)
            counts.update(run.counts)
        print(json.dumps({"seen": [[*k, n] for k, n in seen.items()], "counts": counts}), file=out)
        runs.clear()

    for case in range(*request) if isinstance(request, list) else [ast.literal_eval(request)]:
        number = case if isinstance(case, int) else -1
        print(json.dumps({"at": number}), file=out)
        runs.append(Run(generate(case) if isinstance(case, int) else case))
        try:
            runs[-1].go()
        except Difference as error:
            print(json.dumps({"bad": number, "why": str(error)}), file=out)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            why = f"the fuzzer itself, line {place.lineno}: {type(error).__name__}: {error}"
            print(json.dumps({"bad": number, "why": why}), file=out)
        if len(runs) == 10:
            counted()
    counted()


class Worker:
    """A process that runs cases, each request in a child of its own."""

    def __init__(self, core: str | None) -> None:
        self.command = [sys.executable, __file__, "--serve", *(["--core", core] if core else [])]
        self.start()

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        # What is freed is overwritten: a value read from there is then a wrong one. Threads without work sleep.
        env = {**os.environ, "MALLOC_PERTURB_": "165", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=env,
            start_new_session=True,
        )
        self.rest, self.ready = b"", False

    def ask(self, request: Any) -> Any:
        """Yields the answers to one request; after a crash the last of them has "crash" and "at"."""
        assert self.process.stdin is not None
        self.errors.seek(0)
        self.errors.truncate()
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        at = None
        while True:
            seconds = PATIENCE if self.ready else START
            line = self._line(seconds)
            if line is None:
                os.killpg(self.process.pid, signal.SIGABRT)  # faulthandler writes where it is
                self.process.wait()
                why = self._crash(f"no answer for {seconds:g} s")
                self.close()
                self.start()
                yield {"crash": why, "at": at}
                return
            found = json.loads(line)
            self.ready |= "ready" in found
            if "end" in found:
                if found["end"]:
                    yield {"crash": self._crash(found["end"]), "at": at}
                return
            at = found.get("at", at)
            yield found

    def _line(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                return None
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        return line

    def _crash(self, how: str) -> str:
        self.errors.seek(0)
        text = re.sub(r"\nExtension modules:.*", "", self.errors.read().decode(errors="replace"))
        found = re.search(r"(ERROR: AddressSanitizer: \S+|runtime error: .*)(?:.*\n.*){0,12}", text)
        return f"crash: {found[1]}\n{found[0]}" if found else f"crash: {how}\n{text[-4000:]}"

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the child, too
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.errors.close()


# -- findings ---------------------------------------------------------------------------------------------------------


def kind(why: str) -> str:
    """The finding without its numbers: what is alike is reported once."""
    first = re.sub(r"0x[0-9a-f]+|, which requires.*", "#", why.split("\n")[0])
    first = re.sub(r"(event|parameter) \d+", r"\1", first)
    first = re.sub(r"parameter, \w+ \(.*?\): (torch has|strides).*", r"state \1", first)
    first = re.sub(r"parameter, (step|param)?.*", r"\1 differs", first)
    return re.sub(r"[\d.]+", "#", first)[:110]


def fails(worker: Worker, program: Program) -> str | None:
    """Why this program fails, if it does."""
    why = None
    for found in worker.ask(repr(program)):
        why = found.get("crash", found.get("bad") and found["why"]) or why
    return why


def smaller(program: Program) -> Iterator[Program]:
    """Programs with something less or something simpler in them."""
    events, params = program["events"], program["params"]
    for i in range(len(params) if len(params) > 1 else 0):
        yield {**program, "params": params[:i] + params[i + 1 :]}
    for key in program["options"]:
        yield {**program, "options": {k: v for k, v in program["options"].items() if k != key}}
    for key, value in (("groups", 1), ("wide_default", False), ("ours", {})):
        if program[key] != value:
            yield {**program, key: value}
    for i, spec in enumerate(params):
        for key, value in (("layout", "plain"), ("dtype", "f32"), ("shape", (3,))):
            if spec[key] != value:
                yield {**program, "params": [*params[:i], {**spec, key: value}, *params[i + 1 :]]}
    for i, (name, which, seed) in enumerate(events):
        if which:
            yield {**program, "events": [*events[:i], (name, 0, seed), *events[i + 1 :]]}


def shrunk(worker: Worker, program: Program, why: str, seconds: float = 60) -> tuple[Program, str]:
    """The smallest program found that fails in the same way."""
    end = time.monotonic() + seconds

    def alike(candidate: Program) -> bool:
        nonlocal program, why
        found = fails(worker, candidate) if time.monotonic() < end else None
        if found is None or kind(found) != kind(why):
            return False
        program, why = candidate, found
        return True

    before = None
    while program != before and time.monotonic() < end:
        before = program
        size = (len(program["events"]) + 1) // 2
        while size:
            at = 0
            while at < len(program["events"]):
                events = program["events"]
                if not alike({**program, "events": events[:at] + events[at + size :]}):
                    at += size
            size //= 2
        while any(alike(candidate) for candidate in smaller(program)):
            pass
    return program, why


class Fuzzer:
    """Hands out the cases and gathers what comes back."""

    def __init__(self, first: int, cases: int, jobs: int, failures: int, core: str | None) -> None:
        self.core, self.failures, self.jobs = core, failures, jobs
        self.chunks: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for at in range(first, first + cases, CHUNK):
            self.chunks.put([at, min(at + CHUNK, first + cases)])
        self.first, self.cases, self.done = first, cases, 0
        self.seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: dict[str, list[tuple[int, str]]] = {}
        self.lock = threading.Lock()

    def run(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(self.work) for _ in range(self.jobs)]:
                future.result()

    def work(self) -> None:
        worker = Worker(self.core)
        while len(self.found) < self.failures:
            try:
                chunk = self.chunks.get_nowait()
            except queue.Empty:
                break
            at, end = chunk
            while at < end:
                first, at = at, end
                for found in worker.ask([first, end]):
                    if "bad" in found:
                        self.note(found["bad"], found["why"])
                    elif "crash" in found:
                        case = first if found["at"] is None else found["at"]
                        self.note(case, found["crash"])
                        at = case + 1
                    elif "counts" in found:
                        with self.lock:
                            self.seen.update({(a, b): n for a, b, n in found["seen"]})
                            self.counts.update(found["counts"])
            with self.lock:
                self.done += end - chunk[0]
        worker.close()

    def note(self, number: int, why: str) -> None:
        with self.lock:
            self.found.setdefault(kind(why), []).append((number, why))


def report(fuzzer: Fuzzer, shrink: bool = True) -> None:
    from torch_programs import generate

    worker = Worker(fuzzer.core)
    for name, places in fuzzer.found.items():
        number, why = places[0]
        print(f"\n== {len(places)} of {fuzzer.done} cases: {name}\n   cases {[n for n, _ in places[:8]]}")
        program = generate(number)
        alone = fails(worker, program)
        if alone is None:
            print(
                f"   case {number} fails after others in the same process only (from {number // CHUNK * CHUNK}): {why}"
            )
        else:
            program, why = shrunk(worker, program, alone) if shrink else (program, alone)
            print("   " + why.replace("\n", "\n   "))
            print(f'   python tests/torch_front/fuzz_torch.py --program "{program!r}"', flush=True)
    worker.close()


def table(fuzzer: Fuzzer) -> str:
    """How often each event met each dtype, layout and size."""
    from torch_programs import EVENTS

    words = ["f64", "f32", "bf16", "f16", "contiguous", "offset", "permuted", "channels_last", "gaps", "misaligned"]
    words += ["negated", "expanded", "sliding", "no memory", "sparse", "0-d", "empty", "<1024", ">=1024", ">64 dims"]
    heads = [w if len(w) < 8 else {"channels_last": "ch.last", "no memory": "no mem"}.get(w, w[:7]) for w in words]
    lines = [" " * 26 + "".join(f"{h:>9}" for h in heads)]
    for name in EVENTS:
        lines.append(f"{name:26}" + "".join(f"{fuzzer.seen[name, w] or '-':>9}" for w in words))
    lines += [f"{n:>10} {what}" for what, n in sorted(fuzzer.counts.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--failures", type=int, default=5, help="stop after so many kinds of findings")
    parser.add_argument("--program", help="run this one program")
    parser.add_argument("--core", help="a build of fusedopt._core to use")
    parser.add_argument("--no-shrink", action="store_true", help="print findings as they are")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.core:
        use_core(args.core)
    if args.serve:
        serve()
        return 0
    if args.program:
        why = fails(Worker(args.core), ast.literal_eval(args.program))
        print(why or "no difference")
        return bool(why)
    began = time.monotonic()
    fuzzer = Fuzzer(args.seed, args.cases, args.jobs, args.failures, args.core)
    fuzzer.run()
    print(table(fuzzer))
    took = time.monotonic() - began
    report(fuzzer, not args.no_shrink)
    different = sum(map(len, fuzzer.found.values()))
    print(
        f"{fuzzer.done} cases from {args.seed} in {took:.0f} s: {different} with a difference, "
        f"of {len(fuzzer.found)} kinds"
    )
    return bool(fuzzer.found)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    sys.exit(main())
