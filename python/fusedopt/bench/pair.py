"""Two gloo processes that time the optimizer's part of data-parallel training, for the suite ``integrations``.

Both processes build the same model, wrapped by DDP or sharded by FSDP2, and compute gradients in one backward pass.
Then both time every contender's ``step`` simultaneously, after a barrier; the slower process counts.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from fusedopt.bench.cases import Case
from fusedopt.bench.timing import Contender

RANKS = 2

Maker = Callable[[str, Case, Any], Any]
"""Creates a contender's optimizer from its name, the case and the parameters; None if it does not exist. Must be
picklable: a function of a module."""


class Pair:
    """The parent process's side."""

    def __init__(self, case: Case, make: Maker) -> None:
        import torch
        import torch.multiprocessing as mp

        context = mp.get_context("spawn")
        folder = tempfile.TemporaryDirectory()
        threads = max(1, torch.get_num_threads() // RANKS)
        self._pipes: list[Any] = []
        processes = []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder.name, threads, case, make, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            processes.append(process)
        self._close = weakref.finalize(self, _stop, self._pipes, processes, folder)

    def ask(self, *message: Any) -> list[Any]:
        """Sends a message to both processes and returns their answers."""
        for pipe in self._pipes:
            pipe.send(message)
        answers = []
        for pipe in self._pipes:
            good, answer = pipe.recv()
            if not good:
                raise RuntimeError(answer)
            answers.append(answer)
        return answers

    def contender(self, name: str) -> Contender | None:
        """A contender that runs and is timed in the processes."""
        if not all(self.ask("build", name)):
            return None
        return Contender(lambda: None, measure=lambda calls: max(self.ask("run", name, calls)))


def _stop(pipes: list[Any], processes: list[Any], folder: Any) -> None:
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(20)
        if process.is_alive():
            process.kill()
    folder.cleanup()


def _serve(rank: int, folder: str, threads: int, case: Case, make: Maker, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    params = _trained(case, rank)
    optimizers: dict[str, Any] = {}
    while (message := pipe.recv()) is not None:
        try:
            if message[0] == "build":
                made = make(message[1], case, params)
                if made is not None:
                    optimizers[message[1]] = made
                pipe.send((True, made is not None))
            else:
                _, name, calls = message
                step = optimizers[name].step
                dist.barrier()
                start = time.perf_counter()
                for _ in range(calls):
                    step()
                pipe.send((True, time.perf_counter() - start))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def _trained(case: Case, rank: int) -> list[Any]:
    """The parameters of a model with these shapes, after one forward and backward pass."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weights = torch.nn.ParameterList(torch.randn(shape) for shape in case.shapes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([(w * w).mean() * x for w in self.weights]).sum()

    model: Any = Model()
    if case.kind == "fsdp":
        fully_shard(model)
        whole = model
    else:
        whole = DistributedDataParallel(model)
    whole(torch.tensor(1.0 + rank)).backward()
    return list(model.parameters())
