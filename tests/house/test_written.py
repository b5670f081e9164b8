"""Pickles and checkpoints of earlier versions load under the module names that they contain, and training resumes from
them bit-identically. tests/support/written.py writes them."""

import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import written
from form_cases import assert_same, kept
from fusedopt.schedules import Cosine

FOLDERS = sorted(Path(__file__).parent.glob("written_by_*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in the working directory of the test."""
    copy: Path = shutil.copytree(request.param, tmp_path / "files")
    monkeypatch.chdir(copy)
    return copy


def test_there_are_files() -> None:
    assert any(folder.name == "written_by_0.1.0" for folder in FOLDERS)


# ---- NumPy


def test_numpy_optimizers_load_and_go_on(folder: Path) -> None:
    found = pickle.loads((folder / "numpy.pickle").read_bytes())
    fresh = written.numpy_optimizers()
    assert len(found["optimizers"]) >= 13
    for label, opt in found["optimizers"].items():
        for steps in (0, 1):
            written.numpy_steps(opt, 2, steps)
            written.numpy_steps(fresh[label], 2, steps)
            assert type(opt) is type(fresh[label])
            assert_same(kept(opt), kept(fresh[label]), label)


def test_numpy_state_dicts_load_and_go_on(folder: Path) -> None:
    found = pickle.loads((folder / "numpy.pickle").read_bytes())["state_dicts"]
    for label, want in written.numpy_optimizers().items():
        if label not in found:
            continue
        params = [p.copy() for p in want.param_groups[0]["params"]]
        options = written.CASES[label][2] if label in written.CASES else {"lr": Cosine(0.1, 10)}
        opt = type(want)(params, **options)
        opt.load_state_dict(found[label])
        for one in (opt, want):
            written.numpy_steps(one, 2, 1)
        assert_same(kept(opt), kept(want), label)


# ---- torch


def load(path: Path, weights_only: bool) -> Any:
    return pytest.importorskip("torch").load(path, weights_only=weights_only)


def assert_same_tensors(got: Any, want: Any) -> None:
    """Parameters and state of two optimizers, bit for bit."""
    from torch_compare import assert_same_bits, snapshot

    assert_same_bits(snapshot(got), snapshot(want))


def test_torch_optimizers_load_and_go_on(folder: Path) -> None:
    found = load(folder / "torch_objects.pt", weights_only=False)["optimizers"]
    fresh = written.torch_optimizers()
    assert len(found) >= 15
    for label, opt in found.items():
        for steps in (0, 1):
            written.torch_steps(opt, 2, steps)
            written.torch_steps(fresh[label], 2, steps)
            assert type(opt) is type(fresh[label])
            assert_same_tensors(opt, fresh[label])


def test_torch_state_dicts_load_and_go_on(folder: Path) -> None:
    found = load(folder / "torch_states.pt", weights_only=True)
    fresh = written.torch_optimizers()
    for label, (name, _, options) in written.CASES.items():
        if label not in found:
            continue
        import fusedopt.torch as optim

        want = fresh[label]
        params = [p.detach().clone().requires_grad_() for p in want.param_groups[0]["params"]]
        opt = getattr(optim, name)(params, **options)
        opt.load_state_dict(found[label])
        for one in (opt, want):
            written.torch_steps(one, 2, 1)
        assert_same_tensors(opt, want)


def test_the_state_of_an_offloaded_optimizer_loads_and_goes_on(folder: Path) -> None:
    found, want = load(folder / "torch_states.pt", weights_only=True)["Offload"], written.offload()
    import fusedopt.torch as optim

    params = [p.detach().clone().requires_grad_() for p in want.param_groups[0]["params"]]
    opt = optim.Offload(params, optim.AdamW, lr=0.01)
    opt.load_state_dict(found)
    for one in (opt, want):
        written.torch_steps(one, 2, 1)
    assert_same_tensors(opt, want)
    assert_same_tensors(opt.inner, want.inner)


def test_a_scheduler_loads_and_goes_on(folder: Path) -> None:
    found, fresh = load(folder / "torch_objects.pt", weights_only=False)["scheduler"], written.scheduler()
    for one in (found, fresh):
        written.torch_steps(one.optimizer, 2, 1)
        one.step()
    assert found.get_last_lr() == fresh.get_last_lr() == [Cosine(0.1, 10)(3)]
    assert_same_tensors(found.optimizer, fresh.optimizer)


def test_the_wrapper_of_a_state_tensor_loads(folder: Path) -> None:
    assert load(folder / "torch_objects.pt", weights_only=False)["keep"].tensor.tolist() == [1.0]


def trained(epochs: int, **how: Any) -> Any:
    return written.trainer(Cosine(0.1, 12), **how).fit(written.batches(), epochs=epochs, resume=bool(how))


def assert_close(got: Any, want: Any) -> None:
    import torch

    for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_training_goes_on_from_its_checkpoint(folder: Path) -> None:
    pytest.importorskip("torch")
    resumed, whole = trained(4, checkpoint="trainer.pt"), trained(4)
    assert [row["step"] for row in resumed.rows] == [3, 6, 9, 12]
    assert_close(resumed, whole)
    np.testing.assert_allclose([r["loss"] for r in resumed.rows], [r["loss"] for r in whole.rows], rtol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="a path in it is one of POSIX")
def test_a_trainer_loads_and_goes_on(folder: Path) -> None:
    found = load(folder / "trainer_object.pt", weights_only=False)
    assert_close(found, trained(2))
    assert_close(found.fit(written.batches(), epochs=4), trained(4))
    assert len((folder / "log.csv").read_text().splitlines()) == 5


# ---- estimators


def test_estimators_load_answer_as_before_and_go_on(folder: Path) -> None:
    pytest.importorskip("sklearn")
    x, y = written.data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, if its version differs from the writer's
        found = pickle.loads((folder / "estimators.pickle").read_bytes())
        fresh = {name: one.fit(x, y) for name, one in written.estimators().items()}
    assert len(found["fitted"]) == 4
    for name, one in found["fitted"].items():
        np.testing.assert_allclose(one.predict(x), found["answers"][name], rtol=1e-6, err_msg=name)
        want = fresh[name].partial_fit(x, y)
        np.testing.assert_allclose(one.partial_fit(x, y).predict(x), want.predict(x), rtol=1e-6, err_msg=name)


def test_a_fit_goes_on_from_its_checkpoint(folder: Path) -> None:
    pytest.importorskip("sklearn")
    x, y = written.data()
    resumed, whole = written.network(5, "network.ckpt").fit(x, y), written.network(5).fit(x, y)
    assert resumed.n_iter_ == whole.n_iter_ == 5
    np.testing.assert_allclose(resumed.predict_proba(x), whole.predict_proba(x), rtol=1e-6)
