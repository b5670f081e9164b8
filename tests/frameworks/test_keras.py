"""`fusedopt.keras`: Keras's `fit`, saving and options with fusedopt's kernels."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend", allow_module_level=True)
    import fusedopt.keras as ours

import fusedopt.torch as optim  # noqa: E402
from fusedopt.rules import RULES  # noqa: E402
from fusedopt.torch._engine import engine_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::fusedopt.torch.FallbackWarning")]
NAMES = ours.__all__


def network(inputs: int = 784, seed: int = 0) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def digits(n: int = 512, inputs: int = 784) -> tuple[Any, Any]:
    """Clusters in the shape of flattened 28x28 images."""
    rng = np.random.default_rng(0)
    centres = rng.random((10, inputs)).astype("float32")
    y = rng.integers(10, size=n)
    x = np.clip(centres[y] + rng.normal(0, 0.3, (n, inputs)), 0, 1) - 0.5
    return x.astype("float32"), y


def compiled(opt: Any, inputs: int = 784) -> Any:
    model = network(inputs)
    model.compile(optimizer=opt, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.integration("Keras 3", "`fit` of a 784-10-10 network learns, with every class", "keras")
@pytest.mark.parametrize("name", NAMES)
def test_the_784_10_10_network_learns(name: str) -> None:
    x, y = digits()
    rates = {"SGD": 0.05, "Adadelta": 1.0, "Lion": 1e-3, "Adagrad": 0.05}
    opt = getattr(ours, name)(learning_rate=rates.get(name, 0.01))
    model = compiled(opt)
    model.fit(x, y, batch_size=32, epochs=4, verbose=0)
    assert model.evaluate(x, y, verbose=0)[1] > 0.8
    assert engine_of(opt._inner).plan is not None
    assert not engine_of(opt._inner).fallback.places
    assert int(opt.iterations) == 64


@pytest.mark.integration("Keras 3", "the values of `fusedopt.torch` with the same gradients, every class", "keras")
@pytest.mark.parametrize("name", NAMES)
def test_the_update_is_the_rules(name: str) -> None:
    opt = getattr(ours, name)(learning_rate=2**-7, weight_decay=0.1 if getattr(ours, name)._rule.decoupled else None)
    variables = [keras.Variable(np.linspace(-1, 1, n, dtype="float32")) for n in (3, 70)]
    params = [torch.nn.Parameter(v.value.detach().clone()) for v in variables]
    options = opt._options() | ({"weight_decay": 0.1} if opt._decays else {})
    if name == "Adagrad":
        assert options["initial_accumulator_value"] == 0.1
    want = getattr(optim, opt._rule.name)(params, lr=2**-7, **options)
    for step in range(4):
        grads = [torch.sin(torch.arange(v.shape[0]) + step) for v in variables]
        opt.apply([g.clone() for g in grads], variables)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        want.step()
    for v, p in zip(variables, params, strict=True):
        assert torch.equal(v.value, p)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "Lion"])
def test_where_keras_has_the_same_equation_its_values_come_out(name: str) -> None:
    """Gradients are large compared with epsilon."""
    results = []
    for module in (ours, keras.optimizers):
        opt = getattr(module, name)(learning_rate=0.01)
        v = keras.Variable(np.linspace(-1, 1, 50, dtype="float32"))
        for step in range(5):
            opt.apply([3 + torch.sin(torch.arange(50.0) + step)], [v])
        results.append(v.value.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)


@pytest.mark.integration("Keras 3", "saving and loading in the middle: the bits of one run", "keras")
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    x, y = digits(128, 20)
    model = compiled(getattr(ours, name)(learning_rate=0.01), 20)
    model.fit(x, y, epochs=1, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is getattr(ours, name)
    for m in (model, again):
        m.fit(x, y, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.integration("Keras 3", "schedules, clipping, accumulation, moving averages, exclusion from decay", "keras")
def test_keras_own_options_work() -> None:
    x, y = digits(128, 20)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    for more in (
        {"global_clipnorm": 0.1},
        {"gradient_accumulation_steps": 2},
        {"use_ema": True},
        {"weight_decay": 0.1},
    ):
        runs = []
        for module in (ours, keras.optimizers):
            opt = module.AdamW(learning_rate=schedule, **more)
            opt.exclude_from_weight_decay(var_names=["bias"])
            model = compiled(opt, 20)
            model.fit(x, y, epochs=2, shuffle=False, verbose=0)
            runs.append(model.get_weights())
        for a, b in zip(*runs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)


def test_config_round_trip_and_signature() -> None:
    for name in NAMES:
        opt = getattr(ours, name)(learning_rate=0.02, name="mine")
        config = opt.get_config()
        again = getattr(ours, name).from_config(config)
        assert again.get_config() == config
    theirs = {k: v for k, v in keras.optimizers.Adam(0.1).get_config().items() if k != "name"}
    mine = {k: v for k, v in ours.Adam(0.1).get_config().items() if k != "name"}
    assert mine == pytest.approx(theirs)
    assert {rule.name for rule in RULES.values()} == {getattr(ours, n)._rule.name for n in NAMES}


def test_bad_options_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="betas"):
        ours.Adam(beta_1=1.5)
    with pytest.raises(TypeError):
        ours.Adam(no_such=1)
