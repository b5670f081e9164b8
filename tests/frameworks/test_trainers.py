"""Hugging Face's Trainer, Accelerate and Lightning: fusedopt's optimizers against torch's in the same program."""

import importlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import fusedopt.torch as optim  # noqa: E402
from fusedopt.torch._engine import engine_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::fusedopt.torch.FallbackWarning")]


class Net(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Maps ``x`` and ``labels`` to the loss, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(n: int = 64) -> list[dict[str, Any]]:
    make = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=make)
    labels = (x[:, :3] @ torch.randn(3, 3, generator=make)).argmax(1)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def need(package: str) -> Any:
    """Imports the package, or skips the test; ignores its warnings."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return pytest.skip(f"{package} is not installed")


def values(model: Any) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()]


def assert_near(mine: list[Any], theirs: list[Any], atol: float = 1e-5) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
    assert any(not torch.equal(a, b) for a, b in zip(mine, values(net()), strict=True)), "nothing was trained"


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(folder: Path, cls: Any, steps: int, resume: str | None = None, **arguments: Any) -> tuple[Any, Any]:
    transformers = need("transformers")
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": [], "save_steps": 4, "logging_steps": 100, "disable_tqdm": True, "lr_scheduler_type": "linear",
        "warmup_steps": 2, "max_grad_norm": 0.5, "seed": 3, **arguments,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model=net(),
        args=transformers.TrainingArguments(**arguments),
        train_dataset=data(),
        optimizer_cls_and_kwargs=(cls, {"lr": 0.01, "weight_decay": 0.1}),
    )
    trainer.train(resume_from_checkpoint=resume)
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return trainer, inner


@pytest.mark.integration(
    "Hugging Face Trainer", "`optimizer_cls_and_kwargs`, clipping, schedule", "transformers", "accelerate"
)
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_hugging_face_trainer(tmp_path: Path, arguments: dict[str, Any]) -> None:
    mine, opt = hugging_face(tmp_path / "a", optim.AdamW, 8, **arguments)
    assert type(opt) is optim.AdamW
    assert engine_of(opt).plan is not None
    theirs, _ = hugging_face(tmp_path / "b", torch.optim.AdamW, 8, **arguments)
    assert_near(values(mine.model), values(theirs.model), 1e-3 if arguments.get("bf16") else 1e-5)


@pytest.mark.integration(
    "Hugging Face Trainer", "resumes from its checkpoint, to the same values", "transformers", "accelerate"
)
def test_hugging_face_trainer_resumes(tmp_path: Path) -> None:
    whole, _ = hugging_face(tmp_path / "a", optim.AdamW, 8)
    again, opt = hugging_face(tmp_path / "b", optim.AdamW, 8, resume=str(tmp_path / "a" / "checkpoint-4"))
    assert {int(s["step"]) for s in opt.state.values()} == {8}
    for a, b in zip(values(whole.model), values(again.model), strict=True):
        assert torch.equal(a, b)


# -- Accelerate ------------------------------------------------------------------------------------------------------


def accelerated(cls: Any, precision: str, switch: bool = False) -> tuple[Any, Any, list[Any]]:
    accelerate = need("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = net()
    opt = cls(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    rates = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    model, opt, loader, rates = accelerator.prepare(model, opt, loader, rates)
    for i, batch in enumerate(loader):
        if switch and i == 4:
            assert optim.convert(opt) is opt
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            rates.step()
            opt.zero_grad()
    return model, opt, [rates.get_last_lr(), opt.step_was_skipped]


@pytest.mark.integration("Accelerate", "accumulation, clipping, a scheduler, bf16", "accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    mine, opt, said = accelerated(optim.AdamW, precision)
    assert type(opt.optimizer) is optim.AdamW
    assert engine_of(opt.optimizer).plan is not None
    theirs, _, other = accelerated(torch.optim.AdamW, precision)
    assert said == other
    assert_near(values(mine), values(theirs), 1e-5 if precision == "no" else 1e-3)


@pytest.mark.integration("Accelerate", "`convert()` of a prepared optimizer in the middle of a run", "accelerate")
def test_a_prepared_optimizer_can_be_converted() -> None:
    mine, opt, _ = accelerated(torch.optim.AdamW, "no", switch=True)
    assert type(opt.optimizer) is optim.AdamW
    assert engine_of(opt.optimizer).plan is not None
    theirs, _, _ = accelerated(torch.optim.AdamW, "no")
    assert_near(values(mine), values(theirs))


# -- Lightning -------------------------------------------------------------------------------------------------------


def lightning(folder: Path, cls: Any, **arguments: Any) -> tuple[Any, Any]:
    lightning = need("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            opt = cls(self.parameters(), lr=0.01)
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)]

    module = Module()
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=True, **arguments,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=8))
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer, module.net


@pytest.mark.integration("Lightning", "clipping, accumulation, bf16-mixed, a scheduler", "lightning")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_lightning(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer, mine = lightning(tmp_path / "a", optim.Adam, **arguments)
    (opt,) = trainer.optimizers
    assert type(opt) is optim.Adam
    assert engine_of(opt).plan is not None
    _, theirs = lightning(tmp_path / "b", torch.optim.Adam, **arguments)
    assert_near(values(mine), values(theirs), 1e-3 if "precision" in arguments else 1e-5)
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    torch.optim.Adam(net().parameters()).load_state_dict(saved)
