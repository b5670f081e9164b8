"""Writes pickles and checkpoints of the installed version, to check that later versions load them bit-identically.

    python tests/support/written.py tests/house/written_by_0.1.0

Arrays are small and contain multiples of 1/64 up to 1, which are exact in 16 bits.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt
from fusedopt.schedules import Cosine

N = 70
"""Elements of a parameter: two blocks of 64 for the 8-bit states."""

Options = dict[str, Any]

CASES: dict[str, tuple[str, str, Options]] = {
    "SGD": ("SGD", "float32", {"momentum": 0.9, "nesterov": True}),
    "Adagrad": ("Adagrad", "float64", {"lr_decay": 0.1}),
    "RMSprop": ("RMSprop", "float32", {"centered": True, "momentum": 0.5}),
    "Adam": ("Adam", "float32", {"amsgrad": True, "max_grad_norm": 0.5}),
    "AdamW": ("AdamW", "float32", {"ema_decay": 0.9, "l1": 1e-3}),
    "NAdam": ("NAdam", "float32", {}),
    "RAdam": ("RAdam", "float32", {}),
    "Adamax": ("Adamax", "float32", {}),
    "Adadelta": ("Adadelta", "float32", {}),
    "Lion": ("Lion", "float32", {}),
    "AdamW, int8": ("AdamW", "float32", {"state_dtype": "int8"}),
    "AdamW, bfloat16, split8, int8": ("AdamW", "bfloat16", {"master": "split8", "state_dtype": "int8"}),
    "Adam, bfloat16, split16": ("Adam", "bfloat16", {"master": "split16", "state_dtype": "bfloat16"}),
    "Adam, float16, master": ("Adam", "float16", {"master": "float32", "state_dtype": "float32"}),
    "Lion, bfloat16, rounded": ("Lion", "bfloat16", {"stochastic_rounding": True, "seed": 7}),
}
"""Label -> class, dtype of the parameter, options."""


def values(n: int, seed: int) -> np.ndarray[Any, Any]:
    """Multiples of 1/64 from -1 to 1, by integers alone."""
    return ((np.arange(n) * 37 + seed * 53) % 127 - 63).astype(np.float32) / 64


# ---- NumPy


def numpy_steps(opt: Any, first: int, steps: int) -> None:
    for k in range(first, first + steps):
        opt.step([values(p.size, k + 1).astype(p.dtype) for p in opt.param_groups[0]["params"]])


def numpy_optimizers() -> dict[str, Any]:
    """Every case after two steps, and one whose learning rate is a schedule."""
    made: dict[str, Any] = {}
    for label, (name, dtype, options) in CASES.items():
        if dtype != "bfloat16":  # not a NumPy dtype: its pickle would name ml_dtypes
            made[label] = getattr(fusedopt, name)([values(N, 0).astype(dtype)], **options)
    made["AdamW, schedule"] = fusedopt.AdamW([values(N, 0)], lr=Cosine(0.1, 10))
    for opt in made.values():
        numpy_steps(opt, 0, 2)
    return made


def write_numpy() -> None:
    made = numpy_optimizers()
    states = {label: opt.state_dict() for label, opt in made.items()}
    Path("numpy.pickle").write_bytes(pickle.dumps({"optimizers": made, "state_dicts": states}, protocol=4))


# ---- torch


def torch_steps(opt: Any, first: int, steps: int) -> None:
    import torch

    for k in range(first, first + steps):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.from_numpy(values(p.numel(), k + 1)).to(p.dtype)
        opt.step()


def torch_parameter(dtype: str) -> Any:
    import torch

    return torch.nn.Parameter(torch.from_numpy(values(N, 0)).to(getattr(torch, dtype)))


def torch_optimizers() -> dict[str, Any]:
    """Every case after two steps."""
    import fusedopt.torch as optim

    made = {
        label: getattr(optim, name)([torch_parameter(dtype)], **options)
        for label, (name, dtype, options) in CASES.items()
    }
    for opt in made.values():
        torch_steps(opt, 0, 2)
    return made


def offload() -> Any:
    """After two steps; contains only state dicts, no pickles."""
    import fusedopt.torch as optim

    made = optim.Offload([torch_parameter("bfloat16")], optim.AdamW, lr=0.01)
    torch_steps(made, 0, 2)
    return made


def scheduler() -> Any:
    """After two steps of the optimizer that it holds."""
    import fusedopt.torch as optim

    made = optim.ScheduledLR(optim.SGD([torch_parameter("float32")], momentum=0.9), lr=Cosine(0.1, 10))
    for k in range(2):
        torch_steps(made.optimizer, k, 1)
        made.step()
    return made


def batches() -> list[tuple[Any, Any]]:
    import torch

    return [
        (torch.from_numpy(values(12, k).reshape(4, 3)), torch.from_numpy(values(8, k + 9).reshape(4, 2)))
        for k in range(3)
    ]


def trainer(schedule: Callable[[int], float], **files: str) -> Any:
    """A linear layer's, ready to fit."""
    import torch

    import fusedopt.torch as optim

    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(values(p.numel(), 3)).view_as(p))
    opt = optim.AdamW(model.parameters(), lr=0.1)
    callbacks = [optim.Callback()]
    return optim.Trainer(
        model, torch.nn.functional.mse_loss, opt, schedule=schedule, callbacks=callbacks, progress=False, **files
    )


def write_torch() -> None:
    import torch

    from fusedopt.torch_forms import Keep

    made = torch_optimizers()
    states = {label: opt.state_dict() for label, opt in {**made, "Offload": offload()}.items()}
    torch.save(states, "torch_states.pt")
    fitted = trainer(Cosine(0.1, 12), checkpoint="trainer.pt", log="log.csv")
    fitted.fit(batches(), epochs=2)
    torch.save(fitted, "trainer_object.pt")
    torch.save({"optimizers": made, "scheduler": scheduler(), "keep": Keep(torch.ones(1))}, "torch_objects.pt")


# ---- estimators


def data() -> tuple[Any, Any]:
    x = values(120, 5).reshape(40, 3).astype(np.float64)
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.int64)


def estimators() -> dict[str, Any]:
    """Each estimator, not yet fitted."""
    from fusedopt.estimators import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor

    common = {"hidden_layer_sizes": (4,), "batch_size": 10, "random_state": 0}
    return {
        "MLPClassifier": MLPClassifier(**common, max_iter=3, learning_rate=Cosine(0.1, 40), batch_norm=True),
        "MLPRegressor": MLPRegressor(**common, max_iter=3, solver="lion"),
        "LinearClassifier": LinearClassifier(max_iter=3, random_state=0),
        "LinearRegressor": LinearRegressor(max_iter=3, random_state=0, learning_rate="invscaling"),
    }


def network(epochs: int, checkpoint: str | None = None) -> Any:
    """A network whose fit resumes from a checkpoint if there is one."""
    from fusedopt.estimators import MLPClassifier

    return MLPClassifier((4,), batch_size=10, random_state=0, max_iter=epochs, tol=None, checkpoint=checkpoint)


def write_estimators() -> None:
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they stop early on purpose
        fitted = {name: one.fit(x, y) for name, one in estimators().items()}
        network(2, "network.ckpt").fit(x, y)
    answers = {name: one.predict(x) for name, one in fitted.items()}
    Path("estimators.pickle").write_bytes(pickle.dumps({"fitted": fitted, "answers": answers}, protocol=4))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    os.chdir(target)  # so that no file holds the path of a machine
    write_numpy()
    write_torch()
    write_estimators()
    for extra in ("log.csv", "trainer.pt.previous", "network.ckpt.previous"):
        Path(extra).unlink()
